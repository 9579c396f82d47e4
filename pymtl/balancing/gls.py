"""Geometric loss strategy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pymtl.balancing.base import Balancing


class GLS(Balancing):
    """Geometric loss strategy (Chennupati et al. 2019, "MultiNet++", equation 3): the geometric mean of the losses. A
    loss of 0 (no label, or nothing left to learn) is held at 1e-8, and has no gradient there."""

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return values.clamp(min=1e-8).log().mean().exp()
