"""Records from JSON lines, vocabularies, and length-bucketed batches."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops
from pymtl.training.config import Config, TaskConfig
from pymtl.training.errors import DataError, RunError

PADDING, UNKNOWN = "<pad>", "<unk>"
NO_LABEL = -100


@dataclass(frozen=True)
class Record:
    """One text: its tokens, and for each task its label, or None where it has none."""

    tokens: list[str]
    labels: dict[str, Any]


def read_records(path: Path, config: Config, labelled: bool = True) -> list[Record]:
    """Reads a JSON-lines file, plain or .gz.

    Args:
        path: the file; one JSON object a line, the tokens and each task's label in the fields the
            configuration names. A label may be null or missing.
        labelled: whether labels are read at all.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is malformed; the message names file, line number and reason.
    """
    records = []
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    records.append(_record(line, config, labelled))
    except (ValueError, TypeError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number}: {error}") from None
    if not records:
        raise DataError(f"{path}: expected at least one record, got none")
    return records


def labelled(records: list[Record], where: str) -> list[Record]:
    """The records with a label of any task: what one can train on.

    Raises:
        DataError: there is none.
    """
    kept = [record for record in records if any(label is not None for label in record.labels.values())]
    if not kept:
        raise DataError(f"{where}: no record has a label of any task")
    return kept


def _record(line: bytes, config: Config, labelled: bool) -> Record:
    try:
        raw = json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"expected a JSON object, got {type(raw).__name__}")
    tokens = raw.get(config.data.tokens)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise DataError(f"field {config.data.tokens!r}: expected a list of at least one string, got {tokens!r}")
    _check_text(config.data.tokens, tokens)
    if config.data.lowercase:
        tokens = [t.lower() for t in tokens]
    labels = {}
    for name, task in config.tasks.items() if labelled else ():
        field = task.field or name
        label = raw.get(field)
        if label is not None:
            _check_label(field, label, task, len(tokens))
        labels[name] = label
    return Record(tokens, labels)


def _check_text(field: str, tokens: list[str]) -> None:
    """Half of a surrogate pair is JSON, but no text."""
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {field!r}: {error}") from None


def _check_label(field: str, label: Any, task: TaskConfig, length: int) -> None:
    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    expected, fits = {
        "classification": ("a string", isinstance(label, str)),
        "tagging": (f"a list of {length} strings, one a token", strings(label) and len(label) == length),
        "regression": ("a finite number", _is_number(label)),
        "multilabel": ("a list of strings", strings(label)),
    }[task.kind]
    texts = {"classification": [label], "regression": []}.get(task.kind, label)
    if fits:
        _check_text(field, texts)
    if not fits:
        shown = f"a list of {len(label)}" if isinstance(label, list) else repr(label)
        raise DataError(f"field {field!r}: expected {expected}, got {shown}")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


@dataclass(frozen=True)
class Vocabulary:
    """Token ids and, for each task with classes, label ids."""

    tokens: list[str]
    labels: dict[str, list[str]]

    @staticmethod
    def of(records: Iterable[Record], config: Config) -> Vocabulary:
        """Of training records; tokens by falling count, labels by name."""
        records = list(records)
        counts = Counter(token for record in records for token in record.tokens)
        kept = [t for t, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if n >= config.training.min_count]
        labels = {}
        for name, task in config.tasks.items():
            values = [record.labels[name] for record in records if record.labels[name] is not None]
            if not values:
                raise DataError(f"task {name!r}: no training record has a label")
            if task.kind == "classification":
                labels[name] = sorted(set(values))
            elif task.kind in ("tagging", "multilabel"):
                labels[name] = sorted({label for value in values for label in value})
            if name in labels and not labels[name]:
                raise DataError(f"task {name!r}: no training record has a label")
        return Vocabulary([PADDING, UNKNOWN, *(t for t in kept if t not in (PADDING, UNKNOWN))], labels)

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "labels": self.labels}

    @staticmethod
    def from_dict(raw: Any, config: Config, where: str) -> Vocabulary:
        """What :meth:`as_dict` gave.

        Raises:
            RunError: it is something else, or lacks the labels of a task.
        """

        def strings(value: Any) -> bool:
            return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)

        if not isinstance(raw, dict) or not strings(raw.get("tokens")) or raw["tokens"][:2] != [PADDING, UNKNOWN]:
            raise RunError(f"{where}: expected a vocabulary with tokens")
        labels = raw.get("labels")
        for name, task in config.tasks.items():
            if task.kind != "regression" and not (isinstance(labels, dict) and strings(labels.get(name))):
                raise RunError(f"{where}: expected labels of task {name!r}")
        return Vocabulary(raw["tokens"], labels)


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    ``tokens`` int64 [B, T], 0 at padding; ``lengths`` int64 [B]; ``targets`` for each task as
    :class:`pymtl.JointLoss` takes them; ``indices`` the records it was made of.
    """

    tokens: Tensor
    lengths: Tensor
    targets: dict[str, Tensor]
    indices: list[int]

    def packed(self) -> tuple[PackedSequence, dict[str, Tensor | PackedSequence]]:
        """Tokens and targets without padding; the targets of whole sentences stay as they are."""
        order = ops.packing_order(self.lengths, self.tokens.shape[1])

        def pack(padded: Tensor) -> PackedSequence:
            return PackedSequence(ops.pack(padded, order, batch_first=True), *order)

        by_token = {
            name: pack(t) if t.shape[:2] == self.tokens.shape and t.dtype == torch.int64 else t
            for name, t in self.targets.items()
        }
        return pack(self.tokens), by_token


