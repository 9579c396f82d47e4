"""What benchmarks of forward and training passes beside alternatives share: their options, their table, their JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pymtl.benchmark import results
from pymtl.commands import positive

PARTS = ("forward", "training")


def measure_shapes(
    description: str | None, title: str, shapes: Sequence[Any], measure: Callable[..., dict[str, Any]]
) -> None:
    """Measures each shape and prints how many times as long the alternatives take as ours, the first contender.

    Args:
        description: of the command, for ``--help``.
        title: of the table.
        shapes: the first arguments of ``measure``, whose last one is the number of runs.
        measure: gives a row: ``shape``, for each of ``PARTS`` what :func:`pymtl.benchmark.timing.interleaved` gives,
            and the ``operations`` of a forward pass.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive, default=11, metavar="N", help="of each contender (default: 11)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    console = Console(width=124)
    rows = [measure(*shape, arguments.runs) for shape in track(shapes, "shapes", console=console, transient=True)]
    names = list(rows[0][PARTS[0]])
    table = Table(title=title)
    table.add_column("shape", no_wrap=True)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        for part in PARTS:
            timed = row[part]
            cells = [f"{timed[name]['p50']:.2f} ({timed[name]['ratio']:.2f} x)" for name in names[1:]]
            shape = row["shape"] if part == PARTS[0] else ""
            table.add_row(shape, part, f"{timed[names[0]]['p50']:.2f}", *cells, end_section=part == PARTS[-1])
    console.print(table)
    for row in rows:
        seconds = row["forward"][names[0]]["p50"] / 1e3
        console.print(f"{row['shape']}: forward at {row['operations'] / seconds / 1e9:.0f} GFLOP/s", highlight=False)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)
