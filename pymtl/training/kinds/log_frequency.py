"""How frequent each token is: every text is its own label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pymtl.heads import TokenClassificationHead
from pymtl.serving.answers import LogFrequencyAnswers, Scored
from pymtl.serving.values import is_number
from pymtl.training.kinds.base import Kind, Learned, Requirement


class LogFrequency(LogFrequencyAnswers, Kind):
    """The whole part of the logarithm of how often a token occurs in training, as a class (Plank, Søgaard & Goldberg
    2016, "Multilingual Part-of-Speech Tagging with Bidirectional Long Short-Term Memory Models and Auxiliary Loss",
    section 2). It keeps the states of rare words apart from those of frequent ones, and so helps other tags of rare
    words.

    Its vocabulary has the classes, the most frequent tokens' first, and how many tokens of the run's vocabulary each
    has: those are ordered by how often they occur.
    """

    scores = ("accuracy",)
    aligned = True
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

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> TokenClassificationHead:
        return TokenClassificationHead(len(learned.labels), reads=self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        right, tokens = (sum(each[name] for each in details) for name in ("right", "tokens"))
        return {"accuracy": right / tokens} if tokens > 0 else {}

    def as_cell(self, value: Sequence[int]) -> str:
        return " ".join(map(str, value))

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        return []
