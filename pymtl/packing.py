"""Packed batches: the one layout inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops


def as_lengths(lengths: Tensor | Sequence[int], batch: int, device: torch.device | None = None) -> Tensor:
    """``lengths`` as an int64 tensor [B], which the ops take. :func:`pymtl.ops.packing_order` checks their values.

    Args:
        lengths: a tensor, or what makes an int64 tensor on the CPU.
        batch: B.
        device: a tensor may be on this device or on the CPU; on the CPU only if None.

    Raises:
        RuntimeError: a tensor is not one-dimensional, not int64 or on another device; or there are not B lengths.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    placed = lengths.device.type == "cpu" or lengths.device == device
    if lengths.dim() != 1 or not placed or lengths.dtype != torch.int64:
        where = "CPU" if device is None or device.type == "cpu" else f"CPU or {device}"
        got = f"{lengths.dim()}D {lengths.device} {lengths.dtype}"
        raise RuntimeError(f"lengths: expected a 1D {where} int64 tensor, got a {got} tensor")
    if lengths.shape[0] != batch:
        raise RuntimeError(
            f"lengths: expected {batch} lengths, one for each sequence, got {lengths.shape[0]} (sequences are the "
            "input's first dimension with batch_first=True, the second without)"
        )
    return lengths


def turned_around(batch_sizes: Tensor) -> Tensor:
    """For each packed token the place of the one whose place it takes when every sequence is turned around, int64 [N].

    Args:
        batch_sizes: int64 [T] on the CPU, as in PackedSequence.
    """
    starts = batch_sizes.cumsum(0) - batch_sizes
    steps = torch.arange(batch_sizes.shape[0]).repeat_interleave(batch_sizes)
    sequences = torch.arange(steps.shape[0]) - starts[steps]
    lengths = torch.searchsorted(-batch_sizes, -sequences)  # of each token's sequence: the steps with more sequences
    return starts[lengths - 1 - steps] + sequences


def pack(padded: Tensor, lengths: Tensor | Sequence[int], *, batch_first: bool = False) -> PackedSequence:
    """:func:`torch.nn.utils.rnn.pack_padded_sequence` for sequences in any order, of any dtype.

    Args:
        padded: [T, B, ...], or [B, T, ...] if ``batch_first``.
        lengths: int64 [B] or integers, each from 1 to T; those on a GPU are waited for.
    """
    batch, steps = padded.shape[:2] if batch_first else (padded.shape[1], padded.shape[0])
    order = ops.packing_order(as_lengths(lengths, batch, padded.device).cpu(), steps, padded.device)
    data = ops.pack(padded, order, batch_first=batch_first)
    longest = int((order.batch_sizes > 0).sum())
    return PackedSequence(data, order.batch_sizes[:longest], order.sorted_indices, order.unsorted_indices)


def same_packing(a: PackedSequence, b: PackedSequence) -> bool:
    """Whether two packed batches hold sequences of the same lengths in the same order."""
    if not _same(a.batch_sizes, b.batch_sizes):
        return False
    return a.sorted_indices is None or b.sorted_indices is None or _same(a.sorted_indices, b.sorted_indices)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)
