"""The recurrent layers: wrapper, fake kernels and derivatives.

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


class _Blocks(NamedTuple):
    """Blocks of H numbers: of what a token keeps for the backward pass, and of the gradient of a bias."""

    kept: int
    bias: int


_BLOCKS = {"LSTM": _Blocks(4, 4), "GRU": _Blocks(4, 4), "RNN_TANH": _Blocks(0, 1), "RNN_RELU": _Blocks(0, 1)}


class RNNWeights(NamedTuple):
    """The weights of G recurrences, in nn.LSTM's, nn.GRU's or nn.RNN's shapes and order of the gates.

    ``weight_ih`` G tensors [gates*H, I], ``weight_hh`` G tensors [gates*H, H], ``bias_ih`` and ``bias_hh`` G tensors
    [gates*H] each or none at all, ``reverse`` G flags: walk each sequence from its last token to its first. ``mode`` as
    :class:`torch.nn.RNNBase` calls it: ``"LSTM"`` (4 gates: i, f, g, o), ``"GRU"`` (3: r, z, n), ``"RNN_TANH"`` or
    ``"RNN_RELU"`` (1).
    """

    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]
    reverse: list[bool]
    mode: str = "LSTM"

    def tensors(self) -> list[Tensor]:
        """All weights, flat."""
        return [*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh]


class RNNHeadsResult(NamedTuple):
    """What :func:`rnn_heads` returns; a part that was not asked for is an empty tensor."""

    logits: Tensor
    mean: Tensor
    max: Tensor
    h_n: Tensor
    c_n: Tensor


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: RNNWeights,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    inputs: int = 1,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs G recurrences over a batch, each as :class:`torch.nn.LSTM` (Hochreiter & Schmidhuber 1997),
    :class:`torch.nn.GRU` (Cho et al. 2014) or :class:`torch.nn.RNN` (Elman 1990) defines it.

    Args:
        input: [T, B, P*I], or packed [N, P*I] with ``batch_sizes``; float32, float64 or bfloat16 on the CPU. Sums
            and c of bfloat16 are float32 within the call, h is rounded at every step.
        batch_sizes: int64 [T], never increasing, on the CPU; or None.
        weights: of the G recurrences, of the input's dtype.
        h0, c0: [G, B, H] initial states; zeros if None. Only an LSTM has c.
        inputs: P, how many inputs stand side by side: the first G/P recurrences read the first, and so on.
        packed: these weights from :func:`rnn_pack`, to save the packing; not used where a gradient is wanted.

    Returns:
        ``output`` [T, B, G*H] or [N, G*H], and ``h_n``, ``c_n`` [G, B, H] at each sequence's own last step; of another
        mode than LSTM ``c_n`` is empty.

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.

    """
    _check_counts(weights, c0)
    _check_inputs(input, weights, inputs)
    if autocasts():
        (input, h0, c0), weights = autocast([input, h0, c0]), _autocast(weights)
        packed = packed if packed is not None and packed.dtype == input.dtype else None
    if transforming():
        return reference.rnn(input, batch_sizes, *weights, h0, c0)
    if wants_gradient(input, h0, c0, *weights.tensors()):
        if torch.compiler.is_compiling():
            return torch.ops.pymtl.rnn_training(input, batch_sizes, *weights, h0, c0)[:3]
        return _RNN.apply(input, batch_sizes, h0, c0, weights.reverse, weights.mode, *weights.tensors())[:3]
    with below_autograd():
        return torch.ops.pymtl.rnn_inference(input, batch_sizes, *weights, h0, c0, packed)


def _autocast(weights: RNNWeights) -> RNNWeights:
    return RNNWeights(*(autocast(group) for group in weights[:4]), weights.reverse, weights.mode)


def _check_counts(weights: RNNWeights, c0: Tensor | None) -> None:
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
    if weights.mode not in _BLOCKS:
        raise RuntimeError(f"mode: expected one of {', '.join(_BLOCKS)}, got {weights.mode}")
    if weights.mode != "LSTM" and c0 is not None:
        raise RuntimeError("c0: expected none, which only an LSTM has")
    if len(weights.reverse) != count:
        raise RuntimeError(f"reverse: expected {count} flags, got {len(weights.reverse)}")


def _check_inputs(input: Tensor, weights: RNNWeights, inputs: int) -> None:
    """The op tells the number of inputs from the sizes: a wrong size must not pass for another number."""
    count = len(weights.weight_ih)
    if inputs < 1 or count % inputs != 0:
        raise RuntimeError(f"inputs: expected a number that divides the {count} recurrences, got {inputs}")
    if input.dim() in (2, 3) and weights.weight_ih[0].dim() == 2:
        size, width = weights.weight_ih[0].shape[1], input.shape[-1]
        if size > 0 and width % size == 0 and width != inputs * size:
            expected = [*input.shape[:-1], inputs * size]
            raise RuntimeError(f"input: expected size {expected}, got {list(input.shape)}")


