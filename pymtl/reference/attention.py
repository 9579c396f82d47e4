"""Attention of queries over the tokens of sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    batch_sizes: Tensor,
    heads: int = 1,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`pymtl.ops.attend` computes; on any device. Sequences are padded, and so are the queries of each."""
    count, steps = query.shape[0], batch_sizes.shape[0]
    batch = int(batch_sizes[0]) if steps > 0 else 0
    if count == 0 or batch == 0:
        if count > 0:
            raise IndexError("sequences: expected queries of none, since there is no sequence")
        return value[:0] + 0 * query.sum(), query.new_zeros(0, heads, steps)
    device = query.device
    rows = torch.arange(batch).unsqueeze(1)
    valid = (rows < batch_sizes).to(device)  # [B, T]
    places = torch.where(rows < batch_sizes, (batch_sizes.cumsum(0) - batch_sizes) + rows, 0).to(device)
    # Of each query its place among those of its sequence.
    order = sequences.argsort(stable=True)
    counts = torch.bincount(sequences, minlength=batch)
    inside = torch.arange(count, device=device) - (counts.cumsum(0) - counts)[sequences[order]]
    column = torch.empty_like(order).scatter(0, order, inside)
    most = int(counts.max())
    padded = query.new_zeros(batch * most, query.shape[1]).index_copy(0, sequences * most + column, query)
    # [B, J, ..., D / J] of each.
    q = padded.view(batch, most, heads, -1).transpose(1, 2)
    k, v = (
        each.index_select(0, places.flatten()).view(batch, steps, heads, -1).transpose(1, 2) for each in (key, value)
    )
    if score is None:
        scores = q @ k.transpose(2, 3)
    else:
        weights = score.view(heads, 1, -1, 1)
        scores = (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ weights.unsqueeze(0)).squeeze(-1)
    weights = scores.masked_fill(~valid.view(batch, 1, 1, steps), -torch.inf).softmax(-1)
    context = (weights @ v).transpose(1, 2).reshape(batch * most, -1)
    chosen = sequences * most + column
    weights = weights.transpose(1, 2).reshape(batch * most, heads, steps)
    return context.index_select(0, chosen), weights.index_select(0, chosen)
