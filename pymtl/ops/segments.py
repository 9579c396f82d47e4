"""Sequences that begin anew inside a padded batch, as sequences of their own in the packed layout: wrapper and fake
kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The index work of a padded batch of B sequences that resets cut into S segments.

    ``batch_sizes`` int64 [T], the number of segments with a token at each of their steps, ending in zeros; ``tokens``
    int64 [N], the place of each packed token in the flattened padded batch; ``first``, ``last`` int64 [B], the packed
    segment that each sequence begins and ends with; ``sequences`` int64 [S], the sequence of each packed segment.
    """

    batch_sizes: Tensor
    tokens: Tensor
    first: Tensor
    last: Tensor
    sequences: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """The tokens [N, ...] of a padded batch."""
        return padded.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """The padded batch [rows, columns, ...] of packed tokens [N, ...], zeros at padding."""
        padded = packed.new_zeros(rows * columns, *packed.shape[1:])
        return padded.index_copy(0, self.tokens, packed).unflatten(0, (rows, columns))

    def initial(self, state: Tensor | None, reverse: Sequence[bool]) -> Tensor | None:
        """The initial states [L*D, S, ...] of the segments, from those of the sequences [L*D, B, ...]: each direction's
        is that of the segment it reads first, and zero for the others. ``reverse``: D flags, of each direction."""
        if state is None:
            return None
        parts = state.unflatten(0, (-1, len(reverse))).unbind(1)
        zeros = parts[0].new_zeros(parts[0].shape[0], self.sequences.shape[0], state.shape[2])
        begun = [
            zeros.index_copy(1, self.last if backwards else self.first, part) for part, backwards in zip(parts, reverse)
        ]
        return torch.stack(begun, 1).flatten(0, 1)

    def final(self, state: Tensor, reverse: Sequence[bool]) -> Tensor:
        """The last states [L*D, B, ...] of the sequences, from those of the segments [L*D, S, ...]: each direction's
        is that of the segment it reads last."""
        parts = state.unflatten(0, (-1, len(reverse))).unbind(1)
        ended = [
            part.index_select(1, self.first if backwards else self.last) for part, backwards in zip(parts, reverse)
        ]
        return torch.stack(ended, 1).flatten(0, 1)


def segment_order(
    resets: Tensor, lengths: Tensor | None, batch_first: bool, device: torch.device | None = None
) -> Segments:
    """Cuts the sequences of a padded batch before each step with a reset, and sorts the pieces by length.

    Args:
        resets: bool [T, B] ([B, T] if ``batch_first``); whether a sequence begins anew at a step. On a GPU they are
            waited for.
        lengths: int64 [B] of the sequences, each from 1 to T; all are T long if None. Resets in padding count nothing.
        batch_first: of the batch, and of ``resets``.
        device: of the batch, where the indices go; by default the CPU, where the sizes stay.

    Raises:
        RuntimeError: a length is out of range.
    """
    found = torch.ops.pymtl.segment_order(resets.cpu(), None if lengths is None else lengths.cpu(), batch_first)
    batch_sizes, *indices = found
    if device is not None:
        indices = [each.to(device, non_blocking=True) for each in indices]
    return Segments(batch_sizes, *indices)


@torch.library.register_fake("pymtl::segment_order")
def _segment_order_fake(resets: Tensor, lengths: Tensor | None, batch_first: bool) -> tuple[Tensor, ...]:
    batch, steps = resets.shape if batch_first else (resets.shape[1], resets.shape[0])
    context = torch.library.get_ctx()
    tokens = batch * steps if lengths is None else context.new_dynamic_size()
    sizes = (steps, tokens, batch, batch, context.new_dynamic_size())
    return tuple(resets.new_empty(size, dtype=torch.int64) for size in sizes)
