"""Any number of labels of each sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import MultiLabelHead
from pymtl.training.kinds.base import Decoding, Kind, PoolingOptions, Scored
from pymtl.training.values import are_strings


class Multilabel(Kind):
    """Micro F1."""

    name = "multilabel"
    Options = PoolingOptions
    scores = ("f1",)
    has_reference = True

    def of_cell(self, cell: str, task: Any) -> list[str]:
        return [label.strip() for label in cell.split("|") if label.strip()]

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        return are_strings(label), "a list of strings"

    def target(self, label: list[str], ids: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        target = torch.zeros(len(ids))
        target[[ids[value] for value in label if value in ids]] = 1.0
        return target

    def head(self, task: Any, labels: Sequence[str], words: nn.Embedding | None) -> MultiLabelHead:
        return MultiLabelHead(len(labels), self.pooling(task), reads=self.reads(task))

    def decode(self, logits: Tensor, given: Decoding) -> list[list[str]]:
        return [[label for label, yes in zip(given.labels, row) if yes] for row in (logits > 0).tolist()]

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from sklearn import metrics as sk

        labels = sorted({label for row in (*truth, *guess) for label in row})
        flat = [[label in row for row in rows for label in labels] for rows in (truth, guess)]
        return {"f1": float(sk.f1_score(*flat, labels=[True], average="micro", zero_division=0.0)) if labels else 0.0}

    def describe(self, value: list[str], details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        return ", ".join(value) or "none"
