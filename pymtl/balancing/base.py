"""What every balancing method has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class Balancing(nn.Module):
    """Makes one loss of several. A method's parameters are learned with the model's; what else it remembers is in its
    ``state_dict`` too.

    Args:
        tasks: the tasks' names.

    Raises:
        ValueError: there is no task, or a name comes twice.
    """

    #: Whether :meth:`backward` differs from ``backward()`` of the loss.
    combines_gradients: ClassVar[bool] = False
    #: Whether :meth:`after_step` has to be called with the losses of the same batch after the optimiser's step.
    needs_losses_after_step: ClassVar[bool] = False
    #: Whether :meth:`forward` takes each task's own states and fixed weight too, and losses of tasks without a label in
    #: the batch, as that of :class:`EqualNorm` does.
    takes_states: ClassVar[bool] = False

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: expected at least one name, all different, got {list(tasks)}")
        self.tasks = tuple(tasks)

    def forward(self, losses: Mapping[str, Tensor], shared: Sequence[Tensor] = ()) -> Tensor:
        """The loss to minimise.

        Args:
            losses: the scalar of each task that has targets in this batch, times its fixed weight.
            shared: the states that all these tasks' heads read, for methods that look at their gradients.

        Raises:
            KeyError: a task is unknown.
        """
        self.check_known(losses)
        names = list(losses)
        return self.total(torch.stack([losses[name] for name in names]), names, shared)

    def check_known(self, losses: Mapping[str, Tensor]) -> None:
        """Raises KeyError if a task is unknown."""
        for task in losses:
            if task not in self.tasks:
                raise KeyError(f"losses: unknown task {task!r}, expected one of {list(self.tasks)}")

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        """What a method defines: a scalar of the losses [K] of these tasks."""
        raise NotImplementedError

    def backward(self, losses: Mapping[str, Tensor], shared: Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
        """Adds the gradients to the parameters' ``grad``, if ``combines_gradients``."""
        raise NotImplementedError

    def after_step(self, losses: Mapping[str, Tensor]) -> None:
        """Called after the optimiser's step, with the batch's losses anew, if ``needs_losses_after_step``."""

    def after_epoch(self, losses: Mapping[str, float]) -> None:
        """Called after each epoch with every task's mean loss in training."""

    def places(self, tasks: Sequence[str]) -> list[int]:
        """Where these tasks stand among all."""
        return [self.tasks.index(task) for task in tasks]

    def extra_repr(self) -> str:
        return f"tasks={list(self.tasks)}"
