"""The recurrent ops' derivatives: the first by the kernels, the second by the plain PyTorch recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl import reference
from pymtl.ops.autograd import any_requires_grad, below_autograd, below_autograd_in_backward, no_derivative
from pymtl.ops.rnn_arguments import RNNArguments, cell_of, missing_of


class RNN(torch.autograd.Function):
    """The registered derivative without its dispatch in Python.

    ``arguments`` are the op's; all that may require a gradient come a second time, flat, for autograd to see.
    """

    @staticmethod
    def forward(ctx: Any, arguments: RNNArguments, *differentiable: Tensor | None) -> tuple[Tensor, ...]:
        with below_autograd():
            output = torch.ops.pymtl.rnn_training(*arguments)
        _save_training(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *_training_backward(ctx, *grads).differentiable()


def _setup_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.missing = missing_of(inputs)
    _save_training(ctx, RNNArguments.of_op(*inputs), output)


def _save_training(ctx: Any, given: RNNArguments, output: tuple[Tensor, ...]) -> None:
    hidden, _, _, gates, cells = output
    if any_requires_grad((given.dropout, given.zoneout_h, given.zoneout_c)):
        raise RuntimeError("dropout, zoneout_h, zoneout_c: expected masks that require no gradient, got one that does")
    ctx.save_for_backward(hidden, gates, cells, *given.tensors())
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.layout = given.layout()
    ctx.needs = [
        given.input.requires_grad,
        any_requires_grad(given.weight_ih),
        any_requires_grad(given.weight_hh),
        any_requires_grad((*given.bias_ih, *given.bias_hh, *given.norm)),
        any_requires_grad((given.h0, given.c0)),
    ]


def _training_backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: Any
) -> RNNArguments:
    hidden, gates, cells, *saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    given = ctx.layout.arguments(saved)
    grad_c_n = grad_c_n if cell_of(given.mode).has_cell else None
    with below_autograd_in_backward():
        grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0 = torch.ops.pymtl.rnn_backward(
            grad_output, grad_h_n, grad_c_n, *given, hidden, gates, cells, ctx.needs
        )
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, _ = ctx.needs
    biases, normalised = len(given.bias_ih), given.normalised
    of_b_ih, of_b_hh, of_norm = [None] * biases, [None] * biases, [None] * len(given.norm)
    if needs_bias:
        parts = [_parts_of_sums(sums, given.mode, normalised) for sums in grad_bias]
        if biases > 0:
            of_b_ih, of_b_hh = [p[0] for p in parts], [p[1] for p in parts]
        if normalised:
            # All recurrences' gains of the products, then of c, then biases of c; these may be missing.
            of_norm = [part for kind in zip(*(p[2:] for p in parts)) for part in kind][: len(given.norm)]
    return RNNArguments(
        input=grad_input if needs_input else None,
        weight_ih=grad_w_ih if needs_weight_ih and not normalised else [None] * len(given.weight_ih),
        weight_hh=grad_w_hh if needs_weight_hh else [None] * len(given.weight_hh),
        bias_ih=of_b_ih,
        bias_hh=of_b_hh,
        h0=grad_h0 if given.h0 is not None and given.h0.requires_grad else None,
        c0=grad_c0 if given.c0 is not None and given.c0.requires_grad else None,
        norm=of_norm,
    )


def _training_backward_of_op(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return _training_backward(ctx, *grads).as_gradients_of(ctx.missing)


def _parts_of_sums(sums: Tensor, mode: str, normalised: bool) -> list[Tensor]:
    """Splits the op's bias gradient of one recurrence into those of b_ih and b_hh, of a layer-normalised cell also of
    gain_hh, and of a layer-normalised LSTM also of gain_c and bias_c.

    No two share memory, since users scale gradients in place. The gradients of b_ih and b_hh are equal, except for a
    GRU's gate n, where the reset gate multiplies b_hn but not b_in.
    """
    if mode != "GRU" and not normalised:
        return [sums, sums.clone()]
    plain, cell = cell_of(mode), cell_of(mode, normalised)
    gates, bias = plain.gates, plain.gradients
    size = sums.shape[0] // cell.gradients
    biases = sums[: bias * size]
    if mode == "GRU":
        parts = [torch.cat([biases[size : 3 * size], biases[:size]]), biases[size:].clone()]
    else:
        parts = [biases.clone(), biases.clone()]
    if normalised:
        gains = sums[(bias + gates) * size :].split([gates * size, *([size] * 2 if cell.has_cell else [])])
        parts += [gain.clone() for gain in gains]
    return parts


def _sums_of_parts(
    of_b_ih: Sequence[Tensor], of_b_hh: Sequence[Tensor], of_norm: Sequence[Tensor | None], weight_hh: Tensor, mode: str
) -> Tensor:
    """The reverse of :func:`_parts_of_sums`; zeros stand for what nobody asked for."""
    rows, hidden_size = weight_hh.shape
    nothing = weight_hh.new_zeros(rows)
    (b_ih,), (b_hh,) = of_b_ih or [nothing], of_b_hh or [nothing]
    if mode == "GRU":
        (r, z, n), (_, _, q) = b_ih.chunk(3), b_hh.chunk(3)
        b_ih = torch.cat([n, r, z, q])
    if not of_norm:
        return b_ih
    sizes = [rows, hidden_size, hidden_size] if mode == "LSTM" else [rows]
    given = [*of_norm, *([None] * len(sizes))]
    gains = [weight_hh.new_zeros(size) if g is None else g for g, size in zip(given, sizes)]
    return torch.cat([b_ih, nothing, *gains])


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    grad_output, grad_h_n, grad_c_n, *arguments, _, _, _, needs = inputs
    given = RNNArguments.of_op(*arguments)
    ctx.save_for_backward(grad_output, grad_h_n, grad_c_n, *given.tensors())
    ctx.layout, ctx.missing, ctx.needs = given.layout(), missing_of(arguments), list(needs)


def _double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The derivative of the derivative, from the original inputs by the plain PyTorch recurrence.

    The saved gates are functions of the inputs too; taken as constants they would give wrong second
    derivatives, so nothing but the inputs is used here.
    """
    grad_output, grad_h_n, grad_c_n, *saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    given = ctx.layout.arguments(saved)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t if t is None or t.requires_grad else t.detach().requires_grad_()
            for t in (grad_output, grad_h_n, grad_c_n, *given.differentiable())
        ]
        # New views, so that autograd.grad stops at these and does not go on to the tensors the caller made them from.
        views = [None if t is None else t.view_as(t) for t in leaves]
        seeds, own = views[:3], given.with_differentiable(views[3:])
        results = reference.rnn(**own.for_reference())
        outputs = [r for r, s in zip(results, seeds, strict=True) if s is not None]
        seeds_given = [s for s in seeds if s is not None]
        wanted = [t for t in own.differentiable() if t is not None]
        found = iter(torch.autograd.grad(outputs, wanted, seeds_given, create_graph=True, allow_unused=True))
        first = own.with_differentiable([None if t is None else next(found) for t in own.differentiable()])
        pairs = _pairs_of_gradients(first, given, ctx.needs, grads)
        at = [t for t in views if t is not None]
        second = iter(
            torch.autograd.grad(
                [a for a, _ in pairs],
                at,
                [b for _, b in pairs],
                create_graph=again,
                allow_unused=True,
            )
            if pairs
            else [None] * len(at)
        )
    result = [None if v is None else next(second) for v in views]
    of_arguments = given.no_gradients().with_differentiable(result[3:])
    return *result[:3], *of_arguments.as_gradients_of(ctx.missing), None, None, None, None


