"""Dropout for any tensor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymtl import ops


def dropout(tensor: Tensor, p: float) -> Tensor:
    """Dropout in training (Srivastava et al. 2014): by the kernel where there is one, elsewhere by torch."""
    return ops.dropout(tensor, p) if ops.has_kernels(tensor) else F.dropout(tensor, p)
