"""The neighbours of each token: every text is its own label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pymtl.language_model import LanguageModelHead
from pymtl.serving.answers import LanguageModelAnswers, Scored, perplexity, suffixes_of
from pymtl.serving.encoding import FIRST_TOKEN
from pymtl.training.kinds.base import Kind, Learned, Requirement


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    # What is said of each token's neighbours: "tokens", which they are; "suffixes", their last three characters, which
    # rare words share with frequent ones
    predicts: Literal["tokens", "suffixes"] = "tokens"
    num_tokens: int = 5000  # how many of the most frequent tokens, or suffixes, are predicted
    tied: bool = False  # whether its weights are the word embedding's


class LanguageModel(LanguageModelAnswers, Kind):
    """Perplexity, of tokens or of suffixes. Of the latter the vocabulary has the most frequent ones."""

    Options = LanguageModelOptions
    scores = ("perplexity",)
    lower_is_better = frozenset(scores)
    is_bounded = False
    aligned = True

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        suffixes = task.predicts == "suffixes"
        return [
            (task.num_tokens >= 1, "num_tokens", "a number above 0"),
            (suffixes or task.num_tokens > FIRST_TOKEN, "num_tokens", "more than padding and the unknown token"),
            (not suffixes or not task.tied, "tied", "predicts = 'tokens' with it"),
            (config.model.words, "kind", "a task with words"),
            (not task.skip, "skip", "a language model that reads its states alone"),
            (task.after is None, "after", "a language model that reads its states alone"),
        ]

    def parts(self, label: Any) -> tuple[Any, ...]:
        return ()

    def has_vocabulary(self, task: Any) -> bool:
        return task.predicts == "suffixes"

    def vocabulary_of_tokens(self, counts: Mapping[str, int], task: Any) -> list[str]:
        suffixes = suffixes_of(counts)
        return sorted(suffixes, key=lambda suffix: (-suffixes[suffix], suffix))[: task.num_tokens]

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> LanguageModelHead:
        count = len(learned.labels) or min(task.num_tokens, words.num_embeddings)
        return LanguageModelHead(count, words.embedding_dim, words if task.tied else None)

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        counts = [each["tokens"] for each in details]
        total = sum(math.log(value) * count for value, count in zip(guess, counts) if count > 0)
        return {"perplexity": perplexity(total, sum(counts))} if sum(counts) > 0 else {}

    def as_cell(self, value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        return []
