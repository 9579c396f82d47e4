"""Task encoders that exchange states after each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.sharing.parallel import ParallelLSTM
from pymtl.states import States


class CrossStitch(Sharing):
    """Cross-stitch units (Misra et al. 2016, "Cross-stitch Networks for Multi-task Learning", equation 1): after each
    layer task j reads ``sum_k alpha[j, k] x_k``, x_k the layer's states of task k.

    The K encoders run side by side, a layer in one launch.

    Args:
        tasks, input_size, hidden_size, num_layers, bidirectional, dropout: as for :class:`Sharing`.
        self_weight: the diagonal of each ``alpha`` to begin with; the others of a row share what is left of 1.

    Raises:
        ValueError: ``self_weight`` is not from 0 to 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        self_weight: float = 0.9,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        if not 0.0 <= self_weight <= 1.0:
            raise ValueError(f"self_weight: expected a number from 0 to 1, got {self_weight}")
        self.layers = nn.ModuleList(
            ParallelLSTM({task: self.lstm(input_size if layer == 0 else self.out_features, 1) for task in tasks})
            for layer in range(num_layers)
        )
        count = len(tasks)
        alpha = torch.full((count, count), (1 - self_weight) / max(count - 1, 1))
        alpha.fill_diagonal_(self_weight if count > 1 else 1.0)
        self.alpha = nn.ParameterList(alpha.clone() for _ in range(num_layers))

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        for index, (layer, alpha) in enumerate(zip(self.layers, self.alpha)):
            if index > 0:
                data = self.between_layers(data)
            tokens, last = layer(data, batch_sizes)
            data = torch.einsum("jk,nkf->njf", alpha, tokens)
        finals = torch.einsum("jk,bkf->bjf", self.alpha[-1], last)
        states = {
            task: States.of(data[:, k], batch_sizes, self.directions, finals[:, k])
            for k, task in enumerate(self.tasks)
            if task in tasks
        }
        return SharingResult(states, {})
