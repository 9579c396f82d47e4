"""Who runs a call of a recurrent module: the one place that decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pymtl.ops import has_kernels
from pymtl.ops.dtypes import autocast_dtype, has_cuda, has_kernels_of_gpu, lstm_fits_gpu


class Route(NamedTuple):
    """``runner``: "kernels", this library's; "torch", torch's own path; "reference", the plain PyTorch one, where
    the module has options that torch's has not. ``reason``: why not the kernels, or how these go about it."""

    runner: Literal["kernels", "torch", "reference"]
    reason: str


ON_CPU = "this library's CPU kernels take the dtype"
PERSISTENT = "a persistent kernel holds the weights of the LSTM on the GPU"
PER_STEP_OPTIONS = "torch has no such options: per-step kernels of the GPU have them"
PER_STEP_LENGTHS = "torch would wait for lengths on the GPU: per-step kernels of the GPU do not"
NO_PROJECTION = "proj_size: no kernel projects h"
NO_DTYPE = "no kernel takes the dtype on this device"
NO_AUTOCAST = "no kernel takes the dtype of autocast"
NO_DEVICE = "no kernels are loaded for this device"
RECORDED = "torch.jit.trace and torch.onnx.export record torch's own operators"
NOT_FASTER = "on a GPU torch runs GRUs, RNNs and LSTMs that no persistent kernel holds"

REASONS = (
    ON_CPU,
    PERSISTENT,
    PER_STEP_OPTIONS,
    PER_STEP_LENGTHS,
    NO_PROJECTION,
    NO_DTYPE,
    NO_AUTOCAST,
    NO_DEVICE,
    RECORDED,
    NOT_FASTER,
)


# Made once: one of them is asked for at every call.
_ROUTES = {
    (runner, reason): Route(runner, reason) for runner in ("kernels", "torch", "reference") for reason in REASONS
}
_ON_CPU = _ROUTES["kernels", ON_CPU]


def is_recorded() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records what runs now."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def refuse_recording(what: str, instead: str) -> None:
    """Raises where a trace or an ONNX graph would hold this call's sizes, or operators that only pymtl has."""
    if is_recorded():
        raise RuntimeError(f"torch.jit.trace and torch.onnx.export cannot record {what}: {instead}")


def route(
    input: Tensor,
    weights: Sequence[Tensor],
    mode: str,
    hidden_size: int,
    proj_size: int = 0,
    varied: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
) -> Route:
    """Who runs a call with this input.

    Args:
        input: [T, B, I], or packed [N, I].
        weights: of the module, all of one dtype.
        mode: :class:`torch.nn.RNNBase`'s.
        hidden_size, proj_size: the module's.
        varied: whether options that torch's module has not change the cell now.
        reverse: whether its one direction reads from the end.
        lengths: of the sequences of a padded batch, or None.
    """
    if proj_size != 0:
        reason = NO_PROJECTION
    elif is_recorded():
        reason = RECORDED
    elif input.is_cpu:
        if has_kernels(weights[0], bfloat16=True):
            if not torch.is_autocast_enabled("cpu") or autocast_dtype(input) is not None:
                return _ON_CPU
            reason = NO_AUTOCAST
        else:
            reason = NO_DTYPE if weights[0].is_cpu else NO_DEVICE
    elif not weights[0].is_cuda or not has_cuda(input):
        reason = NO_DEVICE
    else:
        dtype = autocast_dtype(input) or weights[0].dtype
        held = mode == "LSTM" and lstm_fits_gpu(input, dtype, hidden_size)
        if not has_kernels_of_gpu(input, dtype):
            reason = NO_DTYPE
        elif varied or (reverse and not held):
            return _ROUTES["kernels", PER_STEP_OPTIONS]
        elif held:
            return _ROUTES["kernels", PERSISTENT]
        elif lengths is not None and lengths.is_cuda:
            return _ROUTES["kernels", PER_STEP_LENGTHS]
        else:
            reason = NOT_FASTER
    return _ROUTES["reference" if varied else "torch", reason]
