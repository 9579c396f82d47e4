"""A number, or several, of each sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymtl.heads import RegressionHead
from pymtl.serving.answers import RegressionAnswers, Scored
from pymtl.serving.values import has_numbers, is_missing, is_number, number_of
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import Column, Kind, Learned, PoolingOptions, Requirement


@dataclass(frozen=True, kw_only=True)
class RegressionOptions(PoolingOptions):
    num_targets: int = 1  # how many numbers a text has
    # "log": the model learns logarithms, for numbers above 0 of very different sizes, as prices from 10 to 250,000
    scale: Literal["linear", "log"] = "linear"


class Regression(RegressionAnswers, Kind):
    """R², Pearson's and Spearman's correlation; of several numbers their means.

    The model's outputs are standardised: its vocabulary holds the mean and the standard deviation of each target, or of
    its logarithm, among the training records.
    """

    Options = RegressionOptions
    scores = ("r2", "pearson", "spearman")
    has_reference = True
    has_squared_error = True
    least_labels = 2

    looked_for = 4

    def starting(self, column: Column) -> list[str]:
        numbers = column.numbers() or [1.0]
        wide = min(numbers) > 0 and max(numbers) > 1000 * min(numbers)
        return ['pooling = "mean"', *(['scale = "log"              # numbers of very different sizes'] if wide else [])]

    def suits(self, column: Column) -> str | None:
        numbers = column.numbers()
        if numbers is None or len(set(numbers)) < 2:
            return None
        if len(numbers) > 2 and all(b - a == 1 for a, b in pairwise(numbers)):
            return None  # running numbers
        return f"numbers from {min(numbers):g} to {max(numbers):g}"

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        return [(task.num_targets >= 1, "num_targets", "a number above 0")]

    def of_cell(self, cell: str, task: Any) -> Any:
        return [number_of(part) for part in cell.split()] if task.num_targets > 1 else number_of(cell)

    def reads_numbers(self, task: Any) -> bool:
        return True

    def as_cell(self, value: Any) -> str:
        return " ".join(f"{number:.10g}" for number in (value if isinstance(value, list) else [value]))

    def of_value(self, value: Any, task: Any, source: Any) -> Any:
        if isinstance(value, list):
            return [None if is_missing(number) else number for number in value]
        return value

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        if task.num_targets == 1:
            return has_numbers(label, 1), "a finite number"
        some = isinstance(label, list) and any(value is not None for value in label)
        fits = some and has_numbers([0.0 if value is None else value for value in label], task.num_targets)
        return fits, f"a list of {task.num_targets} finite numbers, some perhaps null"

    def is_element(self, value: Any) -> bool:
        return is_number(value)

    def parts(self, label: Any) -> tuple[Any, ...]:
        return ()

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[dict[str, float]]:
        rows = [value if isinstance(value, list) else [value] for value in values]
        found = []
        for number, column in enumerate(zip(*rows), 1):
            known = [float(value) for value in column if value is not None]
            which = f" of number {number}" if task.num_targets > 1 else ""
            if task.scale == "log" and known:
                if min(known) <= 0:
                    raise DataError(
                        f"task {name!r}: expected values{which} above 0 with scale = 'log', got {min(known):g}"
                    )
                known = list(map(math.log, known))
            if len(set(known)) < 2:
                got = f"only {known[0]:g}" if known else "none"
                raise DataError(
                    f"task {name!r}: expected at least two different training values{which}, got {got}: "
                    "there is nothing to learn, leave the task out"
                )
            mean, deviation = _moments(known)
            if not 0 < deviation < math.inf:
                raise DataError(
                    f"task {name!r}: expected training values{which} whose standard deviation is a number above 0, "
                    f"got {deviation:g} around {mean:g}"
                )
            found.append({"mean": mean, "std": deviation} | ({"log": True} if task.scale == "log" else {}))
        return found

    def is_vocabulary(self, labels: Any) -> bool:
        fits = isinstance(labels, list) and len(labels) > 0 and all(isinstance(label, dict) for label in labels)
        return (
            fits
            and all(is_number(label.get("mean")) and is_number(label.get("std")) for label in labels)
            and all(label["std"] > 0 for label in labels)
        )

    def encoding(self, labels: Sequence[dict[str, float]], tokens: Sequence[str] = ()) -> RegressionHead:
        return _scaled(labels or [{"mean": 0.0, "std": 1.0}])

    def unknown(self, label: Any, encoding: Any) -> list[str]:
        return []

    def target(self, label: Any, encoding: RegressionHead, tokens: Tensor, task: Any, config: Any) -> Tensor:
        numbers = label if isinstance(label, list) else [label]
        row = torch.tensor([torch.nan if number is None else number for number in numbers], dtype=torch.float64)
        return encoding.standardized(row)

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> RegressionHead:
        return _scaled(learned.labels, self.pooling(task), self.reads(task))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from scipy import stats
        from sklearn import metrics as sk

        columns = [column for column in _columns(truth, guess) if len(column[0]) > 1]
        if not columns:
            return {}
        found = [
            (float(sk.r2_score(*column)), *(_correlation(c, *column) for c in (stats.pearsonr, stats.spearmanr)))
            for column in columns
        ]
        return {name: sum(values) / len(values) for name, values in zip(self.scores, zip(*found))}

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        """Those that are off by more than two of the training labels' standard deviations, the farthest first."""
        head = _scaled(scored.labels)

        def distance(expected: Any, actual: Any) -> float:
            rows = [value if isinstance(value, list) else [value] for value in (expected, actual)]
            rows[0] = [math.nan if number is None else number for number in rows[0]]
            a, b = (head.standardized(torch.tensor(row, dtype=torch.float64)) for row in rows)
            return float((a - b).abs().nan_to_num().max())

        distances = [distance(a, b) for a, b in zip(truth, guess)]
        return sorted((i for i, far in enumerate(distances) if far > 2), key=lambda i: -distances[i])

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        """Mean absolute, root mean squared and mean error of each number, in the data's units."""
        found: dict[str, float] = {}
        for number, (expected, actual) in enumerate(_columns(truth, guess), 1):
            if not expected:
                continue
            errors = [b - a for a, b in zip(expected, actual)]
            behind = f" of number {number}" if len(scored.labels) > 1 else ""
            found[f"mean absolute error{behind}"] = math.fsum(map(abs, errors)) / len(errors)
            found[f"root mean squared error{behind}"] = _deviation(errors)
            found[f"mean error{behind}"] = math.fsum(errors) / len(errors)
        return {"errors": found}

    def uncertainty(self, truth: Sequence[Any], guess: Sequence[Any], task: Any) -> Any:
        """The root mean squared error, of several numbers a list."""
        found = [_deviation([b - a for a, b in zip(*column)]) for column in _columns(truth, guess)]
        return found if task.num_targets > 1 else found[0]


