"""Tasks at different layers of one stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.states import States


class HierarchicalSharing(Sharing):
    """Lower tasks supervised at lower layers (Søgaard & Goldberg 2016, "Deep multi-task learning with low level tasks
    supervised at lower layers").

    Args:
        tasks, input_size, hidden_size, bidirectional, dropout: as for :class:`Sharing`.
        num_layers: how many layers there are; if a level is higher, as many as that level.
        levels: the layer of each task, from 1; by default the first task reads layer 1, the second layer 2, and so on.
        shortcut: whether each layer above the first reads the embedded tokens besides the layer below (Hashimoto et
            al. 2017).

    Raises:
        TypeError: a level is not a whole number.
        ValueError: the tasks of ``levels`` are not ``tasks``, or a level is below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        levels: Mapping[str, int] | None = None,
        shortcut: bool = True,
    ) -> None:
        levels = {task: i + 1 for i, task in enumerate(tasks)} if levels is None else dict(levels)
        if not all(isinstance(level, int) for level in levels.values()):
            raise TypeError(f"levels: expected whole numbers, got {levels}")
        super().__init__(tasks, input_size, hidden_size, max([num_layers, *levels.values()]), bidirectional, dropout)
        if set(levels) != set(tasks):
            raise ValueError(f"levels: expected a level for each of {list(tasks)}, got {levels}")
        if min(levels.values()) < 1:
            raise ValueError(f"levels: expected layers from 1, got {levels}")
        self.levels = levels
        self.shortcut = shortcut
        above = self.out_features + (input_size if shortcut else 0)
        self.layers = nn.ModuleList(
            self.lstm(input_size if layer == 0 else above, num_layers=1) for layer in range(self.num_layers)
        )

    def separates_directions(self, task: str) -> bool:
        return not self.bidirectional or self.levels[task] == 1

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        of_level = {}
        below = data
        for level in range(1, max(self.levels[task] for task in tasks) + 1):
            output, (h_n, _) = self.layers[level - 1](PackedSequence(below, batch_sizes))
            last = h_n.transpose(0, 1).flatten(1)
            of_level[level] = States.of(output.data, batch_sizes, self.directions, last)
            below = self.between_layers(output.data)
            if self.shortcut:
                below = torch.cat([below, data], dim=1)
        return SharingResult({task: of_level[self.levels[task]] for task in tasks}, {})

    def extra_repr(self) -> str:
        return f"levels={self.levels}, shortcut={self.shortcut}"
