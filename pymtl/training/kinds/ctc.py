"""A sequence of labels of each sentence, shorter than it and aligned with nothing (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import CTCHead
from pymtl.serving.answers import NO_LABEL, CTCAnswers, Scored
from pymtl.serving.values import are_strings, is_string, shown
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import Learned
from pymtl.training.kinds.sequences import ReferenceOptions, RightAnswers, SequenceKind, error_rate, exact_matches

BLANK = "<blank>"


class CTC(CTCAnswers, SequenceKind):
    """One minus the label error rate; exact matches."""

    Options = ReferenceOptions
    scores = ("label_accuracy", "exact_match")
    special_labels = 1  # the blank

    def of_cell(self, cell: str, task: Any) -> list[str]:
        return cell.split()

    def sequence_of(self, answer: Any, task: Any) -> tuple[str, ...]:
        if not are_strings(answer) or BLANK in answer:
            expected = f"a list of at least one string, none of them {BLANK}"
            raise DataError(f"expected {expected}, got {shown(answer, is_string)}")
        return tuple(answer)

    def check_label(self, field: str, label: RightAnswers, task: Any, length: int) -> None:
        if not label.tokens:
            raise DataError(f"field {field!r}: expected at least one label, got none")
        # A path passes through a blank between equal neighbours.
        needed = len(label.tokens) + sum(a == b for a, b in pairwise(label.tokens))
        if needed > length:
            raise DataError(f"field {field!r}: expected labels that fit into {length} tokens, got {needed} steps")
        super().check_label(field, label, task, length)

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[str]:
        return [BLANK, *super().vocabulary(name, values, task)]

    def target(
        self, label: RightAnswers, encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any
    ) -> Tensor:
        return torch.tensor([encoding[symbol] for symbol in label.tokens if symbol in encoding], dtype=torch.int64)

    def count_labels(self, target: Tensor, weight: Sequence[float] | None = None) -> float:
        return int((target != NO_LABEL).any(1).sum())  # sequences

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> CTCHead:
        return CTCHead(len(learned.labels), reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        found = list(map(tuple, guess))
        return {
            "label_accuracy": 1 - error_rate(list(map(list, truth)), found),
            "exact_match": exact_matches(truth, found),
        }
