"""Random loss weighting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class RLW(Balancing):
    """Random loss weighting (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting", normal distribution): at
    each call the weights are ``K softmax(z)``, z drawn from a standard normal by torch's generator; K times the
    paper's, so that they are 1 on average as in equal weighting. The numbers are this object's own, begun by torch's
    generator: processes that share a batch draw the same."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        z = torch.randn(len(tasks), generator=self._generator, dtype=torch.float64)
        return len(tasks) * torch.dot(torch.softmax(z, 0).to(values), values)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state)
