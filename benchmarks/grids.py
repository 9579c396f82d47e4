"""The LSTM beside what one could use instead, over grids of shapes.

    python benchmarks/grids.py [--grid NAME]... [--json FILE]

Every grid is written down in GRIDS. The contenders take turns in one process, in blocks of calls with a pause before
each (threads of one that still spin would slow down the next); a ratio is the median over the blocks of their time
over ours. The limit of a shape is what its multiply-adds take at the measured peak; for those of a recurrence, if it
is more, what reading its weights once a step takes at the measured rate of the cache that holds them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.machine import peak_gflops, read_gigabytes

BLOCKS = 5
ROUND_PAUSE = 0.1  # seconds; the other runtimes' threads spin on for some tens of milliseconds
OTHER_RUNTIMES = ("OpenVINO", "ONNX Runtime")
SIZES = ((64, 64), (128, 128), (300, 256), (512, 512))  # I, H


@dataclass(frozen=True)
class Case:
    """A shape. ``fill``: about the mean length over the longest, of batches of variable length."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 2
    fill: float = 1.0

    def __str__(self) -> str:
        text = f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"
        text += f" {self.layers}x" if self.layers > 1 else " "
        text += "bi" if self.directions == 2 else "uni"
        return text + (f" fill {self.fill:.1f}" if self.fill < 1 else "")

    def lengths(self) -> Tensor:
        """Of sentences: lognormal about the mean that ``fill`` asks for, the longest T."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.empty(4096).log_normal_(0.0, 0.5, generator=generator)
        scale = 1.0
        for _ in range(30):  # cut off at T, the mean is below what was asked for
            lengths = (drawn * scale * self.fill * self.steps / drawn.mean()).round().clamp(1, self.steps)
            scale *= self.fill * self.steps / float(lengths.mean())
        lengths = lengths[torch.randperm(4096, generator=generator)[: self.batch]].long()
        lengths[0] = self.steps
        return lengths


@dataclass(frozen=True)
class Grid:
    """Cases, the contenders in them, and the pairs (ours, theirs, geometric mean and worst aimed at)."""

    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    pairs: tuple[tuple[str, str, float, float], ...]
    dtype: torch.dtype = torch.float32
    training: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def product(
    batches: Iterable[int], steps: Iterable[int], sizes: Any = SIZES, **others: Iterable[Any]
) -> tuple[Case, ...]:
    names = list(others)
    return tuple(
        Case(batch, step, *size, **dict(zip(names, rest)))
        for size, step, batch, *rest in itertools.product(sizes, steps, batches, *others.values())
    )


LATENCY = tuple(
    Case(batch, steps, *size, layers, directions)
    for size in SIZES
    for layers, directions in ((1, 1), (1, 2), (2, 2))
    for steps in (1, 8, 32, 128)
    for batch in (1, 2, 4)
)
VARIABLE = product((8, 32), (16, 50, 128), SIZES[:3], fill=(0.3, 0.5, 0.7))
DENSE = product((16, 32, 64, 128), (50,))
GRIDS = {
    "latency": Grid(
        LATENCY,
        ("pymtl", "pymtl frozen", "nn.LSTM", "ONNX Runtime", "OpenVINO"),
        (
            ("pymtl frozen", "nn.LSTM", 5.0, 2.0),
            ("pymtl", "nn.LSTM", 3.0, 1.1),
            ("pymtl frozen", "ONNX Runtime", 1.4, 1.0),
            ("pymtl frozen", "OpenVINO", 1.0, 1.0),
        ),
    ),
    "variable length, training": Grid(
        VARIABLE,
        ("pymtl", "nn.LSTM packed", "nn.LSTM padded"),
        (("pymtl", "nn.LSTM packed", 7.0, 2.5), ("pymtl", "nn.LSTM padded", 3.2, 1.6)),
        training=True,
    ),
    "variable length, inference": Grid(
        VARIABLE,
        ("pymtl", "nn.LSTM packed", "nn.LSTM padded"),
        (("pymtl", "the better of both", 2.5, 1.3),),
    ),
    "dense, training": Grid(DENSE, ("pymtl", "nn.LSTM"), (("pymtl", "nn.LSTM", 1.6, 1.2),), training=True),
    "dense, inference": Grid(DENSE, ("pymtl", "nn.LSTM"), (("pymtl", "nn.LSTM", 1.3, 1.0),)),
    "latency, bfloat16": Grid(
        tuple(case for case in LATENCY if case.layers == 1),
        ("pymtl", "pymtl frozen", "nn.LSTM"),
        (("pymtl", "nn.LSTM", 2.5, 1.2), ("pymtl frozen", "nn.LSTM", 2.5, 1.2)),
        torch.bfloat16,
    ),
    "compiled": Grid(
        (
            Case(1, 32, 128, 128),
            Case(1, 128, 300, 256),
            Case(4, 32, 128, 128),
            Case(16, 50, 128, 128),
            Case(32, 50, 300, 256),
        ),
        ("pymtl", "pymtl frozen", "torch.compile"),
        (("pymtl", "torch.compile", 1.0, 1.0), ("pymtl frozen", "torch.compile", 1.0, 1.0)),
    ),
    "dense, bfloat16, inference": Grid(DENSE, ("pymtl", "nn.LSTM"), (("pymtl", "nn.LSTM", 1.0, 0.97),), torch.bfloat16),
    "dense, bfloat16, training": Grid(
        DENSE, ("pymtl", "nn.LSTM"), (("pymtl", "nn.LSTM", 1.0, 0.97),), torch.bfloat16, training=True
    ),
}


def calls_of(case: Case, grid: Grid) -> dict[str, Callable[[], Any]]:
    """What each contender runs."""
    torch.manual_seed(0)
    theirs = nn.LSTM(case.input_size, case.hidden_size, case.layers, bidirectional=case.directions == 2)
    theirs = theirs.to(grid.dtype).eval()
    x = torch.randn(case.steps, case.batch, case.input_size, dtype=grid.dtype)
    ours = pymtl.convert(theirs)
    packed: Tensor | PackedSequence = x
    if case.fill < 1:
        packed = pack_padded_sequence(x, case.lengths(), enforce_sorted=False)
    run = _train if grid.training else _call
    threads = torch.get_num_threads()
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "pymtl": lambda: run(ours, packed),
        "pymtl frozen": lambda: run(pymtl.freeze(pymtl.convert(theirs)), packed),
        "nn.LSTM": lambda: run(theirs, x),
        "torch.compile": lambda: _compiled(theirs, x),
        "nn.LSTM packed": lambda: run(theirs, packed),
        "nn.LSTM padded": lambda: run(theirs, x),
        "ONNX Runtime": lambda: runtimes().onnx_runtime(theirs, x, threads),
        "OpenVINO": lambda: runtimes().open_vino(theirs, x, threads),
    }
    return {name: made[name]() for name in grid.contenders}


def runtimes() -> Any:
    import runtimes

    return runtimes


def _compiled(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Without allow_rnn the compiler leaves an nn.LSTM as it is. (With it, torch 2.13 fails in training.)"""
    with torch._dynamo.config.patch(allow_rnn=True), torch.inference_mode():
        call = _call(torch.compile(module), x)
        call()
    return call


