"""Labels in order, from the logits of a sequence's tokens; class 0 is the blank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BLANK = 0


def greedy(path: Sequence[int]) -> list[int]:
    """The labels of a path: repeats merged, blanks left out (Graves et al. 2006, "best path decoding")."""
    merged = [label for i, label in enumerate(path) if i == 0 or label != path[i - 1]]
    return [label for label in merged if label != BLANK]


def beam(scores: Sequence[Sequence[float]], beam_size: int) -> tuple[list[int], float]:
    """The likeliest labels by prefix beam search (Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech
    Recognition", algorithm 1, without a language model), and the logarithm of their probability, over the paths the
    beam has kept. ``scores``: of each step the classes' log-probabilities.

    Raises:
        ValueError: ``beam_size``, how many prefixes are kept at each step, is below 1.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size: expected a number above 0, got {beam_size}")
    # Of each prefix the log-probabilities of the paths that end in a blank and of those that end in its last label.
    infinity = math.inf
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -infinity)}
    for step in scores:
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], blank: float, label: float, grown: dict = grown) -> None:
            before = grown.get(prefix, (-infinity, -infinity))
            grown[prefix] = (log_add(before[0], blank), log_add(before[1], label))

        for prefix, (blank, label) in kept.items():
            whole = log_add(blank, label)
            add(prefix, whole + step[BLANK], -infinity)
            for c in range(1, len(step)):
                if prefix and c == prefix[-1]:
                    add(prefix, -infinity, label + step[c])
                    add((*prefix, c), -infinity, blank + step[c])
                else:
                    add((*prefix, c), -infinity, whole + step[c])
        best = sorted(grown, key=lambda prefix: -log_add(*grown[prefix]))[:beam_size]
        kept = {prefix: grown[prefix] for prefix in best}
    prefix, parts = next(iter(kept.items()))
    return list(prefix), log_add(*parts)


def log_probability(scores: np.ndarray, labels: Sequence[int]) -> float:
    """The logarithm of the labels' probability over all their paths (Graves et al. 2006, equations 6 to 8).

    Args:
        scores: float64 [T, C], T at least 1: of each step the classes' log-probabilities.
        labels: classes above 0.
    """
    path = np.full(2 * len(labels) + 1, BLANK)
    path[1::2] = labels
    # Two steps along the path at once: past a blank between different labels.
    jumps = np.zeros(len(path), dtype=bool)
    jumps[2:] = (path[2:] != BLANK) & (path[2:] != path[:-2])
    sums = np.full(len(path), -np.inf)
    sums[:2] = scores[0, path[:2]]
    for step in scores[1:]:
        reached = sums.copy()
        reached[1:] = np.logaddexp(reached[1:], sums[:-1])
        reached[2:] = np.where(jumps[2:], np.logaddexp(reached[2:], sums[:-2]), reached[2:])
        sums = reached + step[path]
    return float(np.logaddexp.reduce(sums[-2:]))


def log_add(a: float, b: float) -> float:
    larger, smaller = (a, b) if a >= b else (b, a)
    return larger if smaller == -math.inf else larger + math.log1p(math.exp(smaller - larger))
