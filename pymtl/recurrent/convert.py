"""Every nn.LSTM, nn.GRU and nn.RNN inside an existing model becomes pymtl's, and back."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from pymtl.recurrent.base import Recurrent
from pymtl.recurrent.gru import GRU
from pymtl.recurrent.lstm import LSTM
from pymtl.recurrent.rnn import RNN

Module = TypeVar("Module", bound=nn.Module)

_FAST: dict[type[nn.RNNBase], type[Recurrent]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}

# What the forward pass asks torch's modules, and not ours.
_CHECKS = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


def convert(module: Module, inplace: bool = False) -> Module:
    """Makes every :class:`torch.nn.LSTM`, :class:`torch.nn.GRU` and :class:`torch.nn.RNN` inside ``module`` (or
    ``module`` itself) a :class:`pymtl.LSTM`, :class:`pymtl.GRU` or :class:`pymtl.RNN`.

    Every Parameter and buffer stays the very same object, so optimizers go on working; hooks, training flags
    and sharing of modules stay. Subclasses convert too, parametrised ones among them; a ``forward`` of their own
    reaches the kernels by ``super().forward(...)``. Those that override a check which torch's forward pass makes are
    left alone, with a warning that names them.

    Without ``inplace`` the module given stays as it is: use what is returned, ``model = pymtl.convert(model)``.
    :func:`pymtl.describe` shows who runs each layer of either.

    Args:
        module: any module. One without any such layer gives a warning.
        inplace: change ``module`` itself; otherwise a copy of the module tree is made that shares its tensors.

    Returns:
        The converted module: ``module`` if ``inplace``.

    Raises:
        TypeError: ``module`` is no nn.Module.
        RuntimeError: it holds something that cannot be copied, and ``inplace`` is False.
    """
    check_module(module)
    module = module if inplace else _copy_sharing_tensors(module)
    left_alone, found = [], False
    for name, child in module.named_modules():
        found = found or isinstance(child, (Recurrent, *_FAST))
        if not isinstance(child, tuple(_FAST)) or isinstance(child, Recurrent):
            continue
        if own_checks(child):
            left_alone.append(f"{name or 'the module itself'} ({type(child).__name__})")
            continue
        child.__class__ = _fast_class(type(child))
    if not found:
        warnings.warn(
            f"convert found no nn.LSTM, nn.GRU or nn.RNN inside {type(module).__name__}: nothing is changed",
            stacklevel=2,
        )
    if left_alone:
        warnings.warn(
            "convert left alone what overrides the checks of its base's forward pass: " + ", ".join(left_alone),
            stacklevel=2,
        )
    return module


def check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"module: expected an nn.Module, got {got}")


def own_checks(module: nn.RNNBase) -> list[str]:
    """The methods by which a subclass changes what torch's forward pass asks, and ours does not."""
    original = next((cls for cls in type(module).__mro__ if cls in _FAST), nn.RNNBase)
    return [name for name in _CHECKS if getattr(type(module), name, None) is not getattr(original, name, None)]


def revert(module: Module, inplace: bool = False) -> Module:
    """Undoes :func:`convert`: every :class:`pymtl.LSTM`, ``GRU`` and ``RNN`` inside becomes torch's again.

    Left alone, with a warning that names them, are subclasses written by hand, modules with options that torch's have
    not, and those inside a :class:`pymtl.MultiTaskModel` or another of this library's modules, which need them.

    Raises:
        TypeError, RuntimeError: as :func:`convert`.
    """
    check_module(module)
    module = module if inplace else _copy_sharing_tensors(module)
    left_alone = []
    needed = {
        id(child)
        for parent in module.modules()
        if not isinstance(parent, Recurrent) and type(parent).__module__.partition(".")[0] == "pymtl"
        for child in parent.modules()
    }
    for name, child in module.named_modules():
        if not isinstance(child, Recurrent):
            continue
        original = _original_class(type(child))
        options = child._pymtl_variants
        if original is None or options.reverse or options.act(training=True) or id(child) in needed:
            left_alone.append(f"{name or 'the module itself'} ({type(child).__name__})")
            continue
        Recurrent.unfreeze(child)
        vars(child).pop("_pymtl_variants", None)  # a pickle of it would need pymtl
        child.__class__ = original
        # Torch's modules read their weights from here; ours look them up by name.
        child._init_flat_weights()
    if left_alone:
        warnings.warn("revert left alone what torch's modules cannot be: " + ", ".join(left_alone), stacklevel=2)
    return module


def _copy_sharing_tensors(module: Module) -> Module:
    memo: dict[int, Any] = {}
    for child in module.modules():
        tensors = [*child._parameters.values(), *child._buffers.values()]
        for value in vars(child).values():
            tensors += [
                t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, torch.Tensor)
            ]
        memo.update((id(t), t) for t in tensors if t is not None)
    try:
        return copy.deepcopy(module, memo)
    except MemoryError:
        raise
    except Exception as error:  # of whatever the model holds beside its tensors: a logger, a lock, an open file
        raise RuntimeError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}): change the model itself, "
            "with inplace=True"
        ) from error


@cache
def _fast_class(original: type[nn.RNNBase]) -> type[Recurrent]:
    """The class to give to an instance of ``original`` so that it runs through the kernels."""
    if original in _FAST:
        return _FAST[original]
    if _is_parametrised(original):
        fast = _parametrised_on(_fast_class(original.__bases__[0]), original)
    else:
        torchs = next(cls for cls in original.__mro__ if cls in _FAST)
        fast = type(original.__name__, _bases(original, torchs), {"__reduce_ex__": _reduce})
    fast.__module__, fast.__qualname__ = original.__module__, original.__qualname__
    fast._converted_from = original
    return fast


def _bases(original: type[nn.RNNBase], torchs: type[nn.RNNBase]) -> tuple[type, ...]:
    # Between the subclass and torch's class: what the subclass has of its own wins, its super() finds ours.
    ours = _FAST[torchs]
    return original, type(ours.__name__, (ours, torchs), {})


def _original_class(fast: type[Recurrent]) -> type[nn.RNNBase] | None:
    if fast in _FAST.values():
        return fast._original
    if _is_parametrised(fast) and "_converted_from" not in vars(fast):
        base = _original_class(fast.__bases__[0])  # parametrised after it was converted
        return None if base is None else _parametrised_on(base, fast)
    return vars(fast).get("_converted_from")


@cache
def _parametrised_on(base: type[nn.RNNBase], parametrised: type[nn.RNNBase]) -> type:
    """The class torch.nn.utils.parametrize made for one module, on top of another base.

    Such a class is a subclass of the module's own class that holds nothing but properties.
    """
    members = {k: v for k, v in vars(parametrised).items() if k not in ("__dict__", "__weakref__", "_converted_from")}
    made = type(parametrised.__name__, (base,), members)
    made.__module__, made.__qualname__ = parametrised.__module__, parametrised.__qualname__
    return made


def _is_parametrised(cls: type) -> bool:
    return cls.__name__.startswith("Parametrized") and cls.__module__ == parametrize.__name__


def _rebuild(original: type[nn.RNNBase]) -> Recurrent:
    fast = _fast_class(original)
    return fast.__new__(fast)


def _reduce(self: Recurrent, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time: pickle its origin, and make it again.
    return _rebuild, (type(self)._converted_from,), self.__getstate__()
