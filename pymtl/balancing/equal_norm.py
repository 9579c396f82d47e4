"""Equal gradient norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class EqualNorm(Balancing):
    """Divides each loss by the norm of its gradient at the states that the task's head reads, so that equal weights
    give the tasks an equal say in the encoder, whatever their losses are a mean or a sum of.

    The total is ``sum_k w_k (c / n_k) L_k``: w are the fixed weights; n_k is the norm of task k's gradient, a mean over
    the past with the weights ``decay^age``; c is the largest norm of any task, so that no loss is scaled down. This is
    the gradient normalisation of Lin et al. 2023 ("Dual-Balancing for Multi-Task Learning", section 3.2), and what
    GradNorm with alpha = 0 learns its weights for (Chen et al. 2018). The gradients are with respect to states, not to
    weights: they take a backward pass through the heads only.

    The gradient of a task that has been learned vanishes, and dividing by it would make noise of what is left. So n_k
    is never taken below ``floor`` times the largest it has been.

    The norms are measured in a task's first ``every`` batches and then in one of ``every``.

    Args:
        tasks: the tasks' names.
        decay: of a measurement's weight in the mean with each later one.
        every: a task's batches between two measurements.
        floor: the share of its largest norm below which a task's norm is taken as that share.

    Raises:
        ValueError: ``decay`` is not from 0 to below 1, ``every`` is below 1 or ``floor`` not from 0 to 1.
    """

    takes_states: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[str], decay: float = 0.5, every: int = 10, floor: float = 0.01) -> None:
        super().__init__(tasks)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
        if type(every) is not int or every < 1:
            raise ValueError(f"every: expected a whole number above 0, got {every}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: expected a number above 0 and at most 1, got {floor}")
        self.decay = decay
        self.every = every
        self.floor = floor
        # Of each task the mean norm, 0 before there is one; the sum of the weights in that mean; the largest it was.
        self.register_buffer("norms", torch.zeros(len(self.tasks)))
        self.register_buffer("mass", torch.zeros(len(self.tasks)))
        self.register_buffer("largest", torch.zeros(len(self.tasks)))
        self._batches = dict.fromkeys(self.tasks, 0)

    def forward(
        self,
        losses: Mapping[str, Tensor],
        shared: Sequence[Tensor] = (),
        weights: Mapping[str, float] | None = None,
        states: Mapping[str, Sequence[Tensor]] | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The loss to minimise.

        Args:
            losses, shared: as of :meth:`Balancing.forward`.
            weights: the fixed weights that the losses are multiplied by; 1 of a task that is not named.
            states: those that each task's head reads.
            mean: of a tensor over all processes, where each has a part of the batch; None of a single one.

        Raises:
            KeyError: a task is unknown.
            ValueError: a task's loss comes without its states.
        """
        self.check_known(losses)
        if self.training and torch.is_grad_enabled():
            self._measure(losses, weights or {}, states or {}, mean)
        scales = self.scales().unbind()
        return torch.stack(
            [scales[i].to(v.dtype) * v for i, v in zip(self.places(list(losses)), losses.values())]
        ).sum()

    def scales(self) -> Tensor:
        """What each task's loss is multiplied by, [K]; 1 for one whose gradient has not been measured."""
        known = self.norms > 0
        norms = torch.maximum(self.norms, self.floor * self.largest)
        return torch.where(known, norms.max() / norms, 1.0)

    @torch.no_grad()
    def _add(self, place: int, norm: Tensor) -> None:
        """Adds a measurement, unless there was nothing to measure: no label, no weight, no states to train."""
        norm = norm.to(self.norms.dtype)
        found = norm.isfinite() & (norm > 0)
        mass = self.decay * self.mass[place] + (1 - self.decay)
        mean = self.norms[place] + (norm - self.norms[place]) * (1 - self.decay) / mass
        for buffer, new in ((self.mass, mass), (self.norms, mean)):
            buffer[place].copy_(torch.where(found, new, buffer[place]))
        self.largest[place].copy_(torch.maximum(self.largest[place], self.norms[place]))

    def _measure(
        self,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float],
        states: Mapping[str, Sequence[Tensor]],
        mean: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Adds the norms of the tasks whose turn it is."""
        due = []
        for task in losses:
            if task not in states and mean is None:  # of several processes one may have no label of a task
                raise ValueError(
                    f"states: EqualNorm needs the states that the head of {task!r} reads, which the output of a "
                    "pymtl.MultiTaskModel has: pass that output to the loss, or take another method"
                )
            batches, self._batches[task] = self._batches[task], self._batches[task] + 1
            if batches < self.every or batches % self.every == 0:
                due.append(task)
        if not due:
            return
        squares = torch.stack([_square_of_gradient(losses[task], states.get(task, ())) for task in due])
        if mean is not None:  # the gradient of the whole batch, but for a factor that all tasks have
            squares = mean(squares)
        for place, task, square in zip(self.places(due), due, squares.unbind()):
            weight = abs(weights.get(task, 1.0))
            if weight > 0:
                self._add(place, square.sqrt() / weight)

    def get_extra_state(self) -> dict[str, Any]:
        return {"batches": dict(self._batches)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if list(state["batches"]) != list(self.tasks):
            raise ValueError(f"state: expected one of the tasks {list(self.tasks)}, got of {list(state['batches'])}")
        self._batches = dict(state["batches"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}, every={self.every}, floor={self.floor}"


def _square_of_gradient(loss: Tensor, states: Sequence[Tensor]) -> Tensor:
    """The squared norm of the loss's gradient at these states, float64; 0 if it has none."""
    wanted = [tensor for tensor in states if tensor.requires_grad]
    nothing = torch.zeros((), dtype=torch.float64, device=loss.device)
    if not wanted or not loss.requires_grad:
        return nothing
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return torch.stack(norms).square().sum() if norms else nothing
