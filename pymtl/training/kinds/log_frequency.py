"""How frequent each token is: every text is its own label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import TokenClassificationHead
from pymtl.training.kinds.base import FIRST_TOKEN, NO_LABEL, Decoding, Kind, Learned, Requirement, Scored
from pymtl.training.values import is_number


class LogFrequency(Kind):
    """The whole part of the logarithm of how often a token occurs in training, as a class (Plank, Søgaard & Goldberg
    2016, "Multilingual Part-of-Speech Tagging with Bidirectional Long Short-Term Memory Models and Auxiliary Loss",
    section 2). It keeps the states of rare words apart from those of frequent ones, and so helps other tags of rare
    words.

    Its vocabulary has the classes, the most frequent tokens' first, and how many tokens of the run's vocabulary each
    has: those are ordered by how often they occur.
    """

    name = "log_frequency"
    scores = ("accuracy",)
    of_tokens = True
    aligned = True
    labels_itself = True
    has_reference = True

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        return [(config.model.words, "kind", "a task with words")]

    def parts(self, label: Any) -> tuple[Any, ...]:
        return ()

    def vocabulary_of_tokens(self, counts: Mapping[str, int], task: Any) -> list[dict[str, int]]:
        classes = Counter(int(math.log(count)) for count in counts.values())
        return [{"class": value, "tokens": classes[value]} for value in sorted(classes, reverse=True)]

    def is_vocabulary(self, labels: Any) -> bool:
        fits = isinstance(labels, list) and len(labels) > 0 and all(isinstance(label, dict) for label in labels)
        return fits and all(is_number(label.get("class")) and is_number(label.get("tokens")) for label in labels)

    def encoding(self, labels: Sequence[Mapping[str, int]], tokens: Sequence[str] = ()) -> Tensor:
        """The first id behind each class."""
        return torch.tensor([label["tokens"] for label in labels], dtype=torch.int64).cumsum(0) + FIRST_TOKEN

    def target(self, label: Any, encoding: Tensor, tokens: Tensor, task: Any, config: Any) -> Tensor:
        """Tokens that training has not seen, or too rarely, have no label."""
        known = (tokens >= FIRST_TOKEN) & (tokens < encoding[-1])
        return torch.bucketize(tokens, encoding, right=True).where(known, torch.tensor(NO_LABEL))

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> TokenClassificationHead:
        return TokenClassificationHead(len(learned.labels), reads=self.reads(task))

    def decode(self, logits: Tensor, given: Decoding) -> list[list[int]]:
        classes = [label["class"] for label in given.labels]
        rows = logits.argmax(-1).tolist()
        return [[classes[i] for i in row[:length]] for row, length in zip(rows, given.lengths.tolist())]

    def details(self, logits: Tensor, given: Decoding) -> dict[str, list[int]]:
        """How many ``tokens`` of a text have a label, and for how many of them it was ``right``."""
        known = given.target != NO_LABEL
        right = known & (logits.argmax(-1) == given.target)
        return {"tokens": known.sum(1).tolist(), "right": right.sum(1).tolist()}

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        right, tokens = (sum(each[name] for each in details) for name in ("right", "tokens"))
        return {"accuracy": right / tokens} if tokens > 0 else {}

    def as_cell(self, value: Sequence[int]) -> str:
        return " ".join(map(str, value))

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        return []

    def describe(self, value: Sequence[int], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return " ".join(f"{token}/{number}" for token, number in zip(tokens, value))