def _scaled(labels: Sequence[dict[str, float]], pooling: Any = "last", reads: Any = None) -> RegressionHead:
    """A head of these means and standard deviations."""
    mean, std = [label["mean"] for label in labels], [label["std"] for label in labels]
    log = bool(labels) and bool(labels[0].get("log", False))
    return RegressionHead(len(labels), pooling, reads=reads, mean=mean, std=std, log=log)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; infinite ones of numbers that are too large for them."""
    try:
        mean = math.fsum(values) / len(values)
        return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    except OverflowError:
        return math.inf, math.inf


def _deviation(errors: Sequence[float]) -> float | None:
    """Root mean square; None of none."""
    return math.sqrt(math.fsum(error * error for error in errors) / len(errors)) if errors else None


def _columns(truth: Sequence[Any], guess: Sequence[Any]) -> list[tuple[list[float], list[float]]]:
    """Of each number what it was and what was said, where it was known."""
    targets, outputs = ([row if isinstance(row, list) else [row] for row in rows] for rows in (truth, guess))
    found = []
    for expected, actual in zip(zip(*targets), zip(*outputs), strict=True):
        known = [(float(a), float(b)) for a, b in zip(expected, actual) if a is not None]
        found.append(([a for a, _ in known], [b for _, b in known]))
    return found


def _correlation(values: Callable[..., Any], *columns: Sequence[float]) -> float:
    """One of scipy's correlations of two columns; 0 if one of them is constant."""
    if any(len(set(column)) == 1 for column in columns):
        return 0.0
    return float(values(*columns).statistic)
