"""Task attention over shared states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.states import States


class TaskAttention(Sharing):
    """Soft attention masks of each task on the features of shared layers (Liu, Johns & Davison 2019, "End-to-End
    Multi-Task Learning with Attention", MTAN), over sequences: at layer l task k reads

        a_k^l = sigmoid(W_k^l [h^l, a_k^{l-1}] + b_k^l) * h^l

    and its heads the mask of the last layer. h^l are the states of the shared LSTM's layer l; at the first layer
    there is no a_k below.

    Args:
        tasks, input_size, hidden_size, num_layers, bidirectional, dropout: as for :class:`Sharing`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        features = self.out_features
        self.layers = nn.ModuleList(
            self.lstm(input_size if layer == 0 else features, num_layers=1) for layer in range(num_layers)
        )
        self.masks = nn.ModuleDict(
            {
                task: nn.ModuleList(
                    nn.Linear(features if layer == 0 else 2 * features, features) for layer in range(num_layers)
                )
                for task in tasks
            }
        )

    def separates_directions(self, task: str) -> bool:
        return not self.bidirectional  # a mask reads both

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        attended: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            output, (h_n, _) = layer(PackedSequence(data, batch_sizes))
            states = output.data
            for task in tasks:
                read = torch.cat([states, attended[task]], dim=1) if task in attended else states
                attended[task] = self.masks[task][index](read).sigmoid() * states
            data = self.between_layers(states)
        batch = h_n.shape[1]
        states = {task: States.of(attended[task], batch_sizes, self.directions, batch=batch) for task in tasks}
        return SharingResult(states, {})
