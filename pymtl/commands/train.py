"""``pymtl train``: a model from a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymtl.commands import positive

if TYPE_CHECKING:
    from pymtl.training.config import Config
    from pymtl.training.run import Run

EXAMPLES = """examples:
  pymtl train examples/snips/snips.toml
  pymtl train examples/snips/snips.toml --set training.epochs=5 --set model.hidden_size=256
  pymtl train examples/snips/snips.toml --resume           go on after Ctrl-C
  pymtl train examples/snips/snips.toml --backend reference --run runs/plain
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
        "--run",
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
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is there already")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from pymtl.training import config as configuration
    from pymtl.training.backends import Backend
    from pymtl.training.data import Vocabulary, labelled, read_records
    from pymtl.training.errors import RunError
    from pymtl.training.metrics import check_scorable
    from pymtl.training.plots import training_curves
    from pymtl.training.run import Run
    from pymtl.training.trainer import Trainer, test_scores

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console()
    config = configuration.load(arguments.config, arguments.set)
    run = Run(arguments.folder or Path("runs", arguments.config.stem))
    train = labelled(read_records(config.path(config.data.train), config), config.data.train)
    valid = read_records(config.path(config.data.valid), config)
    check_scorable(valid, config, config.data.valid)
    test = read_records(config.path(config.data.test), config) if config.data.test else []
    if arguments.resume:
        vocabulary = _resumable(run, config, arguments.backend)
    else:
        if run.exists() and not arguments.overwrite:
            raise RunError(f"{run.folder}: holds a run already: pass --resume, --overwrite or another --run")
        if run.holds_other_files():
            raise RunError(f"{run.path('config.json')}: is not of a run: pass another --run")
        vocabulary = Vocabulary.of(train, config)

    torch.manual_seed(config.seed)
    backend = Backend(arguments.backend, config, vocabulary)
    trainer = Trainer(run, config, vocabulary, backend, train, valid, _Screen(console, config))
    if arguments.resume:
        trainer.resume()
    else:
        run.create(config, vocabulary, arguments.backend)  # an earlier run goes only when this one can begin
    parameters = sum(p.numel() for p in backend.model.parameters())
    console.print(
        f"{arguments.config.stem}: {len(train):,} sentences to train on, {len(valid):,} to validate, "
        f"{len(vocabulary.tokens):,} tokens, {parameters:,} parameters, {torch.get_num_threads()} threads, "
        f"backend {arguments.backend}",
        markup=False,
        soft_wrap=True,
    )
    # Adam's means of gradients decay, for a word that does not come, into numbers too small for fast arithmetic.
    torch.set_flush_denormal(True)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        done = len(trainer.epochs)
        saved = f"--resume goes on; {run.folder} holds the best so far" if done else "nothing is saved yet"
        console.print(f"\ninterrupted after {done} epochs: {saved}", markup=False, soft_wrap=True)
        raise
    finally:
        torch.set_flush_denormal(False)
    run.save_figure("curves.png", training_curves(trainer.epochs))
    if test:
        best, _, _ = run.load_backend()
        scores = test_scores(best, test, config, vocabulary)
        run.write_json("test.json", scores)
        console.print(scores_table(scores, len(test)))
    console.print(f"run folder: {run.folder}", markup=False, soft_wrap=True)
    return 0


def _resumable(run: Run, config: Config, backend: str) -> Any:
    """The vocabulary of the run to resume, if it is of the same configuration."""
    from pymtl.training.errors import RunError

    saved, vocabulary, trained_with = run.load()
    if trained_with != backend:
        raise RunError(f"{run.folder}: was trained with --backend {trained_with}, not {backend}")

    def fixed(c: Config) -> tuple[Any, ...]:
        return c.data, c.tasks, c.model, c.seed, c.training.min_count

    if fixed(saved) != fixed(config):
        raise RunError(f"{run.folder}: was trained with another configuration of data, tasks, model, seed or min_count")
    return vocabulary


def scores_table(scores: dict[str, float], sentences: int) -> Any:
    from rich.table import Table

    table = Table(title=f"Test set, {sentences:,} sentences")
    table.add_column("score")
    table.add_column("%", justify="right")
    for name, value in scores.items():
        table.add_row(name.replace("/", " "), f"{100 * value:.2f}")
    return table


class _Screen:
    """A bar while an epoch runs, a row of the table when it is over."""

    def __init__(self, console: Any, config: Config) -> None:
        self.console = console
        self.config = config
        self.header: list[str] | None = None
        self.best = float("-inf")

    def steps(self, epoch: int, total: int) -> Iterator[int]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("epoch {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield from progress.track(range(total), description=f"{epoch}/{self.config.training.epochs}")

    def epoch(self, record: dict[str, Any]) -> None:
        cells = {"epoch": f"{record['epoch']}", "loss": f"{record['loss']['total']:.4f}"}
        cells |= {f"{task} loss": f"{value:.4f}" for task, value in record["loss"].items() if task != "total"}
        cells |= {name.replace("/", " "): f"{100 * value:.2f} %" for name, value in record["valid"].items()}
        cells["time"] = f"{record['seconds']:.1f} s"
        if self.header is None:
            self.header = list(cells)
            self.console.print(
                "  ".join(f"{name:>{_width(name)}}" for name in self.header), style="bold", soft_wrap=True
            )
        row = "  ".join(f"{cells.get(name, '-'):>{_width(name)}}" for name in self.header)
        better = record["selection"] > self.best
        self.best = max(self.best, record["selection"])
        self.console.print(row + ("  best" if better else ""), highlight=False, soft_wrap=True)


def _width(name: str) -> int:
    return max(len(name), 8)
