"""Descriptions of the losses of single tasks. :class:`pymtl.JointLoss` computes the losses of all tasks in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pymtl.ops.late_errors import refuse_where


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


@dataclass(frozen=True)
class OrdinalLoss:
    """The cumulative link loss of ordered classes: the mean of the binary cross-entropies of "above class k" (Cao,
    Mirjalili & Raschka 2020, "Rank consistent ordinal regression", CORAL, equation 4), for :class:`pymtl.OrdinalHead`.

    Args:
        ignore_index: the class that means there is no label.
    """

    ignore_index: int = -100
    weight: ClassVar[None] = None
    label_smoothing: ClassVar[float] = 0.0
    kind: ClassVar[str] = "binary_cross_entropy"

    def levels(self, classes: Tensor, thresholds: int) -> Tensor:
        """Of classes [...], 0 to ``thresholds``, whether each is above class 0, 1, ...: 0 and 1 [..., thresholds]; NaN
        where there is no label.

        Raises:
            IndexError: a class is out of range. On a GPU a later loss raises it, and its numbers here are infinite, so
                that the loss of them is not finite.
            RuntimeError: they are no integers.
        """
        if classes.is_floating_point():
            raise RuntimeError(f"expected int64 classes, got {classes.dtype}")
        missing = classes == self.ignore_index
        wrong = ~missing & ((classes < 0) | (classes > thresholds))
        refuse_where(wrong, classes, lambda got: f"Target {got} is out of bounds", IndexError)
        above = (classes.unsqueeze(-1) > torch.arange(thresholds, device=classes.device)).to(torch.get_default_dtype())
        return above.masked_fill(wrong.unsqueeze(-1), torch.inf).masked_fill(missing.unsqueeze(-1), torch.nan)


class SequenceLoss:
    """A loss of whole sequences rather than of rows of logits: called with a task's logits and targets, it gives a
    scalar.

    Raises, for :class:`pymtl.JointLoss` to put the task's name in front: IndexError, TypeError, ValueError.
    """

    weight: ClassVar[None] = None
    label_smoothing: ClassVar[float] = 0.0
    kind: ClassVar[str] = "sequence"

    def __call__(self, logits: Tensor | PackedSequence, targets: Tensor | PackedSequence) -> Tensor:
        raise NotImplementedError


Loss = CrossEntropy | MeanSquaredError | BinaryCrossEntropy | OrdinalLoss | SequenceLoss