def rnn_heads(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: RNNWeights,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    *,
    mean: bool = False,
    max: bool = False,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    packed: Tensor | None = None,
) -> RNNHeadsResult:
    """:func:`rnn` (of one input) with the heads' projection and the pooling inside its walk; h is never written.

    For inference; it records no gradient. The results are the same bits as those of :func:`rnn` followed by
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
    _check_counts(weights, c0)
    _check_inputs(input, weights, 1)
    if autocasts():
        (input, head_weight, head_bias, h0, c0) = autocast([input, head_weight, head_bias, h0, c0])
        weights = _autocast(weights)
        packed = packed if packed is not None and packed.dtype == input.dtype else None
    if transforming():
        raise NotImplementedError("pymtl.ops.rnn_heads is for inference: call rnn, heads and pool in torch.func")
    wants_gradient(input, h0, c0, head_weight, head_bias, *weights.tensors())  # raises for forward-mode tangents
    with below_autograd():
        return RNNHeadsResult(
            *torch.ops.pymtl.rnn_heads(input, batch_sizes, *weights, h0, c0, packed, head_weight, head_bias, mean, max)
        )


def rnn_pack(weights: RNNWeights) -> Tensor:
    """Packs weights for the argument ``packed`` of :func:`rnn`: a copy, good for the instruction set in use only."""
    return torch.ops.pymtl.rnn_pack(*weights)


def rnn_frozen(
    input: Tensor,
    batch_sizes: Tensor | None,
    packed: list[Tensor],
    hidden_size: int,
    reverse: list[bool],
    mode: str = "LSTM",
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers as :func:`rnn` runs each, from packed weights alone. For inference: no gradient is recorded,
    and autocast changes nothing, since the packed weights have a dtype already.

    Args:
        input: [T, B, I], or packed [N, I] with ``batch_sizes``.
        batch_sizes: as for :func:`rnn`.
        packed: of each of L layers, from :func:`rnn_pack`; of the input's dtype.
        hidden_size: H.
        reverse, mode: of a layer's G recurrences; all layers are alike.
        h0, c0: [L*G, B, H] initial states; zeros if None.

    Returns:
        The last layer's ``output`` [T, B, G*H] or [N, G*H]; ``h_n``, ``c_n`` [L*G, B, H].

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.
    """
    with below_autograd():
        return torch.ops.pymtl.rnn_frozen(input, batch_sizes, packed, hidden_size, reverse, mode, h0, c0)


@torch.library.register_fake("pymtl::rnn_frozen")
def _rnn_frozen_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    packed: Sequence[Tensor],
    hidden_size: int,
    reverse: Sequence[bool],
    mode: str,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(input=input, batch_sizes=batch_sizes, packed=packed, h0=h0, c0=c0)
    batch = _fake_batch(input, batch_sizes, h0, c0)
    states = input.new_empty(len(packed) * len(reverse), batch, hidden_size)
    output = input.new_empty(*input.shape[:-1], len(reverse) * hidden_size)
    return output, states, _fake_cell(states, mode)


def _fake_cell(states: Tensor, mode: str) -> Tensor:
    return torch.empty_like(states) if mode == "LSTM" else states.new_empty(0, *states.shape[1:])


@torch.library.register_fake("pymtl::rnn_inference")
def _rnn_inference_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str,
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
    return output, state, _fake_cell(state, mode)


def _fake_batch(input: Tensor, batch_sizes: Tensor | None, *states: Tensor | None) -> Any:
    """B: of a packed batch it is data, not a shape, unless an initial state tells."""
    if batch_sizes is None:
        return input.shape[1]
    for state in states:
        if state is not None:
            return state.shape[1]
    return torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("pymtl::rnn_training")
def _rnn_training_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _rnn_inference_fake(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0, c0)
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    tokens = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    gates = input.new_empty(recurrences, tokens, _BLOCKS[mode].kept * hidden_size)
    cells = input.new_empty(recurrences if mode == "LSTM" else 0, tokens, hidden_size, dtype=_real(input.dtype))
    return *results, gates, cells


