"""Pooling over the tokens of each sequence: wrappers, fake kernels and derivatives."""

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
    fake_batch,
    needs_reference,
    wants_gradient,
)


def pool(input: Tensor, batch_sizes: Tensor | None, kind: str, *, reverse: Sequence[bool] = (False,)) -> Tensor:
    """The mean or the maximum of each sequence's tokens.

    Args:
        input: [T, B, F], or packed [N, F] with ``batch_sizes`` [T]; float32, float64 or bfloat16 (pooled in float32)
            on the CPU, any floating dtype on a GPU.
        kind: ``"mean"`` or ``"max"``.
        reverse: one flag for each recurrence that wrote a part of the features; a backward recurrence's part
            is summed from the last token on, as in :func:`pymtl.ops.rnn_heads`, so that both give the same bits.

    Returns:
        [B, F]. The gradient of a maximum goes to the token it came from.

    Raises:
        RuntimeError: a size, dtype, device or ``kind`` does not fit.

    """
    if input.dtype == torch.bfloat16 and input.is_cpu:
        return pool(input.float(), batch_sizes, kind, reverse=reverse).to(input.dtype)
    if needs_reference(input):
        return reference.pool(input, batch_sizes, kind, reverse=reverse)
    if wants_gradient(input):
        return torch.ops.pymtl.pool(input, batch_sizes, reverse, kind)[0]
    with below_autograd():
        return torch.ops.pymtl.pool(input, batch_sizes, reverse, kind)[0]


@torch.library.register_fake("pymtl::pool")
def _pool_fake(input: Tensor, batch_sizes: Tensor | None, reverse: Sequence[bool], kind: str) -> tuple[Tensor, Tensor]:
    check_one_device(input=input, batch_sizes=batch_sizes)
    batch = input.shape[1] if batch_sizes is None else torch.library.get_ctx().new_dynamic_size()
    output = input.new_empty(batch, input.shape[-1])
    argmax = input.new_empty(batch if kind == "max" else 0, input.shape[-1], dtype=torch.int64)
    return output, argmax


@torch.library.register_fake("pymtl::pool_backward")
def _pool_backward_fake(
    grad_output: Tensor, batch_sizes: Tensor | None, argmax: Tensor, size: Sequence[int], kind: str
) -> Tensor:
    check_one_device(grad_output=grad_output, batch_sizes=batch_sizes, argmax=argmax)
    return grad_output.new_empty(size)


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, batch_sizes, _, kind = inputs
    ctx.save_for_backward(batch_sizes, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.size, ctx.kind = input.shape, kind


def _pool_backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Any, ...]:
    batch_sizes, argmax = ctx.saved_tensors
    grad = torch.ops.pymtl.pool_backward(grad_output, batch_sizes, argmax, ctx.size, ctx.kind)
    return grad, None, None, None


def _setup_pool_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, batch_sizes, argmax, _, kind = inputs
    ctx.save_for_backward(batch_sizes, argmax)
    ctx.kind = kind


def _pool_double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Pooling's derivative is linear in grad_output: pool the new gradient at the same places.
    batch_sizes, argmax = ctx.saved_tensors
    if ctx.kind == "max":
        pooled = grad.reshape(-1, grad.shape[-1]).gather(0, argmax)
    else:
        pooled = pool(grad, batch_sizes, "mean")
    return pooled, None, None, None, None


torch.library.register_autograd("pymtl::pool", _pool_backward, setup_context=_setup_pool)
torch.library.register_autograd("pymtl::pool_backward", _pool_double_backward, setup_context=_setup_pool_backward)


def attention_pool(input: Tensor, scores: Tensor, batch_sizes: Tensor) -> Tensor:
    """The sum of each sequence's tokens, weighted by softmax over them of the scores (Lin et al. 2017, "A Structured
    Self-attentive Sentence Embedding", equations 5 and 6): each of J heads sums its own slice of the features.

    Args:
        input: packed [N, F]; float32 or float64 on the CPU.
        scores: [N, J] of each head; J divides F.
        batch_sizes: [T] as in :class:`torch.nn.utils.rnn.PackedSequence`.

    Returns:
        [B, F].

    Raises:
        RuntimeError: a size, dtype or device does not fit.
    """
    if needs_reference(input, scores):
        return reference.attention_pool(input, scores, batch_sizes)
    if wants_gradient(input, scores):
        if torch.compiler.is_compiling():
            return torch.ops.pymtl.attention_pool(input, scores, batch_sizes)
        return _AttentionPool.apply(input, scores, batch_sizes)
    with below_autograd():
        return torch.ops.pymtl.attention_pool(input, scores, batch_sizes)


@torch.library.register_fake("pymtl::attention_pool")
def _attention_pool_fake(input: Tensor, scores: Tensor, batch_sizes: Tensor) -> Tensor:
    check_one_device(input=input, scores=scores, batch_sizes=batch_sizes)
    return input.new_empty(fake_batch(input, batch_sizes), input.shape[1])


@torch.library.register_fake("pymtl::attention_pool_backward")
def _attention_pool_backward_fake(
    grad_output: Tensor, input: Tensor, scores: Tensor, batch_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    check_one_device(grad_output=grad_output, input=input, scores=scores, batch_sizes=batch_sizes)
    return torch.empty_like(input), torch.empty_like(scores)


def _setup_attention_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attention_pool_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    with below_autograd_in_backward():
        return *torch.ops.pymtl.attention_pool_backward(grad_output, *ctx.saved_tensors), None


def _attention_pool_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """In plain PyTorch, from the original inputs."""
    *inputs, batch_sizes = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        # New views, so that autograd.grad stops at these.
        grad_output, input, scores = (t.view_as(t) for t in leaves)
        output = reference.attention_pool(input, scores, batch_sizes, grad_output.shape[0])
        found = torch.autograd.grad(output, (input, scores), grad_output, create_graph=True)
        return *torch.autograd.grad(found, (grad_output, input, scores), grads, create_graph=again), None


class _AttentionPool(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scores: Tensor, batch_sizes: Tensor) -> Tensor:
        ctx.save_for_backward(input, scores, batch_sizes)
        with below_autograd():
            return torch.ops.pymtl.attention_pool(input, scores, batch_sizes)

    backward = staticmethod(_attention_pool_backward)


torch.library.register_autograd("pymtl::attention_pool", _attention_pool_backward, setup_context=_setup_attention_pool)
torch.library.register_autograd(
    "pymtl::attention_pool_backward", _attention_pool_double_backward, setup_context=_setup_attention_pool
)
