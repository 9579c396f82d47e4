"""The losses of all tasks in one pass over their logits: wrapper, fake kernel and derivative."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl import reference
from pymtl.ops.autograd import below_autograd, check_one_device, needs_reference, wants_gradient
from pymtl.ops.dtypes import has_cuda
from pymtl.ops.late_errors import raise_late_errors, report


def joint_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[str],
    *,
    weights: Sequence[Tensor | None] | None = None,
    ignore_index: Sequence[int] | None = None,
    label_smoothing: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The mean loss of each of K tasks.

    Args:
        logits: K tensors [M_k, C_k], float32 or float64 on the CPU, any floating dtype on a GPU; columns of a stacked
            tensor are read in place.
        targets: for ``"cross_entropy"`` int64 [M_k] classes, for the others [M_k, C_k] of the logits' dtype,
            NaN where there is no label.
        kinds: ``"cross_entropy"`` (as :func:`torch.nn.functional.cross_entropy`), ``"mean_squared_error"`` or
            ``"binary_cross_entropy"`` (with logits) for each task.
        weights: class weights, for binary cross-entropy weights of the positives; [C_k] each, None for ones.
        ignore_index: the class that means no label, -100 by default.
        label_smoothing: of the cross-entropies, 0 by default.
        names: of the tasks, for late errors; their numbers by default. A caller that gives names has to raise the late
            errors of earlier calls itself (:func:`raise_late_errors`) before this call.

    Returns:
        [K]; a task without any label gives 0 and no gradient.

    Raises:
        IndexError: a class is neither in range nor ``ignore_index``. On a GPU, which nobody waits for, the task's loss
            and gradients are NaN, and a later call raises the error, or :func:`raise_late_errors`.
        RuntimeError: a size, dtype or device does not fit.

    """
    count = len(logits)
    if count == 0:
        raise RuntimeError("logits: expected at least one task, got none")
    given = weights if weights is not None else [None] * count
    missing = logits[0].new_empty(0)
    arguments = (
        list(logits),
        list(targets),
        list(kinds),
        [missing if w is None else w for w in given],
        [-100] * count if ignore_index is None else list(ignore_index),
        [0.0] * count if label_smoothing is None else list(label_smoothing),
    )
    if any(t.requires_grad for t in (*arguments[1], *arguments[3])):
        raise RuntimeError("targets and weights: expected tensors without gradients, which joint_loss does not have")
    late = logits[0].is_cuda and not torch.compiler.is_compiling()
    if late and names is None:
        raise_late_errors(wait=False)
    try:
        if needs_reference(*logits) or (logits[0].is_cuda and not has_cuda(logits[0])):
            return reference.joint_loss(*arguments)
        if wants_gradient(*logits):
            if torch.compiler.is_compiling():
                return torch.ops.pymtl.joint_loss(*arguments, True)[0]
            losses, bad_rows, *_ = _JointLoss.apply(arguments[1:], *logits)
        else:
            with below_autograd():
                losses, _, bad_rows = torch.ops.pymtl.joint_loss(*arguments, False)
    except RuntimeError as error:
        # The stable C++ interface knows one type of error only; torch's own loss raises IndexError here.
        if "out of bounds" in str(error):
            raise IndexError(str(error).splitlines()[0]) from None
        raise
    if late:
        classes = [z.shape[1] for z in logits]
        whose = [f"targets of task {k}" for k in range(count)] if names is None else [f"targets[{n!r}]" for n in names]
        report(bad_rows, functools.partial(_out_of_bounds, whose, classes, arguments[4]))
    return losses


def _out_of_bounds(
    whose: Sequence[str], classes: Sequence[int], ignore_index: Sequence[int], bad_rows: Sequence[int]
) -> str:
    """A message of each task's first bad row; -1 stands for none."""
    return "; ".join(
        f"{whose[k]}: expected classes from 0 to {classes[k] - 1} or ignore_index {ignore_index[k]}, got "
        f"another at row {row} of an earlier call on the GPU, out of bounds"
        for k, row in enumerate(bad_rows)
        if row >= 0
    )


@torch.library.register_fake("pymtl::joint_loss")
def _joint_loss_fake(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[str],
    weights: Sequence[Tensor],
    ignore_index: Sequence[int],
    label_smoothing: Sequence[float],
    gradients: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    check_one_device(logits=logits, targets=targets, weights=weights)
    grads = [l.new_empty(l.shape) for l in logits] if gradients else []
    return logits[0].new_empty(len(logits)), grads, logits[0].new_empty(len(logits), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], Tensor]) -> None:
    logits, targets, kinds, weights, ignore_index, label_smoothing, gradients = inputs
    if any(t.requires_grad for t in (*targets, *weights)):
        raise RuntimeError("targets and weights: expected tensors without gradients, which joint_loss does not have")
    _, grads, bad_rows = output
    ctx.mark_non_differentiable(*grads, bad_rows)
    ctx.save_for_backward(*logits, *targets, *weights, *grads)
    ctx.settings = (list(kinds), list(ignore_index), list(label_smoothing))
    ctx.gradients = gradients


def _backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.gradients:
        raise RuntimeError("joint_loss kept no gradients: call it with gradients=True")
    count = len(ctx.settings[0])
    saved = ctx.saved_tensors  # once: a checkpoint counts how often it is asked
    logits, targets, weights, grads = (saved[i : i + count] for i in range(0, 4 * count, count))
    if torch.is_grad_enabled():
        # A derivative of this derivative is wanted: the plain PyTorch loss has them all.
        leaves = [l.view_as(l) for l in logits]
        losses = reference.joint_loss(leaves, targets, *ctx.settings[:1], weights, *ctx.settings[1:])
        wanted = [k for k, leaf in enumerate(leaves) if leaf.requires_grad]
        gradients = torch.autograd.grad(
            losses, [leaves[k] for k in wanted], grad_losses, create_graph=True, allow_unused=True
        )
        by_task = dict(zip(wanted, gradients))
        scaled = tuple(by_task.get(k) for k in range(count))
    else:
        scaled = tuple(g * s for g, s in zip(grads, grad_losses.unbind(), strict=True))
    nothing = [None] * count
    return list(scaled), nothing, None, nothing, None, None, None


class _JointLoss(torch.autograd.Function):
    """The registered derivative without its dispatch in Python."""

    @staticmethod
    def forward(ctx: Any, others: tuple[Any, ...], *logits: Tensor) -> tuple[Tensor, ...]:
        inputs = (list(logits), *others, True)
        with below_autograd():
            output = torch.ops.pymtl.joint_loss(*inputs)
        _setup(ctx, inputs, output)
        losses, grads, bad_rows = output
        return losses, bad_rows, *grads

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Any, ...]:
        return None, *_backward(ctx, grad_losses)[0]


torch.library.register_autograd("pymtl::joint_loss", _backward, setup_context=_setup)