def _real(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed with."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@torch.library.register_fake("pymtl::rnn_backward")
def _rnn_backward_fake(
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
    mode: str,
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
        [input.new_empty(_BLOCKS[mode].bias * hidden_size) for _ in bias_ih] if needs_bias else [],
        state,
        _fake_cell(state, mode),
    )


@torch.library.register_fake("pymtl::rnn_heads")
def _rnn_heads_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    mean: bool,
    max: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, h_n, c_n = _rnn_inference_fake(
        input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0, c0
    )
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


@torch.library.register_fake("pymtl::rnn_pack")
def _rnn_pack_fake(
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str,
) -> Tensor:
    # The size depends on the width of the vector registers in use.
    return weight_ih[0].new_empty(torch.library.get_ctx().new_dynamic_size())


def _setup_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0, c0 = inputs
    hidden, _, _, gates, cells = output
    ctx.save_for_backward(input, batch_sizes, h0, c0, hidden, gates, cells, *weight_ih, *weight_hh, *bias_ih, *bias_hh)
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.reverse, ctx.mode = list(reverse), mode
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
        grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0 = torch.ops.pymtl.rnn_backward(
            grad_output,
            grad_h_n,
            grad_c_n if ctx.mode == "LSTM" else None,
            input,
            batch_sizes,
            *_grouped(weights, count),
            ctx.reverse,
            ctx.mode,
            h0,
            c0 if ctx.mode == "LSTM" else None,
            hidden,
            gates,
            cells,
            ctx.needs,
        )
    nothing = [None] * count
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, _ = ctx.needs
    grad_b_ih, grad_b_hh = [], []
    if ctx.has_bias:
        grad_b_ih, grad_b_hh = _bias_gradients(grad_bias, ctx.mode) if needs_bias else (nothing, nothing)
    return (
        grad_input if needs_input else None,
        None,
        grad_w_ih if needs_weight_ih else nothing,
        grad_w_hh if needs_weight_hh else nothing,
        grad_b_ih,
        list(grad_b_hh),
        None,
        None,
        grad_h0 if h0 is not None and h0.requires_grad else None,
        grad_c0 if c0 is not None and c0.requires_grad else None,
    )


def _bias_gradients(gradients: list[Tensor], mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of b_ih and b_hh: equal, but for what a GRU's reset gate stands between."""
    if mode != "GRU":
        return gradients, gradients
    apart = [g.unflatten(0, (4, -1)) for g in gradients]  # of b_in, b_ir, b_iz and b_hn
    return [g[[1, 2, 0]].flatten() for g in apart], [g[1:].flatten() for g in apart]


def _stacked_biases(of_b_ih: list[Tensor], of_b_hh: list[Tensor], mode: str) -> list[Tensor]:
    """The gradients that the op gives, from those of b_ih and b_hh."""
    if mode != "GRU":
        return of_b_ih
    pairs = ((i.chunk(3), h.chunk(3)) for i, h in zip(of_b_ih, of_b_hh))
    return [torch.cat([i[2], i[0], i[1], h[2]]) for i, h in pairs]


class _RNN(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        reverse: list[bool],
        mode: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (input, batch_sizes, *_grouped(weights, len(reverse)), reverse, mode, h0, c0)
        with below_autograd():
            output = torch.ops.pymtl.rnn_training(*inputs)
        _setup_training(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_input, _, *groups, _, _, grad_h0, grad_c0 = _training_backward(ctx, *grads)
        return grad_input, None, grad_h0, grad_c0, None, None, *(grad for group in groups for grad in group)


def _grouped(weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """weight_ih, weight_hh, bias_ih and bias_hh of a flat list; the biases may be missing."""
    groups = [list(weights[i : i + count]) for i in range(0, len(weights), count)]
    return groups + [[]] * (4 - len(groups))


torch.library.register_autograd("pymtl::rnn_training", _training_backward, setup_context=_setup_training)
for _op in ("rnn_inference", "rnn_heads", "rnn_frozen", "rnn_pack"):
    torch.library.register_autograd(f"pymtl::{_op}", no_derivative(_op, "pymtl.ops.rnn with gradients enabled"))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, reverse, mode, h0, c0, _, _, _, needs = inputs
    ctx.save_for_backward(*grads, input, batch_sizes, h0, c0, *w_ih, *w_hh, *b_ih, *b_hh)
    ctx.reverse, ctx.mode, ctx.needs = list(reverse), mode, list(needs)


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
        results = reference.rnn(x, batch_sizes, *lists, ctx.reverse, ctx.mode, h, c)
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
            (needs_bias, _stacked_biases(grad_lists[2], grad_lists[3], ctx.mode), grads[3]),
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
    return (*result[:4], None, *_grouped(result[6:], count), None, None, result[4], result[5], None, None, None, None)


torch.library.register_autograd("pymtl::rnn_backward", _double_backward, setup_context=_setup_backward)
