"""Recurrent layers, one step after another. Of bfloat16 numbers the sums and c are float32, h is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pymtl.reference.quantised import Int8Weight, int8_linear

# From the projections of the input and of h (with their biases), h, c, and what stands for tanh of c: the next h and c.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor | Int8Weight],
    weight_hh: Sequence[Tensor | Int8Weight],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str = "LSTM",
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    dropout: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    norm: Sequence[Tensor] | None = None,
    gain_ih: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pymtl.ops.rnn` computes; see there for the shapes.

    ``norm`` holds the gains of layer-normalised cells' products with ``weight_hh``; of an LSTM then the gains of c, and
    its biases or none. Without ``gain_ih`` and ``weight_ih`` their input is what :func:`normalised_projection` gives.
    Rows of the input behind the last token, and sequences without one, are left alone. Weights may be 8-bit integers.
    """
    if len(gain_ih) > 0:
        inputs = input.shape[-1] // weight_ih[0].shape[1]
        input, weight_ih = normalised_projection(input, weight_ih, gain_ih, inputs), ()
    dense = batch_sizes is None
    sizes = [input.shape[1]] * input.shape[0] if dense else batch_sizes.tolist()
    beyond = 0 if dense else input.shape[0] - sum(sizes)
    rows = input.shape[0]
    if beyond > 0:
        input = input[:-beyond]
    alive = sizes[0] if sizes else 0  # of the sequences
    told = next((state.shape[1] for state in (h0, c0) if state is not None), None)
    batch = told if told is not None else rows // len(sizes) if beyond > 0 else alive
    count = len(reverse)
    inputs = input.shape[-1] // _columns(weight_ih[0]) if len(weight_ih) > 0 else count
    tokens = input.reshape(-1, input.shape[-1]).chunk(inputs, dim=-1)
    valid = tokens[0].shape[0]
    readers = count // inputs
    outputs, h_last, c_last = [], [], []
    for g, backwards in enumerate(reverse):
        weights = _Weights(
            weight_ih[g] if len(weight_ih) > 0 else None,
            weight_hh[g],
            (bias_ih[g], bias_hh[g]) if len(bias_ih) > 0 else None,
            tuple(norm[g::count]) if norm is not None else (),
        )
        hidden_size = _columns(weight_hh[g])
        own = slice(g * hidden_size, (g + 1) * hidden_size)
        zoneouts = (None if z is None else z[..., own].reshape(-1, hidden_size)[:valid] for z in (zoneout_h, zoneout_c))
        masks = _Masks(None if dropout is None else dropout[g], *zoneouts)
        output, h, c = _recurrence(
            tokens[g // readers],
            sizes,
            weights,
            backwards,
            STEPS[mode],
            None if h0 is None else h0[g, :alive],
            None if c0 is None else c0[g, :alive],
            masks,
        )
        outputs.append(output)
        h_last.append(torch.cat([h, h.new_zeros(batch - alive, hidden_size) if h0 is None else h0[g, alive:]]))
        c_last.append(torch.cat([c, c.new_zeros(batch - alive, hidden_size) if c0 is None else c0[g, alive:]]))
    output = torch.cat(outputs, dim=-1)
    if dense:
        output = output.reshape(*input.shape[:2], output.shape[-1])
    elif beyond > 0:
        output = F.pad(output, (0, 0, 0, beyond))
    h_n, c_n = torch.stack(h_last), torch.stack(c_last)
    return output, h_n, c_n if mode == "LSTM" else c_n[:0]


def normalised_projection(
    input: Tensor, weight_ih: Sequence[Tensor], gain_ih: Sequence[Tensor], inputs: int = 1
) -> Tensor:
    """LN(W_ih x; gain_ih) of every recurrence (Ba et al. 2016): [..., P*I] to [..., G*gates*H]."""
    readers = len(weight_ih) // inputs
    parts = input.chunk(inputs, dim=-1)
    return torch.cat(
        [
            (_normalised(F.linear(parts[g // readers], w).to(accum_dtype(input.dtype))) * gain).to(input.dtype)
            for g, (w, gain) in enumerate(zip(weight_ih, gain_ih, strict=True))
        ],
        dim=-1,
    )


class _Weights(NamedTuple):
    """Of one recurrence."""

    weight_ih: Tensor | Int8Weight | None
    weight_hh: Tensor | Int8Weight
    biases: tuple[Tensor, Tensor] | None
    norm: tuple[Tensor, ...]


class _Masks(NamedTuple):
    """Of one recurrence: [B, H]; [N, H] or [1, H]."""

    dropout: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None


def _lstm(x: Tensor, q: Tensor, h: Tensor, c: Tensor, squash: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + q).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * squash(c), c


def _gru(x: Tensor, q: Tensor, h: Tensor, c: Tensor, _: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (q_r, q_z, q_n) = x.chunk(3, dim=-1), q.chunk(3, dim=-1)
    r, z = (x_r + q_r).sigmoid(), (x_z + q_z).sigmoid()
    n = (x_n + r * q_n).tanh()
    return n + z * (h - n), c


def _rnn_tanh(x: Tensor, q: Tensor, h: Tensor, c: Tensor, _: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return (x + q).tanh(), c


def _rnn_relu(x: Tensor, q: Tensor, h: Tensor, c: Tensor, _: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return (x + q).relu(), c


STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn_tanh, "RNN_RELU": _rnn_relu}


def _recurrence(
    tokens: Tensor,
    sizes: list[int],
    weights: _Weights,
    reverse: bool,
    step: Step,
    h0: Tensor | None,
    c0: Tensor | None,
    masks: _Masks,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_size = _columns(weights.weight_hh)
    batch = sizes[0]
    dtype = tokens.dtype
    accum = accum_dtype(dtype)
    h = tokens.new_zeros(batch, hidden_size) if h0 is None else h0
    c = tokens.new_zeros(batch, hidden_size, dtype=accum) if c0 is None else c0.to(accum)
    # Cast once: the gradient of a cast at every step would be summed in bfloat16.
    weight_ih = None if weights.weight_ih is None else _cast(weights.weight_ih, accum)
    weight_hh = _cast(weights.weight_hh, accum)
    bias_ih, bias_hh = (0, 0) if weights.biases is None else (b.to(accum) for b in weights.biases)
    gain_hh, *norm_c = (n.to(accum) for n in weights.norm) if weights.norm else (None,)
    steps = list(tokens.to(accum).split(sizes))
    zoneouts = [
        None if z is None else list(z.to(accum).split(sizes)) if z.shape[0] > 1 else [z.to(accum)] * len(sizes)
        for z in masks[1:]
    ]
    outputs: list[Tensor] = [tokens.new_empty(0)] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        active = sizes[t]
        before, c_before = h[:active].to(accum), c[:active]
        operand = before
        if masks.dropout is not None:
            operand = (before * masks.dropout[:active].to(accum)).to(dtype).to(accum)
        x = steps[t] if weight_ih is None else _product(steps[t], weight_ih)
        q = _product(operand, weight_hh)
        if gain_hh is not None:
            q = _normalised(q) * gain_hh
        squash = (lambda c: _affine(_normalised(c), *norm_c).tanh()) if norm_c else torch.tanh
        h_next, c_next = step(x + bias_ih, q + bias_hh, before, c_before, squash)
        keep_h, keep_c = (None if z is None else z[t] for z in zoneouts)
        if keep_h is not None:
            h_next = _mixed(keep_h, before, h_next)
        if keep_c is not None:
            c_next = _mixed(keep_c, c_before, c_next)
        outputs[t] = h_next.to(dtype)
        # Sequences that have no token at this step keep their state.
        h = torch.cat([outputs[t], h[active:]])
        c = torch.cat([c_next, c[active:]])
    return torch.cat(outputs), h, c.to(dtype)


def _columns(weight: Tensor | Int8Weight) -> int:
    return (weight.numbers if isinstance(weight, Int8Weight) else weight).shape[1]


def _cast(weight: Tensor | Int8Weight, dtype: torch.dtype) -> Tensor | Int8Weight:
    return weight if isinstance(weight, Int8Weight) else weight.to(dtype)


def _product(x: Tensor, weight: Tensor | Int8Weight) -> Tensor:
    return int8_linear(x, weight) if isinstance(weight, Int8Weight) else x @ weight.t()


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of a dtype are computed in, and c."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _mixed(d: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """One of the two where d is 1 or 0, even if the other is infinite."""
    mix = d * before + (1 - d) * now
    return torch.where(d == 1, before, torch.where(d == 0, now, mix))


def _affine(x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    return x * gain if bias is None else x * gain + bias
