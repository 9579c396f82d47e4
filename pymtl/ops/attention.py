"""Attention of queries over the tokens of sequences: wrapper, fake kernels and derivatives."""

from __future__ import annotations

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
from pymtl.ops.dtypes import has_kernels


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    batch_sizes: Tensor,
    heads: int = 1,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much each query reads of each token of its sequence, softmax over them of a score, and the mean of their
    values with these weights. The score is ``query . key`` (Luong et al. 2015, "Effective Approaches to Attention-based
    Neural Machine Translation", equation 8), or ``v . tanh(query + key)`` (Bahdanau et al. 2015, "Neural Machine
    Translation by Jointly Learning to Align and Translate", appendix A.1.2).

    Args:
        query: [M, D]; float32 or float64 (others are computed in float32); on the CPU by the kernel, in which a query's
            bits do not depend on the others, on a GPU in plain PyTorch.
        key, value: of the packed tokens, [N, D] and [N, F].
        sequences: of each query its sequence, int64 [M], below B.
        batch_sizes: int64 [T] as in :class:`torch.nn.utils.rnn.PackedSequence`.
        heads: J, a divisor of D and F: each head has its own slice of queries, keys and values.
        score: v [D] of additive scores; None: products.

    Returns:
        The means [M, F], and the weights [M, J, T], zero behind each sequence's last token.

    Raises:
        RuntimeError: a size, dtype or device does not fit, or there is no such sequence.
    """
    given = (query, key, value, score)
    dtype = query.dtype
    if not all(t is None or t.dtype == dtype for t in given) or dtype not in (torch.float32, torch.float64):
        # As under autocast, which gives some of them in 16 bits.
        query, key, value, score = (None if t is None else t.float() for t in given)
    if needs_reference(query, key, value, score) or not has_kernels(query):
        context, weights = reference.attend(query, key, value, sequences, batch_sizes, heads, score)
    elif wants_gradient(query, key, value, score) and not torch.compiler.is_compiling():
        context, weights = _Attend.apply(query, key, value, sequences, batch_sizes, heads, score)
    elif wants_gradient(query, key, value, score):
        context, weights = torch.ops.pymtl.attend(query, key, value, sequences, batch_sizes, heads, score)
    else:
        with below_autograd():
            context, weights = torch.ops.pymtl.attend(query, key, value, sequences, batch_sizes, heads, score)
    return context.to(dtype), weights


@torch.library.register_fake("pymtl::attend")
def _attend_fake(
    query: Tensor, key: Tensor, value: Tensor, sequences: Tensor, batch_sizes: Tensor, heads: int, score: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_one_device(query=query, key=key, value=value, sequences=sequences, batch_sizes=batch_sizes, score=score)
    count = query.shape[0]
    return query.new_empty(count, value.shape[1]), query.new_empty(count, heads, batch_sizes.shape[0])


@torch.library.register_fake("pymtl::attend_backward")
def _attend_backward_fake(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    batch_sizes: Tensor,
    heads: int,
    score: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, ...]:
    check_one_device(query=query, key=key, value=value, sequences=sequences, batch_sizes=batch_sizes, score=score)
    of_score = query.new_empty(0) if score is None else torch.empty_like(score)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_score


def _setup_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sequences, batch_sizes, ctx.heads, score = inputs
    ctx.save_for_backward(query, key, value, sequences, batch_sizes, score, output[1])
    ctx.set_materialize_grads(False)


def _attend_backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple[Any, ...]:
    query, key, value, sequences, batch_sizes, score, weights = ctx.saved_tensors
    with below_autograd_in_backward():
        of_query, of_key, of_value, of_score = torch.ops.pymtl.attend_backward(
            grad_context, grad_weights, query, key, value, sequences, batch_sizes, ctx.heads, score, weights
        )
    return of_query, of_key, of_value, None, None, None, None if score is None else of_score


def _setup_attend_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, score, weights = inputs
    ctx.save_for_backward(*tensors, score, weights)


def _attend_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """In plain PyTorch, from the original inputs."""
    *given, sequences, batch_sizes, score, _ = ctx.saved_tensors
    places = [i for i, t in enumerate((*given, score)) if t is not None]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (*given, score) if t is not None]
        own: list[Tensor | None] = [None] * 6
        for i, t in zip(places, leaves):
            own[i] = t.view_as(t)  # new views, so that autograd.grad stops at these
        grad_context, grad_weights, query, key, value, v = own
        outputs = reference.attend(query, key, value, sequences, batch_sizes, ctx.heads, v)
        pairs = [(o, g) for o, g in zip(outputs, (grad_context, grad_weights)) if g is not None]
        wanted = [t for t in (query, key, value, v) if t is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, materialize_grads=True
        )
        every = [t for t in own if t is not None]
        second = torch.autograd.grad(found, every, grads[: len(found)], create_graph=again, materialize_grads=True)
    result: list[Tensor | None] = [None] * 6
    for i, g in zip(places, second):
        result[i] = g
    return *result[:5], None, None, None, result[5], None


class _Attend(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            output = torch.ops.pymtl.attend(*inputs)
        _setup_attend(ctx, inputs, output)
        return output

    backward = staticmethod(_attend_backward)


torch.library.register_autograd("pymtl::attend", _attend_backward, setup_context=_setup_attend)
torch.library.register_autograd("pymtl::attend_backward", _attend_double_backward, setup_context=_setup_attend_backward)
