"""Equal gradient norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing


class EqualNorm(Balancing):
    """Divides each loss by the norm of its gradient at the states that the task's head reads, so that equal weights
    give the tasks an equal say in the encoder, whatever their losses are a mean or a sum of.

    The total is ``sum_k w_k (c / n_k) L_k``: w are the fixed weights; n_k is the norm of task k's gradient, a mean over
    the past with the weights ``decay^age``; c is the largest norm of any task, so that no loss is scaled down. This is
    the gradient normalisation of Lin et al. 2023 ("Dual-Balancing for Multi-Task Learning", section 3.2), and the goal
    of GradNorm with alpha = 0 (Chen et al. 2018), reached at once. The gradients are with respect to states, not to
    weights: they take a backward pass through the heads only.

    Norms change slowly, so they are measured in a task's first ``every`` batches and then in one of ``every``.

    Args:
        tasks: the tasks' names.
        decay: of a measurement's weight in the mean with each later one.
        every: a task's batches between two measurements.

    Raises:
        ValueError: ``decay`` is not from 0 to below 1, or ``every`` is below 1.
    """

    def __init__(self, tasks: Sequence[str], decay: float = 0.9, every: int = 10) -> None:
        super().__init__(tasks)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a whole number above 0, got {every}")
        self.decay = decay
        self.every = every
        # Of the norms measured so far the sum with their weights, and the sum of the weights.
        self.register_buffer("sums", torch.zeros(len(self.tasks)))
        self.register_buffer("weights", torch.zeros(len(self.tasks)))
        self._batches = dict.fromkeys(self.tasks, 0)

    def forward(
        self,
        losses: Mapping[str, Tensor],
        shared: Sequence[Tensor] = (),
        weights: Mapping[str, float] | None = None,
        states: Mapping[str, Sequence[Tensor]] | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As :meth:`Balancing.forward`.

        Raises:
            ValueError: a task's loss comes without its states.
        """
        self.check_known(losses)
        if self.training and torch.is_grad_enabled():
            self._measure(losses, weights or {}, states or {}, mean)
        scales = self.scales()
        if tuple(losses) != self.tasks:
            scales = scales[self.places(list(losses))]
        values = torch.stack(list(losses.values()))
        return torch.dot(scales.to(values.dtype), values)

    def scales(self) -> Tensor:
        """What each task's loss is multiplied by, [K]; 1 for one whose gradient has not been measured."""
        known = self.sums > 0
        norms = torch.where(known, self.sums / self.weights, 0.0)
        return torch.where(known, norms.max() / norms, 1.0)

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
        own = torch.tensor([abs(weights.get(task, 1.0)) for task in due], dtype=squares.dtype, device=squares.device)
        norms = squares.sqrt() / own
        places = torch.tensor(self.places(due), device=self.sums.device)
        # A task without weight, without states to train or already perfect has nothing to measure.
        found = norms.isfinite() & (norms > 0)
        norms = norms.where(found, torch.zeros_like(norms)).to(self.sums.dtype)
        kept = torch.where(found, self.decay, 1.0).to(self.sums.dtype)
        new = (1 - self.decay) * found
        self.sums.index_put_((places,), kept * self.sums[places] + (1 - self.decay) * norms)
        self.weights.index_put_((places,), kept * self.weights[places] + new.to(self.weights.dtype))

    def get_extra_state(self) -> dict[str, Any]:
        return {"batches": dict(self._batches)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if set(state["batches"]) != set(self.tasks):
            raise ValueError(f"state: expected one of the tasks {list(self.tasks)}, got of {list(state['batches'])}")
        self._batches = dict(state["batches"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}, every={self.every}"


def _square_of_gradient(loss: Tensor, states: Sequence[Tensor]) -> Tensor:
    """The squared norm of the loss's gradient at these states, float64; 0 if it has none."""
    wanted = [tensor for tensor in states if tensor.requires_grad]
    nothing = torch.zeros((), dtype=torch.float64, device=loss.device)
    if not wanted or not loss.requires_grad:
        return nothing
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return torch.stack(norms).square().sum() if norms else nothing
