"""The neighbours of each token: every text is its own label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.language_model import LanguageModelHead, language_model_targets
from pymtl.training.kinds.base import FIRST_TOKEN, NO_LABEL, Decoding, Kind, Learned, Requirement, Scored


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    # What is said of each token's neighbours: "tokens", which they are; "suffixes", their last three characters, which
    # rare words share with frequent ones
    predicts: Literal["tokens", "suffixes"] = "tokens"
    num_tokens: int = 5000  # how many of the most frequent tokens, or suffixes, are predicted
    tied: bool = False  # whether its weights are the word embedding's


SUFFIX = 3  # characters


class LanguageModel(Kind):
    """Perplexity, of tokens or of suffixes. Of the latter the vocabulary has the most frequent ones."""

    name = "language_model"
    Options = LanguageModelOptions
    scores = ("perplexity",)
    lower_is_better = True
    of_tokens = True
    aligned = True
    labels_itself = True

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
        suffixes: Counter[str] = Counter()
        for token, count in counts.items():
            suffixes[_suffix(token)] += count
        return sorted(suffixes, key=lambda suffix: (-suffixes[suffix], suffix))[: task.num_tokens]

    def encoding(self, labels: Sequence[str], tokens: Sequence[str] = ()) -> Tensor | None:
        """The suffix of each token, -1 if it is not predicted; None where tokens are."""
        if not labels:
            return None
        places = {suffix: i for i, suffix in enumerate(labels)}
        special = [-1] * FIRST_TOKEN
        return torch.tensor(special + [places.get(_suffix(token), -1) for token in tokens[FIRST_TOKEN:]])

    def target(self, label: Any, encoding: Tensor | None, tokens: Tensor, task: Any, config: Any) -> Tensor:
        predicted = tokens if encoding is None else encoding[tokens]
        alone = PackedSequence(predicted, torch.ones(len(tokens), dtype=torch.int64))
        directions = 2 if config.model.bidirectional else 1
        return language_model_targets(alone, task.num_tokens, directions).data

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> LanguageModelHead:
        count = len(learned.labels) or min(task.num_tokens, words.num_embeddings)
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


def _suffix(token: str) -> str:
    return token[-SUFFIX:].lower()


def _counts(given: Decoding) -> list[int]:
    """How many words of each text are predicted."""
    return (given.target != NO_LABEL).flatten(1).sum(1).tolist()


def _perplexity(entropy: float, count: int) -> float:
    return math.exp(min(entropy / count, 700.0))  # a number still
