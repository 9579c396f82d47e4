"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class DWA(Balancing):
    """Dynamic weight average (Liu, Johns & Davison 2019, "End-to-End Multi-Task Learning with Attention", equation 7):
    in epoch t the weights are ``K softmax(r / T)``, ``r_k = L_k(t-1) / L_k(t-2)`` of the mean training losses; ones in
    the first two epochs.

    Args:
        tasks: the tasks' names.
        temperature: T; larger is more even.
    """

    def __init__(self, tasks: Sequence[str], temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self.temperature = temperature
        # Mean losses of the last epoch and of the one before; NaN where there was none.
        self.register_buffer("history", torch.full((2, len(self.tasks)), torch.nan))

    def weights(self) -> Tensor:
        """[K], of all tasks."""
        ratios = torch.where(self.history.isnan().any(0), 1.0, self.history[0] / self.history[1].clamp(min=1e-12))
        return len(self.tasks) * torch.softmax(ratios / self.temperature, 0)

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return torch.dot(self.weights()[self.places(tasks)].to(values.dtype), values)

    def after_epoch(self, losses: Mapping[str, float]) -> None:
        self.history[1] = self.history[0]
        for task, place in zip(self.tasks, self.places(self.tasks)):
            if task in losses:
                self.history[0, place] = losses[task]
