"""What the autograd formulas of the ops share."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def below_autograd() -> AbstractContextManager[Any]:
    """Skips the autograd layer of a call that needs none: it is Python and costs tens of microseconds."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def no_derivative(op: str, instead: str) -> Any:
    """A backward formula for an op that keeps nothing for one: it raises, and so is never silently wrong."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"torch.ops.pymtl.{op} has no derivative: call {instead}, which records one")

    return backward


def flatten(groups: Iterable[Iterable[Tensor | None] | Tensor | None]) -> list[Tensor]:
    """All tensors of a nested argument list, in order."""
    tensors: list[Tensor] = []
    for group in groups:
        if isinstance(group, Tensor):
            tensors.append(group)
        elif group is not None:
            tensors.extend(t for t in group if t is not None)
    return tensors
