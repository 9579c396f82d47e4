"""Dropout by given random bits."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(input: Tensor, bits: Tensor, p: float) -> Tensor:
    """What ``torch.ops.pymtl.dropout`` computes.

    Args:
        input: any shape.
        bits: int64 [ceil(numel / 4)], uniform; each holds 16 random bits of four elements.
        p: the probability of a zero, rounded to a multiple of 2**-16.
    """
    drop = round(p * 2**16)
    uniform = (bits.view(torch.int16)[: input.numel()].int() & 0xFFFF).view(input.shape)
    scale = 2**16 / (2**16 - drop) if drop < 2**16 else 0.0
    return input * ((uniform >= drop).to(input.dtype) * scale)
