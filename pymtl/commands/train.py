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
    from pymtl.training.vocabulary import Vocabulary

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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is there already")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from pymtl.training import config as configuration
    from pymtl.training.data import read_sets, read_test_sets
    from pymtl.training.errors import ConfigError, RunError
    from pymtl.training.metrics import check_scorable
    from pymtl.training.run import Run
    from pymtl.training.vocabulary import Vocabulary

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no GPU, or this torch has no CUDA")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console()
    config = configuration.load(arguments.config, arguments.set, arguments.data)
    run = Run(arguments.folder or Path("runs", arguments.config.stem))
    train, valid = read_sets(config)
    files = ", ".join(data.valid or data.train for data in config.sets.values())
    check_scorable([record for records in valid.values() for record in records], config, files)
    test = read_test_sets(config)
    if arguments.resume:
        vocabulary = _resumable(run, config, arguments.backend)
    else:
        if run.exists() and not arguments.overwrite:
            raise RunError(f"{run.folder}: holds a run already: pass --resume, --overwrite or another --run")
        if run.holds_other_files():
            raise RunError(f"{run.path('config.json')}: is not of a run: pass another --run")
        vocabulary = Vocabulary.of([record for records in train.values() for record in records], config)
    sets = (train, valid, test)
    scores = train_run(run, config, vocabulary, sets, arguments.backend, arguments.resume, console, arguments.device)
    if scores is not None:
        console.print(scores_table(scores, sum(map(len, test.values()))))
    console.print(f"run folder: {run.folder}", markup=False, soft_wrap=True)
    return 0


def train_run(
    run: Run,
    config: Config,
    vocabulary: Vocabulary,
    sets: tuple[Any, Any, Any],
    backend_name: str,
    resume: bool,
    console: Any,
    device: str = "cpu",
) -> dict[str, float] | None:
    """Trains (or resumes) a run to its end and returns its scores on the test sets, if there are some.

    Args:
        run: its folder.
        config, vocabulary: what to train.
        sets: the records to train on, to validate and to test, of each data set.
        backend_name: as ``--backend``.
        resume: go on from the run's last state.
        console: where to show it.
        device: ``"cpu"`` or ``"cuda"``.
    """
    import torch

    from pymtl.training import building
    from pymtl.training.backends import Backend
    from pymtl.training.errors import ConfigError
    from pymtl.training.plots import training_curves
    from pymtl.training.trainer import Trainer, test_scores
    from pymtl.training.warm_start import freeze, warm_start

    train, valid, test = sets
    torch.manual_seed(config.seed)
    try:
        backend = Backend(backend_name, config, vocabulary)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None
    lines = []
    if config.model.vectors is not None:
        count = building.load_vectors(backend.model, config, vocabulary)
        lines.append(f"{count:,} of {len(vocabulary.tokens):,} tokens have vectors in {config.model.vectors}")
        if config.model.freeze_vectors:
            building.word_embedding(backend.model.embedding).weight.requires_grad_(False)
    if config.warm_start is not None and resume:
        freeze(backend.model, config)
    elif config.warm_start is not None:
        taken = warm_start(backend.model, config, vocabulary)
        state = "frozen" if config.warm_start.freeze else "to be trained on"
        lines.append(f"{len(taken)} parameters taken from {config.warm_start.run}, {state}")
    screen = _Screen(console, config)
    trainer = Trainer(run, config, vocabulary, backend, train, valid, screen, device)
    main = trainer.accelerator.is_main_process
    if resume:
        trainer.resume()
        screen.best = max((epoch["selection"] for epoch in trainer.epochs), default=screen.best)
    elif main:
        run.create(config, vocabulary, backend_name)  # an earlier run goes only when this one can begin
    if main:
        parameters = sum(p.numel() for p in backend.model.parameters())
        counts = [sum(map(len, records.values())) for records in (train, valid)]
        processes = trainer.accelerator.num_processes
        there = trainer.accelerator.device
        where = f"{torch.get_num_threads()} threads" if there.type == "cpu" else torch.cuda.get_device_name(there)
        console.print(
            f"{run.folder.name}: {counts[0]:,} sentences to train on, {counts[1]:,} to validate, "
            f"{len(vocabulary.tokens):,} tokens, {parameters:,} parameters, {where}"
            f"{f', {processes} processes' if processes > 1 else ''}, backend {backend_name}",
            *lines,
            sep="\n",
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
        saved = "--resume goes on within the first" if not done and run.exists() else saved
        console.print(f"\ninterrupted after {done} epochs: {saved}", markup=False, soft_wrap=True)
        raise
    finally:
        torch.set_flush_denormal(False)
        trainer.close()
    if not main:
        return None
    run.save_figure("curves.png", training_curves(trainer.epochs))
    if not test:
        return None
    best, _, _ = run.load_backend()
    scores = test_scores(best.to(trainer.accelerator.device), test, config, vocabulary)
    run.write_json("test.json", scores)
    return scores


def _resumable(run: Run, config: Config, backend: str) -> Any:
    """The vocabulary of the run to resume, if it is of the same configuration."""
    from pymtl.training.errors import RunError

    saved, vocabulary, trained_with = run.load()
    if trained_with != backend:
        raise RunError(f"{run.folder}: was trained with --backend {trained_with}, not {backend}")

    def fixed(c: Config) -> dict[str, Any]:
        changeable = ("epochs", "patience", "learning_rate", "checkpoint_steps", "tensorboard", "clip_norm")
        training = {f"training.{name}": value for name, value in vars(c.training).items() if name not in changeable}
        return {name: value for name, value in vars(c).items() if name != "training"} | training

    if fixed(saved) != fixed(config):
        differing = [name for name in fixed(config) if fixed(saved)[name] != fixed(config)[name]]
        raise RunError(f"{run.folder}: was trained with another configuration: {', '.join(differing)}")
    return vocabulary


def scores_table(scores: dict[str, float], sentences: int) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Test set, {sentences:,} sentences")
    table.add_column("score")
    table.add_column("", justify="right")
    for name, value in scores.items():
        table.add_row(escape(name.replace("/", " ")), shown(name, value))
    return table


def shown(name: str, value: float) -> str:
    """A score as people write it: shares in percent."""
    metric = name.rpartition("/")[2]
    return f"{value:.3f}" if metric in ("r2", "pearson", "spearman", "kappa", "perplexity") else f"{100 * value:.2f} %"


class _Screen:
    """A bar while an epoch runs, a row of the table when it is over."""

    def __init__(self, console: Any, config: Config) -> None:
        self.console = console
        self.config = config
        self.header: list[str] | None = None
        self.best = float("-inf")

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
