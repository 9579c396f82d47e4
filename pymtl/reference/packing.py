"""Packing and unpacking by indices."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(padded: Tensor, batch_sizes: Tensor, sorted_indices: Tensor, batch_first: bool = False) -> Tensor:
    """The tokens of a padded batch; see :func:`pymtl.ops.pack`."""
    steps, rows = _places(batch_sizes, sorted_indices)
    packed = padded[rows, steps] if batch_first else padded[steps, rows]
    if batch_sizes.is_cuda:  # as many rows as where nobody looks at the sizes
        packed = torch.cat(
            [packed, packed.new_zeros(padded.shape[0] * padded.shape[1] - len(packed), *packed.shape[1:])]
        )
    return packed


def unpack(packed: Tensor, batch_sizes: Tensor, sorted_indices: Tensor, batch_first: bool = False) -> Tensor:
    """The padded batch of packed tokens; see :func:`pymtl.ops.unpack`."""
    places = _places(batch_sizes, sorted_indices)
    padded = packed.new_zeros(batch_sizes.shape[0], sorted_indices.shape[0], *packed.shape[1:])
    padded = padded.index_put(places, packed[: len(places[0])])
    return padded.transpose(0, 1) if batch_first else padded


def _places(batch_sizes: Tensor, sorted_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Step and row, in the padded batch, of each packed token."""
    device = batch_sizes.device
    steps = torch.arange(batch_sizes.shape[0], device=device).repeat_interleave(batch_sizes)
    rank = torch.arange(steps.shape[0], device=device) - (batch_sizes.cumsum(0) - batch_sizes)[steps]
    return steps, sorted_indices[rank]
