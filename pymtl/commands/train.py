"""``pymtl train``: a model from a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymtl.commands import add_machine, use_machine

if TYPE_CHECKING:
    from pymtl.training.config import Config

EXAMPLES = """examples:
  pymtl train examples/snips/snips.toml
  pymtl train examples/snips/snips.toml --set training.epochs=5 --set model.hidden_size=256
  pymtl train examples/snips/snips.toml --resume           go on after Ctrl-C
  pymtl train examples/snips/snips.toml --backend reference --run runs/plain
  pymtl train examples/snips/snips.toml --device cuda
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "train",
        help="train a multi-task model from a TOML configuration",
        description="Train a multi-task model. The run folder receives configuration, vocabulary, the best "
        "epoch's weights, metrics, a plot, and the state to resume from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file: data, tasks, model, training")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, as in training.epochs=5; may be repeated",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder that paths are relative to (default: the configuration's own)"
    )
    parser.add_argument(
        "--run",
        "--out",  # torchrun takes --run for its own
        type=Path,
        metavar="DIR",
        dest="folder",
        help="run folder (default: runs/ and the configuration's name)",
    )
    parser.add_argument(
        "--backend",
        choices=("pymtl", "reference"),
        default="pymtl",
        help="reference: the identical model in plain PyTorch (default: pymtl)",
    )
    add_machine(parser, "train")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is there already")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pymtl.training import config as configuration
    from pymtl.training.data import read_all
    from pymtl.training.errors import RunError
    from pymtl.training.fitting import Fitting, vocabulary_to_resume
    from pymtl.training.metrics import check_scorable, exact_tasks
    from pymtl.training.run import Run
    from pymtl.training.vocabulary import Vocabulary

    run = Run(arguments.folder or Path("runs", arguments.config.stem))
    before = run.read_manifest().get("threads") if arguments.resume else None
    if before is not None and (type(before) is not int or before < 1):
        raise RunError(f"{run.path('run.json')}: damaged: expected a number of threads, got {before!r}")
    use_machine(arguments, before)
    console = Console()
    config = configuration.load(arguments.config, arguments.set, arguments.data)
    sets = read_all(config)
    config = sets.config
    files = ", ".join(data.valid or data.train for data in config.sets.values())
    check_scorable([record for records in sets.valid.values() for record in records], config, files)
    if arguments.resume:
        vocabulary = vocabulary_to_resume(run, config, arguments.backend)
    else:
        if run.exists() and not arguments.overwrite:
            raise RunError(f"{run.folder}: holds a run already: pass --resume, --overwrite or another --run")
        if run.foreign_file() is not None:
            raise RunError(f"{run.foreign_file()}: is not of a run: pass another --run")
        vocabulary = Vocabulary.of(sets.trained_on, config)
    fitting = Fitting(run, config, vocabulary, arguments.backend, arguments.device)
    scores = fitting.fit(sets, arguments.resume, _Screen(console, config))
    if scores is not None:
        console.print(scores_table(scores, sum(map(len, sets.test.values())), exact_tasks(config)))
    console.print(f"run folder: {run.folder}", markup=False, soft_wrap=True)
    return 0


def scores_table(scores: dict[str, float], sentences: int, exact: Sequence[str], title: str = "Test set") -> Any:
    """A table of scores; ``exact``: the tasks that ``exact_match`` counts."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{title}, {sentences:,} sentences")
    table.add_column("score")
    table.add_column("", justify="right")
    for name, value in scores.items():
        of = f" ({', '.join(exact)})" if name == "exact_match" else ""
        table.add_row(escape(name.replace("/", " ") + of), shown(name, value))
    return table


def shown(name: str, value: float) -> str:
    """A score as people write it: shares in percent."""
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.3f}"


def is_share(name: str) -> bool:
    """Whether a score is a share of something."""
    return name.rpartition("/")[2] not in ("r2", "pearson", "spearman", "kappa", "perplexity")


class _Screen:
    """A bar while an epoch runs, a row of the table when it is over."""

    def __init__(self, console: Any, config: Config) -> None:
        self.console = console
        self.config = config
        self.header: list[str] | None = None
        self.best = float("-inf")

    def say(self, *lines: str) -> None:
        self.console.print(*lines, sep="\n", markup=False, soft_wrap=True)

    def passed_over(self, kept: int, better: Mapping[str, tuple[int, float, float]]) -> None:
        if better:
            each = (
                f"{name.replace('/', ' ')} was {shown(name, best)} in epoch {epoch}, {shown(name, value)} in this one"
                for name, (epoch, best, value) in better.items()
            )
            self.say(
                f"epoch {kept} is kept for all tasks: {'; '.join(each)}. Of tasks that are best at different times, "
                "give the one that is best first a smaller weight"
            )

    def steps(self, epoch: int, total: int, first: int = 0) -> Iterator[int]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("epoch {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(f"{epoch}/{self.config.training.epochs}", total=total, completed=first)
            for step in range(first, total):
                yield step
                progress.advance(task)

    def epoch(self, record: dict[str, Any]) -> None:
        cells = {"epoch": f"{record['epoch']}", "loss": f"{record['loss']['total']:.4f}"}
        cells |= {f"{task} loss": f"{value:.4f}" for task, value in record["loss"].items() if task != "total"}
        cells |= {name.replace("/", " "): shown(name, value) for name, value in record["valid"].items()}
        cells["time"] = f"{record['seconds']:.1f} s"
        if self.header is None:
            self.header = self._fitting(list(cells), record)
            self.console.print(
                "  ".join(f"{name:>{_width(name)}}" for name in self.header), style="bold", soft_wrap=True
            )
        row = "  ".join(f"{cells.get(name, '-'):>{_width(name)}}" for name in self.header)
        better = record["selection"] > self.best
        self.best = max(self.best, record["selection"])
        self.console.print(row + ("  best" if better else ""), highlight=False, soft_wrap=True)

    def _fitting(self, names: list[str], record: dict[str, Any]) -> list[str]:
        """The columns; on a terminal that is too narrow for all, of each task the first score alone."""
        if sum(_width(name) + 2 for name in names) <= self.console.width or not self.console.is_terminal:
            return names
        first = {name.partition("/")[0]: name.replace("/", " ") for name in reversed(record["valid"])}
        return ["epoch", "loss", *(name for name in names if name in first.values()), "time"]


def _width(name: str) -> int:
    return max(len(name), 8)
