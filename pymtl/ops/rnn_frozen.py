"""Recurrent layers from prepacked weights.

Dimensions: N tokens, T steps, B sequences, I input size, H hidden size, G recurrences of a layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymtl import reference
from pymtl.ops.autograd import below_autograd, cpu_kernel, has_plain_numbers, is_watched
from pymtl.ops.rnn import RNNNorm, RNNWeights, check_counts


class RNNFrozen(NamedTuple):
    """A stack of L layers that are alike, for :func:`rnn_frozen`.

    ``prepacked``: of each layer from :func:`rnn_prepack`, one behind the other. ``layers`` describes them:
    ``"LSTM 128 2 fr"`` are two layers of mode LSTM and hidden size 128, each with a forward and a reverse recurrence.
    """

    prepacked: Tensor
    layers: str

    @staticmethod
    def of(prepacked: Sequence[Tensor], hidden_size: int, reverse: Sequence[bool], mode: str = "LSTM") -> RNNFrozen:
        """``prepacked`` layer by layer; ``reverse`` and ``mode`` as in :class:`RNNWeights`, of each layer."""
        if not prepacked:
            raise RuntimeError("prepacked: expected the weights of at least one layer, got none")
        directions = "".join("r" if reverses else "f" for reverses in reverse)
        whole = prepacked[0] if len(prepacked) == 1 else torch.cat(list(prepacked))
        return RNNFrozen(whole, f"{mode} {hidden_size} {len(prepacked)} {directions}")

    def first(self, layers: int, size: int) -> RNNFrozen:
        """Only so many layers, whose weights take ``size`` numbers; over the same memory."""
        mode, hidden_size, _, directions = self.layers.split()
        return RNNFrozen(self.prepacked[:size], f"{mode} {hidden_size} {layers} {directions}")


def rnn_prepack(weights: RNNWeights, norm: RNNNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Packs weights for the argument ``prepacked`` of :func:`rnn`: a copy, good for the instruction set in use only.

    Of layer-normalised cells these are not ``weight_ih`` and the gains, which :func:`rnn` reads as they are.

    Args:
        dtype: what the matrices are kept in, where the weights are float32: ``torch.bfloat16``, rounded, with sums in
            float32 as before; or ``torch.int8``, as :func:`pymtl.reference.int8_weight` makes them, times rows that
            are made 8-bit integers too (:func:`pymtl.reference.int8_linear`). None: their own dtype.

    Raises:
        RuntimeError: the weights are not float32, and ``dtype`` is another.
        ValueError: ``dtype`` is neither, or a number is not finite that is to become an integer.
    """
    own = weights.weight_hh[0].dtype if weights.weight_hh else None
    if dtype is not None and dtype != own:
        return NarrowWeights.of(weights, dtype, norm).prepack(weights)
    if norm is None:
        return torch.ops.pymtl.rnn_prepack(*weights, None)
    return torch.ops.pymtl.rnn_prepack([], *weights[1:], norm.within())


class NarrowWeights(NamedTuple):
    """The matrices of G recurrences in bfloat16, or in int8 with a scale for each row, float32 [gates*H]."""

    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    scale_ih: list[Tensor]
    scale_hh: list[Tensor]

    @staticmethod
    def of(weights: RNNWeights, dtype: torch.dtype, norm: RNNNorm | None = None) -> NarrowWeights:
        """As :func:`rnn_prepack` makes them of float32."""
        check_counts(weights, None)
        if dtype not in (torch.int8, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.int8, torch.bfloat16 or the weights' own, got {dtype}")
        named = {"weight_ih": weights.weight_ih if norm is None else [], "weight_hh": weights.weight_hh}
        for name, group in named.items():
            for g, weight in enumerate(group):
                if weight.dtype != torch.float32 or weight.dim() != 2 or weight.shape[1] == 0:
                    raise RuntimeError(
                        f"{name}[{g}]: expected a matrix of torch.float32 with columns to keep in {dtype}, got one of "
                        f"{weight.dtype} and size {list(weight.shape)}"
                    )
        if dtype == torch.bfloat16:
            return NarrowWeights(*([w.bfloat16() for w in group] for group in named.values()), [], [])
        ih, hh = (
            [reference.int8_weight(w, f"{name}[{g}]") for g, w in enumerate(group)] for name, group in named.items()
        )
        return NarrowWeights(*([w.numbers for w in ws] for ws in (ih, hh)), *([w.scale for w in ws] for ws in (ih, hh)))

    def prepack(self, weights: RNNWeights) -> Tensor:
        """For :func:`rnn_frozen`, with the biases of ``weights``."""
        return torch.ops.pymtl.rnn_prepack_narrow(*self, weights.bias_ih, weights.bias_hh, weights.mode)


def rnn_frozen(
    input: Tensor,
    batch_sizes: Tensor | None,
    frozen: RNNFrozen,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers as :func:`rnn` runs each, from prepacked weights alone. For inference: no gradient is recorded,
    and autocast changes nothing, since the prepacked weights have a dtype already.

    Args:
        input: [T, B, I], or packed [N, I] with ``batch_sizes``; of the prepacked weights' dtype.
        batch_sizes: as for :func:`rnn`.
        frozen: the L layers.
        h0, c0: [L*G, B, H] initial states; zeros if None.

    Returns:
        The last layer's ``output`` [T, B, G*H] or [N, G*H]; ``h_n``, ``c_n`` [L*G, B, H].

    Raises:
        RuntimeError: a size, dtype or device does not fit; the message names the argument.
    """
    with below_autograd():
        return _frozen_op(input, batch_sizes, frozen.prepacked, frozen.layers, h0, c0)


_frozen_op = torch.ops.pymtl.rnn_frozen.default  # the packet would look for it at every call
_frozen_kernel = cpu_kernel(_frozen_op)


def rnn_frozen_plain(
    input: Tensor, frozen: RNNFrozen, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rnn_frozen` of a batch [T, B, I] on the CPU in ordinary inference (``is_plain``), by the shortest way."""
    plain = has_plain_numbers(input) and (h0 is None or has_plain_numbers(h0)) and (c0 is None or has_plain_numbers(c0))
    if not plain or is_watched():
        return rnn_frozen(input, None, frozen, h0, c0)
    return _frozen_kernel(input, None, frozen.prepacked, frozen.layers, h0, c0)


def rnn_frozen_of(
    input: Tensor,
    batch_sizes: Tensor | None,
    frozen: RNNFrozen,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor],
    origin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rnn_frozen` within compiled code, which cannot ask by itself whether the weights are still those of
    ``parameters``.

    Args:
        parameters: what the weights were packed from.
        origin: int64, the versions of all of them when that was, and then their addresses.

    Raises:
        RuntimeError: besides, one of them has another version or address now.
    """
    return torch.ops.pymtl.rnn_frozen_of(input, batch_sizes, *frozen, h0, c0, list(parameters), origin)


@torch.library.impl("pymtl::rnn_frozen_of", "CPU")
def _rnn_frozen_of(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *of_rnn_frozen, parameters, origin = arguments
    if [*(p._version for p in parameters), *(p.data_ptr() for p in parameters)] != origin.tolist():
        raise RuntimeError(
            "parameters: expected them as they were when pymtl.freeze packed them, got changed or other ones: call "
            "pymtl.freeze again, or pymtl.unfreeze"
        )
    return torch.ops.pymtl.rnn_frozen(*of_rnn_frozen)
