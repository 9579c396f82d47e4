"""Sequences from a decoder, one sentence and one hypothesis at a time: what :mod:`pymtl.serving.generation` does for all
of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl.serving.generation import END, NO_COVERAGE, Hypothesis, Search

# From a token and a state to the logits [C] of the next token, the state behind it, and how much was read of each token
# of the sentence [T].
Step = Callable[[int, Any], tuple[Tensor, Any, Tensor | None]]


def beam_search(
    step: Step, state: Any, settings: Search, max_length: int, first: int = END, never: Sequence[int] = ()
) -> list[Hypothesis]:
    """The ``nbest`` sequences of one sentence, the best first.

    Args:
        step, state: the model, and the state before the first token.
        settings: not of sampling.
        max_length: tokens at most.
        first: what is read first.
        never: tokens that are not to come.
    """
    size = settings.beam_size
    live: list[tuple[list[int], float, Any, list[Tensor]]] = [([], 0.0, state, [])]
    found: list[Hypothesis] = []
    for length in range(1, max_length + 2):
        candidates = []
        for tokens, total, before, read in live:
            logits, after, weights = step(tokens[-1] if tokens else first, before)
            scores = logits.double().log_softmax(-1).tolist()
            for token in {*never, *_repeated(tokens, settings.no_repeat_ngram)}:
                scores[token] = -math.inf
            own = [*read, weights] if weights is not None else []
            candidates += [(total + score, tokens, token, after, own) for token, score in enumerate(scores)]
        candidates = [each for each in candidates if each[0] > -math.inf]
        best = sorted(candidates, key=lambda each: -each[0])[: 2 * size]
        for total, tokens, token, _, read in best[:size]:
            if token == END:
                found.append(_hypothesis(tokens, total, read, True, settings))
        found = sorted(found, key=lambda own: -own.score)[:size]
        ended = {tuple(tokens) for _, tokens, token, _, _ in best if token == END}
        if length > max_length:
            live = [each for each in live if tuple(each[0]) not in ended]
            break
        live = [([*tokens, t], total, after, read) for total, tokens, t, after, read in best if t != END][:size]
        reachable = max((total for _, total, _, _ in live), default=-math.inf) / _length(length, settings)
        if len(found) == size and reachable <= found[-1].score:
            live = []
        if not live:
            break
    for tokens, total, _, read in live:
        if len(found) < size:
            found.append(_hypothesis(tokens, total, read, False, settings))
    return found[: settings.nbest]


def _length(length: int, settings: Search) -> float:
    return ((5 + length) / 6) ** settings.length_penalty


def _hypothesis(tokens: list[int], total: float, read: list[Tensor], ended: bool, settings: Search) -> Hypothesis:
    score = total / _length(len(tokens) + ended, settings)
    if read and settings.coverage_penalty > 0:
        covered = torch.stack(read).double().sum(0).clamp(NO_COVERAGE, 1.0)
        score += settings.coverage_penalty * float(covered.log().sum())
    attention = torch.stack(read).double().numpy() if read else None
    return Hypothesis(tokens, total, score, ended, attention)


def _repeated(tokens: list[int], n: int) -> list[int]:
    """Those with which n tokens would come a second time."""
    if n == 0 or len(tokens) < n:
        return []
    end = tuple(tokens[len(tokens) - n + 1 :])
    return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n - 1]) == end]
