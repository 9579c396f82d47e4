"""A number, or several, of each sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.heads import RegressionHead
from pymtl.training.kinds.base import Decoding, Kind, PoolingOptions, Requirement, Scored
from pymtl.training.values import has_numbers, is_number, number_of


@dataclass(frozen=True, kw_only=True)
class RegressionOptions(PoolingOptions):
    num_targets: int = 1


class Regression(Kind):
    """R², Pearson's and Spearman's correlation; of several numbers their means."""

    name = "regression"
    Options = RegressionOptions
    scores = ("r2", "pearson", "spearman")
    has_vocabulary = False
    has_reference = True
    has_squared_error = True
    least_labels = 2

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        return [(task.num_targets >= 1, "num_targets", "a number above 0")]

    def of_cell(self, cell: str, task: Any) -> Any:
        return [number_of(part) for part in cell.split()] if task.num_targets > 1 else number_of(cell)

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        if task.num_targets == 1:
            return has_numbers(label, 1), "a finite number"
        some = isinstance(label, list) and any(value is not None for value in label)
        fits = some and has_numbers([0.0 if value is None else value for value in label], task.num_targets)
        return fits, f"a list of {task.num_targets} finite numbers, some perhaps null"

    def is_element(self, value: Any) -> bool:
        return is_number(value)

    def target(self, label: Any, ids: Mapping[Any, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        numbers = label if isinstance(label, list) else [label]
        return torch.tensor([torch.nan if number is None else number for number in numbers], dtype=torch.float32)

    def head(self, task: Any, labels: Sequence[Any], words: nn.Embedding | None) -> RegressionHead:
        return RegressionHead(task.num_targets, self.pooling(task), reads=self.reads(task))

    def decode(self, logits: Tensor, given: Decoding) -> list[Any]:
        return logits[:, 0].tolist() if given.task.num_targets == 1 else logits.tolist()

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        from scipy import stats
        from sklearn import metrics as sk

        targets, outputs = ([row if isinstance(row, list) else [row] for row in rows] for rows in (truth, guess))
        columns = []
        for expected, actual in zip(zip(*targets), zip(*outputs), strict=True):
            known = [(float(a), float(b)) for a, b in zip(expected, actual) if a is not None]
            if len(known) > 1:
                columns.append(list(zip(*known)))
        if not columns:
            return {}
        found = [
            (float(sk.r2_score(*column)), *(_correlation(c, *column) for c in (stats.pearsonr, stats.spearmanr)))
            for column in columns
        ]
        return {name: sum(values) / len(values) for name, values in zip(self.scores, zip(*found))}

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        return " ".join(f"{number:.3f}" for number in (value if isinstance(value, list) else [value]))


def _correlation(values: Callable[..., Any], *columns: Sequence[float]) -> float:
    """One of scipy's correlations of two columns; 0 if one of them is constant."""
    if any(len(set(column)) == 1 for column in columns):
        return 0.0
    return float(values(*columns).statistic)
