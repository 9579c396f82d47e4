"""The projection of all heads at once: wrapper, fake kernels and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl import reference
from pymtl.ops.autograd import (
    below_autograd,
    below_autograd_in_backward,
    check_one_device,
    needs_reference,
    wants_gradient,
)
from pymtl.ops.dtypes import autocast, autocast_dtype


def heads(input: Tensor, weight: Tensor, bias: Tensor | None, *, parts: int = 1) -> Tensor:
    """``input @ weight.T + bias`` with a row's bits independent of every other row.

    Args:
        input: [N, F], float32, float64 or bfloat16 (summed in float32) on the CPU, any floating dtype on a GPU, where
            this is torch's matrix product and a row's bits may depend on the number of rows.
        weight: [C, F], the weights of all heads stacked.
        bias: [C] or None.
        parts: the number of recurrences that wrote ``input`` side by side. The sum runs over each part and
            then over the parts, as in :func:`pymtl.ops.rnn_heads`, so that both give the same bits.

    Returns:
        [N, C].

    Raises:
        RuntimeError: a size, dtype or device does not fit, or ``parts`` does not divide F.

    """
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = autocast([input, weight, bias], dtype)
    if needs_reference(input, weight, bias):
        return reference.heads(input, weight, bias, parts)
    if wants_gradient(input, weight, bias):
        if torch.compiler.is_compiling():
            return torch.ops.pymtl.heads(input, weight, bias, parts)
        return _Heads.apply(input, weight, bias, parts)
    with below_autograd():
        return torch.ops.pymtl.heads(input, weight, bias, parts)


@torch.library.register_fake("pymtl::heads")
def _heads_fake(input: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    check_one_device(input=input, weight=weight, bias=bias)
    return input.new_empty(input.shape[0], weight.shape[0])


@torch.library.register_fake("pymtl::heads_backward")
def _heads_backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(grad_output=grad_output, input=input, weight=weight)
    shapes = (input.shape, weight.shape, weight.shape[:1])
    grad_input, grad_weight, grad_bias = (input.new_empty(s if n else 0) for s, n in zip(shapes, needs, strict=True))
    return grad_input, grad_weight, grad_bias


def _setup_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _ = inputs
    ctx.save_for_backward(input, weight)


def _heads_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    with below_autograd_in_backward():
        grads = torch.ops.pymtl.heads_backward(grad, *ctx.saved_tensors, needs)
    return *(g if needed else None for g, needed in zip(grads, needs)), None


def _setup_heads_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _heads_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The products' own derivatives, in plain PyTorch."""
    grad_output, input, weight = ctx.saved_tensors
    of_input, of_weight, of_bias = (g if needed else None for g, needed in zip(grads, ctx.needs))
    needs_grad_output, needs_input, needs_weight, _ = ctx.needs_input_grad
    terms = []
    if needs_grad_output and of_input is not None:
        terms.append(of_input @ weight.t())
    if needs_grad_output and of_weight is not None:
        terms.append(input @ of_weight.t())
    if needs_grad_output and of_bias is not None:
        terms.append(of_bias.expand_as(grad_output))
    return (
        sum(terms[1:], terms[0]) if terms else None,
        grad_output @ of_weight if needs_input and of_weight is not None else None,
        grad_output.t() @ of_input if needs_weight and of_input is not None else None,
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
torch.library.register_autograd("pymtl::heads_backward", _heads_double_backward, setup_context=_setup_heads_backward)
