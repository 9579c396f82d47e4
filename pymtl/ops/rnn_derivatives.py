"""The recurrent ops' derivatives: the first by the kernels, the second by the plain PyTorch recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pymtl import reference
from pymtl.ops.autograd import below_autograd, below_autograd_in_backward, no_derivative
from pymtl.ops.rnn_fakes import BLOCKS, blocks_of


class RNN(torch.autograd.Function):
    """The registered derivative without its dispatch in Python.

    ``inputs`` are the op's arguments; all that may require a gradient come a second time, flat, for autograd to see.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: tuple[Any, ...], input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            output = torch.ops.pymtl.rnn_training(*inputs)
        _setup_training(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_input, _, *lists, _, _, grad_h0, grad_c0, _, _, _, norm, _ = _training_backward(ctx, *grads)
        w_ih, w_hh, b_ih, b_hh = lists
        return None, grad_input, grad_h0, grad_c0, *w_ih, *w_hh, *b_ih, *b_hh, *(norm or ())


def _setup_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0, c0 = inputs[:10]
    *masks, norm, allow_tf32 = inputs[10:]
    hidden, _, _, gates, cells = output
    if any(mask is not None and mask.requires_grad for mask in masks):
        raise RuntimeError("dropout, zoneout_h, zoneout_c: expected masks that require no gradient, got one that does")
    within = norm or ()
    added = [*bias_ih, *bias_hh, *within]  # what the gradient of the biases is of
    ctx.save_for_backward(input, batch_sizes, h0, c0, *masks, hidden, gates, cells, *weight_ih, *weight_hh, *added)
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.reverse, ctx.mode, ctx.allow_tf32 = list(reverse), mode, allow_tf32
    ctx.counts = [len(weight_ih), len(weight_hh), len(bias_ih), len(bias_hh), len(within)]
    ctx.needs = [
        input.requires_grad,
        any(w.requires_grad for w in weight_ih),
        any(w.requires_grad for w in weight_hh),
        any(b.requires_grad for b in added),
        any(s is not None and s.requires_grad for s in (h0, c0)),
    ]


def _training_backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    input, batch_sizes, h0, c0, *masks, hidden, gates, cells = saved[:10]
    *lists, norm = _grouped(saved[10:], ctx.counts)
    with below_autograd_in_backward():
        grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0 = torch.ops.pymtl.rnn_backward(
            grad_output,
            grad_h_n,
            grad_c_n if ctx.mode == "LSTM" else None,
            input,
            batch_sizes,
            *lists,
            ctx.reverse,
            ctx.mode,
            h0,
            c0 if ctx.mode == "LSTM" else None,
            *masks,
            norm or None,
            ctx.allow_tf32,
            hidden,
            gates,
            cells,
            ctx.needs,
        )
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, _ = ctx.needs
    nothing: list[list[Tensor | None]] = [[None] * count for count in ctx.counts]
    of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, of_norm = nothing
    if needs_bias:
        parts = [_parts_of_sums(sums, ctx.mode, len(norm) > 0) for sums in grad_bias]
        if len(of_bias_ih) > 0:
            of_bias_ih, of_bias_hh = [p[0] for p in parts], [p[1] for p in parts]
        # All recurrences' gains of the products, then of c, then biases of c; these may be missing.
        of_norm = [part for kind in zip(*(p[2:] for p in parts)) for part in kind][: len(norm)]
    return (
        grad_input if needs_input else None,
        None,
        grad_w_ih if needs_weight_ih else of_weight_ih,
        grad_w_hh if needs_weight_hh else of_weight_hh,
        of_bias_ih,
        of_bias_hh,
        None,
        None,
        grad_h0 if h0 is not None and h0.requires_grad else None,
        grad_c0 if c0 is not None and c0.requires_grad else None,
        None,
        None,
        None,
        of_norm or None,
        None,
    )


def _parts_of_sums(sums: Tensor, mode: str, normalised: bool) -> list[Tensor]:
    """What the op gives as a recurrence's bias gradient: of b_ih and of b_hh, and of a layer-normalised one's gain_hh,
    of an LSTM's gain_c and bias_c.

    No two share memory, since people scale gradients in place. Those of the biases are equal, but for what a GRU's
    reset gate stands between.
    """
    gates, _, bias = BLOCKS[mode]
    if mode != "GRU" and not normalised:
        return [sums, sums.clone()]
    size = sums.shape[0] // blocks_of(mode, normalised).bias
    plain = sums[: bias * size]
    if mode == "GRU":
        parts = [torch.cat([plain[size : 3 * size], plain[:size]]), plain[size:].clone()]
    else:
        parts = [plain.clone(), plain.clone()]
    if normalised:
        gains = sums[(bias + gates) * size :].split([gates * size, *([size] * 2 if mode == "LSTM" else [])])
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


def _grouped(flat: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Lists of so many tensors: weight_ih, weight_hh, bias_ih, bias_hh and norm."""
    ends = list(accumulate(counts))
    return [list(flat[end - count : end]) for end, count in zip(ends, counts)]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, reverse, mode, h0, c0 = inputs[:13]
    *masks, norm, _, _, _, _, needs = inputs[13:]
    within = norm or ()
    ctx.save_for_backward(*grads, input, batch_sizes, h0, c0, *masks, *w_ih, *w_hh, *b_ih, *b_hh, *within)
    ctx.reverse, ctx.mode, ctx.needs = list(reverse), mode, list(needs)
    ctx.counts = [len(w_ih), len(w_hh), len(b_ih), len(b_hh), len(within)]


def _double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The derivative of the derivative, from the original inputs by the plain PyTorch recurrence.

    The saved gates are functions of the inputs too; taken as constants they would give wrong second
    derivatives, so nothing but the inputs is used here.
    """
    saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    *first, input, batch_sizes, h0, c0 = saved[:7]
    masks, weights = saved[7:10], saved[10:]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t if t is None or t.requires_grad else t.detach().requires_grad_()
            for t in (*first, input, h0, c0, *weights)
        ]
        # New views, so that the derivative stops here and not at what the caller made these from.
        views = [None if t is None else t.view_as(t) for t in leaves]
        seeds, (x, h, c), flat = views[:3], views[3:6], views[6:]
        *lists, norm = _grouped(flat, ctx.counts)
        results = reference.rnn(x, batch_sizes, *lists, ctx.reverse, ctx.mode, h, c, *masks, norm or None)
        outputs = [r for r, s in zip(results, seeds, strict=True) if s is not None]
        seeds_given = [s for s in seeds if s is not None]
        wanted = [t for t in (x, *flat, h, c) if t is not None]
        gradients = iter(torch.autograd.grad(outputs, wanted, seeds_given, create_graph=True, allow_unused=True))
        grad_x = next(gradients)
        of_w_ih, of_w_hh, of_b_ih, of_b_hh, of_norm = [[next(gradients) for _ in group] for group in (*lists, norm)]
        grad_h = next(gradients) if h is not None else None
        grad_c = next(gradients) if c is not None else None
        needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = ctx.needs
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        if needs_input:
            pairs.append((grad_x, grads[0]))
        if needs_weight_ih:
            pairs.extend(zip(of_w_ih, grads[1], strict=True))
        if needs_weight_hh:
            pairs.extend(zip(of_w_hh, grads[2], strict=True))
        if needs_bias:
            count = len(of_w_hh)
            ours = [
                _sums_of_parts(of_b_ih[g : g + 1], of_b_hh[g : g + 1], of_norm[g::count], lists[1][g], ctx.mode)
                for g in range(len(grads[3]))
            ]
            pairs.extend(zip(ours, grads[3], strict=True))
        if needs_state:
            pairs.extend(((grad_h, grads[4]), (grad_c, grads[5])))
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None and a.requires_grad]
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
    *of_lists, of_norm = _grouped(result[6:], ctx.counts)
    nothing = [None] * 5
    return (
        *result[:4],
        None,
        *of_lists,
        None,
        None,
        *result[4:6],
        None,
        None,
        None,
        of_norm or None,
        *nothing,
    )


torch.library.register_autograd("pymtl::rnn_training", _training_backward, setup_context=_setup_training)
torch.library.register_autograd("pymtl::rnn_backward", _double_backward, setup_context=_setup_backward)
for _op in ("rnn_inference", "rnn_heads", "rnn_frozen", "rnn_pack"):
    torch.library.register_autograd(f"pymtl::{_op}", no_derivative(_op, "pymtl.ops.rnn with gradients enabled"))
