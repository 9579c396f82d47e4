"""An ordered class of each sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import OrdinalHead
from pymtl.losses import OrdinalLoss
from pymtl.serving.answers import NO_LABEL, OrdinalAnswers, Scored
from pymtl.serving.values import are_strings, is_number, number_of
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import (
    Column,
    Kind,
    Learned,
    PoolingOptions,
    Requirement,
    confusion_of,
    rows_of_classes,
)

MOST_CLASSES = 12  # of a field that looks like ordered classes


@dataclass(frozen=True, kw_only=True)
class OrdinalOptions(PoolingOptions):
    order: list[str] = dataclasses.field(default_factory=list)  # labels that are names, from the lowest


class Ordinal(OrdinalAnswers, Kind):
    """Quadratically weighted kappa and accuracy."""

    Options = OrdinalOptions
    scores = ("kappa", "accuracy")
    is_exact = True

    looked_for = 3

    def starting(self, column: Column) -> list[str]:
        return ['pooling = "mean"           # the numbers are in order; "regression" if their distances count']

    def suits(self, column: Column) -> str | None:
        numbers = column.numbers()
        if numbers is None or not 3 <= len(set(numbers)) <= MOST_CLASSES or not all(n.is_integer() for n in numbers):
            return None
        return f"{len(set(numbers))} whole numbers from {min(numbers):g} to {max(numbers):g}"

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        order = list(dict.fromkeys(task.order))
        return [(order == task.order and len(order) != 1, "order", "two labels or more, all different")]

    def of_cell(self, cell: str, task: Any) -> Any:
        return cell.strip() if task.order else number_of(cell)

    def reads_numbers(self, task: Any) -> bool:
        return not task.order

    def of_value(self, value: Any, task: Any, source: Any) -> Any:
        """Whole numbers stay whole where a spreadsheet or a cell has made 3.0 of 3."""
        if isinstance(value, str):
            return value.strip()
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        if task.order:
            return label in task.order, f"one of {', '.join(task.order)}"
        return is_number(label), "a finite number (or set an order of labels)"

    def parts(self, label: Any) -> tuple[Any, ...]:
        return () if label is None else (label,)

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[Any]:
        if task.order:
            return task.order
        labels = sorted({float(value) for value in values})
        if len(labels) < 2:
            raise DataError(f"task {name!r}: expected at least two different labels, got {labels}")
        return labels

    def is_vocabulary(self, labels: Any) -> bool:
        numbers = isinstance(labels, list) and all(isinstance(label, int | float) for label in labels)
        return bool(labels) and (are_strings(labels) or numbers)

    def target(self, label: Any, encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor(encoding.get(self.label_name(label), NO_LABEL))

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> OrdinalHead:
        loss = OrdinalLoss(NO_LABEL)
        return OrdinalHead(len(learned.labels), self.pooling(task), loss, reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from sklearn import metrics as sk

        place = scored.task.order.index if scored.task.order else float
        truth, guess = [float(place(value)) for value in truth], [float(place(value)) for value in guess]
        labels = sorted(set(truth) | set(guess))
        if len(labels) < 2:
            return {"kappa": 1.0, "accuracy": 1.0}  # all the same, and all of them found
        names = [labels.index(value) for value in truth], [labels.index(value) for value in guess]
        kappa = float(sk.cohen_kappa_score(*names, weights="quadratic"))
        return {"kappa": kappa, "accuracy": float(sk.accuracy_score(*names))}

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        names = list(map(self.label_name, truth)), list(map(self.label_name, guess))
        place = {self.label_name(label): i for i, label in enumerate(scored.labels)}
        confusion = confusion_of(*names)
        order = sorted(range(len(confusion["labels"])), key=lambda i: place.get(confusion["labels"][i], len(place)))
        return {
            "classes": sorted(rows_of_classes(*names), key=lambda row: place.get(row["label"], len(place))),
            "confusion": {
                "labels": [confusion["labels"][i] for i in order],
                "counts": [[confusion["counts"][i][j] for j in order] for i in order],
            },
        }
