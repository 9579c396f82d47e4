"""The neighbouring words of each token: every text is its own label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.language_model import LanguageModelHead, language_model_targets
from pymtl.training.kinds.base import NO_LABEL, Decoding, Kind, Learned, Requirement, Scored


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    num_tokens: int = 5000  # how many of the most frequent tokens are predicted
    tied: bool = False  # whether its weights are the word embedding's


class LanguageModel(Kind):
    """Perplexity."""

    name = "language_model"
    Options = LanguageModelOptions
    scores = ("perplexity",)
    lower_is_better = True
    of_tokens = True
    aligned = True
    has_vocabulary = False
    labels_itself = True

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        return [
            (task.num_tokens >= 1, "num_tokens", "a number above 0"),
            (task.num_tokens > 2, "num_tokens", "more than padding and the unknown token"),
            (config.model.words, "kind", "a task with words"),
            (not task.skip, "skip", "a language model that reads its states alone"),
            (task.after is None, "after", "a language model that reads its states alone"),
        ]

    def parts(self, label: Any) -> tuple[Any, ...]:
        return ()

    def target(self, label: Any, encoding: Any, tokens: Tensor, task: Any, config: Any) -> Tensor:
        alone = PackedSequence(tokens, torch.ones(len(tokens), dtype=torch.int64))
        directions = 2 if config.model.bidirectional else 1
        return language_model_targets(alone, task.num_tokens, directions).data

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> LanguageModelHead:
        count = min(task.num_tokens, words.num_embeddings)
        return LanguageModelHead(count, words.embedding_dim, words if task.tied else None)

    def decode(self, logits: Tensor, given: Decoding) -> list[float | None]:
        """The perplexity, or None of a text without a word to predict."""
        entropies = F.cross_entropy(
            logits.flatten(0, -2), given.target.flatten(), ignore_index=NO_LABEL, reduction="none"
        )
        sums = entropies.view(len(given.target), -1).double().sum(1).tolist()
        return [_perplexity(e, n) if n > 0 else None for e, n in zip(sums, _counts(given))]

    def details(self, logits: Tensor, given: Decoding) -> dict[str, list[int]]:
        return {"tokens": _counts(given)}

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        counts = [each["tokens"] for each in details]
        total = sum(math.log(value) * count for value, count in zip(guess, counts) if count > 0)
        return {"perplexity": _perplexity(total, sum(counts))} if sum(counts) > 0 else {}

    def as_cell(self, value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        return []

    def describe(self, value: float | None, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return "no word to predict" if value is None else f"perplexity {value:.1f}"


def _counts(given: Decoding) -> list[int]:
    """How many words of each text are predicted."""
    return (given.target != NO_LABEL).flatten(1).sum(1).tolist()


def _perplexity(entropy: float, count: int) -> float:
    return math.exp(min(entropy / count, 700.0))  # a number still
