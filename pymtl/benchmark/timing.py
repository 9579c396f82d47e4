"""Interleaved timing: a machine's speed drifts by tens of percent, ratios of neighbours do not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Work = TypeVar("Work")


def interleaved(
    contenders: Mapping[str, Callable[[Work], Any]],
    work: Sequence[Work],
    ours: str,
    warmup: int = 3,
    repeats: int = 1,
) -> dict[str, dict[str, float]]:
    """Runs every contender on every piece of work, one after another.

    Returns:
        For each contender ``p50`` and ``p90`` milliseconds, and ``ratio``, the median over the pieces of its
        time divided by ``ours``: how many times as fast ours is.
    """
    for item in list(work)[:warmup]:
        for run in contenders.values():
            run(item)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for item in work:
            for name, run in contenders.items():
                started = time.perf_counter()
                run(item)
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "p50": 1e3 * statistics.median(taken),
            "p90": 1e3 * percentile(taken, 0.9),
            "ratio": statistics.median(t / o for t, o in zip(taken, seconds[ours])),
        }
        for name, taken in seconds.items()
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
