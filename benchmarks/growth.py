"""How the LSTM's time grows with tokens, steps, batch, hidden size and the number of recurrences, each alone.

    python benchmarks/growth.py [--json FILE] [--plot FILE]

A bidirectional layer about B16 T50 I128 H128, forward and forward + backward, beside nn.LSTM; K encoders side by side
beside K nn.LSTM one after another. In the sweep of tokens the exponent of a power law fitted to the times is printed:
1 is linear.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved
from pymtl.sharing import ParallelLSTM

BASE = {"batch": 16, "steps": 50, "hidden size": 128, "encoders": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (100, 1_000, 10_000, 100_000, 1_000_000),  # N = B T, T = 50
    "steps": (8, 32, 128, 512, 2048),
    "batch": (1, 4, 16, 64, 256),
    "hidden size": (16, 32, 64, 128, 256, 512, 1024),
    "encoders": (1, 2, 4, 8, 16),
}
INPUT_SIZE = 128
TRAINED_TOKENS = 100_000  # above, the saved states of both would not fit into every machine's memory
SECONDS = 0.4


def points() -> Iterator[tuple[str, int, str]]:
    for sweep, values in SWEEPS.items():
        for value in values:
            yield sweep, value, "inference"
            if sweep != "tokens" or value <= TRAINED_TOKENS:
                yield sweep, value, "training"


def measure(sweep: str, value: int, mode: str) -> dict[str, Any]:
    """The times of one point."""
    sizes = {**BASE, **({"batch": value // BASE["steps"]} if sweep == "tokens" else {sweep: value})}
    count, hidden = sizes["encoders"], sizes["hidden size"]
    x = torch.randn(sizes["steps"], sizes["batch"], INPUT_SIZE)
    theirs = nn.ModuleList(nn.LSTM(INPUT_SIZE, hidden, bidirectional=True) for _ in range(count))
    ours = ParallelLSTM({f"e{k}": pymtl.convert(module) for k, module in enumerate(theirs)})
    batch_sizes = torch.full((sizes["steps"],), sizes["batch"])
    data = x.flatten(0, 1)

    def together(_: None) -> list[torch.Tensor]:
        return [ours(data, batch_sizes).tokens]

    def one_by_one(_: None) -> list[torch.Tensor]:
        return [module(x)[0] for module in theirs]

    def trained(run: Callable[[None], list[torch.Tensor]]) -> Callable[[None], Any]:
        def step(_: None) -> None:
            outputs = run(None)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

        return step

    training = mode == "training"
    contenders: dict[str, Callable[[None], Any]] = {"pymtl": together, "nn.LSTM": one_by_one}
    if training:
        contenders = {name: trained(run) for name, run in contenders.items()}
    operations = sizes["batch"] * sizes["steps"] * count * 2 * 8 * hidden * (INPUT_SIZE + hidden)
    about = operations * (3 if training else 1) * 2 / 1e11
    repeats = max(3, min(100, int(SECONDS / about)))
    with torch.inference_mode(not training):
        timed = interleaved(contenders, [None] * repeats, "pymtl")
    return {"sweep": sweep, "value": value, "mode": mode, "contenders": timed}


def exponent(rows: list[dict[str, Any]], name: str, mode: str) -> float:
    """Of the power of N that the times from 1,000 tokens on follow (least squares on logarithms)."""
    found = [r for r in rows if r["sweep"] == "tokens" and r["mode"] == mode and r["value"] >= 1000]
    x = torch.tensor([math.log(r["value"]) for r in found])
    y = torch.tensor([math.log(r["contenders"][name]["p50"]) for r in found])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def plot(rows: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    styles = {"inference": "-", "training": "--"}
    colours = {"pymtl": "tab:red", "nn.LSTM": "tab:blue"}
    for axes, sweep in zip(figure.subplots(1, len(SWEEPS), sharey=True), SWEEPS):
        for mode, style in styles.items():
            own = [row for row in rows if row["sweep"] == sweep and row["mode"] == mode]
            for name, colour in colours.items():
                axes.loglog(
                    [row["value"] for row in own],
                    [row["contenders"][name]["p50"] for row in own],
                    style,
                    color=colour,
                    marker=".",
                    label=f"{name}, {mode}",
                )
        axes.set_xlabel(sweep)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{machine['cpu']}, {machine['instruction set in use']}, {machine['threads']} threads", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    arguments = parser.parse_args()
    console = Console(width=110)
    every = list(points())
    rows = [measure(*point) for point in track(every, "points", console=console, disable=not console.is_terminal)]
    exponents = {
        f"{name}, {mode}": exponent(rows, name, mode)
        for name in ("pymtl", "nn.LSTM")
        for mode in ("inference", "training")
    }
    table = Table(title="Milliseconds")
    for heading in ("", "", "mode", "pymtl", "nn.LSTM", "times as fast"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for row in rows:
        timed = row["contenders"]
        times = [f"{timed[name]['p50']:.2f}" for name in ("pymtl", "nn.LSTM")]
        table.add_row(row["sweep"], f"{row['value']:,}", row["mode"], *times, f"{timed['nn.LSTM']['ratio']:.2f}")
    console.print(table)
    console.print("time ~ tokens^x:", ", ".join(f"{name} {value:.2f}" for name, value in exponents.items()))
    result = results.stamped(rows=rows, exponents=exponents)
    if arguments.json:
        results.write(result, arguments.json)
    if arguments.plot:
        plot(rows, result["machine"]).savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
