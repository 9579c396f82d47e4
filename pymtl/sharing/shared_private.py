"""A shared encoder beside one of each task's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymtl.sharing.base import Sharing, SharingResult, check_weight
from pymtl.sharing.parallel import ParallelLSTM
from pymtl.states import States, beside

SHARED = "shared"


class SharedPrivate(Sharing):
    """Shared and private encoders (Liu, Qiu & Huang 2017, "Adversarial Multi-task Learning for Text Classification").

    A task's states are the shared encoder's beside its own. Two penalties keep the former free of what is one
    task's own: orthogonality, the mean over tasks of ``||S^T P_k||_F^2`` of the sequences' final states (equation 12,
    over B^2 here, so that it does not grow with the batch), and an adversary that tells the task of a batch from
    the shared final states through a gradient reversal (equation 9). The adversary needs batches that belong to some
    of the tasks only, as tasks with data sets of their own have them; it learns nothing from a batch of all tasks.
    (If a task of the batch reads after another task, that one counts as a task of the batch.)

    The K+1 encoders run side by side, a layer in one launch.

    Args:
        tasks, input_size, hidden_size, num_layers, bidirectional, dropout: as for :class:`Sharing`.
        orthogonality: weight of that penalty in the loss.
        adversarial: weight of the adversary's loss.
        shared_only: tasks without an encoder of their own, whose states are the shared encoder's alone: side tasks,
            which are there for what they teach that one.

    Raises:
        ValueError: a weight is below 0, a task is called "shared", or one of ``shared_only`` is not among the tasks.
        TypeError: ``shared_only`` is a string.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        orthogonality: float = 0.01,
        adversarial: float = 0.0,
        shared_only: Sequence[str] = (),
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        if SHARED in tasks:
            raise ValueError(f"tasks: expected other names than {SHARED!r}, the shared encoder's")
        self.orthogonality = check_weight("orthogonality", orthogonality)
        self.adversarial = check_weight("adversarial", adversarial)
        if isinstance(shared_only, str):
            raise TypeError(f"shared_only: expected a list of tasks, got {shared_only!r}")
        for task in shared_only:
            if task not in tasks:
                raise ValueError(f"shared_only: expected some of the tasks {list(tasks)}, got {task!r}")
        self.private = tuple(task for task in tasks if task not in shared_only)
        self.parallel = ParallelLSTM({name: self.lstm() for name in (SHARED, *self.private)})
        features = self.directions * hidden_size
        self.discriminator = nn.Linear(features, len(tasks)) if adversarial > 0 else None

    @property
    def out_features(self) -> int:
        return 2 * self.directions * self.hidden_size

    def features_of(self, task: str) -> int:
        return self.out_features if task in self.private else self.directions * self.hidden_size

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        private = [task for task in tasks if task in self.private]
        tokens, last = self.parallel(data, batch_sizes, (SHARED, *private))
        shared, *own_tokens = tokens.unbind(1)
        shared_last, *private_last = last.unbind(1)
        states = {}
        if len(private) < len(tasks):
            states = dict.fromkeys(tasks, States.of(shared, batch_sizes, self.directions, shared_last))
        for task, own, own_last in zip(private, own_tokens, private_last):
            both = [beside(pair, self.directions) for pair in ((shared, own), (shared_last, own_last))]
            states[task] = States.of(both[0], batch_sizes, self.directions, both[1])
        penalties = {}
        if self.wants_penalties() and self.orthogonality > 0 and private:
            penalties["orthogonality"] = self.orthogonality * _orthogonality(shared_last, private_last)
        some = len(tasks) < len(self.tasks)
        if self.wants_penalties() and self.discriminator is not None and some and len(shared_last) > 0:
            penalties["adversarial"] = self.adversarial * self._adversary(shared_last, tasks)
        return SharingResult(states, penalties)

    def _adversary(self, shared_last: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """The cross-entropy of which tasks the batch is of, equally likely where there are several."""
        guesses = self.discriminator(_Reversed.apply(shared_last))
        truth = guesses.new_tensor([task in tasks for task in self.tasks]) / len(tasks)
        return F.cross_entropy(guesses, truth.expand_as(guesses))

    def extra_repr(self) -> str:
        own = "" if self.private == self.tasks else f", private={list(self.private)}"
        return f"{super().extra_repr()}, orthogonality={self.orthogonality:g}, adversarial={self.adversarial:g}{own}"


def _orthogonality(shared: Tensor, private: Sequence[Tensor]) -> Tensor:
    rows = max(shared.shape[0], 1)
    return torch.stack([(shared.t() @ own).square().sum() for own in private]).mean() / rows**2


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad
