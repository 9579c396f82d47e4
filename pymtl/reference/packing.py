"""Packing and unpacking by indices."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(padded: Tensor, batch_sizes: Tensor, sorted_indices: Tensor, batch_first: bool = False) -> Tensor:
    """The tokens of a padded batch; see :func:`pymtl.ops.pack`."""
    steps, rows = _places(batch_sizes, sorted_indices)
    return padded[rows, steps] if batch_first else padded[steps, rows]


def unpack(packed: Tensor, batch_sizes: Tensor, sorted_indices: Tensor, batch_first: bool = False) -> Tensor:
    """The padded batch of packed tokens; see :func:`pymtl.ops.unpack`."""
    places = _places(batch_sizes, sorted_indices)
    padded = packed.new_zeros(batch_sizes.shape[0], sorted_indices.shape[0], *packed.shape[1:])
    padded = padded.index_put(places, packed)
    return padded.transpose(0, 1) if batch_first else padded


def _places(batch_sizes: Tensor, sorted_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Step and row, in the padded batch, of each packed token."""
    steps = torch.arange(batch_sizes.shape[0]).repeat_interleave(batch_sizes)
    rank = torch.arange(steps.shape[0]) - (batch_sizes.cumsum(0) - batch_sizes)[steps]
    return steps, sorted_indices[rank]
