"""Instructions of recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl import ops
from pymtl.lowering.checks import refuse
from pymtl.lowering.program import Buffer, Program
from pymtl.recurrent import GRU, LSTM, RNN, Recurrent


def lower_recurrent(program: Program, layers: Recurrent, x: Buffer, name: str) -> Buffer:
    """The states of the last layer."""
    return lower_parallel(program, {name: layers}, x)


def lower_parallel(program: Program, encoders: dict[str, Recurrent], x: Buffer, own_inputs: bool = False) -> Buffer:
    """The states of encoders that are alike, side by side.

    Args:
        encoders: by the name of their tensors.
        x: what all of them read; or, with ``own_inputs``, what each reads, side by side.
    """
    for name, encoder in encoders.items():
        _check(encoder, name)
    first = next(iter(encoders.values()))
    for layer in range(first.num_layers):
        if first._pymtl_variants.layer_norm:
            count = len(encoders) if own_inputs else 1
            width = x.width // count
            parts = [
                _normalised_layer(program, encoder, layer, program.columns([(x, k % count * width, width)]), name)
                for k, (name, encoder) in enumerate(encoders.items())
            ]
            x = program.beside(parts)
        else:
            x = _layer(program, encoders, layer, x, len(encoders) if own_inputs else 1)
        own_inputs = True
    return x


def _check(encoder: Recurrent, name: str) -> None:
    if type(encoder) not in (LSTM, GRU, RNN):
        raise refuse(encoder, name, "a pymtl.LSTM, GRU or RNN")
    if encoder.proj_size > 0:
        raise ValueError(f"{name}: expected proj_size=0, got {encoder.proj_size}, which no file can hold")


def _layer(program: Program, encoders: dict[str, Recurrent], layer: int, x: Buffer, inputs: int) -> Buffer:
    recurrences: list[dict[str, Any]] = []
    for name, encoder in encoders.items():
        recurrences += _recurrences(program, encoder, layer, name)
    return _emit(program, next(iter(encoders.values())), x, recurrences, side_by_side=inputs if inputs > 1 else None)


def _normalised_layer(program: Program, encoder: Recurrent, layer: int, x: Buffer, name: str) -> Buffer:
    """Of layer-normalised cells the products with the input come first, and are normalised by themselves."""
    weights, norm = encoder.layer_weights(layer), encoder._layer_norm_of(layer)
    projected = program.linear(x, f"{name}.layer{layer}.ih", torch.cat(weights.weight_ih))
    gain = program.tensor(f"{name}.layer{layer}.gain_ih", torch.cat(norm.gain_ih))
    groups = len(weights.weight_ih)
    normal = program.emit("layer_norm", [projected], x.space, projected.width, gain=gain, groups=groups)
    return _emit(program, encoder, normal, _recurrences(program, encoder, layer, name), normalised=True)


def _emit(
    program: Program, encoder: Recurrent, x: Buffer, recurrences: Sequence[dict[str, Any]], **attributes: Any
) -> Buffer:
    variants = encoder._pymtl_variants
    return program.emit(
        "recurrent",
        [x],
        x.space,
        len(recurrences) * encoder.hidden_size,
        mode=encoder.mode,
        hidden_size=encoder.hidden_size,
        recurrences=list(recurrences),
        zoneout_h=variants.zoneout_h or None,
        zoneout_c=variants.zoneout_c or None,
        **attributes,
    )


def _recurrences(program: Program, encoder: Recurrent, layer: int, name: str) -> list[dict[str, Any]]:
    """The tensors of a layer's directions, by what they are."""
    weights, norm = encoder.layer_weights(layer), encoder._layer_norm_of(layer)
    narrow = program.weights
    lists: dict[str, list[Tensor]] = {"bias_ih": weights.bias_ih, "bias_hh": weights.bias_hh}
    if narrow is None:
        lists |= {"weight_ih": [] if norm is not None else weights.weight_ih, "weight_hh": weights.weight_hh}
    else:
        encoder._pymtl_check_narrow(encoder._weights(), narrow)
        lists |= ops.NarrowWeights.of(weights, narrow, norm)._asdict()
    if norm is not None:
        lists |= {"gain_hh": norm.gain_hh, "gain_c": norm.gain_c, "bias_c": norm.bias_c}
    ends = ["_reverse" if reverse else "" for reverse in weights.reverse]
    return [
        {
            **{
                key: program.tensor(f"{name}.{key}_l{layer}{end}", tensors[g])
                for key, tensors in lists.items()
                if len(tensors) > 0
            },
            "reverse": reverse,
        }
        for g, (end, reverse) in enumerate(zip(ends, weights.reverse))
    ]
