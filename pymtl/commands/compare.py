"""``pymtl compare``: variants of a configuration beside one another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pymtl.commands import positive, wide_console

EXAMPLES = """examples:
  pymtl compare examples/product_reviews/reviews.toml --over sharing=hard,soft,cross_stitch --seeds 3 --single-task
  pymtl compare my.toml --over sharing=hard,mmoe --over balancing=ew,uw,famo --jobs 2
  pymtl compare my.toml --over model.hidden_size=64,128,256

Every run has a folder under --out; a comparison that was interrupted goes on where it stopped. 'delta' is the mean
relative change from each task trained by itself with the same settings (--single-task).
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "compare",
        help="train variants of a configuration with several seeds, side by side",
        description="Train every combination of some settings with several seeds and show the mean and standard "
        "deviation of each task's test score.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file with a test set")
    parser.add_argument(
        "--over", action="append", default=[], metavar="KEY=A,B,...", help="a setting and its values; may be repeated"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each variant (default: 3)")
    parser.add_argument("--single-task", action="store_true", help="train each task by itself too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all variants")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder that paths are relative to (default: the configuration's own)"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of a run (default: torch's / jobs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/compare- and the name)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pymtl.benchmark import results
    from pymtl.training import comparison
    from pymtl.training.errors import ConfigError
    from pymtl.training.plots import comparison_plot
    from pymtl.training.run import Run

    console = wide_console()
    folder = arguments.out or Path("runs", f"compare-{arguments.config.stem}")
    grid = comparison.variants(arguments.config, arguments.over, arguments.set, arguments.single_task, arguments.data)
    for variant in grid:
        sets = variant.raw.get("datasets") or {"": variant.raw["data"]}
        if not all(data.get("test") for data in sets.values()):
            raise ConfigError(f"{arguments.config}: expected a test set to compare on")
    threads = arguments.threads or max(1, torch.get_num_threads() // arguments.jobs)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs")
        for done, total in comparison.run_all(grid, arguments.seeds, folder, arguments.jobs, threads, arguments.device):
            progress.update(task, completed=done, total=total)
    result = results.stamped(**comparison.summary(grid, arguments.seeds, folder), jobs=arguments.jobs, threads=threads)
    run_of_all = Run(folder)
    run_of_all.write_json("compare.json", result)
    run_of_all.write_text("compare.md", markdown(result))
    run_of_all.save_figure("compare.png", comparison_plot(result))
    console.print(_table(result))
    console.print(f"{folder}: compare.json, compare.md, compare.png", markup=False, soft_wrap=True)
    return 0


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heading, and a row for each variant."""
    from pymtl.commands.train import shown

    names: list[str] = []
    for row in result["rows"]:
        names += [name for name in row["scores"] if name not in names]
    with_delta = any(row.get("delta") for row in result["rows"])
    heading = ["variant", *(name.replace("/", " ") for name in names), *(["delta"] if with_delta else []), "ms a step"]
    rows = []
    for row in result["rows"]:
        cells = [row["variant"]]
        for name in names:
            value = row["scores"].get(name)
            cells.append("" if value is None else f"{shown(name, value['mean'])} ± {shown(name, value['std'])}")
        if with_delta:
            change = row.get("delta")
            cells.append("" if change is None else f"{100 * change['mean']:+.2f} % ± {100 * change['std']:.2f} %")
        cells.append(f"{row['step_ms']['mean']:.2f}")
        rows.append(cells)
    return heading, rows


def markdown(result: dict[str, Any]) -> str:
    """The table for a document."""
    heading, rows = _cells(result)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in lines)


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    heading, rows = _cells(result)
    table = Table(title=f"Test scores, mean ± standard deviation over {result['seeds']} seeds")
    table.add_column(heading[0], no_wrap=True)
    for name in heading[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table
