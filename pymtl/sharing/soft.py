"""An encoder for each task, kept alike by a penalty."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

from pymtl.sharing.base import Sharing, SharingResult, check_weight
from pymtl.sharing.parallel import ParallelLSTM

Penalty = Literal["l2", "trace_norm", "representations"]


class SoftSharing(Sharing):
    """Soft parameter sharing: K encoders, and a penalty on how much they differ.

    - ``"l2"``: the sum over pairs of tasks of the squared distance between their parameters (Duong et al. 2015,
      "Low Resource Dependency Parsing", equation 2).
    - ``"trace_norm"``: the sum over parameters of the nuclear norm of the K tasks' stacked into a matrix (Yang &
      Hospedales 2017, "Trace Norm Regularised Deep Multi-Task Learning", last-axis flattening).
    - ``"representations"``: the mean over pairs of tasks of the mean squared distance between their states.

    The encoders run side by side, a layer in one launch.

    Args:
        tasks, input_size, hidden_size, num_layers, bidirectional, dropout: as for :class:`Sharing`.
        penalty: see above.
        weight: of the penalty in the loss.

    Raises:
        ValueError: the penalty is unknown, or its weight below 0.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        penalty: Penalty = "l2",
        weight: float = 1e-3,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        if penalty not in get_args(Penalty):
            raise ValueError(f"penalty: expected one of {get_args(Penalty)}, got {penalty!r}")
        self.penalty = penalty
        self.weight = check_weight("weight", weight)
        self.parallel = ParallelLSTM({task: self.lstm() for task in tasks})

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        states = self.parallel.states(data, batch_sizes, tasks)
        penalties = {}
        if self.wants_penalties() and self.weight > 0 and len(self.tasks) > 1:
            if self.penalty == "l2":
                value = self._l2()
            elif self.penalty == "trace_norm":
                value = self._trace_norm()
            else:
                value = _distance([states[task].tokens for task in tasks])
            penalties[self.penalty] = self.weight * value
        return SharingResult(states, penalties)

    def _parameters_side_by_side(self) -> list[tuple[Tensor, ...]]:
        """Each weight of all tasks, as the encoders use it now."""
        each = []
        for task in self.tasks:
            encoder = self.parallel.encoders[task]
            each.append([w for layer in range(encoder.num_layers) for w in encoder.layer_weights(layer).tensors()])
        return list(zip(*each))

    def _l2(self) -> Tensor:
        # With K tasks' parameters p_k around their mean m: the sum over pairs of |p_i - p_j|^2 is K sum_k |p_k - m|^2.
        terms = []
        for group in self._parameters_side_by_side():
            stacked = torch.stack(group)
            terms.append((stacked - stacked.mean(0)).square().sum())
        return len(self.tasks) * torch.stack(terms).sum()

    def _trace_norm(self) -> Tensor:
        groups = self._parameters_side_by_side()
        with torch.autocast(groups[0][0].device.type, enabled=False):
            stacked = [torch.stack([p.flatten() for p in group]) for group in groups]
            return torch.stack([_nuclear_norm(matrix) for matrix in stacked]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty!r}, weight={self.weight:g}"


def _distance(states: Sequence[Tensor]) -> Tensor:
    pairs = list(combinations(states, 2))
    if not pairs:
        return states[0].new_zeros(())
    return torch.stack([(a - b).square().sum() / max(a.numel(), 1) for a, b in pairs]).mean()


def _nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values of K long rows."""
    # The roots of the eigenvalues of the K x K Gram matrix, many times as fast as a decomposition of the long one. It
    # squares the singular values' ratios, which float64 has the digits for down to a ratio of 1e-7.
    wide = matrix.double()
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.t())
    # Where tasks are alike, one is 0 but for rounding, and its root has no derivative.
    least = (1e-15 * eigenvalues[-1].detach()).clamp(min=1e-300)
    return eigenvalues.clamp(min=least).sqrt().sum().to(matrix.dtype)
