"""How much faster more threads make the LSTM, where the batch or the directions allow it.

    python benchmarks/threads.py [--json FILE]

The same calls with 1, 2, 4, … threads take turns; a ratio is the median of the time with one thread over that with
more. nn.LSTM beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved

# B, T, I, H, directions
SHAPES = (
    (1, 128, 300, 256, 1),
    (1, 128, 300, 256, 2),
    (2, 64, 128, 128, 1),
    (16, 50, 64, 64, 2),
    (16, 50, 128, 128, 1),
    (16, 50, 128, 128, 2),
    (32, 50, 300, 256, 2),
)
SECONDS = 1.5


def counts() -> list[int]:
    """1, 2, 4, … up to all threads."""
    most = torch.get_num_threads()
    return sorted({min(2**k, most) for k in range(most.bit_length() + 1)})


def measure(shape: tuple[int, int, int, int, int], mode: str, threads: list[int]) -> dict[str, Any]:
    """The times of one shape, by contender and number of threads."""
    batch, steps, inputs, hidden, directions = shape
    x = torch.randn(steps, batch, inputs)
    theirs = nn.LSTM(inputs, hidden, bidirectional=directions == 2)
    timed = {}
    for name, module in (("pymtl", pymtl.convert(theirs)), ("nn.LSTM", theirs)):

        def call(count: int, module: nn.Module = module) -> Callable[[None], None]:
            def run(_: None) -> None:
                torch.set_num_threads(count)
                module.zero_grad()
                output = module(x)[0]
                if mode == "training":
                    output.backward(torch.ones_like(output))

            return run

        calls = {str(count): call(count) for count in threads}
        operations = batch * steps * directions * 8 * hidden * (inputs + hidden) * (3 if mode == "training" else 1)
        repeats = max(10, min(500, int(SECONDS / (operations * len(calls) / 5e10))))
        with torch.inference_mode(mode == "inference"):
            timed[name] = interleaved(calls, [None] * repeats, "1")
    torch.set_num_threads(threads[-1])
    name = f"B{batch} T{steps} I{inputs} H{hidden} {'bi' if directions == 2 else 'uni'}"
    gains = {
        f"{who}, {count} threads": 1 / own[str(count)]["ratio"] for who, own in timed.items() for count in threads[1:]
    }
    return {"shape": name, "mode": mode, "contenders": timed, "times as fast": gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    console = Console(width=110)
    threads = counts()
    points = [(shape, mode) for shape in SHAPES for mode in ("inference", "training")]
    shown = track(points, "shapes", console=console, disable=not console.is_terminal)
    rows = [measure(*point, threads) for point in shown]
    table = Table(title="Times as fast as with one thread")
    for heading in ("shape", "mode", *rows[0]["times as fast"]):
        table.add_column(heading, justify="left" if heading in ("shape", "mode") else "right")
    for row in rows:
        table.add_row(row["shape"], row["mode"], *(f"{gain:.2f}" for gain in row["times as fast"].values()))
    console.print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
