"""Recurrent layers, one step after another. Of bfloat16 numbers the sums and c are float32, h is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From the projections of the input and of h (with their biases), h and c: the next h and c.
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    mode: str = "LSTM",
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pymtl.ops.rnn` computes; see there for the shapes."""
    dense = batch_sizes is None
    sizes = [input.shape[1]] * input.shape[0] if dense else [int(s) for s in batch_sizes]
    inputs = input.shape[-1] // weight_ih[0].shape[1]
    tokens = input.reshape(-1, input.shape[-1]).chunk(inputs, dim=-1)
    readers = len(reverse) // inputs
    outputs, h_last, c_last = [], [], []
    for g, backwards in enumerate(reverse):
        biases = (bias_ih[g], bias_hh[g]) if len(bias_ih) > 0 else None
        output, h, c = _recurrence(
            tokens[g // readers],
            sizes,
            weight_ih[g],
            weight_hh[g],
            biases,
            backwards,
            STEPS[mode],
            None if h0 is None else h0[g],
            None if c0 is None else c0[g],
        )
        outputs.append(output)
        h_last.append(h)
        c_last.append(c)
    output = torch.cat(outputs, dim=-1)
    if dense:
        output = output.reshape(*input.shape[:2], output.shape[-1])
    h_n, c_n = torch.stack(h_last), torch.stack(c_last)
    return output, h_n, c_n if mode == "LSTM" else c_n[:0]


def _lstm(x: Tensor, q: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + q).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, q: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (q_r, q_z, q_n) = x.chunk(3, dim=-1), q.chunk(3, dim=-1)
    r, z = (x_r + q_r).sigmoid(), (x_z + q_z).sigmoid()
    n = (x_n + r * q_n).tanh()
    return n + z * (h - n), c


def _rnn_tanh(x: Tensor, q: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + q).tanh(), c


def _rnn_relu(x: Tensor, q: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + q).relu(), c


STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn_tanh, "RNN_RELU": _rnn_relu}


def _recurrence(
    tokens: Tensor,
    sizes: list[int],
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    reverse: bool,
    step: Step,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_size = weight_hh.shape[1]
    batch = sizes[0]
    dtype = tokens.dtype
    real = torch.float32 if dtype == torch.bfloat16 else dtype
    h = tokens.new_zeros(batch, hidden_size) if h0 is None else h0
    c = tokens.new_zeros(batch, hidden_size, dtype=real) if c0 is None else c0.to(real)
    weight_ih, weight_hh = weight_ih.to(real), weight_hh.to(real)
    bias_ih, bias_hh = (0, 0) if biases is None else (b.to(real) for b in biases)
    steps = list(tokens.to(real).split(sizes))
    outputs: list[Tensor] = [tokens.new_empty(0)] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        active = sizes[t]
        before = h[:active].to(real)
        x, q = steps[t] @ weight_ih.t() + bias_ih, before @ weight_hh.t() + bias_hh
        h_next, c_next = step(x, q, before, c[:active])
        outputs[t] = h_next.to(dtype)
        # Sequences that have no token at this step keep their state.
        h = torch.cat([outputs[t], h[active:]])
        c = torch.cat([c_next, c[active:]])
    return torch.cat(outputs), h, c.to(dtype)
