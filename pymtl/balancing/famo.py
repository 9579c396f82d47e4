"""Fast adaptive multitask optimisation."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class FAMO(Balancing):
    """FAMO (Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", algorithm 1): descends on the weighted
    logarithms of the losses, ``sum_k c z_k log L_k`` with ``z = softmax(xi)`` and c such that the weights of the
    losses' own gradients sum to 1, and moves xi by how much each logarithm fell in the step, so that all fall alike.

    It needs the losses of the batch anew after each step: one more forward pass, no further backward pass.

    Args:
        tasks: the tasks' names.
        learning_rate: of xi, for Adam.
        decay: of xi, gamma in the paper.
        least: what the losses never get below.
    """

    needs_losses_after_step: ClassVar[bool] = True

    def __init__(
        self, tasks: Sequence[str], learning_rate: float = 0.025, decay: float = 1e-3, least: float = 0.0
    ) -> None:
        super().__init__(tasks)
        self.least = least
        self.register_buffer("xi", torch.zeros(len(self.tasks)))
        self._settings = {"lr": learning_rate, "weight_decay": decay}
        self._optimizer = torch.optim.Adam([self.xi], **self._settings)
        self._before: dict[str, Tensor] = {}

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        distance = self._distance(values)
        if torch.is_grad_enabled():
            self._before = dict(zip(tasks, distance.detach()))
        z = torch.softmax(self.xi[self.places(tasks)].to(values.dtype), 0)
        c = 1 / (z / distance.detach()).sum()
        return c * torch.dot(z, distance.log())

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        tasks = [task for task in losses if task in self._before]
        if not tasks:
            return
        self._follow()
        after = self._distance(torch.stack([losses[task].detach() for task in tasks]))
        fell = torch.stack([self._before[task] for task in tasks]).log() - after.log()
        places = self.places(tasks)
        # The gradient of z . fell in xi, through the softmax.
        z = torch.softmax(self.xi[places], 0)
        fell = fell.to(z.dtype)
        self.xi.grad = torch.zeros_like(self.xi).index_put((torch.tensor(places),), z * (fell - torch.dot(z, fell)))
        self._optimizer.step()
        self._before = {}

    def _distance(self, values: Tensor) -> Tensor:
        return (values - self.least).clamp(min=1e-8)

    def get_extra_state(self) -> dict[str, Any]:
        return copy.deepcopy(self._optimizer.state_dict())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._follow()
        self._optimizer.load_state_dict(copy.deepcopy(state))

    def _follow(self) -> None:
        """Keeps the optimiser on xi, which another tensor may have replaced."""
        if self._optimizer.param_groups[0]["params"][0] is not self.xi:
            state = self._optimizer.state_dict()
            self._optimizer = torch.optim.Adam([self.xi], **self._settings)
            self._optimizer.load_state_dict(state)
