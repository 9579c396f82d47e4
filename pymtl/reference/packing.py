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


def segment_order(
    resets: Tensor, lengths: Tensor | None = None, batch_first: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The index work of sequences that begin anew; see :class:`pymtl.ops.Segments`."""
    starts = (resets if batch_first else resets.t()).clone(memory_format=torch.contiguous_format)
    batch, steps = starts.shape
    valid = torch.ones_like(starts) if lengths is None else torch.arange(steps) < lengths.unsqueeze(1)
    starts[:, 0] = True
    starts &= valid
    places, begins = valid.flatten().nonzero().squeeze(1), starts.flatten().nonzero().squeeze(1)
    segments = (starts.flatten().cumsum(0) - 1)[places]  # of each token
    order = torch.bincount(segments, minlength=len(begins)).argsort(stable=True, descending=True)
    ranks = order.argsort()
    step = places - begins[segments]
    batch_sizes = torch.bincount(step, minlength=steps)
    packed = (batch_sizes.cumsum(0) - batch_sizes)[step] + ranks[segments]
    tokens = torch.empty_like(places)
    tokens[packed] = places if batch_first else places % steps * batch + places // steps
    ends = starts.sum(1).cumsum(0)
    begun = torch.cat([ends.new_zeros(1), ends])[:-1]
    return batch_sizes, tokens, ranks[begun], ranks[ends - 1], (begins // steps)[order]
