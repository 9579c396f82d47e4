"""Uncertainty weighting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl.balancing.base import Balancing


class UW(Balancing):
    """Homoscedastic uncertainty weighting (Kendall, Gal & Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh
    Losses", equations 7 and 10): the sum of ``L / sigma^2 + log sigma`` for classification, of
    ``L / (2 sigma^2) + log sigma`` for regression, with ``s = log sigma^2`` learned.

    Args:
        tasks: the tasks' names.
        regression: those of them whose loss is a squared error.
    """

    def __init__(self, tasks: Sequence[str], regression: Sequence[str] = ()) -> None:
        super().__init__(tasks)
        for task in regression:
            if task not in self.tasks:
                raise ValueError(f"regression: unknown task {task!r}, expected some of {list(self.tasks)}")
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))
        factors = torch.tensor([0.5 if task in regression else 1.0 for task in self.tasks])
        self.register_buffer("_factors", factors, persistent=False)

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        s, factors = self.log_variance[self.places(tasks)], self._factors[self.places(tasks)]
        return (factors * (-s).exp() * values + s / 2).sum()