class Encoder:
    """From records to batches, by a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, config: Config) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self._token_ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self._label_ids = {
            name: {label: i for i, label in enumerate(labels)} for name, labels in vocabulary.labels.items()
        }

    def batch(self, records: Sequence[Record], indices: Sequence[int]) -> Batch:
        """The batch of ``records[i]`` for i in ``indices``. A label the vocabulary lacks counts as missing."""
        chosen = [records[i] for i in indices]
        lengths = torch.tensor([len(r.tokens) for r in chosen])
        steps = int(lengths.max())
        unknown = self._token_ids[UNKNOWN]
        tokens = torch.zeros(len(chosen), steps, dtype=torch.int64)
        for row, record in enumerate(chosen):
            ids = [self._token_ids.get(token, unknown) for token in record.tokens]
            tokens[row, : len(ids)] = torch.tensor(ids)
        targets = {
            name: self._targets(name, task, chosen, steps)
            for name, task in self.config.tasks.items()
            if any(r.labels.get(name) is not None for r in chosen)
        }
        return Batch(tokens, lengths, targets, list(indices))

    def _targets(self, name: str, task: TaskConfig, records: Sequence[Record], steps: int) -> Tensor:
        labels = [record.labels[name] for record in records]
        if task.kind == "regression":
            return torch.tensor([[float("nan") if label is None else float(label)] for label in labels])
        ids = self._label_ids[name]
        if task.kind == "classification":
            return torch.tensor([ids.get(label, NO_LABEL) for label in labels])
        if task.kind == "tagging":
            targets = torch.full((len(records), steps), NO_LABEL)
            for row, label in enumerate(labels):
                if label is not None:
                    targets[row, : len(label)] = torch.tensor([ids.get(tag, NO_LABEL) for tag in label])
            return targets
        targets = torch.zeros(len(records), len(ids))
        for row, label in enumerate(labels):
            if label is None:
                targets[row] = float("nan")
            else:
                targets[row, [ids[name] for name in label if name in ids]] = 1.0
        return targets


def buckets(records: Sequence[Record], batch_size: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """Indices of batches of records of similar length, in random order; by length alone without a generator."""
    if generator is None:
        by_length = sorted(range(len(records)), key=lambda i: len(records[i].tokens))
        yield from (by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size))
        return
    shuffled = torch.randperm(len(records), generator=generator).tolist()
    pool = 50 * batch_size
    batches = []
    for start in range(0, len(shuffled), pool):
        piece = sorted(shuffled[start : start + pool], key=lambda i: len(records[i].tokens))
        batches += [piece[i : i + batch_size] for i in range(0, len(piece), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]
