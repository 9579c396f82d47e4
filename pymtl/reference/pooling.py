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


def attention(states: Tensor, valid: Tensor, weight: Tensor, query: Tensor) -> Tensor:
    """What :class:`pymtl.AttentionPooling` computes, of padded states [B, T, F] whose tokens are ``valid`` [B, T]."""
    scores = torch.tanh(states @ weight.t()) @ query.t()
    weights = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf).softmax(1)
    slices = states.unflatten(-1, (query.shape[0], -1))
    return (weights.unsqueeze(-1) * slices).sum(1).flatten(1)
