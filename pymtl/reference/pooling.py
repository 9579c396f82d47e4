"""Pooling over the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pool(input: Tensor, batch_sizes: Tensor | None, kind: str, *, reverse: Sequence[bool] = (False,)) -> Tensor:
    """What :func:`pymtl.ops.pool` computes; ``reverse`` only orders a sum and is ignored here."""
    steps = list(input) if batch_sizes is None else list(input.split([int(s) for s in batch_sizes]))
    if steps[0].shape[0] == 0:
        return input.new_zeros(0, input.shape[-1])
    pooled = []
    for row in range(steps[0].shape[0]):
        sequence = torch.stack([step[row] for step in steps if step.shape[0] > row])
        pooled.append(sequence.mean(0) if kind == "mean" else sequence.amax(0))
    return torch.stack(pooled)
