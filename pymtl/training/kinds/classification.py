"""A class of each sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import ClassificationHead
from pymtl.serving.answers import NO_LABEL, ClassificationAnswers, Scored
from pymtl.serving.values import as_name, is_label
from pymtl.training.kinds.base import (
    Column,
    CrossEntropyOptions,
    Kind,
    Learned,
    PoolingOptions,
    Requirement,
    confusion_of,
    rows_of_classes,
    weights_fit,
)


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(PoolingOptions, CrossEntropyOptions):
    pass


class Classification(ClassificationAnswers, Kind):
    """Accuracy and macro F1."""

    Options = ClassificationOptions
    scores = ("accuracy", "macro_f1")
    is_discrete = True
    is_exact = True
    has_reference = True

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        return [weights_fit(task)]

    looked_for = 5

    def starting(self, column: Column) -> list[str]:
        return ['pooling = "max"            # or "last", "mean", "attention"']

    def suits(self, column: Column) -> str | None:
        if not all(map(is_label, column.values)):
            return None
        classes = {as_name(value).strip() for value in column.values}
        few = 2 <= len(classes) <= max(2, min(len(column.values) // 4, 1000))
        return f"{len(classes)} classes" if few else None

    def of_value(self, value: Any, task: Any, source: Any) -> Any:
        return value.strip() if isinstance(value, str) else value

    def parts(self, label: Any) -> tuple[Any, ...]:
        return () if label is None else (label,)

    def target(self, label: Any, encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor(encoding.get(as_name(label), NO_LABEL))

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> ClassificationHead:
        loss = self.cross_entropy(task, learned)
        return ClassificationHead(len(learned.labels), self.pooling(task), loss, reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from sklearn import metrics as sk

        names = list(map(as_name, truth)), list(map(as_name, guess))
        return {
            "accuracy": float(sk.accuracy_score(*names)),
            "macro_f1": float(sk.f1_score(*names, average="macro", zero_division=0.0)),
        }

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        names = list(map(as_name, truth)), list(map(as_name, guess))
        return {"classes": rows_of_classes(*names), "confusion": confusion_of(*names)}
