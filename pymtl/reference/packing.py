"""Packing and unpacking by torch.nn.utils.rnn."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def pack(padded: Tensor, lengths: Tensor, batch_first: bool = False) -> PackedSequence:
    """The tokens of a padded batch; see :func:`pymtl.ops.pack`."""
    return pack_padded_sequence(padded, lengths, batch_first=batch_first, enforce_sorted=False)


def unpack(packed: PackedSequence, steps: int, batch_first: bool = False) -> Tensor:
    """The padded batch of packed tokens; see :func:`pymtl.ops.unpack`."""
    return pad_packed_sequence(packed, batch_first=batch_first, total_length=steps)[0]
