"""Which modules a program can stand for: those that do what their class says, in float32."""

from __future__ import annotations

import torch
from torch import nn

from pymtl.custom import runs_own_code


def check_plain(module: nn.Module) -> None:
    """Refuses code that no instruction stands for: hooks and parametrizations, anywhere inside.

    Raises:
        ValueError: there is some; the message names the module.
        TypeError: a parameter is of another dtype than float32.
        ValueError: a parameter has no values, on the meta device.
    """
    for name, child in module.named_modules():
        at = f"{name or 'the module'} ({type(child).__name__})"
        if torch.nn.utils.parametrize.is_parametrized(child):
            raise ValueError(
                f"{at}: expected parameters, got parametrizations: remove them first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if runs_own_code(child, type(child)):
            raise ValueError(f"{at}: expected a module without hooks or a forward of its own: no file can hold them")
        if isinstance(child, nn.Embedding) and child.max_norm is not None:
            raise ValueError(f"{at}: expected an embedding without max_norm, got {child.max_norm}")
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(f"{name}: expected parameters of torch.float32, got {parameter.dtype}: model.float()")
        if parameter.is_meta:
            raise ValueError(f"{name}: expected a parameter with values, got one on the meta device")


def refuse(module: nn.Module, what: str, expected: str) -> ValueError:
    """The error about a module that there are no instructions for."""
    torchs = type(module) in (nn.LSTM, nn.GRU, nn.RNN)
    out = ": pymtl.convert makes one of it" if torchs else ", which no file can hold"
    return ValueError(f"{what}: expected {expected}, got {type(module).__name__}{out}")
