"""``pymtl predict``: what a trained model says of a text."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  pymtl predict runs/snips "play some jazz by miles davis"
  cat sentences.txt | pymtl predict runs/snips --json
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
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; lines of standard input if there is none")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    return parser


def run(arguments: argparse.Namespace) -> int:
    import torch

    from pymtl import freeze
    from pymtl.training.data import Encoder, Record
    from pymtl.training.metrics import decode
    from pymtl.training.run import Run

    backend, config, vocabulary = Run(arguments.run_folder).load_backend()
    freeze(backend.model)
    encoder = Encoder(vocabulary, config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters, and an argument be no text
    for text in arguments.texts or _lines():
        tokens = text.lower().split() if config.data.lowercase else text.split()
        if not tokens:  # an empty line stays one, so that lines out match lines in
            print(json.dumps({"tokens": []}) if arguments.json else "", flush=True)
            continue
        batch = encoder.batch([Record(tokens, {})], [0])
        with torch.inference_mode():
            prediction = decode(backend.logits(batch), batch.lengths, config, vocabulary, backend.crfs)[0]
        if arguments.json:
            print(json.dumps({"tokens": tokens, **prediction}, ensure_ascii=False), flush=True)
        else:
            print("\n".join(_describe(tokens, prediction, config.tasks)), flush=True)
    return 0


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
            lines.append(f"{name}: {mark_spans(tokens, value)}")
        elif task.kind == "multilabel":
            lines.append(f"{name}: {', '.join(value) or 'none'}")
        else:
            lines.append(f"{name}: {value:.3f}")
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
