"""Prepacked weights kept from call to call, for who asks for them."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from pymtl.recurrent.base import Recurrent

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Packs the weights of every :class:`pymtl.LSTM`, ``GRU`` and ``RNN`` inside once, which each call does otherwise.

    For inference with weights that stay as they are: calls that want gradients do not use the snapshot, nor do
    calls whose parameters are not the very objects, versions and memory that it was made from. ``train()``,
    ``to()`` and its kin, ``load_state_dict`` and :func:`unfreeze` drop it; pickling and deepcopy leave it out.
    What no one can see, such as ``weight.data.mul_()``, it does not see either.

    Returns:
        ``module``. A module without any such layer gives a warning.

    Raises:
        RuntimeError: one of them is in training mode.
    """
    layers = [child for child in module.modules() if isinstance(child, Recurrent)]
    if not layers:
        warnings.warn(
            f"freeze found no pymtl.LSTM, GRU or RNN inside {type(module).__name__}: nothing is packed "
            "(pymtl.convert makes them of torch's)",
            stacklevel=2,
        )
    for layer in layers:
        Recurrent.freeze(layer)  # a converted subclass may have a method of its own by that name
    return module


def unfreeze(module: Module) -> Module:
    """Drops what :func:`freeze` made. Returns ``module``."""
    for child in module.modules():
        if isinstance(child, Recurrent):
            Recurrent.unfreeze(child)
    return module
