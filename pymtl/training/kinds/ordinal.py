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
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import NO_LABEL, Decoding, Kind, PoolingOptions, Requirement, Scored
from pymtl.training.values import are_strings, is_number, number_of


@dataclass(frozen=True, kw_only=True)
class OrdinalOptions(PoolingOptions):
    order: list[str] = dataclasses.field(default_factory=list)  # of labels that are strings, from the lowest


class Ordinal(Kind):
    """Quadratically weighted kappa and accuracy."""

    name = "ordinal"
    Options = OrdinalOptions
    scores = ("kappa", "accuracy")

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        order = list(dict.fromkeys(task.order))
        return [(order == task.order and len(order) != 1, "order", "two labels or more, all different")]

    def of_cell(self, cell: str, task: Any) -> Any:
        return cell.strip() if task.order else number_of(cell)

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        if task.order:
            return label in task.order, f"one of {', '.join(task.order)}"
        return is_number(label), "a finite number (or set an order of labels)"

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

    def target(self, label: Any, ids: Mapping[Any, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor(ids.get(label if isinstance(label, str) else float(label), NO_LABEL))

    def head(self, task: Any, labels: Sequence[Any], words: nn.Embedding | None) -> OrdinalHead:
        return OrdinalHead(len(labels), self.pooling(task), OrdinalLoss(NO_LABEL), reads=self.reads(task))

    def decode(self, logits: Tensor, given: Decoding) -> list[Any]:
        return [given.labels[index] for index in OrdinalHead.classes(logits).tolist()]

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

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        return value if isinstance(value, str) else f"{value:g}"
