"""The LSTM ops: wrapper, fake kernels and derivatives.

Dimensions: N tokens, T steps, B sequences, I input size, H hidden size, G recurrences in one call (2 for a
bidirectional layer). An input is dense ``[T, B, I]`` with ``batch_sizes=None``, or packed ``[N, I]`` with
``batch_sizes`` ``[T]`` as in :class:`torch.nn.utils.rnn.PackedSequence`; the output has the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl import reference
from pymtl.ops.autograd import (
    below_autograd,
    below_autograd_in_backward,
    check_one_device,
    no_derivative,
    transforming,
    wants_gradient,
)
from pymtl.ops.dtypes import autocast, autocasts


class LSTMWeights(NamedTuple):
    """The weights of G recurrences, in nn.LSTM's shapes and gate order (i, f, g, o).

    ``weight_ih`` G tensors [4H, I], ``weight_hh`` G tensors [4H, H], ``bias_ih`` and ``bias_hh`` G tensors
    [4H] each or none at all, ``reverse`` G flags: walk each sequence from its last token to its first.
    """

    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]
    reverse: list[bool]

    def tensors(self) -> list[Tensor]:
        """All weights, flat."""
        return [*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh]


class LSTMHeadsResult(NamedTuple):
    """What :func:`lstm_heads` returns; a part that was not asked for is an empty tensor."""

    logits: Tensor
    mean: Tensor
    max: Tensor
    h_n: Tensor
    c_n: Tensor


def lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: LSTMWeights,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    inputs: int = 1,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs G recurrences over a batch (Hochreiter & Schmidhuber 1997; gates as in :class:`torch.nn.LSTM`).

    Args:
        input: [T, B, P*I], or packed [N, P*I] with ``batch_sizes``; float32, float64 or bfloat16 on the CPU. Sums
            and c of bfloat16 are float32 within the call, h is rounded at every step.
        batch_sizes: int64 [T], never increasing, on the CPU; or None.
        weights: of the G recurrences, of the input's dtype.
        h0, c0: [G, B, H] initial states; zeros if None.
        inputs: P, how many inputs stand side by side: the first G/P recurrences read the first, and so on.
        packed: these weights from :func:`lstm_pack`, to save the packing; not used where a gradient is wanted.

    Returns:
        ``output`` [T, B, G*H] or [N, G*H], and ``h_n``, ``c_n`` [G, B, H] at each sequence's own last step.

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.

    """
    _check_counts(weights)
    _check_inputs(input, weights, inputs)
    if autocasts():
        (input, h0, c0), weights = autocast([input, h0, c0]), _autocast(weights)
        packed = packed if packed is not None and packed.dtype == input.dtype else None
    if transforming():
        return reference.lstm(input, batch_sizes, *weights, h0, c0)
    if wants_gradient(input, h0, c0, *weights.tensors()):
        if torch.compiler.is_compiling():
            return torch.ops.pymtl.lstm_training(input, batch_sizes, *weights, h0, c0)[:3]
        return _LSTM.apply(input, batch_sizes, h0, c0, weights.reverse, *weights.tensors())[:3]
    with below_autograd():
        return torch.ops.pymtl.lstm_inference(input, batch_sizes, *weights, h0, c0, packed)


def _autocast(weights: LSTMWeights) -> LSTMWeights:
    return LSTMWeights(*(autocast(group) for group in weights[:4]), weights.reverse)


def _check_counts(weights: LSTMWeights) -> None:
    """The op checks this too, but the list of arguments autograd takes is flat."""
    count, biases = len(weights.weight_ih), len(weights.bias_ih)
    if count == 0:
        raise RuntimeError("weight_ih: expected at least one recurrence, got none")
    if len(weights.weight_hh) != count:
        raise RuntimeError(f"weight_hh: expected {count} tensors, got {len(weights.weight_hh)}")
    if biases not in (0, count):
        raise RuntimeError(f"bias_ih: expected {count} tensors or none, got {biases}")
    if len(weights.bias_hh) != biases:
        raise RuntimeError(f"bias_hh: expected {biases} tensors, got {len(weights.bias_hh)}")
    if len(weights.reverse) != count:
        raise RuntimeError(f"reverse: expected {count} flags, got {len(weights.reverse)}")


