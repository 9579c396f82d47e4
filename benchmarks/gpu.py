"""The LSTM beside nn.LSTM (cuDNN) on a GPU, over the shapes that the project aims at.

    python benchmarks/gpu.py [--seconds S] [--grid NAME]... [--json FILE]

Times are CUDA events', contenders take turns, a ratio is the median over the rounds of nn.LSTM's time over ours. Beside
them stand the device's limits, measured first: a large matrix product, a copy, and what an exchange between the blocks
of a cluster takes, which no step of a recurrence over several blocks can undercut.

A case that fails or hangs costs no other, and the file has every row as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pymtl.benchmark import results
from pymtl.benchmark.gpu import Case, Limits, device_facts, limits, measure, table_of
from pymtl.benchmark.guarded import guarded
from pymtl.commands import wide_console

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Grid:
    """Cases, and how many times as fast as nn.LSTM ours should be: forward, and forward and backward."""

    cases: tuple[Case, ...]
    forward: float
    training: float


DENSE = tuple(
    Case(batch, steps, size, size, dtype)
    for dtype in HALF
    for size in (256, 512)
    for steps in (64, 512)
    for batch in (1, 8, 32, 64)
)
FLOAT = tuple(
    Case(batch, steps, size, size, torch.float32, tf32=tf32)
    for tf32 in (False, True)
    for size in (256, 512)
    for steps in (64, 512)
    for batch in (1, 8, 32)
)
GRIDS = {
    "16 bits": Grid(DENSE, 3.0, 2.0),
    "16 bits, lengths": Grid(
        tuple(replace(case, fill=fill) for case in DENSE if case.batch > 1 for fill in (0.55, 0.7)), 4.0, 3.0
    ),
    "float32": Grid(FLOAT, 2.0, 1.5),
    "H 1024": Grid(tuple(Case(batch, 256, 1024, 1024) for batch in (1, 8, 32, 64)), 1.5, 1.2),
    "cuDNN's best": Grid((Case(16, 1024, 768, 768, torch.float16, directions=1),), 1.0, 1.0),
    "others": Grid(
        tuple(
            Case(batch, 100, 300, size, dtype, directions)
            for dtype in (torch.bfloat16, torch.float32)
            for directions in (1, 2)
            for size in (64, 128, 300, 768)
            for batch in (1, 16, 128, 512)
        ),
        1.0,
        1.0,
    ),
}


@dataclass(frozen=True)
class Work:
    """What a process of its own measures."""

    grid: str
    case: Case
    limits: Limits
    seconds: float

    def rows(self) -> Iterator[dict[str, Any]]:
        return measure(self.case, self.limits, self.seconds)


def limits_rows(small: bool) -> Iterator[dict[str, Any]]:
    yield dataclasses.asdict(limits(small=small))


def run(names: list[str], found: Limits, seconds: float, small: bool, until: float) -> Iterator[tuple[Work, dict]]:
    cases = [(name, case.small() if small else case) for name in names for case in GRIDS[name].cases]
    work = [Work(name, case, found, seconds) for name, case in dict.fromkeys(cases)]
    for each, row in guarded(Work.rows, work, 30 + 20 * seconds, until):
        yield each, {"grid": each.grid, "case": str(each.case), **row}


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each grid and mode: the geometric mean and the worst ratio, and the aim."""
    for name, grid in GRIDS.items():
        for mode, aim in (("forward", grid.forward), ("forward+backward", grid.training)):
            ratios = {row["case"]: row["ratio"] for row in rows if row["grid"] == name and row.get("mode") == mode}
            if ratios:
                worst = min(ratios, key=ratios.__getitem__)
                mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
                yield {"grid": name, "mode": mode, "mean": mean, "worst": ratios[worst], "at": worst, "aim": aim}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    yield table_of([row for row in result["rows"] if "error" not in row])
    table = Table(title="Times as fast as nn.LSTM")
    for heading in ("grid", "mode", "mean", "worst", "aim", "at"):
        table.add_column(heading, no_wrap=True)
    for row in result["summary"]:
        numbers = (f"{row[key]:.2f}" for key in ("mean", "worst", "aim"))
        table.add_row(row["grid"], row["mode"], *numbers, row["at"])
    yield table
    failed = [row for row in result["rows"] if "error" in row]
    if failed:
        table = Table(title="Not measured")
        for heading in ("case", "why"):
            table.add_column(heading)
        for row in failed:
            table.add_row(row["case"], Text(row["error"]))
        yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="append", choices=list(GRIDS), help="may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each row (default: 0.3)")
    parser.add_argument("--limit", type=float, metavar="S", help="begin no more rows after so many seconds in all")
    parser.add_argument("--small", action="store_true", help="tiny shapes, only to see whether all of it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    until = math.inf if arguments.limit is None else time.monotonic() + arguments.limit
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: there is no GPU, or this torch has no CUDA")
    console = wide_console(160)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    ((_, measured),) = guarded(limits_rows, [arguments.small], 60, until)
    console.print(measured)
    found = Limits({}, 0.0, {}, {}) if "error" in measured else Limits(**measured)
    names = arguments.grid or list(GRIDS)
    rows: list[dict[str, Any]] = []
    result = results.stamped(**device_facts(), limits=dataclasses.asdict(found), rows=rows, summary=[])
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {name: progress.add_task(name, total=2 * len(GRIDS[name].cases)) for name in names}
        for work, row in run(names, found, arguments.seconds, arguments.small, until):
            rows.append(row)
            result["summary"] = list(summary(rows))
            if arguments.json:
                results.write(result, arguments.json)
            progress.advance(tasks[work.grid])
    for table in tables(result):
        console.print(table)


if __name__ == "__main__":
    main()
