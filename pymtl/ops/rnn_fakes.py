"""The recurrent ops' results without their numbers, for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl.ops.autograd import check_one_device, fake_batch


class Blocks(NamedTuple):
    """Blocks of H numbers: gates, what a token keeps for the backward pass, and the gradient of a bias."""

    gates: int
    kept: int
    bias: int


BLOCKS = {"LSTM": Blocks(4, 4, 4), "GRU": Blocks(3, 4, 4), "RNN_TANH": Blocks(1, 0, 1), "RNN_RELU": Blocks(1, 0, 1)}


def blocks_of(mode: str, normalised: bool, zoneout_h: bool = False) -> Blocks:
    """Of a layer-normalised cell the products with W_hh are kept too; its bias gradient is followed by others'. Under
    zoneout a plain recurrent cell keeps what it computed."""
    gates, kept, bias = BLOCKS[mode]
    if zoneout_h and mode.startswith("RNN"):
        kept += 1
    if normalised:
        kept, bias = kept + gates, bias + 2 * gates + (2 if mode == "LSTM" else 0)
    return Blocks(gates, kept, bias)


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
    weight_ih: Sequence[Tensor] | None,
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor] | None,
    bias_hh: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    mode: str,
    h0: Tensor | None,
    c0: Tensor | None,
    dropout: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    norm: Sequence[Tensor] | None,
    allow_tf32: bool,
    packed: Tensor | None,
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
        dropout=dropout,
        zoneout_h=zoneout_h,
        zoneout_c=zoneout_c,
        norm=norm,
        packed=packed,
    )
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    batch = _fake_batch(input, batch_sizes, h0, c0)
    state = input.new_empty(recurrences, batch, hidden_size)
    output = input.new_empty(*input.shape[:-1], recurrences * hidden_size)
    return output, state, _fake_cell(state, mode)


def _fake_batch(input: Tensor, batch_sizes: Tensor | None, *states: Tensor | None) -> Any:
    """B, which an initial state tells too."""
    for state in states:
        if state is not None and batch_sizes is not None:
            return state.shape[1]
    return fake_batch(input, batch_sizes)


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
    dropout: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    norm: Sequence[Tensor] | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode)
    masks = (dropout, zoneout_h, zoneout_c)
    results = _rnn_inference_fake(input, batch_sizes, *weights, h0, c0, *masks, norm, allow_tf32, None)
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    tokens = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    gates = input.new_empty(
        recurrences, tokens, blocks_of(mode, norm is not None, zoneout_h is not None).kept * hidden_size
    )
    cells = input.new_empty(recurrences if mode == "LSTM" else 0, tokens, hidden_size, dtype=_real(input.dtype))
    return *results, gates, cells


def _real(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed with."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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
    dropout: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    norm: Sequence[Tensor] | None,
    allow_tf32: bool,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    recurrences, hidden_size = len(weight_hh), weight_hh[0].shape[1]
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias, needs_state = needs
    batch = _fake_batch(input, batch_sizes, h0, c0, grad_h_n, grad_c_n)
    state = input.new_empty(recurrences if needs_state else 0, batch, hidden_size)
    normalised = norm is not None
    bias = blocks_of(mode, normalised).bias
    return (
        input.new_empty(input.shape if needs_input else 0),
        [input.new_empty(w.shape) for w in weight_ih] if needs_weight_ih else [],
        [input.new_empty(w.shape) for w in weight_hh] if needs_weight_hh else [],
        [input.new_empty(bias * hidden_size) for _ in (weight_hh if normalised else bias_ih)] if needs_bias else [],
        state,
        _fake_cell(state, mode),
    )


@torch.library.register_fake("pymtl::rnn_heads")
def _rnn_heads_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weight_ih: Sequence[Tensor] | None,
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor] | None,
    bias_hh: Sequence[Tensor] | None,
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
        input,
        batch_sizes,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        reverse,
        mode,
        h0,
        c0,
        None,
        None,
        None,
        None,
        False,
        packed,
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
    norm: Sequence[Tensor] | None,
) -> Tensor:
    # The size depends on the width of the vector registers in use.
    return weight_hh[0].new_empty(torch.library.get_ctx().new_dynamic_size())