def _call(module: nn.Module, x: Tensor | PackedSequence) -> Callable[[], Any]:
    return lambda: module(x)[0]


def _train(module: nn.Module, x: Tensor | PackedSequence) -> Callable[[], Any]:
    def step() -> None:
        module.zero_grad()
        output = module(x)[0]
        output = output.data if isinstance(output, PackedSequence) else output
        output.backward(torch.ones_like(output))

    return step


def blocks(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """For each contender the median milliseconds of a call in each block."""
    counts = {}
    for name, call in calls.items():
        call()
        once = min(timed(call) for _ in range(3))  # one call may be a disturbed one
        counts[name] = max(1, min(500, int(seconds / (len(calls) * BLOCKS) / once)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BLOCKS):
        time.sleep(ROUND_PAUSE if any(name.startswith(OTHER_RUNTIMES) for name in calls) else 0.0)
        for name, call in calls.items():
            time.sleep(0.003)
            call()
            taken[name].append(1e3 * statistics.median(timed(call) for _ in range(counts[name])))
    return taken


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def limit(case: Case, grid: Grid, tokens: int, peak: float, threads: int) -> float:
    """Milliseconds."""
    per_input = tokens * case.directions * 8 * case.hidden_size
    inputs = case.input_size + case.directions * case.hidden_size * (case.layers - 1)
    recurrent = case.layers * per_input * case.hidden_size
    size = 4 * case.hidden_size**2 * (2 if grid.dtype == torch.bfloat16 else 4)
    read = case.layers * case.directions * case.steps * size / read_rate(threads, size)
    flops = inputs * per_input
    walks = 1
    if grid.training:  # the weights' gradients need no walk
        flops, walks = 3 * flops + recurrent, 2
    return (flops / peak + walks * max(recurrent / peak, read)) * 1e-6


_peaks: dict[tuple[int, torch.dtype], float] = {}
_rates: dict[tuple[int, int], float] = {}


def peak_rate(threads: int, dtype: torch.dtype) -> float:
    """GFLOP/s: the best so far, since something else may have run beside a measurement."""
    found = peak_gflops(threads, str(dtype).removeprefix("torch."), runs=3)
    _peaks[threads, dtype] = max(found, _peaks.get((threads, dtype), 0.0))
    return _peaks[threads, dtype]


def read_rate(threads: int, size: int) -> float:
    if (threads, size) not in _rates:
        _rates[threads, size] = read_gigabytes(threads, size)
    return _rates[threads, size]


def measure(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each case of a grid."""
    grid = GRIDS[name]
    threads = torch.get_num_threads()
    for case in grid.cases:
        calls = calls_of(case, grid)
        with torch.inference_mode(not grid.training):
            if not grid.training:
                _agree(calls, grid)
            taken = blocks(calls, seconds)
        if "nn.LSTM packed" in taken:
            taken["the better of both"] = list(map(min, taken["nn.LSTM packed"], taken["nn.LSTM padded"]))
        tokens = int(case.lengths().sum()) if case.fill < 1 else case.batch * case.steps
        least = limit(case, grid, tokens, peak_rate(threads, grid.dtype), threads)
        yield {
            "grid": name,
            "shape": str(case),
            "tokens": tokens,
            "fill": tokens / (case.batch * case.steps),
            "ms": {who: statistics.median(times) for who, times in taken.items()},
            "ratios": {
                f"{own} / {other}": statistics.median(b / a for a, b in zip(taken[own], taken[other]))
                for own, other, _, _ in grid.pairs
            },
            "limit_ms": least,
            "shares_of_limit": {who: least / statistics.median(times) for who, times in taken.items()},
        }


def _agree(calls: Mapping[str, Callable[[], Any]], grid: Grid) -> None:
    """Contenders that computed something else would be no contenders."""
    outputs = {name: call() for name, call in calls.items() if name != "nn.LSTM padded"}
    outputs = {k: torch.as_tensor(v.data if isinstance(v, PackedSequence) else v).float() for k, v in outputs.items()}
    first = next(iter(outputs.values()))
    for name, output in outputs.items():
        difference = float((output - first).abs().max())
        if not difference < (0.05 if grid.dtype == torch.bfloat16 else 1e-4):
            raise SystemExit(f"{name}: differs from the others by {difference}")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each grid and pair the geometric mean and the worst of the ratios."""
    lines = []
    for name, grid in GRIDS.items():
        own = [row for row in rows if row["grid"] == name]
        for ours, theirs, mean, worst in grid.pairs if own else ():
            ratios = [(row["ratios"][f"{ours} / {theirs}"], row["shape"]) for row in own]
            lowest = min(ratios)
            lines.append(
                {
                    "grid": name,
                    "ours": ours,
                    "theirs": theirs,
                    "geometric mean": geometric_mean(ratio for ratio, _ in ratios),
                    "aim": mean,
                    "worst": lowest[0],
                    "aim of the worst": worst,
                    "worst shape": lowest[1],
                    "cases": len(ratios),
                    "at the limit": geometric_mean(row["ms"][theirs] / row["limit_ms"] for row in own),
                    "share of limit": statistics.median(row["shares_of_limit"][ours] for row in own),
                }
            )
    return lines


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(lines: list[dict[str, Any]]) -> Table:
    shown = Table(title="How many times as fast: geometric mean and worst (aim)")
    for heading in ("grid", "", "against", "mean", "worst", "worst at", "cases"):
        shown.add_column(heading, justify="right" if heading in ("mean", "worst", "cases") else "left")
    for line in lines:
        shown.add_row(
            line["grid"],
            line["ours"],
            line["theirs"],
            f"{line['geometric mean']:.2f} ({line['aim']:g})",
            f"{line['worst']:.2f} ({line['aim of the worst']:g})",
            line["worst shape"],
            str(line["cases"]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = "only this one; may be repeated: " + "; ".join(GRIDS)
    parser.add_argument("--grid", action="append", choices=GRIDS, metavar="NAME", help=chosen)
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="of each shape, about (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    console = Console(width=140)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in arguments.grid or GRIDS:
            task = progress.add_task(name, total=len(GRIDS[name].cases))
            for row in measure(name, arguments.seconds):
                rows.append(row)
                progress.advance(task)
    lines = summary(rows)
    console.print(table(lines))
    if arguments.json:
        results.write(results.stamped(rows=rows, summary=lines), arguments.json)


if __name__ == "__main__":
    main()
