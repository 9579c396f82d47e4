"""A batch whose sequences begin anew inside, beside what people write for it.

    python benchmarks/resets.py [--json FILE]

Recurrent policies are trained on such batches: an episode may end at any step, and the state before the next step is
zero. Three ways stand beside `pymtl.LSTM(x, hx, resets=mask)`: a loop over steps that clears the states, as the
policies of sb3-contrib run it; nn.LSTM called for each segment; and nn.LSTM on the segments as one PackedSequence.
Each is timed forward alone without gradients, and forward with backward. Ratios are medians of interleaved runs. Below
stands the rate at which ours computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from beside_ours import PARTS, measure_shapes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import pymtl
from pymtl.benchmark.timing import interleaved

SHAPES = (  # batch, steps, input size, hidden size, share of steps that are resets
    (128, 64, 256, 256, 0.01),
    (128, 64, 256, 256, 0.1),
    (32, 128, 64, 128, 0.01),
    (8, 64, 64, 64, 0.05),
    (32, 1, 64, 128, 0.05),  # a policy that acts
)
OURS = "pymtl, resets"


def contenders(x: Tensor, hx: tuple[Tensor, Tensor], resets: Tensor) -> dict[str, Callable[[bool], Tensor]]:
    """Each gives the output [T, B, H] in its own layout; told to train, it runs backward too."""
    size, hidden = x.shape[2], hx[0].shape[2]
    ours, plain = pymtl.LSTM(size, hidden), nn.LSTM(size, hidden)
    plain.load_state_dict(ours.state_dict())
    segments = []
    for row in range(x.shape[1]):
        cuts = [0, *(t for t in range(1, len(x)) if resets[t, row]), len(x)]
        segments += [(row, start, end) for start, end in itertools.pairwise(cuts)]

    def begin(row: int, start: int) -> tuple[Tensor, Tensor]:
        return tuple(s[:, row : row + 1] * float(start == 0 and not resets[0, row]) for s in hx)

    def with_resets() -> Tensor:
        return ours(x, hx, resets=resets)[0]

    def by_steps() -> Tensor:
        state, outputs = hx, []
        for step in range(len(x)):
            keep = (~resets[step]).float()[None, :, None]
            output, state = plain(x[step : step + 1], (state[0] * keep, state[1] * keep))
            outputs.append(output)
        return torch.cat(outputs)

    def one_by_one() -> Tensor:
        return torch.cat([plain(x[start:end, row : row + 1], begin(row, start))[0] for row, start, end in segments])

    def packed() -> Tensor:
        own = [x[start:end, row] for row, start, end in segments]
        states = tuple(torch.cat(each, 1) for each in zip(*(begin(row, start) for row, start, _ in segments)))
        return plain(pack_sequence(own, enforce_sorted=False), states)[0].data

    def run(module: nn.Module, function: Callable[[], Tensor]) -> Callable[[bool], Tensor]:
        def call(training: bool) -> Tensor:
            with torch.set_grad_enabled(training):
                output = function()
            if training:
                module.zero_grad()
                output.sum().backward()
            return output.detach()

        return call

    return {
        OURS: run(ours, with_resets),
        "a loop over steps": run(plain, by_steps),
        "nn.LSTM, one by one": run(plain, one_by_one),
        "nn.LSTM, packed": run(plain, packed),
    }


def measure(batch: int, steps: int, size: int, hidden: int, share: float, runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, resets = torch.randn(steps, batch, size), torch.rand(steps, batch) < share
    hx = (torch.randn(1, batch, hidden), torch.randn(1, batch, hidden))
    each = contenders(x, hx, resets)
    torch.testing.assert_close(each[OURS](False), each["a loop over steps"](False), rtol=1e-4, atol=1e-5)
    row = {"shape": f"B{batch} T{steps} I{size} H{hidden}, {share:.0%} resets", "resets": int(resets.sum())}
    block = 1 if steps > 1 else 50  # a policy acts again and again: caches and threads are warm
    for part in PARTS:
        row[part] = interleaved(each, [part == "training"] * (runs * block), OURS, block)
    row["operations"] = 2.0 * batch * steps * 4 * hidden * (size + hidden)
    return row


if __name__ == "__main__":
    measure_shapes(
        __doc__, "Sequences with resets: milliseconds, and how many times as long as with resets=", SHAPES, measure
    )
