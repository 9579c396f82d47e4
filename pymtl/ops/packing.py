"""Between padded batches with lengths and the packed layout: wrappers, fake kernels and derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymtl import reference
from pymtl.ops.autograd import below_autograd, check_one_device, needs_reference, wants_gradient
from pymtl.ops.dtypes import has_cuda


class PackingOrder(NamedTuple):
    """The index work of one packing, done once for every tensor packed the same way.

    ``batch_sizes`` int64 [T], the number of sequences with a token at each step, ending in zeros where the
    padded batch has steps that no sequence reaches; ``sorted_indices`` int64 [B], the padded row of each
    packed sequence; ``unsorted_indices`` int64 [B], its inverse.
    """

    batch_sizes: Tensor
    sorted_indices: Tensor
    unsorted_indices: Tensor


def packing_order(lengths: Tensor, steps: int, device: torch.device | None = None) -> PackingOrder:
    """Sorts sequences by length, longest first, equal ones in order.

    Args:
        lengths: int64 [B] on the CPU, each from 1 to ``steps``; or on a GPU, where nothing waits to check them, and
            they are cut to 0 and ``steps``.
        steps: T of the padded batch.
        device: of the batch, where the indices go; by default that of ``lengths``, where the sizes stay.

    Raises:
        RuntimeError: a length is out of range, or ``lengths`` has another shape, dtype or device.

    """
    batch_sizes, *indices = torch.ops.pymtl.packing_order(lengths, steps)
    if device is not None and device.type == "cuda":
        indices = [each.to(device, non_blocking=True) for each in indices]
    return PackingOrder(batch_sizes, *indices)


def pack(padded: Tensor, order: PackingOrder, *, batch_first: bool = False) -> Tensor:
    """The tokens of a padded batch [T, B, ...] ([B, T, ...] if ``batch_first``), packed: [N, ...].

    Any dtype; padding is not read. Differentiable. With an order on a GPU, N is not known on the CPU: the result has
    T*B rows, with zeros behind the last token.
    """
    args = (padded, order.batch_sizes, order.sorted_indices, batch_first)
    if needs_reference(padded) or (padded.is_cuda and not has_cuda(padded)):
        return reference.pack(*args)
    if wants_gradient(padded):
        return torch.ops.pymtl.pack(*args)
    with below_autograd():
        return torch.ops.pymtl.pack(*args)


def unpack(packed: Tensor, order: PackingOrder, *, batch_first: bool = False) -> Tensor:
    """The padded batch [T, B, ...] ([B, T, ...] if ``batch_first``) of packed tokens [N, ...], zeros at padding.

    Any dtype. Differentiable.
    """
    args = (packed, order.batch_sizes, order.sorted_indices, batch_first)
    if needs_reference(packed) or (packed.is_cuda and not has_cuda(packed)):
        return reference.unpack(*args)
    if wants_gradient(packed):
        return torch.ops.pymtl.unpack(*args)
    with below_autograd():
        return torch.ops.pymtl.unpack(*args)


@torch.library.impl("pymtl::packing_order", "CUDA")
def _packing_order_of_gpu(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's own kernels: nothing waits for the lengths."""
    if steps < 0:
        raise RuntimeError(f"steps: expected a number of at least 0, got {steps}")
    if lengths.dim() != 1 or lengths.dtype != torch.int64:
        raise RuntimeError(f"lengths: expected one dimension of int64, got {lengths.dim()} of {lengths.dtype}")
    falling, indices = lengths.clamp(0, steps).sort(stable=True, descending=True)
    each_step = torch.arange(steps, device=lengths.device)
    shorter = torch.searchsorted(falling.flip(0), each_step, right=True)  # sequences without a token at the step
    return lengths.shape[0] - shorter, indices, indices.argsort()


@torch.library.register_fake("pymtl::packing_order")
def _packing_order_fake(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    return lengths.new_empty(steps), torch.empty_like(lengths), torch.empty_like(lengths)


@torch.library.register_fake("pymtl::pack")
def _pack_fake(padded: Tensor, batch_sizes: Tensor, sorted_indices: Tensor | None, batch_first: bool) -> Tensor:
    check_one_device(padded=padded, batch_sizes=batch_sizes, sorted_indices=sorted_indices)
    # Sizes on a GPU are not looked at.
    known = batch_sizes.is_cuda
    tokens = padded.shape[0] * padded.shape[1] if known else torch.library.get_ctx().new_dynamic_size()
    return padded.new_empty(tokens, *padded.shape[2:])


@torch.library.register_fake("pymtl::unpack")
def _unpack_fake(packed: Tensor, batch_sizes: Tensor, sorted_indices: Tensor | None, batch_first: bool) -> Tensor:
    check_one_device(packed=packed, batch_sizes=batch_sizes, sorted_indices=sorted_indices)
    steps = batch_sizes.shape[0]
    batch = torch.library.get_ctx().new_dynamic_size() if sorted_indices is None else sorted_indices.shape[0]
    leading = (batch, steps) if batch_first else (steps, batch)
    return packed.new_empty(*leading, *packed.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, batch_sizes, sorted_indices, batch_first = inputs
    ctx.save_for_backward(batch_sizes, sorted_indices)
    ctx.batch_first = batch_first


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.pymtl.unpack(grad, *ctx.saved_tensors, ctx.batch_first), None, None, None


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.pymtl.pack(grad, *ctx.saved_tensors, ctx.batch_first), None, None, None


torch.library.register_autograd("pymtl::pack", _pack_backward, setup_context=_setup)
torch.library.register_autograd("pymtl::unpack", _unpack_backward, setup_context=_setup)
