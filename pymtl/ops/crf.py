"""The linear-chain conditional random field: wrappers, fake kernels and derivatives."""

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
    fake_batch,
    needs_reference,
    no_derivative,
    wants_gradient,
)


def crf(
    emissions: Tensor, batch_sizes: Tensor, tags: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """The log-likelihood of each sequence's tags (Lafferty, McCallum & Pereira 2001), or its log partition function.

    A path's score is ``start[y_1] + sum of emissions + sum of transitions[y_{t-1}, y_t] + end[y_T]``. The forward
    algorithm runs on scaled probabilities in float64, and in log space where those could underflow.

    Args:
        emissions: [N, C] packed; float32 or float64.
        batch_sizes: int64 [T] as in :class:`torch.nn.utils.rnn.PackedSequence`. With a GPU they may be on that,
            unchecked; then there are N = T*B rows, and a sequence without a token gives 0.
        tags: int64 [N], 0 to C - 1; None for log Z.
        start, end: [C].
        transitions: [C, C], from and to; -inf forbids one.

    Returns:
        [B], in the packed order.

    Raises:
        IndexError: a tag is out of range. On a GPU, which nobody waits for, its sequence gives NaN instead.
        RuntimeError: a size, dtype or device does not fit.

    """
    arguments = (emissions, batch_sizes, tags, start, end, transitions)
    if needs_reference(emissions, start, end, transitions):
        _check_rows(emissions, batch_sizes)
        return reference.crf(*arguments)
    try:
        if wants_gradient(emissions, start, end, transitions):
            if torch.compiler.is_compiling():
                return torch.ops.pymtl.crf(*arguments)[0]
            return _CRF.apply(*arguments)[0]
        with below_autograd():
            return torch.ops.pymtl.crf(*arguments)[0]
    except RuntimeError as error:
        # The stable C++ interface knows one type of error only.
        if "out of bounds" in str(error):
            raise IndexError(str(error).splitlines()[0]) from None
        raise


def _check_rows(emissions: Tensor, batch_sizes: Tensor) -> None:
    """The op checks this; the plain chain would take more rows for those behind the last token."""
    if batch_sizes.is_cpu and emissions.shape[0] != int(batch_sizes.sum()):
        expected = [int(batch_sizes.sum()), *emissions.shape[1:]]
        raise RuntimeError(f"emissions: expected size {expected}, got {list(emissions.shape)}")


def crf_decode(
    emissions: Tensor, batch_sizes: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path of each sequence (Viterbi 1967); the lowest classes among equal ones. No gradient.

    Args:
        emissions, batch_sizes, start, end, transitions: as for :func:`crf`.

    Returns:
        ``tags`` int64 [N] and ``scores`` [B], both in the packed order.

    """
    with below_autograd():
        return torch.ops.pymtl.crf_decode(emissions, batch_sizes, start, end, transitions)


@torch.library.register_fake("pymtl::crf")
def _crf_fake(
    emissions: Tensor, batch_sizes: Tensor, tags: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(
        emissions=emissions, batch_sizes=batch_sizes, tags=tags, start=start, end=end, transitions=transitions
    )
    batch = fake_batch(emissions, batch_sizes)
    return (
        emissions.new_empty(batch),
        emissions.new_empty(emissions.shape, dtype=torch.float64),
        emissions.new_empty(emissions.shape[:1], dtype=torch.float64),
    )


@torch.library.register_fake("pymtl::crf_backward")
def _crf_backward_fake(
    grad: Tensor,
    emissions: Tensor,
    batch_sizes: Tensor,
    tags: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    alphas: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_one_device(grad=grad, emissions=emissions, batch_sizes=batch_sizes, start=start, transitions=transitions)
    return tuple(t.new_empty(t.shape) for t in (emissions, start, end, transitions))


@torch.library.register_fake("pymtl::crf_decode")
def _crf_decode_fake(
    emissions: Tensor, batch_sizes: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    check_one_device(emissions=emissions, batch_sizes=batch_sizes, start=start, end=end, transitions=transitions)
    batch = fake_batch(emissions, batch_sizes)
    return emissions.new_empty(emissions.shape[:1], dtype=torch.int64), emissions.new_empty(batch)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    with below_autograd_in_backward():
        emissions, start, end, transitions = torch.ops.pymtl.crf_backward(grad, *ctx.saved_tensors)
    return emissions, None, None, start, end, transitions


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The derivative of the derivative, from the original inputs by the plain PyTorch chain."""
    grad, emissions, batch_sizes, tags, start, end, transitions = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (emissions, start, end, transitions)]
        # New views, so that autograd.grad stops at these and does not go on to the tensors the caller made them from.
        views = [leaf.view_as(leaf) for leaf in leaves]
        seed = grad if grad.requires_grad else grad.detach().requires_grad_()
        seed = seed.view_as(seed)
        result = reference.crf(views[0], batch_sizes, tags, *views[1:])
        first = torch.autograd.grad(result, views, seed, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first, [seed, *views], grads, create_graph=again, allow_unused=True)
    of_seed, of_emissions, of_start, of_end, of_transitions = second
    return of_seed, of_emissions, None, None, of_start, of_end, of_transitions, None, None


class _CRF(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            output = torch.ops.pymtl.crf(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


torch.library.register_autograd("pymtl::crf", _backward, setup_context=_setup)
torch.library.register_autograd("pymtl::crf_backward", _double_backward, setup_context=_setup_backward)
torch.library.register_autograd("pymtl::crf_decode", no_derivative("crf_decode", "pymtl.ops.crf for log-likelihoods"))
