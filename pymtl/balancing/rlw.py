"""Random loss weighting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class RLW(Balancing):
    """Random loss weighting (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting", normal distribution): at
    each call the weights are ``K softmax(z)``, z drawn from a standard normal by torch's generator; K times the
    paper's, so that they are 1 on average as in equal weighting."""

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return len(tasks) * torch.dot(torch.softmax(torch.randn_like(values), 0), values)