def _pairs_of_gradients(
    first: RNNArguments, given: RNNArguments, needs: Sequence[bool], grads: Sequence[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Each of the op's results as the plain recurrence computes it, paired with its incoming gradient. Results that are
    missing or require no gradient are left out."""
    of_input, of_weight_ih, of_weight_hh, of_bias, of_h0, of_c0 = grads
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = needs
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    if needs_input:
        pairs.append((first.input, of_input))
    if needs_weight_ih:
        pairs.extend(zip(first.weight_ih, of_weight_ih, strict=True))
    if needs_weight_hh:
        pairs.extend(zip(first.weight_hh, of_weight_hh, strict=True))
    if needs_bias:
        count = len(given.weight_hh)
        sums = [
            _sums_of_parts(
                first.bias_ih[g : g + 1], first.bias_hh[g : g + 1], first.norm[g::count], given.weight_hh[g], given.mode
            )
            for g in range(len(of_bias))
        ]
        pairs.extend(zip(sums, of_bias, strict=True))
    if needs_state:
        pairs.extend(((first.h0, of_h0), (first.c0, of_c0)))
    return [(a, b) for a, b in pairs if a is not None and b is not None and a.requires_grad]


torch.library.register_autograd("pymtl::rnn_training", _training_backward_of_op, setup_context=_setup_training)
torch.library.register_autograd("pymtl::rnn_backward", _double_backward, setup_context=_setup_backward)
for _op in ("rnn_inference", "rnn_heads", "rnn_frozen", "rnn_frozen_of", "rnn_prepack", "rnn_prepack_narrow"):
    torch.library.register_autograd(f"pymtl::{_op}", no_derivative(_op, "pymtl.ops.rnn with gradients enabled"))
