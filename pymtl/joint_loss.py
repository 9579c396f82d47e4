"""The joint loss of several tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops
from pymtl.balancing.base import Balancing
from pymtl.losses import CrossEntropy, Loss, OrdinalLoss, SequenceLoss
from pymtl.ops.autograd import needs_reference
from pymtl.ops.late_errors import late_errors_about
from pymtl.packing import same_packing

Value = Tensor | PackedSequence


class JointLossResult(NamedTuple):
    """``total``, what to minimise, the loss of each task, and the ``penalties`` in the total that are no task's, such
    as soft sharing's; all differentiable scalars. ``shared`` are the states all tasks read and ``weighted`` the losses
    that were balanced, for methods that look at their gradients."""

    total: Tensor
    per_task: dict[str, Tensor]
    penalties: dict[str, Tensor]
    shared: Sequence[Tensor]
    weighted: dict[str, Tensor]


class JointLoss(nn.Module):
    """The weighted sum of the tasks' mean losses, computed with its gradients in one pass over the logits.

    Args:
        loss_weights: the weight of each task.
        losses: the loss of each task, cross-entropy where none is named; ``model.losses`` of a
            :class:`pymtl.MultiTaskModel` has those of its heads.
        balancing: how the weighted losses become one, where not by their sum; see :mod:`pymtl.balancing`. What it
            learns is among this module's parameters, for the optimiser.

    Raises:
        KeyError: ``losses`` names a task without a weight.
        ValueError: there is no task, or ``balancing`` is of others.
    """

    def __init__(
        self,
        loss_weights: Mapping[str, float],
        losses: Mapping[str, Loss] | None = None,
        balancing: Balancing | None = None,
    ) -> None:
        super().__init__()
        if not loss_weights:
            raise ValueError("loss_weights: expected at least one task, got none")
        losses = {} if losses is None else dict(losses)
        _check_known("losses", losses, loss_weights)
        self.loss_weights = {task: float(weight) for task, weight in loss_weights.items()}
        self.losses: dict[str, Loss] = {task: losses.get(task, CrossEntropy()) for task in loss_weights}
        if balancing is not None and set(balancing.tasks) != set(loss_weights):
            raise ValueError(f"balancing: expected the tasks {list(loss_weights)}, got {list(balancing.tasks)}")
        self.balancing = balancing

    def forward(
        self,
        logits: Mapping[str, Value],
        targets: Mapping[str, Value],
        scales: Mapping[str, float] | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> JointLossResult:
        """Computes the loss.

        Args:
            logits: for each task [B, C] (sentences), or tokens as [B, T, C] (any leading dimensions) or a
                PackedSequence of [N, C].
            targets: for each task classes as int64 [B], [B, T] or PackedSequence [N], with the loss's
                ``ignore_index`` where there is no label (padding, partial labels); for other losses than
                cross-entropy numbers of the logits' shape, NaN where there is no label. A task without
                targets in this batch may be left out; it contributes nothing. Other heads' targets are as their
                losses say. The ``penalties`` of a :class:`pymtl.MultiTaskModel`'s output join the total.
            scales: a further factor for each task's loss in the total of this call; 1 for a task without one. For a
                batch that is one process's part of a larger batch: every process then has to name the same tasks.
            mean: a function that returns the mean of a tensor over all processes, for use with ``scales``. The
                balancing method then sees the losses of the whole batch, while each process differentiates those of its
                part.

        Raises:
            KeyError: a task is unknown, or has targets but no logits.
            TypeError: a decoder's task has targets, which the model was not called with.
            ValueError: targets and logits of a task differ in shape, or no task has targets.
            IndexError: a class is out of range. On a GPU the task's loss is NaN instead (of ordered classes infinite or
                NaN), and a later call raises this, or :func:`pymtl.ops.raise_late_errors`.
            RuntimeError: a dtype or device does not fit.
        """
        _check_known("logits", logits, self.losses)
        given = [z for z in logits.values() if isinstance(z, Tensor | PackedSequence)]
        if not torch.compiler.is_compiling() and any(z.is_cuda for z in given):
            ops.raise_late_errors(wait=False)
        _check_known("targets", targets, self.losses)
        tasks = [task for task in self.losses if targets.get(task) is not None]
        if not tasks:
            raise ValueError("targets: expected targets of at least one task, got none")
        for task in tasks:
            if task not in logits:
                raise KeyError(f"logits: task {task!r} has targets but no logits")
            if not isinstance(logits[task], Tensor | PackedSequence):
                got = type(logits[task]).__name__
                raise TypeError(f"logits[{task!r}]: expected logits, got a {got}: call the model with the targets")
        whole = [task for task in tasks if isinstance(self.losses[task], SequenceLoss)]
        rowwise = [task for task in tasks if task not in whole]
        per_task = dict(zip(rowwise, self._of_rows(rowwise, logits, targets).unbind())) if rowwise else {}
        for task in whole:
            try:
                with late_errors_about(f"targets[{task!r}]"):
                    per_task[task] = self.losses[task](logits[task], targets[task])
            except (IndexError, TypeError, ValueError) as error:
                raise type(error)(f"targets[{task!r}]: {error}") from None
        per_task = {task: per_task[task] for task in tasks}
        shared = getattr(logits, "shared", ())
        penalties = getattr(logits, "penalties", {})
        weights = {task: self.loss_weights[task] * (scales or {}).get(task, 1.0) for task in tasks}
        values = torch.stack(list(per_task.values()))
        weighted: dict[str, Tensor] = {}
        if self.balancing is not None:
            # A task without a label here has no loss to balance the others with.
            labelled = per_task if self.balancing.takes_states else [t for t in tasks if self._has_label(t, targets[t])]
            weighted = {t: weights[t] * per_task[t] for t in labelled}
            if mean is not None and scales:
                weighted = _of_all_parts(weighted, scales, mean, values.new_zeros(()))
        if weighted and self.balancing.takes_states:
            states, own = getattr(logits, "states", {}), {task: self.loss_weights[task] for task in weighted}
            total = self.balancing(weighted, shared, own, states, mean if scales else None)
        elif weighted:
            total = self.balancing(weighted, shared)
        elif values.is_cuda:  # copying the weights to the GPU would make the CPU wait
            total = torch.stack(torch._foreach_mul(list(per_task.values()), list(weights.values()))).sum()
        else:
            total = torch.dot(values, values.new_tensor(list(weights.values())))
        if penalties:
            total = total + torch.stack(list(penalties.values())).sum()
        return JointLossResult(total, per_task, penalties, shared, weighted)

    @property
    def combines_gradients(self) -> bool:
        """Whether :meth:`backward` differs from ``total.backward()``."""
        return self.balancing is not None and self.balancing.combines_gradients

    def backward(self, result: JointLossResult, parameters: Iterable[Tensor] = (), scale: float = 1.0) -> None:
        """Adds the gradients to ``grad`` of what the result depends on.

        The same as ``result.total.backward()``, but where the balancing method combines the tasks' gradients.

        Args:
            result: of :meth:`forward`.
            parameters: the model's, for such methods.
            scale: a factor of all gradients.

        Raises:
            ValueError: such a method finds no states that all tasks share.
        """
        if not self.combines_gradients:
            (result.total if scale == 1.0 else scale * result.total).backward()
            return
        penalties = [penalty for penalty in result.penalties.values() if penalty.requires_grad]
        if penalties:
            (scale * torch.stack(penalties).sum()).backward(retain_graph=True)
        if result.weighted:
            losses = {task: scale * value for task, value in result.weighted.items()}
            self.balancing.backward(losses, result.shared, parameters)

    def _has_label(self, task: str, target: Value) -> bool:
        values = target.data if isinstance(target, PackedSequence) else target
        known = values != self.losses[task].ignore_index
        return bool((known & ~values.isnan() if values.is_floating_point() else known).any())

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
                    None if loss.weight is None else _constant(loss.weight, z) for (z, _), loss in zip(rows, losses)
                ],
                # An ordinal loss has put NaN where there is no label, and 0 and 1 elsewhere.
                ignore_index=[-100 if isinstance(loss, OrdinalLoss) else loss.ignore_index for loss in losses],
                label_smoothing=[loss.label_smoothing for loss in losses],
                names=tasks,
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
                raise ValueError(
                    f"targets[{task!r}]: expected the packing of its logits: the order or lengths of sequences differ"
                )
            z, target = z.data, target.data
        if isinstance(self.losses[task], OrdinalLoss):
            try:
                with late_errors_about(f"targets[{task!r}]"):
                    target = self.losses[task].levels(target, z.shape[-1])
            except (IndexError, RuntimeError) as error:
                raise type(error)(f"targets[{task!r}]: {error}") from None
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


def _constant(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """These numbers as a tensor; on a GPU it is cached, since the copy to the GPU makes the CPU wait."""
    if like.is_cuda and type(like) is Tensor and not torch.compiler.is_compiling() and not needs_reference(like):
        return _kept_constant(numbers, like.dtype, like.device)
    return like.new_tensor(numbers)


@functools.lru_cache(maxsize=64)
def _kept_constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _of_all_parts(
    losses: Mapping[str, Tensor], tasks: Iterable[str], mean: Callable[[Tensor], Tensor], zero: Tensor
) -> dict[str, Tensor]:
    """The mean losses over all processes, with the gradients of this one's."""
    tasks = list(tasks)
    own = [losses.get(task, zero) for task in tasks]
    whole = mean(torch.stack([loss.detach() for loss in own]))
    return {task: loss - loss.detach() + value for task, loss, value in zip(tasks, own, whole.unbind())}


def _check_known(argument: str, given: Mapping[str, object], known: Mapping[str, object]) -> None:
    for task in given:
        if task not in known:
            raise KeyError(f"{argument}: unknown task {task!r}, expected one of {list(known)}")


def _with_names(message: str, tasks: list[str]) -> str:
    for k, task in enumerate(tasks):
        for argument in ("logits", "targets", "weights"):
            message = message.replace(f"{argument}[{k}]", f"{argument}[{task!r}]")
    return message
