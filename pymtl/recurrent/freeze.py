"""Prepacked weights kept from call to call, for who asks for them."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import nn

from pymtl.recurrent.base import Recurrent
from pymtl.recurrent.snapshot import Snapshot

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module, weights: torch.dtype | None = None) -> Module:
    """Packs the weights of every :class:`pymtl.LSTM`, ``GRU`` and ``RNN`` inside once, which each call does otherwise.

    For inference with weights that stay as they are: calls that want gradients do not use the snapshot, nor do
    calls whose parameters are not the very objects, versions and memory that it was made from, nor calls under
    autocast or in a transform of torch.func. ``train()``, ``to()`` and its kin, ``load_state_dict`` and
    :func:`unfreeze` drop it; pickling and deepcopy leave it out. What no one can see, such as ``weight.data.mul_()``,
    it does not see either.

    Args:
        weights: what the snapshot's matrices are kept in; the parameters stay as they are, beside it. None: their own
            dtype. ``torch.int8``: 8-bit integers with a scale for each row (:func:`pymtl.reference.int8_weight`), times
            inputs and states made 8-bit integers at each step; biases, gates and c stay float32, and the results are
            those of :mod:`pymtl.reference` with such weights. ``torch.bfloat16``: rounded, with the same sums in
            float32. Both for layers of float32 on the CPU, of at most 65,536 columns in 8-bit integers.

    Returns:
        ``module``. A module without any such layer gives a warning.

    Raises:
        RuntimeError: one of them is in training mode, or, with ``weights`` of another dtype than its own, is not one
            of float32 that the CPU's kernels run, or computes its weights anew at each call.
        ValueError: ``weights`` is no such dtype, or a weight does not fit it: one that is not finite, or has too many
            columns, for 8-bit integers; one that bfloat16 would round to infinity.

        If it raises, nothing has changed.
    """
    layers = {name: child for name, child in module.named_modules() if isinstance(child, Recurrent)}
    if not layers:
        warnings.warn(
            f"freeze found no pymtl.LSTM, GRU or RNN inside {type(module).__name__}: nothing is packed "
            "(pymtl.convert makes them of torch's)",
            stacklevel=2,
        )
    # A converted subclass may have methods of its own by the plain names. All are made before any is kept.
    for layer, snapshot in [(layer, _snapshot(name, layer, weights)) for name, layer in layers.items()]:
        Recurrent._pymtl_snapshot_with(layer, snapshot)
    return module


def _snapshot(name: str, layer: Recurrent, weights: torch.dtype | None) -> Snapshot | None:
    try:
        return Recurrent._pymtl_snapshot_of(layer, weights)
    except (RuntimeError, ValueError) as error:
        if name:
            raise type(error)(f"{name}: {error}") from None
        raise


def unfreeze(module: Module) -> Module:
    """Drops what :func:`freeze` made. Returns ``module``."""
    for child in module.modules():
        if isinstance(child, Recurrent):
            Recurrent.unfreeze(child)
    return module


def frozen_bytes(module: nn.Module) -> int:
    """The memory that :func:`freeze`'s snapshots inside ``module`` take, in bytes, besides the parameters."""
    snapshots = (child._snapshot for child in module.modules() if isinstance(child, Recurrent))
    return sum(snapshot.bytes() for snapshot in snapshots if snapshot is not None)
