"""Mixtures of expert encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.sharing.parallel import ParallelLSTM
from pymtl.states import States

SHARED = "shared"


class MMoE(Sharing):
    """Multi-gate mixture of experts (Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with
    Multi-gate Mixture-of-Experts", equations 5 to 7) over sequences: the experts are LSTMs, and at every token a
    task's gate, a softmax over the experts, reads the embedded token.

    The experts run side by side, a layer in one launch.

    Args:
        tasks, input_size, hidden_size, num_layers, bidirectional, dropout: as for :class:`Sharing`.
        num_experts: E.

    Raises:
        ValueError: ``num_experts`` is below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        num_experts: int = 3,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        if num_experts < 1:
            raise ValueError(f"num_experts: expected a number above 0, got {num_experts}")
        self.experts = ParallelLSTM({f"expert{e}": self.lstm() for e in range(num_experts)})
        self.gates = nn.ModuleDict({task: nn.Linear(input_size, num_experts, bias=False) for task in tasks})

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        tokens, last = self.experts(data, batch_sizes)
        mixed = {task: _mixed(self.gates[task](data), tokens) for task in tasks}
        batch = last.shape[0]
        states = {task: States.of(own, batch_sizes, self.directions, batch=batch) for task, own in mixed.items()}
        return SharingResult(states, {})


class CGC(Sharing):
    """Customized gate control, and with several levels progressive layered extraction (Tang et al. 2020, "Progressive
    Layered Extraction", sections 4.1 and 4.2), over sequences: every task has experts of its own beside shared ones,
    and its gate, a softmax over both at every token, reads what its experts read. Above the first level a task's
    experts read its mixture, the shared ones that of a gate over all experts.

    The experts of a level run side by side, in one launch.

    Args:
        tasks, input_size, hidden_size, bidirectional, dropout: as for :class:`Sharing`.
        num_layers: levels; 1 is CGC, more are PLE.
        num_experts: of each task, and shared ones.

    Raises:
        ValueError: ``num_experts`` is below 1, or a task is called "shared".
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        num_experts: int = 1,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        if num_experts < 1:
            raise ValueError(f"num_experts: expected a number above 0, got {num_experts}")
        if SHARED in tasks:
            raise ValueError(f"tasks: expected other names than {SHARED!r}, the shared experts'")
        self.num_experts = num_experts
        self.levels = nn.ModuleList()
        self.gates = nn.ModuleList()
        owners = (*self.tasks, SHARED)
        for level in range(num_layers):
            size = input_size if level == 0 else self.out_features
            experts = {f"{owner}_expert{e}": self.lstm(size, 1) for owner in owners for e in range(num_experts)}
            self.levels.append(ParallelLSTM(experts))
            gates = {task: nn.Linear(size, 2 * num_experts, bias=False) for task in self.tasks}
            if level + 1 < num_layers:
                gates[SHARED] = nn.Linear(size, len(owners) * num_experts, bias=False)
            self.gates.append(nn.ModuleDict(gates))

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        count = self.num_experts
        owners = (*self.tasks, SHARED)
        inputs = dict.fromkeys(owners, data)
        for level, (experts, gates) in enumerate(zip(self.levels, self.gates)):
            if level > 0:
                inputs = {owner: self.between_layers(mixture) for owner, mixture in inputs.items()}
                data = torch.stack([inputs[owner] for owner in owners for _ in range(count)], dim=1)
            tokens, last = experts(data, batch_sizes)
            of_owner = dict(zip(owners, tokens.split(count, dim=1)))
            mixtures = {
                task: _mixed(gates[task](inputs[task]), torch.cat([of_owner[task], of_owner[SHARED]], dim=1))
                for task in (tasks if level + 1 == len(self.levels) else self.tasks)
            }
            if SHARED in gates:
                mixtures[SHARED] = _mixed(gates[SHARED](inputs[SHARED]), tokens)
            inputs = mixtures
        batch = last.shape[0]
        states = {task: States.of(inputs[task], batch_sizes, self.directions, batch=batch) for task in tasks}
        return SharingResult(states, {})


def _mixed(gate: Tensor, experts: Tensor) -> Tensor:
    """[N, F], the experts' states [N, E, F] weighted by the softmax of the gate [N, E]."""
    return (gate.softmax(-1).unsqueeze(1) @ experts).squeeze(1)
