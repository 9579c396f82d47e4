"""A stack of layers whose directions alternate, as basecallers and other streaming recognisers have it.

    python benchmarks/alternating.py [--json FILE]

Torch has no layer that reads from the end alone, so people turn the input around before such a layer and its output
after it. Beside `pymtl.LSTM(reverse=True)` stand that with nn.LSTM, and the same model after `pymtl.convert`. A ragged
batch is turned around sequence by sequence, with one gather for all of them. Each is timed forward alone without
gradients, and forward with backward. Ratios are medians of interleaved runs. Below stands the rate at which ours
computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from beside_ours import PARTS, measure_shapes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl.benchmark.timing import interleaved

LAYERS = 5
SHAPES = (  # batch, steps, hidden size, ragged
    (32, 400, 96, False),
    (16, 400, 384, False),
    (32, 400, 96, True),
    (1, 400, 96, False),
)
OURS = "pymtl, reverse"


class Alternating(nn.Module):
    """Reads from the end, from the start, and so on: [T, B, H] to [T, B, H]."""

    def __init__(self, hidden_size: int, own: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            pymtl.LSTM(hidden_size, hidden_size, reverse=place % 2 == 0) if own else nn.LSTM(hidden_size, hidden_size)
            for place in range(LAYERS)
        )
        self.own = own

    def forward(self, x: Tensor, lengths: Tensor | None, turned: Tensor | None) -> Tensor:
        for place, layer in enumerate(self.layers):
            if self.own:
                x, _ = layer(x, lengths=lengths)
                continue
            backwards = place % 2 == 0
            x = _turned(x, turned) if backwards else x
            x = _through(layer, x, lengths)
            x = _turned(x, turned) if backwards else x
        return x


def _through(layer: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return layer(x)[0]
    packed, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(packed, total_length=x.shape[0])[0]


def _turned(x: Tensor, places: Tensor | None) -> Tensor:
    """Each sequence turned around at its own place: ``places`` [T, B] says which step comes where, None all of them."""
    return x.flip(0) if places is None else x.gather(0, places.unsqueeze(2).expand_as(x))


def measure(batch: int, steps: int, hidden: int, ragged: bool, runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(steps, batch, hidden)
    lengths = torch.randint(steps // 4, steps + 1, (batch,)) if ragged else None
    turned = None
    if lengths is not None:
        time = torch.arange(steps)[:, None]
        turned = torch.where(time < lengths, lengths - 1 - time, time)
        x = x * (time < lengths)[:, :, None]
    ours, plain = Alternating(hidden, own=True), Alternating(hidden, own=False)
    plain.load_state_dict(ours.state_dict())
    models = {OURS: ours, "nn.LSTM, turned around": plain, "converted, turned around": pymtl.convert(plain)}

    def run(model: nn.Module) -> Callable[[bool], Tensor]:
        def call(training: bool) -> Tensor:
            with torch.set_grad_enabled(training):
                output = model(x, lengths, turned)
            if training:
                model.zero_grad()
                output.sum().backward()
            return output.detach()

        return call

    each = {name: run(model) for name, model in models.items()}
    for name in each:
        torch.testing.assert_close(each[name](False), each[OURS](False), rtol=1e-4, atol=1e-5)
    row = {"shape": f"B{batch} T{steps} H{hidden}{', ragged' if ragged else ''}"}
    for part in PARTS:
        row[part] = interleaved(each, [part == "training"] * runs, OURS)
    tokens = batch * steps if lengths is None else int(lengths.sum())
    row["operations"] = 2.0 * LAYERS * tokens * 4 * hidden * 2 * hidden
    return row


if __name__ == "__main__":
    measure_shapes(
        __doc__, f"{LAYERS} layers of alternating directions: milliseconds, and how many times as long", SHAPES, measure
    )