def _check_inputs(input: Tensor, weights: LSTMWeights, inputs: int) -> None:
    """The op tells the number of inputs from the sizes: a wrong size must not pass for another number."""
    count = len(weights.weight_ih)
    if inputs < 1 or count % inputs != 0:
        raise RuntimeError(f"inputs: expected a number that divides the {count} recurrences, got {inputs}")
    if input.dim() in (2, 3) and weights.weight_ih[0].dim() == 2:
        size, width = weights.weight_ih[0].shape[1], input.shape[-1]
        if size > 0 and width % size == 0 and width != inputs * size:
            expected = [*input.shape[:-1], inputs * size]
            raise RuntimeError(f"input: expected size {expected}, got {list(input.shape)}")


def lstm_heads(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: LSTMWeights,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    *,
    mean: bool = False,
    max: bool = False,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    packed: Tensor | None = None,
) -> LSTMHeadsResult:
    """:func:`lstm` (of one input) with the heads' projection and the pooling inside its walk; h is never written.

    For inference; it records no gradient. The results are the same bits as those of :func:`lstm` followed by
    :func:`pymtl.ops.heads` and :func:`pymtl.ops.pool`.

    Args:
        head_weight: [C, G*H] the weights of all token heads, stacked; None for none.
        head_bias: [C] or None.
        mean, max: whether to pool h over each sequence's tokens.

    Returns:
        ``logits`` [T, B, C] or [N, C], ``mean`` and ``max`` [B, G*H], ``h_n`` and ``c_n`` [G, B, H].

    Raises:
        NotImplementedError: within a transform of torch.func, which it would hide its derivative from.

    """
    _check_counts(weights)
    _check_inputs(input, weights, 1)
    if autocasts():
        (input, head_weight, head_bias, h0, c0) = autocast([input, head_weight, head_bias, h0, c0])
        weights = _autocast(weights)
        packed = packed if packed is not None and packed.dtype == input.dtype else None
    if transforming():
        raise NotImplementedError("pymtl.ops.lstm_heads is for inference: call lstm, heads and pool in torch.func")
    wants_gradient(input, h0, c0, head_weight, head_bias, *weights.tensors())  # raises for forward-mode tangents
    with below_autograd():
        return LSTMHeadsResult(
            *torch.ops.pymtl.lstm_heads(input, batch_sizes, *weights, h0, c0, packed, head_weight, head_bias, mean, max)
        )


def lstm_pack(weights: LSTMWeights) -> Tensor:
    """Packs weights for the argument ``packed`` of :func:`lstm`: a copy, good for the instruction set in use only."""
    return torch.ops.pymtl.lstm_pack(*weights)


