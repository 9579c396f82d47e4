"""A class of each sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import ClassificationHead
from pymtl.training.kinds.base import NO_LABEL, Decoding, Kind, PoolingOptions, Scored, SmoothingOptions


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(PoolingOptions, SmoothingOptions):
    pass


class Classification(Kind):
    """Accuracy and macro F1."""

    name = "classification"
    Options = ClassificationOptions
    scores = ("accuracy", "macro_f1")
    is_discrete = True
    has_reference = True

    def vocabulary(self, name: str, values: Sequence[str], task: Any) -> list[str]:
        return sorted(set(values))

    def target(self, label: str, ids: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor(ids.get(label, NO_LABEL))

    def head(self, task: Any, labels: Sequence[str], words: nn.Embedding | None) -> ClassificationHead:
        return ClassificationHead(len(labels), self.pooling(task), self.cross_entropy(task), reads=self.reads(task))

    def decode(self, logits: Tensor, given: Decoding) -> list[str]:
        return [given.labels[index] for index in logits.softmax(-1).max(-1).indices.tolist()]

    def details(self, logits: Tensor, given: Decoding) -> dict[str, list[float]]:
        return {"probability": logits.softmax(-1).max(-1).values.tolist()}

    def score(
        self, truth: Sequence[str], guess: Sequence[str], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from sklearn import metrics as sk

        return {
            "accuracy": float(sk.accuracy_score(truth, guess)),
            "macro_f1": float(sk.f1_score(truth, guess, average="macro", zero_division=0.0)),
        }

    def describe(self, value: str, details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        return f"{value} ({100 * details['probability']:.1f} %)"
