"""The recurrent layers; their fake kernels stand in rnn_fakes, their derivatives in rnn_derivatives.

Dimensions: N tokens, T steps, B sequences, I input size, H hidden size, G recurrences in one call (2 for a
bidirectional layer). An input is dense ``[T, B, I]`` with ``batch_sizes=None``, or packed ``[N, I]`` with
``batch_sizes`` ``[T]`` as in :class:`torch.nn.utils.rnn.PackedSequence`; the output has the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pymtl.ops.rnn_fakes  # noqa: F401  (registers them)
from pymtl import reference
from pymtl.ops.autograd import below_autograd, needs_reference, wants_gradient
from pymtl.ops.dtypes import allows_tf32, autocast, autocast_dtype
from pymtl.ops.heads import heads
from pymtl.ops.rnn_arguments import RNNArguments, cell_of
from pymtl.ops.rnn_derivatives import RNN


class RNNWeights(NamedTuple):
    """The weights of G recurrences, in nn.LSTM's, nn.GRU's or nn.RNN's shapes and order of the gates.

    ``weight_ih`` G tensors [gates*H, I], ``weight_hh`` G tensors [gates*H, H], ``bias_ih`` and ``bias_hh`` G tensors
    [gates*H] each or none at all, ``reverse`` G flags: from each sequence's last token to its first. ``mode`` as
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


class RNNMasks(NamedTuple):
    """The masks of recurrent dropout and zoneout, of the input's dtype; None for an option that is off.

    ``dropout`` [G, B, H]: factors of h_{t-1} in its products with ``weight_hh``, the same at all steps of a sequence
    (Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks").
    ``zoneout_h`` and, for an LSTM, ``zoneout_c``, each of the output's size or [G*H]: the share of h_{t-1} or c_{t-1}
    that is kept, 0 or 1 in training and its expected value in evaluation (Krueger et al. 2017, "Zoneout: Regularizing
    RNNs by Randomly Preserving Hidden Activations").
    """

    dropout: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None


_NO_MASKS = RNNMasks()
_OF_HEADS = RNNArguments._fields.index("dropout")  # the arguments before it are those of rnn_heads too