def lstm_frozen(
    input: Tensor,
    batch_sizes: Tensor | None,
    packed: list[Tensor],
    hidden_size: int,
    reverse: list[bool],
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers as :func:`lstm` runs each, from packed weights alone. For inference: no gradient is recorded,
    and autocast changes nothing, since the packed weights have a dtype already.

    Args:
        input: [T, B, I], or packed [N, I] with ``batch_sizes``.
        batch_sizes: as for :func:`lstm`.
        packed: of each of L layers, from :func:`lstm_pack`; of the input's dtype.
        hidden_size: H.
        reverse: of a layer's G recurrences; all layers are alike.
        h0, c0: [L*G, B, H] initial states; zeros if None.

    Returns:
        The last layer's ``output`` [T, B, G*H] or [N, G*H]; ``h_n``, ``c_n`` [L*G, B, H].

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.
    """
    with below_autograd():
        return torch.ops.pymtl.lstm_frozen(input, batch_sizes, packed, hidden_size, reverse, h0, c0)


@torch.library.register_fake("pymtl::lstm_frozen")
def _lstm_frozen_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    packed: Sequence[Tensor],
    hidden_size: int,
    reverse: Sequence[bool],
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(input=input, batch_sizes=batch_sizes, packed=packed, h0=h0, c0=c0)
    batch = _fake_batch(input, batch_sizes, h0, c0)
    states = input.new_empty(len(packed) * len(reverse), batch, hidden_size)
    output = input.new_empty(*input.shape[:-1], len(reverse) * hidden_size)
    return output, states, torch.empty_like(states)


@torch.library.register_fake("pymtl::lstm_inference")
def _lstm_inference_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(
        input=input,
        batch_sizes=batch_sizes,
        weight_ih=weight_ih,
        weight_hh=weight_hh,
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        h0=h0,
        c0=c0,
        packed=packed,
    )
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    batch = _fake_batch(input, batch_sizes, h0, c0)
    state = input.new_empty(recurrences, batch, hidden_size)
    output = input.new_empty(*input.shape[:-1], recurrences * hidden_size)
    return output, state, torch.empty_like(state)


def _fake_batch(input: Tensor, batch_sizes: Tensor | None, *states: Tensor | None) -> Any:
    """B: of a packed batch it is data, not a shape, unless an initial state tells."""
    if batch_sizes is None:
        return input.shape[1]
    for state in states:
        if state is not None:
            return state.shape[1]
    return torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("pymtl::lstm_training")
def _lstm_training_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _lstm_inference_fake(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, h0, c0)
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    tokens = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    gates = input.new_empty(recurrences, tokens, 4 * hidden_size)
    cells = input.new_empty(recurrences, tokens, hidden_size, dtype=_real(input.dtype))
    return *results, gates, cells


def _real(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed with."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@torch.library.register_fake("pymtl::lstm_backward")
def _lstm_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    h0: Tensor | None,
    c0: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = needs
    batch = _fake_batch(input, batch_sizes, h0, c0, grad_h_n, grad_c_n)
    state = input.new_empty(recurrences if needs_state else 0, batch, hidden_size)
    return (
        input.new_empty(input.shape if needs_input else 0),
        [input.new_empty(w.shape) for w in weight_ih] if needs_weight_ih else [],
        [input.new_empty(w.shape) for w in weight_hh] if needs_weight_hh else [],
        [input.new_empty(4 * hidden_size) for _ in weight_hh] if needs_bias and len(bias_ih) > 0 else [],
        state,
        torch.empty_like(state),
    )


@torch.library.register_fake("pymtl::lstm_heads")
def _lstm_heads_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    mean: bool,
    max: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, h_n, c_n = _lstm_inference_fake(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, h0, c0)
    check_one_device(input=input, head_weight=head_weight, head_bias=head_bias)
    classes = 0 if head_weight is None else head_weight.shape[0]
    features, batch = output.shape[-1], h_n.shape[1]
    return (
        input.new_empty(*input.shape[:-1], classes),
        input.new_empty(batch if mean else 0, features),
        input.new_empty(batch if max else 0, features),
        h_n,
        c_n,
    )


@torch.library.register_fake("pymtl::lstm_pack")
def _lstm_pack_fake(
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
) -> Tensor:
    # The size depends on the width of the vector registers in use.
    return weight_ih[0].new_empty(torch.library.get_ctx().new_dynamic_size())


def _setup_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, h0, c0 = inputs
    hidden, _, _, gates, cells = output
    ctx.save_for_backward(input, batch_sizes, h0, c0, hidden, gates, cells, *weight_ih, *weight_hh, *bias_ih, *bias_hh)
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.reverse = list(reverse)
    ctx.has_bias = len(bias_ih) > 0
    ctx.needs = [
        input.requires_grad,
        any(w.requires_grad for w in weight_ih),
        any(w.requires_grad for w in weight_hh),
        any(b.requires_grad for b in (*bias_ih, *bias_hh)),
        any(s is not None and s.requires_grad for s in (h0, c0)),
    ]


def _training_backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    input, batch_sizes, h0, c0, hidden, gates, cells, *weights = ctx.saved_tensors
    count = len(ctx.reverse)
    with below_autograd_in_backward():
        grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0 = torch.ops.pymtl.lstm_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            input,
            batch_sizes,
            *_grouped(weights, count),
            ctx.reverse,
            h0,
            c0,
            hidden,
            gates,
            cells,
            ctx.needs,
        )
    nothing = [None] * count
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, _ = ctx.needs
    biases = (grad_bias if needs_bias else nothing) if ctx.has_bias else []
    return (
        grad_input if needs_input else None,
        None,
        grad_w_ih if needs_weight_ih else nothing,
        grad_w_hh if needs_weight_hh else nothing,
        biases,
        list(biases),
        None,
        grad_h0 if h0 is not None and h0.requires_grad else None,
        grad_c0 if c0 is not None and c0.requires_grad else None,
    )


class _LSTM(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        reverse: list[bool],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (input, batch_sizes, *_grouped(weights, len(reverse)), reverse, h0, c0)
        with below_autograd():
            output = torch.ops.pymtl.lstm_training(*inputs)
        _setup_training(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_input, _, *groups, _, grad_h0, grad_c0 = _training_backward(ctx, *grads)
        return grad_input, None, grad_h0, grad_c0, None, *(grad for group in groups for grad in group)


def _grouped(weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """weight_ih, weight_hh, bias_ih and bias_hh of a flat list; the biases may be missing."""
    groups = [list(weights[i : i + count]) for i in range(0, len(weights), count)]
    return groups + [[]] * (4 - len(groups))


torch.library.register_autograd("pymtl::lstm_training", _training_backward, setup_context=_setup_training)
for _op in ("lstm_inference", "lstm_heads", "lstm_frozen", "lstm_pack"):
    torch.library.register_autograd(f"pymtl::{_op}", no_derivative(_op, "pymtl.ops.lstm with gradients enabled"))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, reverse, h0, c0, _, _, _, needs = inputs
    ctx.save_for_backward(*grads, input, batch_sizes, h0, c0, *w_ih, *w_hh, *b_ih, *b_hh)
    ctx.reverse, ctx.needs = list(reverse), list(needs)


def _double_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """The derivative of the derivative, from the original inputs by the plain PyTorch recurrence.

    The saved gates are functions of the inputs too; taken as constants they would give wrong second
    derivatives, so nothing but the inputs is used here.
    """
    saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    *first, input, batch_sizes, h0, c0 = saved[:7]
    weights = saved[7:]
    count = len(ctx.reverse)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t if t is None or t.requires_grad else t.detach().requires_grad_()
            for t in (*first, input, h0, c0, *weights)
        ]
        # New views, so that the derivative stops here and not at what the caller made these from.
        views = [None if t is None else t.view_as(t) for t in leaves]
        seeds, (x, h, c), flat = views[:3], views[3:6], views[6:]
        lists = _grouped(flat, count)
        results = reference.lstm(x, batch_sizes, *lists, ctx.reverse, h, c)
        outputs = [r for r, s in zip(results, seeds, strict=True) if s is not None]
        seeds_given = [s for s in seeds if s is not None]
        wanted = [t for t in (x, *flat, h, c) if t is not None]
        gradients = iter(torch.autograd.grad(outputs, wanted, seeds_given, create_graph=True, allow_unused=True))
        grad_x = next(gradients)
        grad_lists = [[next(gradients) for _ in group] for group in lists]
        grad_h = next(gradients) if h is not None else None
        grad_c = next(gradients) if c is not None else None
        needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = ctx.needs
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        if needs_input:
            pairs.append((grad_x, grads[0]))
        for needed, ours, theirs in (
            (needs_weight_ih, grad_lists[0], grads[1]),
            (needs_weight_hh, grad_lists[1], grads[2]),
            (needs_bias, grad_lists[2], grads[3]),
        ):
            if needed:
                pairs.extend(zip(ours, theirs, strict=True))
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
    return (*result[:4], None, *_grouped(result[6:], count), None, result[4], result[5], None, None, None, None)


torch.library.register_autograd("pymtl::lstm_backward", _double_backward, setup_context=_setup_backward)
