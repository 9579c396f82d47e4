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
        "--records", action="store_true", help="texts are JSON objects with the fields that training read"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch

    from pymtl import freeze
    from pymtl.training.batches import Encoder
    from pymtl.training.errors import ConfigError
    from pymtl.training.exporting import Exported, is_exported
    from pymtl.training.metrics import decode
    from pymtl.training.run import Run

    backend: Any
    if is_exported(arguments.run_folder):
        backend = Exported(arguments.run_folder)
        config, vocabulary = backend.config, backend.vocabulary
    else:
        backend, config, vocabulary = Run(arguments.run_folder).load_backend()
        freeze(backend.model)
    if config.fields and not arguments.records:
        raise ConfigError(f"--records: expected it with a model that reads {', '.join(config.fields)}")
    encoder = Encoder(vocabulary, config, remember=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters, and an argument be no text
    first = True
    for number, text in enumerate(arguments.texts or _lines(), 1):
        if not text.strip():  # an empty line stays one, so that lines out match lines in
            print(json.dumps({"tokens": []}) if arguments.json else "", flush=True)
            continue
        prediction = {}
        records = {name: _record(text, number, config, arguments.records, name) for name in config.sets}
        tokens = next(iter(records.values())).tokens
        for dataset, record in records.items():
            batch = encoder.batch([record], [0])
            with torch.inference_mode():
                logits = backend.logits(batch, dataset)
                prediction |= decode(logits, batch, config, vocabulary, backend.crfs)[0]
        if arguments.json:
            print(json.dumps({"tokens": tokens, **prediction}, ensure_ascii=False), flush=True)
        else:
            gap = [] if first else [""]
            print("\n".join(gap + _describe(tokens, prediction, config.tasks)), flush=True)
        first = False
    return 0


def _record(text: str, number: int, config: Any, as_json: bool, dataset: str) -> Any:
    """The text as the data set's training read it."""
    from pymtl.training.data import Record, parse_record
    from pymtl.training.errors import DataError

    models = {name: True for name, task in config.tasks.items() if task.kind == "language_model"}
    if as_json:
        try:
            record = parse_record(text.encode("utf-8", "surrogateescape"), config, False, dataset)
        except DataError as error:
            raise DataError(f"text {number}: {error}") from None
        return replace(record, labels=models)
    lowercase = config.sets[dataset].lowercase
    return Record(text.lower().split() if lowercase else text.split(), models)


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
    lines = []
    for name, task in tasks.items():
        value = prediction[name]
        if task.kind == "classification":
            lines.append(f"{name}: {value} ({100 * prediction[f'{name}/probability']:.1f} %)")
        elif task.kind == "tagging":
            words = tokens if any(tokens) else [str(i) for i in range(len(tokens))]
            lines.append(f"{name}: {mark_spans(words, value)}")
        elif task.kind in ("multilabel", "ctc"):
            lines.append(f"{name}: {(', ' if task.kind == 'multilabel' else ' ').join(value) or 'none'}")
        elif task.kind == "ordinal":
            lines.append(f"{name}: {value}" if isinstance(value, str) else f"{name}: {value:g}")
        elif task.kind == "language_model":
            lines.append(f"{name}: perplexity {value:.1f}")
        else:
            values = value if isinstance(value, list) else [value]
            lines.append(f"{name}: {' '.join(f'{number:.3f}' for number in values)}")
    return lines


def mark_spans(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """The text with its BIO spans in brackets, ``play [some jazz | genre]``; other tags behind a slash each."""
    from seqeval.metrics.sequence_labeling import get_entities

    if any(tag != "O" and not tag.startswith(("B-", "I-")) for tag in tags):
        return " ".join(f"{token}/{tag}" for token, tag in zip(tokens, tags))
    words = list(tokens)
    for label, first, last in get_entities(list(tags)):
        words[first] = f"[{words[first]}"
        words[last] = f"{words[last]} | {label}]"
    return " ".join(words)
