"""Convolutions over the characters of words, and their maxima."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def char_cnn(words: Tensor, table: Tensor, widths: Sequence[int]) -> Tensor:
    """What :func:`pymtl.ops.char_cnn` computes; but places with the same value share the gradient."""
    places = torch.arange(words.shape[1], device=words.device)
    outside = (places >= (words != 0).sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)
    values = [filtered.masked_fill(outside, -torch.inf).amax(1) for filtered in _filtered(words, table, widths)]
    return torch.cat(values, dim=1)


def char_cnn_at(words: Tensor, table: Tensor, widths: Sequence[int], places: Tensor) -> Tensor:
    """The filters' values at given ``places`` [N, D*F] instead of the maxima."""
    values = torch.cat(_filtered(words, table, widths), dim=2)
    return values.gather(1, places.unsqueeze(1)).squeeze(1)


def _filtered(words: Tensor, table: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """For each width the filters [N, W, F] at each place."""
    filters = table.shape[1] // sum(widths)
    found = []
    parts = table.split([width * filters for width in widths], dim=1)
    for width, part in zip(widths, parts):
        entries = F.embedding(words, part).unflatten(2, (width, filters))  # [N, W, K, F]
        half = width // 2
        padded = F.pad(entries, (0, 0, 0, 0, half, half))
        found.append(sum(padded[:, k : k + words.shape[1], k] for k in range(width)))
    return found
