"""A sequence of labels of each sentence, shorter than it and aligned with nothing (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import CTCHead
from pymtl.serving.answers import NO_LABEL, CTCAnswers, Scored
from pymtl.serving.values import are_strings, is_string
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import Kind, Learned

BLANK = "<blank>"


class CTC(CTCAnswers, Kind):
    """One minus the label error rate."""

    scores = ("label_accuracy",)

    def of_cell(self, cell: str, task: Any) -> list[str]:
        return cell.split()

    def as_cell(self, value: Any) -> str:
        return " ".join(value)

    def is_element(self, value: Any) -> bool:
        return is_string(value)

    def strata(self, label: Any) -> tuple[str, ...]:
        return ()

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        fits = are_strings(label) and len(label) > 0 and BLANK not in label
        return fits, f"a list of at least one string, none of them {BLANK}"

    def check_label(self, field: str, label: Any, task: Any, length: int) -> None:
        # A path passes through a blank between equal neighbours.
        fits, _ = self.expects(label, task, length)
        needed = len(label) + sum(a == b for a, b in pairwise(label)) if fits else 0
        if needed > length:
            raise DataError(f"field {field!r}: expected labels that fit into {length} tokens, got {needed} steps")
        super().check_label(field, label, task, length)

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[str]:
        return [BLANK, *super().vocabulary(name, values, task)]

    def target(self, label: list[str], encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor([encoding[symbol] for symbol in label if symbol in encoding], dtype=torch.int64)

    def count_labels(self, target: Tensor, weight: Sequence[float] | None = None) -> float:
        return int((target != NO_LABEL).any(1).sum())  # sequences

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> CTCHead:
        return CTCHead(len(learned.labels), reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from torchmetrics.functional.text import word_error_rate

        # Labels may hold spaces, words may not.
        ids = {label: str(i) for i, label in enumerate(sorted({label for row in (*truth, *guess) for label in row}))}
        texts = [[" ".join(ids[label] for label in row) for row in rows] for rows in (guess, truth)]
        return {"label_accuracy": 1 - float(word_error_rate(*texts))}

    def is_right(self, truth: list[str], guess: list[str], task: Any) -> bool:
        return truth == guess
