"""What every sharing scheme has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pymtl.custom import is_module_name
from pymtl.recurrent.lstm import LSTM
from pymtl.states import States


class SharingResult(NamedTuple):
    """The ``states`` of each task asked for (one object where tasks share them), and in training ``penalties``:
    differentiable scalars by name, weighted, that the loss adds."""

    states: dict[str, States]
    penalties: dict[str, Tensor]


class Sharing(nn.Module):
    """Gives each task its states of a batch of packed tokens.

    Args:
        tasks: the tasks' names, each fit for a module.
        input_size: I, the size of an embedded token.
        hidden_size: H, of each LSTM and direction.
        num_layers: LSTM layers between input and states.
        bidirectional: whether each layer also runs backward; D directions.
        dropout: between the layers, in training.

    Raises:
        ValueError: there is no task, a name comes twice or does not fit, or a number is out of range.
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
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: expected at least one name, all different, got {list(tasks)}")
        for task in tasks:
            if not is_module_name(task):
                raise ValueError(f"tasks: expected names fit for modules, got {task!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers: expected a number above 0, got {num_layers}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout}")
        self.tasks = tuple(tasks)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        # Padded input and output of the model is [B, T, ...].
        self.batch_first = True

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out_features(self) -> int:
        """F, the size of a task's states, where all tasks' have one size."""
        return self.directions * self.hidden_size

    def features_of(self, task: str) -> int:
        """F, the size of this task's states."""
        return self.out_features

    def separates_directions(self, task: str) -> bool:
        """Whether each direction's half of a state depends only on the tokens that this direction has read by then."""
        return not self.bidirectional or self.num_layers == 1

    def forward(self, data: Tensor, batch_sizes: Tensor, tasks: Sequence[str] | None = None) -> SharingResult:
        """The states of each task.

        Args:
            data: [N, I] embedded tokens, packed; float32 or float64.
            batch_sizes: int64 [T] on the CPU, as in PackedSequence.
            tasks: those wanted; all by default.

        Raises:
            KeyError: a task is unknown.
            ValueError: no task is wanted.
        """
        wanted = self.tasks if tasks is None else tuple(tasks)
        if not wanted:
            raise ValueError("tasks: expected at least one task, got none")
        for task in wanted:
            if task not in self.tasks:
                raise KeyError(f"tasks: unknown task {task!r}, expected one of {list(self.tasks)}")
        return self.run(data, batch_sizes, wanted)

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        """What a scheme defines: :meth:`forward` with known tasks."""
        raise NotImplementedError

    def lstm(self, input_size: int | None = None, num_layers: int | None = None) -> LSTM:
        """An encoder of this scheme's sizes."""
        layers = self.num_layers if num_layers is None else num_layers
        return LSTM(
            self.input_size if input_size is None else input_size,
            self.hidden_size,
            layers,
            batch_first=True,
            dropout=self.dropout if layers > 1 else 0.0,
            bidirectional=self.bidirectional,
        )

    def between_layers(self, states: Tensor) -> Tensor:
        """Dropout, for schemes that take the layers one by one."""
        return nn.functional.dropout(states, self.dropout, self.training) if self.dropout > 0 else states

    def wants_penalties(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        return f"tasks={list(self.tasks)}"


def check_weight(name: str, value: float) -> float:
    """A penalty's weight.

    Raises:
        ValueError: it is below 0 or no number.
    """
    if not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return float(value)
