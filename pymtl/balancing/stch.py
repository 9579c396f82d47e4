"""Smooth Tchebycheff scalarisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class STCH(Balancing):
    """Smooth Tchebycheff scalarisation (Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective
    Optimization", equation 9): ``mu log sum_k exp((w_k L_k - z) / mu)``, a smooth maximum of the losses' distances from
    an ideal point. Fixed weights w come from :class:`pymtl.JointLoss`.

    Args:
        tasks: the tasks' names.
        mu: the smoothing; towards 0 only the worst task counts.
        ideal: z, a weighted loss that no task gets below.
    """

    def __init__(self, tasks: Sequence[str], mu: float = 1.0, ideal: float = 0.0) -> None:
        super().__init__(tasks)
        if not mu > 0:
            raise ValueError(f"mu: expected a number above 0, got {mu}")
        self.mu = mu
        self.ideal = ideal

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return self.mu * torch.logsumexp((values - self.ideal) / self.mu, 0)
