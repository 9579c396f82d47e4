"""The LSTM recurrence, one step after another. Of bfloat16 numbers the sums and c are float32, h is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    reverse: Sequence[bool],
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pymtl.ops.lstm` computes; see there for the shapes."""
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
            None if h0 is None else h0[g],
            None if c0 is None else c0[g],
        )
        outputs.append(output)
        h_last.append(h)
        c_last.append(c)
    output = torch.cat(outputs, dim=-1)
    if dense:
        output = output.reshape(*input.shape[:2], output.shape[-1])
    return output, torch.stack(h_last), torch.stack(c_last)


def _recurrence(
    tokens: Tensor,
    sizes: list[int],
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    reverse: bool,
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
    bias = 0 if biases is None else biases[0].to(real) + biases[1].to(real)
    steps = list(tokens.to(real).split(sizes))
    outputs: list[Tensor] = [tokens.new_empty(0)] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        active = sizes[t]
        gates = steps[t] @ weight_ih.t() + h[:active].to(real) @ weight_hh.t() + bias
        i, f, g, o = gates.chunk(4, dim=-1)
        c_next = f.sigmoid() * c[:active] + i.sigmoid() * g.tanh()
        h_next = (o.sigmoid() * c_next.tanh()).to(dtype)
        outputs[t] = h_next
        # Sequences that have no token at this step keep their state.
        h = torch.cat([h_next, h[active:]])
        c = torch.cat([c_next, c[active:]])
    return torch.cat(outputs), h, c.to(dtype)
