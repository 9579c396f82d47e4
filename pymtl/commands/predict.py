"""``pymtl predict``: what a trained model says of a text."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymtl.commands import positive

EXAMPLES = """examples:
  pymtl predict runs/snips "play some jazz by miles davis"
  cat sentences.txt | pymtl predict runs/snips --json
  pymtl predict runs/srl --records < sentences.jsonl      records with further fields, as trained on
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "predict",
        help="label texts with a trained model",
        description="Label texts with a trained model: each class with its probability, spans marked in the text. "
        "Tokens are separated by spaces.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train or export")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; lines of standard input if there is none")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument(
        "--beam", type=positive, default=1, metavar="N", help="prefixes that a search for CTC labels keeps (default: 1)"
    )
    parser.add_argument(
        "--records", action="store_true", help="texts are JSON objects with the fields that training read"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch

    from pymtl import freeze
    from pymtl.training.batches import Batcher
    from pymtl.training.errors import ConfigError
    from pymtl.training.exporting import Exported, is_exported
    from pymtl.training.metrics import decode
    from pymtl.training.run import Run

    trained: Any
    if is_exported(arguments.run_folder):
        trained = Exported(arguments.run_folder)
        config, vocabulary = trained.config, trained.vocabulary
    else:
        trained, config, vocabulary = Run(arguments.run_folder).load_model()
        freeze(trained.model)
    if config.fields and not arguments.records:
        raise ConfigError(f"--records: expected it with a model that reads {', '.join(config.fields)}")
    batcher = Batcher(vocabulary, config, remember=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters, and an argument be no text
    first = True
    for number, text in enumerate(arguments.texts or _lines(), 1):
        if not text.strip():  # an empty line stays one, so that lines out match lines in
            print(json.dumps({"tokens": []}) if arguments.json else "", flush=True)
            continue
        prediction = {}
        records, tokens = _records(text, number, config, arguments.records)
        for dataset, record in records.items():
            batch = batcher.batch([record], [0])
            with torch.inference_mode():
                logits = trained.logits(batch, dataset)
                prediction |= decode(logits, batch, config, vocabulary, trained.crfs, arguments.beam)[0]
        if arguments.json:
            print(json.dumps({"tokens": tokens, **prediction}, ensure_ascii=False), flush=True)
        else:
            gap = [] if first else [""]
            print("\n".join(gap + _describe(tokens, prediction, config.tasks)), flush=True)
        first = False
    return 0


def _records(text: str, number: int, config: Any, as_json: bool) -> tuple[dict[str, Any], list[str]]:
    """The text as each data set's training read it, and its tokens as they were given.

    Of several data sets those count whose tokens the JSON object has.
    """
    from pymtl.training.data import Record, parse_record
    from pymtl.training.errors import DataError

    models = {name: True for name, task in config.tasks.items() if task.rules.labels_itself}
    if not as_json:
        tokens = text.split()
        lowered = [token.lower() for token in tokens]
        return {
            name: Record(lowered if data.lowercase else tokens, models) for name, data in config.sets.items()
        }, tokens
    line = text.encode("utf-8", "surrogateescape")
    try:
        records = {name: parse_record(line, config, False, name) for name in _sets_of(line, config)}
    except DataError as error:
        raise DataError(f"text {number}: {error}") from None
    name, first = next(iter(records.items()))
    # A record of features alone has as many empty tokens.
    tokens = json.loads(line)[config.sets[name].tokens] if config.model.words else first.tokens
    return {name: replace(record, labels=models) for name, record in records.items()}, tokens


def _sets_of(line: bytes, config: Any) -> list[str]:
    """The data sets whose tokens a JSON object has; all, if it has none or is something else."""
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    known = [name for name, data in config.sets.items() if isinstance(given, dict) and data.tokens in given]
    return known or list(config.sets)


def _lines() -> Iterable[str]:
    from pymtl.training.errors import DataError

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    number = 0
    try:
        for line in sys.stdin:
            number += 1
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input, after line {number}: not UTF-8: {error}") from None


def _describe(tokens: Sequence[str], prediction: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    from pymtl.training.metrics import details_of

    lines = []
    for name, task in tasks.items():
        if name not in prediction:  # of another data set
            continue
        described = task.rules.describe(prediction[name], details_of(name, prediction), tokens)
        lines.append(f"{name}: {described}")
    return lines
