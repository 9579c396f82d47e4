"""What training learns of the data: ids of tokens, characters and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pymtl.serving.encoding import SPECIAL
from pymtl.serving.records import Record
from pymtl.training.config import Config, TaskConfig
from pymtl.training.errors import DataError, RunError
from pymtl.training.kinds.base import Learned


@dataclass(frozen=True)
class Vocabulary:
    """Token ids; for each task what its kind learns of its labels, of classes the labels in the order of their ids, and
    ``counts``, how often each is in the training records; characters' and categories' ids."""

    tokens: list[str]
    labels: dict[str, list[Any]]
    characters: list[str] = field(default_factory=list)
    categories: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(records: Iterable[Record], config: Config) -> Vocabulary:
        """Of training records; tokens and characters by falling count, labels by name.

        Raises:
            DataError: a task has no label.
        """
        records = list(records)
        for name in config.tasks:
            if all(record.labels.get(name) is None for record in records):
                raise DataError(f"task {name!r}: no training record has a label")
        counts = Counter(token for record in records for token in record.tokens)
        kept = [token for token in _by_count(counts) if counts[token] >= config.training.min_count]
        characters = _by_count(Counter("".join(token for record in records for token in record.tokens)))
        categories = {}
        for name, info in config.fields.items():
            if info.kind == "category":
                seen = Counter(str(value) for record in records for value in record.fields[name])
                categories[name] = SPECIAL + _by_count(seen)
        kept = [t for t in kept if t not in SPECIAL]
        labels = {
            name: _labels(name, records, task, {token: counts[token] for token in kept})
            for name, task in config.tasks.items()
            if task.rules.has_vocabulary(task)
        }
        for name, found in labels.items():
            config.tasks[name].rules.check_options(name, config.tasks[name], found)
        return Vocabulary(
            SPECIAL + kept if config.model.words else SPECIAL,
            labels,
            SPECIAL + characters if config.characters is not None else [],
            categories,
            {name: _counts(name, records, config.tasks[name], found) for name, found in labels.items()},
        )

    def learned(self, task: str) -> Learned:
        """What is known of a task's labels."""
        return Learned(self.labels.get(task, []), self.counts.get(task, []))

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "labels": self.labels,
            "characters": self.characters,
            "categories": self.categories,
            "counts": self.counts,
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
        labels = dict(raw["labels"]) if isinstance(raw.get("labels"), dict) else {}
        for name, task in config.tasks.items():
            older = task.rules.older_vocabulary(task)
            if name not in labels and older is not None:
                labels[name] = older
            if task.rules.has_vocabulary(task) and not task.rules.is_vocabulary(labels.get(name)):
                raise RunError(f"{where}: expected labels of task {name!r}")
        characters, categories, counts = raw.get("characters", []), raw.get("categories", {}), raw.get("counts", {})
        if config.characters is not None and not (strings(characters) and characters[:2] == SPECIAL):
            raise RunError(f"{where}: expected characters")
        for name, info in config.fields.items():
            if info.kind == "category" and not (isinstance(categories, dict) and strings(categories.get(name))):
                raise RunError(f"{where}: expected categories of field {name!r}")
        for name, task in config.tasks.items():
            own = counts.get(name) if isinstance(counts, dict) else None
            whole = isinstance(own, list) and len(own) == len(labels.get(name, ())) and all(type(n) is int for n in own)
            if task.class_weights == "balanced" and not whole:
                raise RunError(f"{where}: expected counts of the labels of task {name!r}")
        return Vocabulary(raw["tokens"], labels, characters, categories, counts)


def _by_count(counts: Counter[str]) -> list[str]:
    return [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _labels(name: str, records: list[Record], task: TaskConfig, counts: dict[str, int]) -> list[Any]:
    """The labels of a task; ``counts`` of the vocabulary's tokens."""
    if task.rules.labels_itself:
        labels = task.rules.vocabulary_of_tokens(counts, task)
        if not labels:
            raise DataError(f"task {name!r}: no token is as frequent in training as training.min_count asks for")
        return labels
    values = [record.labels[name] for record in records if record.labels.get(name) is not None]
    labels = task.rules.vocabulary(name, values, task)
    if not labels:
        raise DataError(f"task {name!r}: no training record has a label")
    return labels


def _counts(name: str, records: list[Record], task: TaskConfig, labels: list[Any]) -> list[int]:
    """How often each label is in the records, in the labels' order; of what is not counted, none."""
    rules = task.rules
    seen = Counter(rules.label_name(part) for record in records for part in rules.parts(record.labels.get(name)))
    return [seen[rules.label_name(label)] for label in labels] if seen else []
