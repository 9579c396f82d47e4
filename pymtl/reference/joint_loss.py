"""The losses of all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[str],
    weights: Sequence[Tensor | None],
    ignore_index: Sequence[int],
    label_smoothing: Sequence[float],
) -> Tensor:
    """What :func:`pymtl.ops.joint_loss` computes; an empty weight counts as none."""
    losses = []
    for z, y, kind, weight, ignored, smoothing in zip(
        logits, targets, kinds, weights, ignore_index, label_smoothing, strict=True
    ):
        w = weight if weight is not None and weight.numel() > 0 else None
        if kind == "cross_entropy":
            loss = _cross_entropy(z, y, w, ignored, smoothing)
        elif kind == "mean_squared_error":
            loss = _mean_over_labels((z - y.nan_to_num()) ** 2, ~y.isnan())
        else:
            labelled = ~y.isnan() & (y != ignored)
            known = torch.where(labelled, y, 0.0)
            entropy = F.binary_cross_entropy_with_logits(z, known, pos_weight=w, reduction="none")
            loss = _mean_over_labels(entropy, labelled)
        losses.append(loss)
    return torch.stack(losses)


def _cross_entropy(z: Tensor, y: Tensor, w: Tensor | None, ignored: int, smoothing: float) -> Tensor:
    if bool((y == ignored).all()):
        return z.new_zeros(())
    return F.cross_entropy(z, y, weight=w, ignore_index=ignored, label_smoothing=smoothing)


def _mean_over_labels(values: Tensor, labelled: Tensor) -> Tensor:
    count = labelled.sum()
    if not bool(count):
        return values.new_zeros(())
    return torch.where(labelled, values, 0.0).sum() / count
