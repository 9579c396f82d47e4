"""``pymtl evaluate``: how good a trained model is on a labelled file."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymtl.commands import FROZEN_WEIGHTS, add_machine, add_weights, positive, use_machine, weights_of, wide_console
from pymtl.serving.search_options import FOR_ONE, add_search_options, given_options, refuse_idle, search_of

if TYPE_CHECKING:
    from pymtl.serving.records import Record
    from pymtl.training.evaluation import Evaluation
    from pymtl.training.predictor import Predictor

EXAMPLES = """examples:
  pymtl evaluate runs/snips                        on the configuration's test set
  pymtl evaluate runs/orders may.csv               on any labelled file
  pymtl evaluate runs/orders may.csv --out may     where to write the page and the wrong answers
  pymtl evaluate runs/phones --beam 10             answers by a wider search
"""
MOST_ROWS = 20  # of a table of labels on the screen


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "evaluate",
        help="how good a trained model is on a labelled file",
        description="Score a trained model on a labelled file: all scores, precision, recall and F1 of each label, the "
        "confusion matrix, how far probabilities can be trusted, and every wrong answer. Writes evaluation.json, "
        "evaluation.md, errors.jsonl and plots.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train or export")
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="a labelled file (default: the configuration's test set)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="the data set that FILE belongs to, where there are several")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the test set, if the run was moved")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: in RUN, evaluation/test or evaluation/FILE)"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="texts at a time (default: 64)")
    add_weights(parser, FROZEN_WEIGHTS)
    add_machine(parser)
    add_search_options(parser, FOR_ONE)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from pymtl.training.data import labelled
    from pymtl.training.evaluation import evaluate, exact_of, lines_of, page
    from pymtl.training.plots import evaluation_plot
    from pymtl.training.predictor import Predictor
    from pymtl.training.run import EVALUATIONS, Run

    use_machine(arguments)
    console = wide_console()
    search, given = search_of(arguments), given_options(arguments)
    predictor = Predictor(arguments.run_folder, arguments.device, arguments.data, weights_of(arguments))
    refuse_idle(given, (task.rules for task in predictor.tasks.values()))
    asked = {option.removeprefix("--"): value for option, value in given.items()}
    notes: list[str] = []
    sets = _records(arguments, predictor, notes)
    every = [record for own in sets.values() for record in own]
    labelled(every, str(arguments.file or "the test set"), predictor.tasks)
    console.print(*notes, sep="\n", end="\n" if notes else "", markup=False)
    with console.status("evaluating ..."):
        evaluation, wrong = evaluate(predictor, sets, arguments.batch_size, search)
    name = "test" if arguments.file is None else arguments.file.name
    narrow = predictor.weights != "float32"
    how = f", weights in {predictor.weights}" if narrow else ""
    how += "".join(f", {option} {value:g}" for option, value in asked.items())
    show(console, evaluation, predictor, name + how)
    source = "test" if arguments.file is None else f"{arguments.file.resolve()} {arguments.dataset or ''}".strip()
    settings = [f"{option}-{value:g}" for option, value in asked.items()]
    own = "-".join([name, *([predictor.weights] if narrow else []), *settings])
    folder = arguments.out or _own_folder(arguments.run_folder / EVALUATIONS, own, source)
    folder.mkdir(parents=True, exist_ok=True)
    target = Run(folder)
    title = f"{arguments.run_folder.resolve().name} on {name}{how}"
    target.write_json(
        "evaluation.json",
        {
            "run": arguments.run_folder.resolve().name,
            "file": name,
            "source": _digest(source),
            "weights": predictor.weights,
            "search": asked,
            **evaluation,
        },
    )
    target.write_text("evaluation.md", page(evaluation, wrong, title, exact_of(predictor, evaluation)))
    target.write_text("errors.jsonl", lines_of(wrong))
    figure = evaluation_plot(evaluation)
    if figure is None:
        target.path("evaluation.png").unlink(missing_ok=True)  # of an earlier evaluation
    else:
        target.save_figure("evaluation.png", figure)
    console.print(
        f"{folder}: evaluation.md, evaluation.json, {len(wrong):,} wrong answers in errors.jsonl", markup=False
    )
    return 0


def _digest(source: str) -> str:
    """What tells files of one name apart, without their path."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _own_folder(folder: Path, name: str, source: str) -> Path:
    """The folder called ``name``, or with a number behind it where that is of another file of the name."""
    number, found = 1, folder / name
    while found.joinpath("evaluation.json").exists():
        before = json.loads(found.joinpath("evaluation.json").read_text(encoding="utf-8"))
        if before.get("source") == _digest(source):
            break
        number += 1
        found = folder / f"{name}-{number}"
    return found


def _records(arguments: argparse.Namespace, predictor: Predictor, notes: list[str]) -> dict[str, list[Record]]:
    from pymtl.training.data import read_records, read_test_sets
    from pymtl.training.errors import ConfigError

    config = predictor.config
    if arguments.file is None:
        sets = read_test_sets(config, notes)
        if not sets:
            raise ConfigError(f"{arguments.run_folder}: its configuration has no test set: name a FILE")
        return sets
    known = config.main_sets
    dataset = arguments.dataset if arguments.dataset is not None else known[0]
    if dataset not in known or (arguments.dataset is None and len(known) > 1):
        raise ConfigError(f"--dataset: expected one of {', '.join(filter(None, known)) or 'none: there is one'}")
    return {dataset: read_records(arguments.file, config, True, dataset, notes, complete=False)}


def show(console: Any, evaluation: Evaluation, predictor: Predictor, name: str) -> None:
    """Tables of an evaluation."""
    from rich.markup import escape
    from rich.table import Table

    from pymtl.commands.train import scores_table
    from pymtl.training.evaluation import exact_of

    exact = exact_of(predictor, evaluation)
    console.print(scores_table(evaluation["scores"], evaluation["sentences"], exact, name))
    console.print(f"{100 * evaluation['unknown_tokens']:.1f} % of the tokens are unknown to training")
    for task, found in evaluation["tasks"].items():
        if found["labelled"] < evaluation["sentences"]:
            console.print(f"{task}: {found['labelled']:,} sentences have a label", markup=False)
        rows = sorted(found.get("classes", []), key=lambda row: -row["support"])
        if rows:
            of = f", {MOST_ROWS} of {len(rows)}, the most frequent" if len(rows) > MOST_ROWS else ""
            table = Table(title=escape(f"{task}{of}"))
            table.add_column("label")
            for heading in ("precision", "recall", "F1", "support"):
                table.add_column(heading, justify="right")
            for row in rows[:MOST_ROWS]:
                shares = (f"{100 * row[key]:.1f} %" for key in ("precision", "recall", "f1"))
                table.add_row(escape(row["label"]), *shares, f"{row['support']:,}")
            console.print(table)
        for what, value in found.get("errors", {}).items():
            console.print(f"{task}: {what} {value:.6g}", markup=False)
        if found.get("unknown_labels"):
            shown = ", ".join(f"{label!r} {count:,}" for label, count in found["unknown_labels"].items())
            console.print(f"{task}: labels that training lacks, each one missed: {shown}", markup=False)
        if "calibration" in found:
            error = 100 * found["calibration"]["error"]
            console.print(f"{task}: probabilities are {error:.1f} points off on average (calibration)", markup=False)
