"""Every nn.LSTM inside an existing model becomes a pymtl.LSTM, and back."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from pymtl.lstm import LSTM

Module = TypeVar("Module", bound=nn.Module)


def convert(module: Module, inplace: bool = False) -> Module:
    """Makes every :class:`torch.nn.LSTM` inside ``module`` (or ``module`` itself) a :class:`pymtl.LSTM`.

    Every Parameter and buffer stays the very same object, so optimizers go on working; hooks, training flags
    and sharing of modules stay. Subclasses of nn.LSTM convert too, parametrised ones among them, unless they
    override ``forward``: those are left alone, with a warning that names them.

    Args:
        module: any module.
        inplace: change ``module`` itself; otherwise a copy of the module tree is made that shares its tensors.

    Returns:
        The converted module: ``module`` if ``inplace``.
    """
    module = module if inplace else _copy_sharing_tensors(module)
    left_alone = []
    for name, child in module.named_modules():
        if not isinstance(child, nn.LSTM) or isinstance(child, LSTM):
            continue
        if type(child).forward is not nn.LSTM.forward:
            left_alone.append(f"{name or 'the module itself'} ({type(child).__name__})")
            continue
        child.__class__ = _fast_class(type(child))
    if left_alone:
        warnings.warn("convert left alone what overrides nn.LSTM.forward: " + ", ".join(left_alone), stacklevel=2)
    return module


def revert(module: Module, inplace: bool = False) -> Module:
    """Undoes :func:`convert`: every :class:`pymtl.LSTM` inside becomes a :class:`torch.nn.LSTM` again.

    Subclasses of pymtl.LSTM written by hand are left alone, with a warning that names them.
    """
    module = module if inplace else _copy_sharing_tensors(module)
    left_alone = []
    for name, child in module.named_modules():
        if not isinstance(child, LSTM):
            continue
        original = _original_class(type(child))
        if original is None:
            left_alone.append(f"{name or 'the module itself'} ({type(child).__name__})")
            continue
        child.unfreeze()
        child.__class__ = original
        # nn.LSTM reads its weights from here; a pymtl.LSTM looks them up by name.
        child._init_flat_weights()
    if left_alone:
        warnings.warn("revert left alone subclasses of pymtl.LSTM: " + ", ".join(left_alone), stacklevel=2)
    return module


def _copy_sharing_tensors(module: Module) -> Module:
    memo: dict[int, Any] = {}
    for child in module.modules():
        tensors = [*child._parameters.values(), *child._buffers.values()]
        tensors += [value for value in vars(child).values() if isinstance(value, torch.Tensor)]
        memo.update((id(t), t) for t in tensors if t is not None)
    return copy.deepcopy(module, memo)


@cache
def _fast_class(original: type[nn.LSTM]) -> type[LSTM]:
    """The class to give to an instance of ``original`` so that it runs through the kernels."""
    if original is nn.LSTM:
        return LSTM
    if _is_parametrised(original):
        # Made by torch.nn.utils.parametrize for one module: a subclass of the module's own class that holds
        # nothing but properties. The same one, on top of the fast class.
        members = {k: v for k, v in vars(original).items() if k not in ("__dict__", "__weakref__")}
        fast = type(original.__name__, (_fast_class(original.__bases__[0]),), members)
    else:
        # pymtl.LSTM first, so that its forward wins; what the subclass adds stays.
        fast = type(original.__name__, (LSTM, original), {"__reduce_ex__": _reduce})
    fast.__module__, fast.__qualname__ = original.__module__, original.__qualname__
    fast._converted_from = original
    return fast


def _original_class(fast: type[LSTM]) -> type[nn.LSTM] | None:
    return nn.LSTM if fast is LSTM else vars(fast).get("_converted_from")


def _is_parametrised(cls: type) -> bool:
    return cls.__name__.startswith("Parametrized") and cls.__module__ == parametrize.__name__


def _rebuild(original: type[nn.LSTM]) -> LSTM:
    fast = _fast_class(original)
    return fast.__new__(fast)


def _reduce(self: LSTM, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time: pickle its origin, and make it again.
    return _rebuild, (type(self)._converted_from,), self.__getstate__()
