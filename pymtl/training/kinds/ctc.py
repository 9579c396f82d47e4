"""A sequence of labels of each sentence, shorter than it and aligned with nothing (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pymtl.ctc import ctc_beam, ctc_greedy
from pymtl.heads import CTCHead
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import NO_LABEL, Decoding, Kind, Learned, Scored
from pymtl.training.values import are_strings, is_string

BLANK = "<blank>"


class CTC(Kind):
    """One minus the label error rate."""

    name = "ctc"
    scores = ("label_accuracy",)
    of_tokens = True

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

    def decode(self, logits: Tensor, given: Decoding) -> list[list[str]]:
        if given.beam_size == 1:
            best = ctc_greedy(logits, given.lengths)
        else:
            best = [row for row, _ in ctc_beam(logits, given.lengths, given.beam_size)]
        return [[given.labels[i] for i in row] for row in best]

    def distributions(self, logits: Tensor, given: Decoding) -> dict[str, list[float]]:
        """``probability`` of the labels that were decoded, over all their paths."""
        ids = {label: i for i, label in enumerate(given.labels)}
        rows = [torch.tensor([ids[label] for label in row], dtype=torch.int64) for row in self.decode(logits, given)]
        losses = F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            pad_sequence(rows, batch_first=True).to(logits.device),
            given.lengths,
            torch.tensor([len(row) for row in rows]),
            reduction="none",
        )
        return {"probability": losses.neg().exp().tolist()}

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

    def describe(self, value: list[str], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return " ".join(value) or "none"
