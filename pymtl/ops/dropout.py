"""Dropout: wrapper, fake kernel and derivative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl.ops.autograd import (
    below_autograd,
    below_autograd_in_backward,
    check_one_device,
    needs_reference,
    wants_gradient,
)


def dropout(input: Tensor, p: float) -> Tensor:
    """:func:`torch.nn.functional.dropout` (Srivastava et al. 2014), for training.

    The random numbers are torch's, 16 bits for an element: ``p`` is rounded to a multiple of 2**-16. The same seed
    gives other masks than torch's own dropout, which takes over under torch.compile and torch.func.

    Args:
        input: any shape, float32 or float64 on the CPU.
        p: the probability of an element to become zero, 0 to 1; the others are scaled by 1 / (1 - p).

    Raises:
        RuntimeError: the dtype or device does not fit, or ``p`` is out of range.

    """
    if torch.compiler.is_compiling() or needs_reference(input):
        return F.dropout(input, p)  # they know how to treat torch's own random numbers
    bits = torch.empty((input.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    if wants_gradient(input):
        return _Dropout.apply(input, bits, p)
    with below_autograd():
        return torch.ops.pymtl.dropout(input, bits, p)


@torch.library.register_fake("pymtl::dropout")
def _dropout_fake(input: Tensor, bits: Tensor, p: float) -> Tensor:
    check_one_device(input=input, bits=bits)
    return input.new_empty(input.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.p = inputs
    ctx.save_for_backward(bits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    with below_autograd_in_backward():
        return torch.ops.pymtl.dropout(grad, *ctx.saved_tensors, ctx.p), None, None


class _Dropout(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bits: Tensor, p: float) -> Tensor:
        _setup(ctx, (input, bits, p), input)
        with below_autograd():
            return torch.ops.pymtl.dropout(input, bits, p)

    backward = staticmethod(_backward)


torch.library.register_autograd("pymtl::dropout", _backward, setup_context=_setup)
