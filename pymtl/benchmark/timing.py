"""Interleaved timing: a machine's speed drifts by tens of percent, ratios of neighbours do not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Work = TypeVar("Work")


def interleaved(
    contenders: Mapping[str, Callable[[Work], Any]], work: Sequence[Work], ours: str, block: int = 1
) -> dict[str, dict[str, float]]:
    """Runs every contender on every piece of work, one after another.

    Args:
        contenders: what to time.
        work: what to run it on.
        ours: the contender the others are compared with.
        block: how many pieces a contender runs before its neighbour's turn. More than one where a contender
            has state, such as an optimizer's, that should stay in the caches as it does when it runs alone.

    Returns:
        For each contender ``p50`` and ``p90`` milliseconds of a piece, and ``ratio``, the median over the
        blocks of its time divided by ``ours``: how many times as fast ours is.
    """
    for run in contenders.values():
        for item in work[:3]:
            run(item)
    pieces: dict[str, list[float]] = {name: [] for name in contenders}
    blocks: dict[str, list[float]] = {name: [] for name in contenders}
    for first in range(0, len(work), block):
        for name, run in contenders.items():
            taken = []
            for item in work[first : first + block]:
                started = time.perf_counter()
                run(item)
                taken.append(time.perf_counter() - started)
            pieces[name] += taken
            blocks[name].append(sum(taken))
    return {
        name: {
            "p50": 1e3 * statistics.median(pieces[name]),
            "p90": 1e3 * percentile(pieces[name], 0.9),
            "ratio": statistics.median(theirs / own for theirs, own in zip(blocks[name], blocks[ours])),
        }
        for name in contenders
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
