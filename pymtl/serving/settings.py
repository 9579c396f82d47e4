"""What a model's file says of the run that it is of: as much of its configuration as answering takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from .answers import ANSWERS, Answers
from .tokenizing import Tokenizer

# Of a task's section, what only training reads.
OF_TRAINING = ("weight", "skip", "after", "label_smoothing", "class_weights", "pooling", "attention_heads", "missing")


@dataclass(frozen=True)
class DataSettings:
    """How the texts of a data set are read."""

    tokens: str  # the field of the text
    splits_by: Tokenizer
    lowercase: bool


@dataclass(frozen=True)
class FieldSettings:
    """A further field of each token."""

    kind: str
    field: str | None
    size: int


class TaskSettings(SimpleNamespace):
    """A task's kind and its options."""

    @property
    def rules(self) -> Answers:
        return ANSWERS[self.kind]


@dataclass(frozen=True)
class Settings:
    """In the place of a whole configuration."""

    sets: dict[str, DataSettings]
    tasks: dict[str, TaskSettings]
    fields: dict[str, FieldSettings]
    characters: SimpleNamespace | None  # max_length
    model: SimpleNamespace  # words, bidirectional

    @property
    def main_tasks(self) -> dict[str, TaskSettings]:
        return self.tasks

    def main_tasks_of(self, dataset: str) -> tuple[str, ...]:
        """The names of a data set's tasks."""
        return tuple(name for name, task in self.tasks.items() if (task.dataset or "") == dataset)

    @staticmethod
    def from_plain(raw: Mapping[str, Any]) -> Settings:
        """What :func:`plain` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        unknown = [task["kind"] for task in raw["tasks"].values() if task["kind"] not in ANSWERS]
        if unknown:
            raise KeyError(unknown[0])
        return Settings(
            {name: DataSettings(**data) for name, data in raw["sets"].items()},
            {name: TaskSettings(**task) for name, task in raw["tasks"].items()},
            {name: FieldSettings(**info) for name, info in raw["fields"].items()},
            None if raw["characters"] is None else SimpleNamespace(**raw["characters"]),
            SimpleNamespace(**raw["model"]),
        )


def plain(config: Any) -> dict[str, Any]:
    """What answering takes of a configuration, as JSON has it."""
    return {
        "sets": {
            name: {"tokens": data.tokens, "splits_by": data.splits_by, "lowercase": data.lowercase}
            for name, data in config.sets.items()
        },
        "tasks": {
            name: {key: value for key, value in asdict(task).items() if key not in OF_TRAINING}
            for name, task in config.main_tasks.items()
        },
        "fields": {
            name: {"kind": info.kind, "field": info.field, "size": info.size} for name, info in config.fields.items()
        },
        "characters": None if config.characters is None else {"max_length": config.characters.max_length},
        "model": {"words": config.model.words, "bidirectional": config.model.bidirectional},
    }
