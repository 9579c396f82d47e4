"""What the autograd formulas of the ops share, and all private parts of torch that this package uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_to_tracers(function: Function) -> Function:
    """Marks a function whose result torch.compile takes as a constant instead of tracing into it.

    :func:`torch.compiler.assume_constant_result` does the same, but imports all of Dynamo: as a decorator it would make
    ``import pymtl`` slow.
    """
    function._dynamo_marked_constant = True
    return function


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which the compiler of torch 2.10 takes for true whenever it traces."""
    return torch.compiler._is_exporting_flag


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these inputs.

    A torch.autograd.Function around the op records the call; while a compiler traces it, the derivative registered
    with the op does. Both compute the same, but the Function has less Python overhead.
    """
    return torch.is_grad_enabled() and any_requires_grad(tensors)


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110  (any() of a generator is slower, and this runs at every call)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def below_autograd() -> AbstractContextManager[Any]:
    """Skips the autograd layer in calls that need no gradient. That layer is Python and costs tens of microseconds."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def below_autograd_in_backward() -> AbstractContextManager[Any]:
    """:func:`below_autograd`, unless a derivative of the derivative is to be recorded."""
    return nullcontext() if torch.is_grad_enabled() else below_autograd()


def needs_reference(*tensors: Tensor | None) -> bool:
    """Whether the plain reference is to run: within a transform of torch.func, which can differentiate and batch it to
    any order, or because a tensor carries a forward-mode tangent, which the ops would drop."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def is_plain() -> bool:
    """Whether a call now is ordinary inference: no gradient is recorded, nothing is traced, compiled or transformed,
    and autocast is off."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch.is_autocast_enabled("cpu")
    )


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # has modes of its own


def is_watched() -> bool:
    """Whether a profiler or a mode (torch.overrides, torch.utils._python_dispatch) asks to be shown each op."""
    return (
        torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def cpu_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The op's CPU kernel, called past autograd and every other layer of the dispatcher: some microseconds less, for
    calls that are :func:`is_plain` and not :func:`is_watched`, of tensors that :func:`has_plain_numbers` holds for."""
    return partial(op._handle.redispatch_boxed, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))


def _dispatch_keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


def _ordinary() -> frozenset[int]:
    with torch.inference_mode():
        made_in_inference = torch.empty(0)
    return frozenset(map(_dispatch_keys, (made_in_inference, torch.empty(0))))


_ORDINARY = _ordinary()


def has_plain_numbers(tensor: Tensor) -> bool:
    """Whether a kernel may read the tensor as it lies in the CPU's memory: it is strided, of no subclass, and no view
    that conjugates or negates."""
    return type(tensor) is Tensor and _dispatch_keys(tensor) in _ORDINARY


def is_mapped(tensor: Tensor) -> bool:
    """Whether vmap maps over the tensor, whose values then cannot be read."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(tensor)


def no_derivative(op: str, instead: str) -> Any:
    """A backward formula for an op that keeps nothing for one: it raises, and so is never silently wrong."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"torch.ops.pymtl.{op} has no derivative: call {instead}, which records one")

    return backward


def fake_batch(rows: Tensor, batch_sizes: Tensor | None) -> Any:
    """The batch size B, for fake kernels, of a dense batch [T, B, ...] or a packed one. With ``batch_sizes`` on the CPU
    it is a value in that tensor, not a shape."""
    if batch_sizes is None:
        return rows.shape[1]
    if batch_sizes.is_cuda:
        return rows.shape[0] // batch_sizes.shape[0]
    return torch.library.get_ctx().new_dynamic_size()


def check_one_device(**arguments: Tensor | Iterable[Tensor] | None) -> None:
    """Checks that all tensors are on one device; for fake kernels, which also run for tensors on the meta device.

    Raises:
        RuntimeError: names the argument that is elsewhere than the first.
    """
    device = None
    for name, value in arguments.items():
        # PackedSequence has its sizes on the CPU wherever its data is.
        indices = name in ("batch_sizes", "sorted_indices")
        single = isinstance(value, Tensor)
        for position, tensor in enumerate([value] if single else value or ()):
            device = device or tensor.device
            if tensor.device != device and not (indices and device.type == "cuda" and tensor.is_cpu):
                where = "the CPU" if device.type == "cpu" else str(device)
                label = name if single else f"{name}[{position}]"
                raise RuntimeError(f"{label}: expected a tensor on {where}, got one on {tensor.device}")
