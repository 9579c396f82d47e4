"""What training learns of the data: ids of tokens, characters and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pymtl.training.config import Config
from pymtl.training.data import BLANK, Record
from pymtl.training.errors import DataError, RunError

PADDING, UNKNOWN = "<pad>", "<unk>"
SPECIAL = [PADDING, UNKNOWN]


@dataclass(frozen=True)
class Vocabulary:
    """Token ids; for each task with classes, label ids; characters' and categories' ids."""

    tokens: list[str]
    labels: dict[str, list[Any]]
    characters: list[str] = field(default_factory=list)
    categories: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(records: Iterable[Record], config: Config) -> Vocabulary:
        """Of training records; tokens and characters by falling count, labels by name.

        Raises:
            DataError: a task has no label.
        """
        records = list(records)
        for name, task in config.tasks.items():
            if task.kind == "regression" and all(record.labels.get(name) is None for record in records):
                raise DataError(f"task {name!r}: no training record has a label")
        counts = Counter(token for record in records for token in record.tokens)
        kept = [token for token in _by_count(counts) if counts[token] >= config.training.min_count]
        characters = _by_count(Counter("".join(token for record in records for token in record.tokens)))
        categories = {}
        for name, info in config.fields.items():
            if info.kind == "category":
                seen = Counter(str(value) for record in records for value in record.fields[name])
                categories[name] = SPECIAL + _by_count(seen)
        return Vocabulary(
            SPECIAL + [t for t in kept if t not in SPECIAL] if config.model.words else SPECIAL,
            {name: _labels(name, records, config) for name in config.tasks if _has_labels(name, config)},
            SPECIAL + characters if config.characters is not None else [],
            categories,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "labels": self.labels,
            "characters": self.characters,
            "categories": self.categories,
        }

    @staticmethod
    def from_dict(raw: Any, config: Config, where: str) -> Vocabulary:
        """What :meth:`as_dict` gave.

        Raises:
            RunError: it is something else, or lacks the labels of a task.
        """

        def strings(value: Any) -> bool:
            return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)

        if not isinstance(raw, dict) or not strings(raw.get("tokens")) or raw["tokens"][:2] != SPECIAL:
            raise RunError(f"{where}: expected a vocabulary with tokens")
        labels = raw.get("labels")
        for name, task in config.tasks.items():
            own = labels.get(name) if isinstance(labels, dict) else None
            numbers = isinstance(own, list) and len(own) > 0 and all(isinstance(v, int | float) for v in own)
            if _has_labels(name, config) and not strings(own) and not (task.kind == "ordinal" and numbers):
                raise RunError(f"{where}: expected labels of task {name!r}")
        characters, categories = raw.get("characters", []), raw.get("categories", {})
        if config.characters is not None and not (strings(characters) and characters[:2] == SPECIAL):
            raise RunError(f"{where}: expected characters")
        for name, info in config.fields.items():
            if info.kind == "category" and not (isinstance(categories, dict) and strings(categories.get(name))):
                raise RunError(f"{where}: expected categories of field {name!r}")
        return Vocabulary(raw["tokens"], labels, characters, categories)


def _has_labels(task: str, config: Config) -> bool:
    return config.tasks[task].kind not in ("regression", "language_model")


def _by_count(counts: Counter[str]) -> list[str]:
    return [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _labels(name: str, records: list[Record], config: Config) -> list[Any]:
    kind = config.tasks[name].kind
    values = [record.labels[name] for record in records if record.labels.get(name) is not None]
    if kind == "classification":
        labels = sorted(set(values))
    elif kind == "ordinal":
        labels = _ordered(name, values, config.tasks[name].order)
    else:
        labels = sorted({label for value in values for label in value if label is not None})
        labels = [BLANK, *labels] if kind == "ctc" else labels
    if not values or not labels:
        raise DataError(f"task {name!r}: no training record has a label")
    return labels


def _ordered(name: str, values: list[Any], order: list[str]) -> list[Any]:
    """The classes of an ordinal task, from the lowest."""
    if order:
        return order
    labels = sorted({float(value) for value in values})
    if len(labels) < 2:
        raise DataError(f"task {name!r}: expected at least two different labels, got {labels}")
    return labels
