"""Equal weighting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pymtl.balancing.base import Balancing


class EW(Balancing):
    """Equal weighting: the plain sum of the losses (each times its fixed weight)."""

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return values.sum()
