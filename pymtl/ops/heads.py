"""The projection of all heads at once: wrapper, fake kernel and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl.ops.autograd import below_autograd, check_one_device, takes_function, wants_gradient


def heads(input: Tensor, weight: Tensor, bias: Tensor | None, *, parts: int = 1) -> Tensor:
    """``input @ weight.T + bias`` with a row's bits independent of every other row.

    Args:
        input: [N, F], float32 or float64 on the CPU.
        weight: [C, F], the weights of all heads stacked.
        bias: [C] or None.
        parts: the number of recurrences that wrote ``input`` side by side. The sum runs over each part and
            then over the parts, as in :func:`pymtl.ops.lstm_heads`, so that both give the same bits.

    Returns:
        [N, C].

    Raises:
        RuntimeError: a size, dtype or device does not fit, or ``parts`` does not divide F.

    """
    if wants_gradient(input, weight, bias):
        if takes_function():
            return _Heads.apply(input, weight, bias, parts)
        return torch.ops.pymtl.heads(input, weight, bias, parts)
    with below_autograd():
        return torch.ops.pymtl.heads(input, weight, bias, parts)


@torch.library.register_fake("pymtl::heads")
def _heads_fake(input: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    check_one_device(input=input, weight=weight, bias=bias)
    return input.new_empty(input.shape[0], weight.shape[0])


def _setup_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _ = inputs
    ctx.save_for_backward(input, weight)


def _heads_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
    return (
        grad @ weight if needs_input else None,
        grad.t() @ input if needs_weight else None,
        grad.sum(0) if needs_bias else None,
        None,
    )


class _Heads(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        with below_autograd():
            output = torch.ops.pymtl.heads(input, weight, bias, parts)
        _setup_heads(ctx, (input, weight, bias, parts), output)
        return output

    backward = staticmethod(_heads_backward)


torch.library.register_autograd("pymtl::heads", _heads_backward, setup_context=_setup_heads)
