"""Pooling over the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pool(input: Tensor, batch_sizes: Tensor | None, kind: str, *, reverse: Sequence[bool] = (False,)) -> Tensor:
    """What :func:`pymtl.ops.pool` computes; ``reverse`` only orders a sum and is ignored here."""
    steps = list(input) if batch_sizes is None else list(input.split([int(s) for s in batch_sizes]))
    if steps[0].shape[0] == 0:
        return input.new_zeros(0, input.shape[-1])
    pooled = []
    for row in range(steps[0].shape[0]):
        sequence = torch.stack([step[row] for step in steps if step.shape[0] > row])
        pooled.append(sequence.mean(0) if kind == "mean" else sequence.amax(0))
    return torch.stack(pooled)


def attention_pool(input: Tensor, scores: Tensor, batch_sizes: Tensor, batch: int | None = None) -> Tensor:
    """What :func:`pymtl.ops.attention_pool` computes; on any device. ``batch``: B, which a tracer cannot read from
    ``batch_sizes``."""
    rows = sequences_of(batch_sizes, input.shape[0]).to(input.device, non_blocking=True)
    index = rows.unsqueeze(1).expand_as(scores)
    heads = scores.shape[1]
    if batch is None:
        batch = int(batch_sizes[0]) if len(batch_sizes) > 0 else 0
    largest = scores.detach().new_full((batch, heads), -torch.inf)
    largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = torch.exp(scores - largest[rows])
    weights = weights / torch.zeros_like(largest).scatter_add(0, index, weights)[rows]
    parts = input.unflatten(1, (heads, -1)) * weights.unsqueeze(-1)
    return input.new_zeros(batch, input.shape[1]).index_add(0, rows, parts.flatten(1))


def sequences_of(batch_sizes: Tensor, tokens: int) -> Tensor:
    """The sequence of each of N packed tokens, int64 [N]."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    return torch.arange(tokens) - starts.repeat_interleave(batch_sizes, output_size=tokens)


def attention(states: Tensor, valid: Tensor, weight: Tensor, query: Tensor) -> Tensor:
    """What :class:`pymtl.AttentionPooling` computes, of padded states [B, T, F] whose tokens are ``valid`` [B, T]."""
    scores = torch.tanh(states @ weight.t()) @ query.t()
    weights = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf).softmax(1)
    slices = states.unflatten(-1, (query.shape[0], -1))
    return (weights.unsqueeze(-1) * slices).sum(1).flatten(1)