class RNNNorm(NamedTuple):
    """The gains of layer-normalised cells (Ba et al. 2016, "Layer Normalization", equations 20 to 22):

    LN(W_ih x; gain_ih) and LN(W_hh h; gain_hh) stand for the two products, over all gates together, and an LSTM has
    h = o tanh(LN(c; gain_c) + bias_c). ``gain_ih`` and ``gain_hh`` G tensors [gates*H] each; of an LSTM ``gain_c`` G
    tensors [H] and ``bias_c`` G or none. What is added to a variance is 1e-5.
    """

    gain_ih: list[Tensor]
    gain_hh: list[Tensor]
    gain_c: list[Tensor]
    bias_c: list[Tensor]

    def within(self) -> list[Tensor]:
        """All that acts within the recurrence, flat: all but ``gain_ih``."""
        return [*self.gain_hh, *self.gain_c, *self.bias_c]


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
    prepacked: Tensor | None = None,
    masks: RNNMasks | None = None,
    norm: RNNNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs G recurrences over a batch, each as :class:`torch.nn.LSTM` (Hochreiter & Schmidhuber 1997),
    :class:`torch.nn.GRU` (Cho et al. 2014) or :class:`torch.nn.RNN` (Elman 1990) defines it.

    Args:
        input: [T, B, P*I], or packed [N, P*I] with ``batch_sizes``; float32, float64 or bfloat16 on the CPU, float16
            too on a GPU. For 16-bit inputs, sums and c are float32 within the call, and h is rounded at every step.
            On a GPU, persistent kernels keep the weights of an LSTM without masks and norm for the whole call, up to
            a hidden size that depends on the device (no float64); per-step kernels run everything else. Products of
            float32 on a GPU use TF32 where ``torch.backends.cudnn.rnn.fp32_precision`` allows it, which is the
            default. Within the recurrence, a persistent kernel uses TF32 only where that is faster, and a per-step
            product uses it where ``torch.backends.cuda.matmul`` allows it.
        batch_sizes: int64 [T], never increasing, on the CPU; or None. With an input on a GPU they may be on that GPU,
            where they are not checked: N may then be more than their sum, and has to be T*B if no h0 gives B.
        weights: of the G recurrences, of the input's dtype.
        h0, c0: [G, B, H] initial states; zeros if None. Only an LSTM has c.
        inputs: P, how many inputs stand side by side: the first G/P recurrences read the first, and so on.
        prepacked: these weights from :func:`rnn_prepack`, to save the packing; not used where a gradient is wanted.
            Kept in fewer bits, they give the results of those numbers.
        masks: of recurrent dropout and zoneout; they are constants to autograd.
        norm: makes the cells layer-normalised.

    Returns:
        ``output`` [T, B, G*H] or [N, G*H], and ``h_n``, ``c_n`` [G, B, H] at each sequence's own last step; of another
        mode than LSTM ``c_n`` is empty.

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.

    """
    check_counts(weights, c0)
    _check_inputs(input, weights, inputs)
    if masks is not None:
        masks = _checked_masks(RNNMasks(*masks), input, batch_sizes, weights, h0)
    if norm is not None:
        _check_norm(norm, input, weights, inputs)
    dtype = autocast_dtype(input)
    if dtype is not None:
        (input, h0, c0), weights = autocast([input, h0, c0], dtype), _autocast(weights, dtype)
        masks = None if masks is None else RNNMasks(*autocast(masks, dtype))
        norm = None if norm is None else RNNNorm(*(autocast(gains, dtype) for gains in norm))
        prepacked = prepacked if prepacked is not None and prepacked.dtype == input.dtype else None
    within: Sequence[Tensor] = ()
    if norm is not None:
        input = _normalised_projection(input, weights.weight_ih, norm.gain_ih, inputs)
        weights = weights._replace(weight_ih=[])
        within = norm.within()
    arguments = RNNArguments._make(
        (input, batch_sizes, *weights, h0, c0, *(masks or _NO_MASKS), within, allows_tf32(input))
    )
    differentiable = arguments.differentiable()
    if needs_reference(*differentiable):
        return reference.rnn(**arguments.for_reference())
    compiling = torch.compiler.is_compiling()
    if wants_gradient(*differentiable):
        if compiling:
            return torch.ops.pymtl.rnn_training(*arguments.for_compiler())[:3]
        return RNN.apply(arguments, *differentiable)[:3]
    if compiling:
        return torch.ops.pymtl.rnn_inference(*arguments.for_compiler(), prepacked)
    with below_autograd():
        return torch.ops.pymtl.rnn_inference(*arguments, prepacked)


def _normalised_projection(input: Tensor, weight_ih: list[Tensor], gain_ih: list[Tensor], inputs: int) -> Tensor:
    """What :func:`pymtl.reference.normalised_projection` computes, a row's bits independent of every other row."""
    readers = len(weight_ih) // inputs
    size = weight_ih[0].shape[1]
    rows = input.flatten(0, -2).split(size, dim=-1)
    normal = []
    for g, (weight, gain) in enumerate(zip(weight_ih, gain_ih)):
        projected = heads(rows[g // readers], weight, None)
        if projected.dtype in (torch.bfloat16, torch.float16):
            projected = projected.float()
        # Not layer_norm's own product with the gain, whose gradient depends on the number of threads.
        normal.append((F.layer_norm(projected, gain.shape) * gain).to(input.dtype))
    whole = normal[0] if len(normal) == 1 else torch.cat(normal, dim=-1)
    return whole.view(*input.shape[:-1], whole.shape[-1])


def _autocast(weights: RNNWeights, dtype: torch.dtype) -> RNNWeights:
    return RNNWeights(*(autocast(group, dtype) for group in weights[:4]), weights.reverse, weights.mode)


def check_counts(weights: RNNWeights, c0: Tensor | None) -> None:
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
    if not cell_of(weights.mode).has_cell and c0 is not None:
        raise RuntimeError("c0: expected None, since only an LSTM has a cell state, got a tensor")
    if len(weights.reverse) != count:
        raise RuntimeError(f"reverse: expected {count} flags, got {len(weights.reverse)}")


def _checked_masks(
    masks: RNNMasks, input: Tensor, batch_sizes: Tensor | None, weights: RNNWeights, h0: Tensor | None
) -> RNNMasks:
    """The op checks sizes and dtypes; the plain recurrence would broadcast."""
    if not cell_of(weights.mode).has_cell and masks.zoneout_c is not None:
        raise RuntimeError("zoneout_c: expected None, since only an LSTM has a cell state, got a tensor")
    for name, mask in masks._asdict().items():
        if mask is not None and mask.requires_grad:
            raise RuntimeError(f"{name}: expected a mask that requires no gradient, got one that does")
    if needs_reference(input, *weights.tensors()):
        count, hidden_size = len(weights.weight_hh), weights.weight_hh[0].shape[1]
        if batch_sizes is None:
            batch = input.shape[1]
        elif batch_sizes.is_cuda:
            batch = input.shape[0] // batch_sizes.shape[0] if h0 is None else h0.shape[1]
        else:
            batch = int(batch_sizes[0])
        _check_size("dropout", masks.dropout, [count, batch, hidden_size])
        for name in ("zoneout_h", "zoneout_c"):
            mask, width = getattr(masks, name), count * hidden_size
            _check_size(name, mask, [width] if mask is not None and mask.dim() == 1 else [*input.shape[:-1], width])
    return masks


def _check_size(name: str, tensor: Tensor | None, expected: list[int]) -> None:
    if tensor is not None and list(tensor.shape) != expected:
        raise RuntimeError(f"{name}: expected size {expected}, got {list(tensor.shape)}")


def _check_norm(norm: RNNNorm, input: Tensor, weights: RNNWeights, inputs: int) -> None:
    """What the projection reads is checked here, what the recurrence reads by the op."""
    count = len(weights.weight_hh)
    cells = count if weights.mode == "LSTM" else 0
    for name, given, expected in (
        ("gain_ih", norm.gain_ih, (count,)),
        ("gain_hh", norm.gain_hh, (count,)),
        ("gain_c", norm.gain_c, (cells,)),
        ("bias_c", norm.bias_c, (0, cells)),
    ):
        if len(given) not in expected:
            raise RuntimeError(f"{name}: expected {' or '.join(map(str, expected))} tensors, got {len(given)}")
    if input.dim() not in (2, 3):
        raise RuntimeError(f"input: expected [T, B, I] or packed [N, I], got {input.dim()}-D")
    first, hidden = weights.weight_ih[0], weights.weight_hh[0]
    if first.dim() != 2 or hidden.dim() != 2 or first.shape[1] == 0 or hidden.shape[1] == 0:
        raise RuntimeError(
            f"weight_ih and weight_hh: expected matrices with columns, got {list(first.shape)} and {list(hidden.shape)}"
        )
    rows = cell_of(weights.mode).gates * hidden.shape[1]
    _check_size("input", input, [*input.shape[:-1], inputs * first.shape[1]])
    for g, (weight, gain) in enumerate(zip(weights.weight_ih, norm.gain_ih)):
        _check_size(f"weight_ih[{g}]", weight, [rows, first.shape[1]])
        _check_size(f"gain_ih[{g}]", gain, [rows])
        for name, tensor in ((f"weight_ih[{g}]", weight), (f"gain_ih[{g}]", gain)):
            if autocast_dtype(input) is None and tensor.dtype != input.dtype:
                raise RuntimeError(f"{name}: expected dtype {input.dtype}, got {tensor.dtype}")
            if tensor.device != input.device:
                raise RuntimeError(f"{name}: expected a tensor on {input.device}, got one on {tensor.device}")


def _check_inputs(input: Tensor, weights: RNNWeights, inputs: int) -> None:
    """Checks the input's size: the op infers ``inputs`` from it, so a wrong size could pass for another number."""
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
    prepacked: Tensor | None = None,
) -> RNNHeadsResult:
    """:func:`rnn` (of one input) with the heads' projection and the pooling inside its time loop; h is never written.

    For inference; it records no gradient. The results are the same bits as those of :func:`rnn` followed by
    :func:`pymtl.ops.heads` and :func:`pymtl.ops.pool`.

    Args:
        head_weight: [C, G*H] the weights of all token heads, stacked; None for none.
        head_bias: [C] or None.
        mean, max: whether to pool h over each sequence's tokens.

    Returns:
        ``logits`` [T, B, C] or [N, C], ``mean`` and ``max`` [B, G*H], ``h_n`` and ``c_n`` [G, B, H].

    Raises:
        NotImplementedError: within a torch.func transform, or for a tensor with a forward-mode tangent, since the op
            would drop the derivative.

    """
    check_counts(weights, c0)
    _check_inputs(input, weights, 1)
    dtype = autocast_dtype(input)
    if dtype is not None:
        (input, head_weight, head_bias, h0, c0) = autocast([input, head_weight, head_bias, h0, c0], dtype)
        weights = _autocast(weights, dtype)
        prepacked = prepacked if prepacked is not None and prepacked.dtype == input.dtype else None
    if needs_reference(input, h0, c0, head_weight, head_bias, *weights.tensors()):
        raise NotImplementedError(
            "pymtl.ops.rnn_heads is for inference: call rnn, heads and pool in torch.func and for tangents"
        )
    with below_autograd():
        arguments = RNNArguments(input, batch_sizes, *weights, h0, c0)
        layer = (arguments.for_compiler() if torch.compiler.is_compiling() else arguments)[:_OF_HEADS]
        return RNNHeadsResult(*torch.ops.pymtl.rnn_heads(*layer, prepacked, head_weight, head_bias, mean, max))
