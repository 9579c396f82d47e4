"""``pymtl compare``: variants of a configuration beside one another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pymtl.commands import positive, use_machine, wide_console
from pymtl.training.markdown import table

EXAMPLES = """examples:
  pymtl compare examples/product_reviews/reviews.toml --over sharing=hard,soft,cross_stitch --seeds 3 --single-task
  pymtl compare my.toml --over sharing=hard,mmoe --over balancing=ew,uw,famo --jobs 2
  pymtl compare my.toml --over tasks=mood+topic,mood+topic+tags --single-task --seeds 5
  pymtl compare my.toml --over model.hidden_size=64,128,256 --tune training.learning_rate=1e-3,3e-3
  pymtl compare my.toml --over data.limit=100,300,1000 --single-task --set training.epoch_steps=100

Every run has a folder under --out; a comparison that was interrupted goes on where it stopped.

With --single-task each task is trained by itself too: one encoder, no side tasks, all other settings alike, those of
--over among them that are not about several tasks (sharing is, data.limit is not). A second table then tells how much
each task's score differs from that, seed by seed, and the interval that holds the difference with 95 % confidence;
'delta' is the mean relative change.

Of a setting with three numbers or more, as data.limit, the plot shows curves. --over tasks=a+b takes these tasks alone.
--tune gives every variant, tasks by themselves among them, the same choice: of its values the one that is best in
validation counts.
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
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a setting of which each variant takes the value best in validation; may be repeated",
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each variant (default: 3)")
    parser.add_argument("--single-task", action="store_true", help="train each task by itself too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all variants")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder that paths are relative to (default: the configuration's own)"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of a run (default: free cores / jobs)"
    )
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
    from pymtl.training import comparison, grid
    from pymtl.training.config import parse
    from pymtl.training.errors import ConfigError
    from pymtl.training.plots import comparison_plot
    from pymtl.training.run import Run

    console = wide_console()
    folder = arguments.out or Path("runs", f"compare-{arguments.config.stem}")
    chosen = arguments.over, arguments.set, arguments.single_task, arguments.data, arguments.tune
    variants = grid.variants(arguments.config, *chosen)
    for variant in variants:
        config = parse(variant.raw, variant.label)
        if not all(config.sets[name].test for name in config.main_sets):
            raise ConfigError(f"{arguments.config}: expected a test set to compare on")
    use_machine(arguments)
    threads = arguments.threads or max(1, torch.get_num_threads() // arguments.jobs)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs")
        for done, total in comparison.run_all(
            variants, arguments.seeds, folder, arguments.jobs, threads, arguments.device
        ):
            progress.update(task, completed=done, total=total)
    result = results.stamped(
        **comparison.summary(variants, arguments.seeds, folder), jobs=arguments.jobs, threads=threads
    )
    run_of_all = Run(folder)
    run_of_all.write_json("compare.json", result)
    run_of_all.write_text("compare.md", markdown(result))
    run_of_all.save_figure("compare.png", comparison_plot(result))
    title = f"Test scores, mean ± standard deviation over {result['seeds']} seeds"
    console.print(_table(console, *_scores(result), title))
    changes = _changes(result)
    if changes is not None:
        console.print(_table(console, *changes, CHANGES))
    console.print(f"{folder}: compare.json, compare.md, compare.png", markup=False, soft_wrap=True)
    return 0


CHANGES = "Change from each task alone (of shares in points), with the interval that holds it with 95 % confidence"


def _scores(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heading, and a row for each variant."""
    from pymtl.commands.train import shown

    names = _names(result)
    with_delta = any(row.get("delta") for row in result["rows"])
    with_tuned = any(row["tuned"] for row in result["rows"])
    heading = [
        "variant",
        *(["tuned"] if with_tuned else []),
        *(name.replace("/", " ") for name in names),
        *(["delta"] if with_delta else []),
        "ms a step",
        "s a run",
    ]
    rows = []
    for row in result["rows"]:
        tuned = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["tuned"].items())
        cells = [row["variant"], *([tuned] if with_tuned else [])]
        for name in names:
            value = row["scores"].get(name)
            cells.append("" if value is None else f"{shown(name, value['mean'])} ± {shown(name, value['std'])}")
        if with_delta:
            change = row.get("delta")
            cells.append("" if change is None else f"{100 * change['mean']:+.2f} % ± {100 * change['std']:.2f} %")
        rows.append([*cells, f"{row['step_ms']['mean']:.2f}", f"{row['seconds']['mean']:.0f}"])
    return heading, rows


def _changes(result: dict[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The heading, and a row for each variant that has tasks by themselves beside it; None if none has."""
    joint = [row for row in result["rows"] if row.get("changes")]
    if not joint:
        return None
    names = [name for name in _names(result) if any(name in row["changes"] for row in joint)]
    rows = []
    for row in joint:
        found = [row["changes"].get(name) for name in names]
        rows.append(
            [row["variant"], *("" if each is None else _change(name, each) for name, each in zip(names, found))]
        )
    return ["variant", *(name.replace("/", " ") for name in names)], rows


def _change(name: str, change: dict[str, float | None]) -> str:
    """A difference in points, its interval, and what it says."""
    from pymtl.commands.train import is_share
    from pymtl.training.metrics import lower_is_better

    factor = 100 if is_share(name) else 1
    low, high = change["low"], change["high"]
    mean, *ends = (
        None if each is None else f"{round(factor * each, 2) + 0.0:+.2f}" for each in (change["mean"], low, high)
    )
    if low is None or high is None:
        return mean
    said = "even" if low <= 0 <= high else "worse" if (low > 0) == lower_is_better(name) else "better"
    return f"{mean} [{', '.join(ends)}] {said}"


def _names(result: dict[str, Any]) -> list[str]:
    """The scores that any variant has."""
    return list(dict.fromkeys(name for row in result["rows"] for name in row["scores"]))


def markdown(result: dict[str, Any]) -> str:
    """The tables for a document."""
    lines = table(*_scores(result))
    changes = _changes(result)
    if changes is not None:
        lines += ["", f"{CHANGES}:", "", *table(*changes)]
    return "".join(f"{line}\n" for line in lines)


def _table(console: Any, heading: list[str], rows: list[list[str]], title: str) -> Any:
    """A column for each heading; where the console is too narrow for that, a line for each."""
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    found = Table(title=title)
    found.add_column(heading[0], no_wrap=True)
    for name in heading[1:]:
        found.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        found.add_row(*map(escape, cells))
    without_limit = console.options.update(width=100_000)
    if Measurement.get(console, without_limit, found).maximum <= console.width:
        return found
    narrow = Table(title=title)
    for name, justify in ((heading[0], "left"), ("", "left"), ("", "right")):
        narrow.add_column(name, justify=justify, overflow="fold")
    for variant, *cells in rows:
        said = [(name, cell) for name, cell in zip(heading[1:], cells) if cell] or [("", "")]
        for place, (name, cell) in enumerate(said):
            narrow.add_row(
                escape(variant) if place == 0 else "", escape(name), escape(cell), end_section=place == len(said) - 1
            )
    return narrow
