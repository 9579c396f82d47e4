"""The joint loss of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops
from pymtl.crf import CRFLoss
from pymtl.packing import same_packing

Value = Tensor | PackedSequence


@dataclass(frozen=True)
class CrossEntropy:
    """Masked cross-entropy over classes, as :func:`torch.nn.functional.cross_entropy` (mean).

    Args:
        weight: a weight for each class, or None.
        ignore_index: the class that means there is no label.
        label_smoothing: the share of the target spread over all classes (Szegedy et al. 2016), 0 to 1.
    """

    weight: tuple[float, ...] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    kind: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {self.label_smoothing}")


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean of squared errors over the targets that are not NaN."""

    weight: ClassVar[None] = None
    ignore_index: ClassVar[int] = -100
    label_smoothing: ClassVar[float] = 0.0
    kind: ClassVar[str] = "mean_squared_error"


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean of binary cross-entropies (with logits) over the targets that are neither NaN nor ``ignore_index``.

    Args:
        weight: a weight of the positive label for each output, or None.
        ignore_index: the target that means there is no label, beside NaN.
    """

    weight: tuple[float, ...] | None = None
    ignore_index: int = -100
    label_smoothing: ClassVar[float] = 0.0
    kind: ClassVar[str] = "binary_cross_entropy"


Loss = CrossEntropy | MeanSquaredError | BinaryCrossEntropy | CRFLoss


class JointLossResult(NamedTuple):
    """``total``, the weighted sum, and the loss of each task; all differentiable scalars."""

    total: Tensor
    per_task: dict[str, Tensor]


class JointLoss(nn.Module):
    """The weighted sum of the tasks' mean losses, computed with its gradients in one pass over the logits.

    Args:
        loss_weights: the weight of each task.
        losses: the loss of each task, cross-entropy where none is named; ``model.losses`` of a
            :class:`pymtl.MultiTaskModel` has those of its heads.

    Raises:
        KeyError: ``losses`` names a task without a weight.
    """

    def __init__(self, loss_weights: Mapping[str, float], losses: Mapping[str, Loss] | None = None) -> None:
        super().__init__()
        if not loss_weights:
            raise ValueError("loss_weights: expected at least one task, got none")
        losses = {} if losses is None else dict(losses)
        _check_known("losses", losses, loss_weights)
        self.loss_weights = {task: float(weight) for task, weight in loss_weights.items()}
        self.losses: dict[str, Loss] = {task: losses.get(task, CrossEntropy()) for task in loss_weights}

    def forward(self, logits: Mapping[str, Value], targets: Mapping[str, Value]) -> JointLossResult:
        """Computes the loss.

        Args:
            logits: for each task [B, C] (sentences), or tokens as [B, T, C] (any leading dimensions) or a
                PackedSequence of [N, C].
            targets: for each task classes as int64 [B], [B, T] or PackedSequence [N], with the loss's
                ``ignore_index`` where there is no label (padding, partial labels); for other losses than
                cross-entropy numbers of the logits' shape, NaN where there is no label. A task without
                targets in this batch may be left out; it contributes nothing.

        Raises:
            KeyError: a task is unknown, or has targets but no logits.
            ValueError: targets and logits of a task differ in shape, or no task has targets.
            IndexError: a class is out of range.
            RuntimeError: a dtype or device does not fit.
        """
        _check_known("logits", logits, self.losses)
        _check_known("targets", targets, self.losses)
        tasks = [task for task in self.losses if targets.get(task) is not None]
        if not tasks:
            raise ValueError("targets: expected targets of at least one task, got none")
        for task in tasks:
            if task not in logits:
                raise KeyError(f"logits: task {task!r} has targets but no logits")
        chains = [task for task in tasks if isinstance(self.losses[task], CRFLoss)]
        rowwise = [task for task in tasks if task not in chains]
        per_task = dict(zip(rowwise, self._of_rows(rowwise, logits, targets).unbind())) if rowwise else {}
        for task in chains:
            try:
                per_task[task] = self.losses[task](logits[task], targets[task])
            except (IndexError, TypeError, ValueError) as error:
                raise type(error)(f"targets[{task!r}]: {error}") from None
        per_task = {task: per_task[task] for task in tasks}
        values = torch.stack(list(per_task.values()))
        weights = values.new_tensor([self.loss_weights[task] for task in tasks])
        return JointLossResult(torch.dot(values, weights), per_task)

    def _of_rows(self, tasks: list[str], logits: Mapping[str, Value], targets: Mapping[str, Value]) -> Tensor:
        """The losses that are sums over rows of logits, [K]."""
        rows = [self._rows(task, logits[task], targets[task]) for task in tasks]
        losses = [self.losses[task] for task in tasks]
        try:
            return ops.joint_loss(
                [z for z, _ in rows],
                [y for _, y in rows],
                [loss.kind for loss in losses],
                weights=[
                    None if loss.weight is None else z.new_tensor(loss.weight) for (z, _), loss in zip(rows, losses)
                ],
                ignore_index=[loss.ignore_index for loss in losses],
                label_smoothing=[loss.label_smoothing for loss in losses],
            )
        except (IndexError, RuntimeError) as error:
            if type(error) not in (IndexError, RuntimeError):
                raise
            raise type(error)(_with_names(str(error), tasks)) from None

    def _rows(self, task: str, z: Value, target: Value) -> tuple[Tensor, Tensor]:
        """A task's logits as [M, C] and targets as [M] or [M, C]."""
        if isinstance(z, PackedSequence) != isinstance(target, PackedSequence):
            raise TypeError(
                f"targets[{task!r}]: expected a {type(z).__name__} like its logits, got a {type(target).__name__}"
            )
        if isinstance(z, PackedSequence):
            if not same_packing(z, target):
                raise ValueError(f"targets[{task!r}]: expected the packing of its logits, got another order or lengths")
            z, target = z.data, target.data
        if z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()  # as F.cross_entropy under autocast
        if self.losses[task].kind == "cross_entropy":
            if target.is_floating_point():
                raise RuntimeError(
                    f"targets[{task!r}]: cross-entropy expects int64 classes, got {target.dtype}; for another loss "
                    f"pass losses={{{task!r}: ...}} to JointLoss"
                )
            expected = z.shape[:-1]
        else:
            expected = z.shape
            if target.shape == z.shape[:-1] and z.shape[-1] == 1:
                target = target.unsqueeze(-1)
            target = target.to(z.dtype)
        if target.shape != expected:
            raise ValueError(
                f"targets[{task!r}]: expected shape {list(expected)} for logits of shape {list(z.shape)}, "
                f"got {list(target.shape)}"
            )
        if z.dim() == 2:
            return z, target
        return z.reshape(-1, z.shape[-1]), target.reshape(-1, *target.shape[z.dim() - 1 :])

    def extra_repr(self) -> str:
        return ", ".join(f"{task}: {self.loss_weights[task]:g} x {loss}" for task, loss in self.losses.items())


def _check_known(argument: str, given: Mapping[str, object], known: Mapping[str, object]) -> None:
    for task in given:
        if task not in known:
            raise KeyError(f"{argument}: unknown task {task!r}, expected one of {list(known)}")


def _with_names(message: str, tasks: list[str]) -> str:
    for k, task in enumerate(tasks):
        for argument in ("logits", "targets", "weights"):
            message = message.replace(f"{argument}[{k}]", f"{argument}[{task!r}]")
    return message
