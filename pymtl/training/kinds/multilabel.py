"""Any number of labels of each sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import MultiLabelHead
from pymtl.serving.answers import MultilabelAnswers, Scored
from pymtl.serving.values import as_name, is_label
from pymtl.training.kinds.base import Column, Kind, Learned, MissingOptions, PoolingOptions


@dataclass(frozen=True, kw_only=True)
class MultilabelOptions(PoolingOptions, MissingOptions):
    pass


class Multilabel(MultilabelAnswers, Kind):
    """Micro F1."""

    Options = MultilabelOptions
    scores = ("f1",)
    is_exact = True
    has_reference = True

    looked_for = 2

    def starting(self, column: Column) -> list[str]:
        return ['pooling = "max"']

    def suits(self, column: Column) -> str | None:
        if column.is_cells:
            several = sum("|" in value.strip(" |") for value in column.values)
            return f"several labels in {several:,} of {len(column.values):,} cells" if several > 0 else None
        lists = all(isinstance(value, list) and all(map(is_label, value)) for value in column.values)
        return "lists of labels" if lists and any(column.values) else None

    def of_cell(self, cell: str, task: Any) -> list[str]:
        return [label.strip() for label in cell.split("|") if label.strip()]

    def when_missing(self, task: Any, length: int) -> list[str] | None:
        return [] if task.missing == "none" else None

    def as_cell(self, value: Any) -> str:
        return "|".join(map(as_name, value)) or "|"

    def of_value(self, value: Any, task: Any, source: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = [label.strip() if isinstance(label, str) else label for label in value]
        return [label for label in texts if label != ""]

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        fits = isinstance(label, list) and all(map(self.is_element, label))
        return fits, "a list of strings or whole numbers"

    def target(self, label: list[Any], encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        target = torch.zeros(len(encoding))
        target[[encoding[as_name(value)] for value in label if as_name(value) in encoding]] = 1.0
        return target

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> MultiLabelHead:
        return MultiLabelHead(len(learned.labels), self.pooling(task), reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from sklearn import metrics as sk

        labels, rows = _columns(truth, guess)
        flat = [[label in row for row in each for label in labels] for each in rows]
        return {"f1": float(sk.f1_score(*flat, labels=[True], average="micro", zero_division=0.0)) if labels else 0.0}

    def is_right(self, truth: Sequence[Any], guess: Sequence[Any], task: Any) -> bool:
        return set(map(as_name, truth)) == set(map(as_name, guess))

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        from sklearn import metrics as sk

        labels, rows = _columns(truth, guess)
        if not labels:
            return {}
        table = [[[label in row for label in labels] for row in each] for each in rows]
        columns = sk.precision_recall_fscore_support(*table, zero_division=0.0)
        return {
            "classes": [
                {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                for label, p, r, f, n in zip(labels, *columns)
            ]
        }


def _columns(truth: Sequence[Any], guess: Sequence[Any]) -> tuple[list[str], list[list[set[str]]]]:
    """All labels that occur, and the sets of each sentence, of the truth and of the guess."""
    rows = [[set(map(as_name, row)) for row in each] for each in (truth, guess)]
    return sorted(set().union(*rows[0], *rows[1])), rows
