"""The dtypes that the kernels take, and autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def has_kernels(tensor: Tensor, *, bfloat16: bool = False) -> bool:
    """Whether there are kernels for such a tensor: on the CPU float32 and float64, for the LSTM, the heads and
    pooling ``bfloat16`` too."""
    dtype = tensor.dtype
    return tensor.is_cpu and (dtype in (torch.float32, torch.float64) or (bfloat16 and dtype == torch.bfloat16))


def autocasts() -> bool:
    """Whether autocast asks for bfloat16 on the CPU. (For float16 there are no kernels.)"""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def autocast(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The tensors as autocast gives them to an op that it runs in bfloat16: all but float64."""
    return [t.to(torch.bfloat16) if t is not None and t.dtype in (torch.float32, torch.float16) else t for t in tensors]
