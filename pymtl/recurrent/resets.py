"""Resets inside the sequences of a padded batch: their check, and the states that the sequences then begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymtl.ops.autograd import is_mapped


def check_resets(resets: object, input: Tensor) -> None:
    """Whether ``resets`` mark steps of an input [T, B, I], [B, T, I] or [T, I].

    Raises:
        TypeError: they are no tensor.
        RuntimeError: they have another dtype or size, are on another GPU, or are mapped over by vmap.
    """
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool or resets.shape != input.shape[:-1]:
        expected = list(input.shape[:-1])
        way_out = "" if resets.dtype == torch.bool else ": take resets.bool()"
        raise RuntimeError(f"resets: expected bool {expected}, got {resets.dtype} {list(resets.shape)}{way_out}")
    if is_mapped(resets):
        raise RuntimeError(
            "resets: vmap cannot map over them: how many segments there are is data. Give one batch of all"
        )
    if resets.device != input.device and not resets.is_cpu:
        where = "the CPU" if input.is_cpu else f"the CPU or {input.device}"
        raise RuntimeError(f"resets: expected a tensor on {where}, got one on {resets.device}")


def cut_nothing(resets: Tensor, batch_first: bool) -> bool:
    """Whether only first steps have resets, as in a policy that acts step by step. A compiler cannot know."""
    if torch.compiler.is_compiling():
        return False
    return not bool((resets[:, 1:] if batch_first else resets[1:]).any())


def begun(state: Tensor | None, resets: Tensor, batch_first: bool, reverse: Sequence[bool]) -> Tensor | None:
    """Initial states [L*D, B, ...], those of a forward direction zero where the first step is a reset."""
    if state is None or all(reverse):
        return state
    first = resets.select(1 if batch_first else 0, 0).to(state.device)
    if not any(reverse):
        return state.masked_fill(first.unsqueeze(1), 0.0)
    forward = torch.arange(state.shape[0], device=state.device) % 2 == 0
    return state.masked_fill(forward[:, None, None] & first.unsqueeze(1), 0.0)
