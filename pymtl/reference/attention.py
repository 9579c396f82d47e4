"""Attention of queries over the tokens of sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_of(sequences: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The packed tokens of sequences int64 [M], and which of them there are: int64 and bool [M, T]. Where there is
    none, the token is 0."""
    starts = (batch_sizes.cumsum(0) - batch_sizes).to(sequences.device)
    rows = sequences.unsqueeze(1)
    valid = rows < batch_sizes.to(sequences.device)
    return torch.where(valid, starts + rows, 0), valid


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    batch_sizes: Tensor,
    heads: int = 1,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`pymtl.ops.attend` computes; on any device."""
    places, valid = tokens_of(sequences, batch_sizes)
    # [M, 1, J, D / J] and [M, T, J, ...]
    q = query.unflatten(1, (heads, -1)).unsqueeze(1)
    k, v = (each[places].unflatten(2, (heads, -1)) for each in (key, value))
    terms = q * k if score is None else torch.tanh(q + k) * score.unflatten(0, (heads, -1))
    weights = terms.sum(-1).masked_fill(~valid.unsqueeze(-1), -torch.inf).softmax(1)
    context = (weights.unsqueeze(-1) * v).sum(1).flatten(1)
    return context, weights.transpose(1, 2)
