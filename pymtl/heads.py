"""The tasks' output layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import init

from pymtl import ops, reference
from pymtl.crf import CRF, CRFLoss
from pymtl.joint_loss import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError

Pooling = Literal["last", "mean", "max"]
POOLINGS = ("last", "mean", "max")


class Head(nn.Module):
    """A linear output layer over an encoder's states: of each token, or pooled over each sequence.

    The base of the heads below. ``weight`` [C, F] and ``bias`` [C] are initialised as in
    :class:`torch.nn.Linear`; they take their size F when a :class:`pymtl.MultiTaskModel` takes the head, or
    from ``in_features``.

    Args:
        out_features: C, the width of this head's output.
        pooling: how a sequence's states become one: ``"last"`` (each direction's own final state), ``"mean"``
            or ``"max"`` over its tokens; None for a head of each token.
        loss: the loss this head is trained with.
        in_features: F, the encoder's features; None to learn them from the model.
    """

    def __init__(self, out_features: int, pooling: Pooling | None, loss: Loss, in_features: int | None = None) -> None:
        super().__init__()
        if not isinstance(out_features, int) or out_features < 1:
            raise ValueError(f"{type(self).__name__}: expected a number of outputs above 0, got {out_features!r}")
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
        if loss.weight is not None and len(loss.weight) != out_features:
            raise ValueError(f"loss.weight: expected {out_features} numbers, got {len(loss.weight)}")
        self.out_features = out_features
        self.pooling = pooling
        self.loss = loss
        self.weight = nn.UninitializedParameter()
        self.bias = nn.UninitializedParameter()
        if in_features is not None:
            self.materialize(in_features)

    def materialize(self, in_features: int, like: Tensor | None = None) -> None:
        """Gives the parameters their size. Called once, by the model; later calls check the size.

        Args:
            in_features: F.
            like: the dtype and device of the parameters; torch's defaults if None.

        Raises:
            ValueError: the parameters have another size already.
        """
        if isinstance(self.weight, nn.UninitializedParameter):
            kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
            self.weight.materialize((self.out_features, in_features), **kind)
            self.bias.materialize((self.out_features,), **kind)
            self.reset_parameters()
        elif self.weight.shape[1] != in_features:
            raise ValueError(
                f"{type(self).__name__}: expected an encoder of {self.weight.shape[1]} features, got {in_features}"
            )

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as :class:`torch.nn.Linear` does."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """[N, F] to [N, C]. A :class:`pymtl.MultiTaskModel` projects all heads at once instead, where it can."""
        if features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64):
            return ops.heads(features, self.weight, self.bias)
        return reference.heads(features, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.out_features}, pooling={self.pooling!r}, loss={self.loss}"


class ClassificationHead(Head):
    """One of ``num_classes`` classes for each sequence. Logits [B, C], targets int64 [B]."""

    def __init__(
        self,
        num_classes: int,
        pooling: Pooling = "last",
        loss: CrossEntropy | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(num_classes, pooling, loss or CrossEntropy(), in_features)


class TokenClassificationHead(Head):
    """One of ``num_classes`` classes for each token. Logits [B, T, C], targets int64 [B, T]."""

    def __init__(self, num_classes: int, loss: CrossEntropy | None = None, in_features: int | None = None) -> None:
        super().__init__(num_classes, None, loss or CrossEntropy(), in_features)


class CRFHead(Head):
    """Tags of the tokens whose order counts: a :class:`pymtl.CRF` on the projected states.

    Logits are the emissions [B, T, C] (or packed), targets int64 [B, T] (or packed); ``crf.decode`` gives the tags.
    In a :class:`pymtl.MultiTaskModel` padded logits are laid out as the encoder's, and ``crf.batch_first`` follows.

    Args:
        num_classes: C.
        labels: the tags' names, to bind paths to the BIO scheme; None not to.
    """

    def __init__(self, num_classes: int, labels: Sequence[str] | None = None, in_features: int | None = None) -> None:
        crf = CRF(num_classes, labels)
        super().__init__(num_classes, None, CRFLoss(crf), in_features)
        self.crf = crf

    def materialize(self, in_features: int, like: Tensor | None = None) -> None:
        is_new = isinstance(self.weight, nn.UninitializedParameter)
        super().materialize(in_features, like)
        if is_new and like is not None:
            self.crf.to(like.device, like.dtype)


class RegressionHead(Head):
    """``num_targets`` numbers for each sequence. Predictions [B, C], targets of the same shape, or [B] of one."""

    def __init__(self, num_targets: int = 1, pooling: Pooling = "last", in_features: int | None = None) -> None:
        super().__init__(num_targets, pooling, MeanSquaredError(), in_features)


class MultiLabelHead(Head):
    """Any of ``num_labels`` labels for each sequence. Logits [B, C], targets 0 or 1 (or between) [B, C]."""

    def __init__(
        self,
        num_labels: int,
        pooling: Pooling = "last",
        loss: BinaryCrossEntropy | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(num_labels, pooling, loss or BinaryCrossEntropy(), in_features)
