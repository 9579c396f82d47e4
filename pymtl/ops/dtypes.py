"""The devices and dtypes that the kernels take, and autocast."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pymtl.ops.autograd import constant_to_tracers
from pymtl.ops.library import why_no_cuda

_OF_THE_CPU = (torch.float32, torch.float64)
_OF_A_GPU = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def has_kernels(tensor: Tensor, *, bfloat16: bool = False, cuda: bool = False) -> bool:
    """Whether there are kernels for such a tensor.

    On the CPU for float32 and float64, and with ``bfloat16`` for bfloat16 (recurrent layers, heads, pooling). On a
    GPU only with ``cuda`` (heads, pooling, and the CRF, whose 16-bit scores are cast to float32 before).
    """
    if tensor.is_cpu:
        return tensor.dtype in _OF_THE_CPU or (bfloat16 and tensor.dtype == torch.bfloat16)
    return cuda and has_kernels_of_gpu(tensor, tensor.dtype)


def has_kernels_of_gpu(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the GPU that ``tensor`` is on, if it is on one, has kernels for that dtype."""
    return has_cuda(tensor) and dtype in _OF_A_GPU


def has_cuda(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU that the CUDA library is loaded for."""
    return tensor.is_cuda and not why_no_cuda and _runs_kernels(tensor.device)


def lstm_fits_gpu(tensor: Tensor, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether a kernel on ``tensor``'s GPU can keep all weights of such an LSTM on the chip, in registers and shared
    memory, for a whole call."""
    return has_cuda(tensor) and hidden_size <= _hidden_size_limit(dtype, tensor.device)


# Facts about a device. A tracer would otherwise trace into the cached functions.


@constant_to_tracers
def _runs_kernels(device: torch.device) -> bool:
    return _capability(device) >= (8, 0)


@constant_to_tracers
def _hidden_size_limit(dtype: torch.dtype, device: torch.device) -> int:
    return _asked_hidden_size_limit(dtype, device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _asked_hidden_size_limit(dtype: torch.dtype, device: torch.device) -> int:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return 0
    return torch.ops.pymtl.rnn_hidden_size_limit(torch.empty(0, dtype=dtype, device=device))


def allows_tf32(tensor: Tensor) -> bool:
    """Whether torch allows recurrent layers TF32 for such a tensor, as for cuDNN's; by default it does."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensor's device, if there are kernels for it: on the CPU bfloat16."""
    if tensor.is_cuda:
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.bfloat16 if asked else None


def autocast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors as autocast gives them to an op that it runs in that dtype: all but float64."""
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]
