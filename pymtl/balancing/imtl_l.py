"""Impartial multi-task learning of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl.balancing.base import Balancing


class IMTLL(Balancing):
    """IMTL-L (Liu et al. 2021, "Towards Impartial Multi-task Learning", equation 7): the sum of ``exp(s) L - s`` with s
    learned, whose minimum scales every loss to 1. (IMTL-G, on gradients, is ``IMTLG`` of
    :class:`GradientAggregation`.)"""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_scale = nn.Parameter(torch.zeros(len(self.tasks)))

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        s = self.log_scale[self.places(tasks)]
        return (s.exp() * values - s).sum()
