"""The recurrent ops' results without their numbers, for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl.ops.autograd import check_one_device, fake_batch
from pymtl.ops.rnn_arguments import RNNArguments, cell_of
from pymtl.reference.rnn import accum_dtype


@torch.library.register_fake("pymtl::rnn_frozen")
def _rnn_frozen_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    prepacked: Tensor,
    layers: str,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device(input=input, batch_sizes=batch_sizes, prepacked=prepacked, h0=h0, c0=c0)
    batch = _fake_batch(input, batch_sizes, h0, c0)
    mode, hidden_size, count, directions = layers.split()
    states = input.new_empty(int(count) * len(directions), batch, int(hidden_size))
    output = input.new_empty(*input.shape[:-1], len(directions) * int(hidden_size))
    return output, states, _fake_cell(states, mode)


@torch.library.register_fake("pymtl::rnn_frozen_of")
def _rnn_frozen_of_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, _, _ = arguments
    return _rnn_frozen_fake(*given)


def _fake_cell(states: Tensor, mode: str) -> Tensor:
    return torch.empty_like(states) if cell_of(mode).has_cell else states.new_empty(0, *states.shape[1:])


@torch.library.register_fake("pymtl::rnn_inference")
def _rnn_inference_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, prepacked = arguments
    return _results(RNNArguments.of_op(*given), prepacked)


def _results(given: RNNArguments, prepacked: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n."""
    named = {name: value for name, value in given._asdict().items() if name not in ("reverse", "mode", "allow_tf32")}
    check_one_device(**named, prepacked=prepacked)
    recurrences, hidden_size = len(given.weight_hh), given.weight_hh[0].shape[1]
    batch = _fake_batch(given.input, given.batch_sizes, given.h0, given.c0)
    state = given.input.new_empty(recurrences, batch, hidden_size)
    output = given.input.new_empty(*given.input.shape[:-1], recurrences * hidden_size)
    return output, state, _fake_cell(state, given.mode)


def _fake_batch(input: Tensor, batch_sizes: Tensor | None, *states: Tensor | None) -> Any:
    """The batch size B, of a packed batch read from an initial state if there is one."""
    for state in states:
        if state is not None and batch_sizes is not None:
            return state.shape[1]
    return fake_batch(input, batch_sizes)


@torch.library.register_fake("pymtl::rnn_training")
def _rnn_training_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = RNNArguments.of_op(*arguments)
    input = given.input
    recurrences, hidden_size = len(given.weight_hh), given.weight_hh[0].shape[1]
    tokens = input.shape[0] if given.batch_sizes is not None else input.shape[0] * input.shape[1]
    cell = cell_of(given.mode, given.normalised)
    reserve = cell.reserve_with(given.zoneout_h is not None)
    gates = input.new_empty(recurrences, tokens, reserve * hidden_size)
    cells = input.new_empty(recurrences if cell.has_cell else 0, tokens, hidden_size, dtype=accum_dtype(input.dtype))
    return *_results(given), gates, cells


@torch.library.register_fake("pymtl::rnn_backward")
def _rnn_backward_fake(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    *arguments, _, _, _, needs = arguments
    given = RNNArguments.of_op(*arguments)
    input = given.input
    recurrences, hidden_size = len(given.weight_hh), given.weight_hh[0].shape[1]
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = needs
    batch = _fake_batch(input, given.batch_sizes, given.h0, given.c0, grad_h_n, grad_c_n)
    state = input.new_empty(recurrences if needs_state else 0, batch, hidden_size)
    biases = given.weight_hh if given.normalised else given.bias_ih
    bias = cell_of(given.mode, given.normalised).gradients * hidden_size
    return (
        input.new_empty(input.shape if needs_input else 0),
        [input.new_empty(w.shape) for w in given.weight_ih] if needs_weight_ih else [],
        [input.new_empty(w.shape) for w in given.weight_hh] if needs_weight_hh else [],
        [input.new_empty(bias) for _ in biases] if needs_bias else [],
        state,
        _fake_cell(state, given.mode),
    )


@torch.library.register_fake("pymtl::rnn_heads")
def _rnn_heads_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *given, prepacked, head_weight, head_bias, mean, max = arguments
    input = given[0]
    output, h_n, c_n = _results(RNNArguments.of_op(*given), prepacked)
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


@torch.library.register_fake("pymtl::rnn_prepack_narrow")
def _rnn_prepack_narrow_fake(_: Any, weight_hh: Sequence[Tensor], *__: Any) -> Tensor:
    return weight_hh[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


@torch.library.register_fake("pymtl::rnn_prepack")
def _rnn_prepack_fake(weight_ih: Sequence[Tensor], weight_hh: Sequence[Tensor], *_: Any) -> Tensor:
    # The size depends on the width of the vector registers in use.
    return weight_hh[0].new_empty(torch.library.get_ctx().new_dynamic_size())
