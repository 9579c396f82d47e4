"""Decoders under torch.export: what they answer from, as tensors by name, and one step as a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymtl.attention import Attended
from pymtl.decoder import Copied, DecoderHead, Memory, State

PARTS = ("keys", "values", "batch_sizes", "places", "h", "c")


def memory_tensors(task: str, memory: Memory) -> dict[str, Tensor]:
    """What the program of a :class:`pymtl.MultiTaskModel` gives for a decoder: of its memory ``task/keys`` and
    ``task/values`` (what attention reads, packed), ``task/batch_sizes``, ``task/places``, ``task/h`` and of an LSTM
    ``task/c``."""
    parts = (*memory.attended, memory.places, *memory.initial)
    return {f"{task}/{name}": part for name, part in zip(PARTS, parts)}


def memory_of(
    task: str,
    tensors: Mapping[str, Tensor],
    program: Callable[..., tuple[Tensor, State, Tensor]],
    copied: Copied | None = None,
) -> Memory:
    """Rebuilds the memory from the tensors that an exported model gave.

    Args:
        tensors: with those of :func:`memory_tensors`.
        program: of :func:`export_step`.
        copied: of a decoder that copies, as :func:`pymtl.decoder.copied_from` gives it.
    """
    keys, values, batch_sizes, places, *state = (
        tensors[f"{task}/{name}"] for name in PARTS if f"{task}/{name}" in tensors
    )

    def step(
        tokens: Tensor, state: State, attended: Attended, places: Tensor, copied: Copied | None = None
    ) -> tuple[Tensor, State, Tensor]:
        further = () if copied is None else (tuple(copied),)
        return program(tokens, state, *attended, places, *further)

    return Memory(step, Attended(keys, values, batch_sizes), tuple(state), places, copied)


class _Step(nn.Module):
    """One step of a decoder's hypotheses."""

    def __init__(self, head: DecoderHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        tokens: Tensor,
        state: State,
        keys: Tensor,
        values: Tensor,
        batch_sizes: Tensor,
        places: Tensor,
        copied: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State, Tensor]:
        attended = Attended(keys, values, batch_sizes)
        return self.head.step(tokens, state, attended, places, None if copied is None else Copied(*copied))


def export_step(head: DecoderHead) -> torch.export.ExportedProgram:
    """Exports one step of a decoder, for any number M of hypotheses. It goes with the exported program of the whole
    model, which gives the decoder's first state, and the keys and values that attention reads.

    The step takes, in this order:

    - ``tokens`` int64 [M]: the token that each hypothesis reads; at first class 0
    - ``state``: a tuple of h and, of an LSTM, c, [L, M, H] each; at first ``NAME/h`` and ``NAME/c`` at the sentences'
      places
    - ``keys``, ``values``, ``batch_sizes``: as the model's program gives them
    - ``places`` int64 [M]: for each hypothesis, the place of its sentence in the packed order
    - of a head that copies, a tuple: the class of each packed token of the input, int64 [N]; for each sequence, in the
      packed order, the number of classes with its own unknown tokens, int64 [B]; and the numbers of all classes of the
      batch, from 0 on

    It gives logits [M, C], the states after the step, and the weights [M, J, T] of J attention heads over T tokens.

    Args:
        head: in eval mode, of a model that has been built.

    Raises:
        RuntimeError: the head is in training mode, or its layers keep their weights in fewer bits.
        TypeError: it is no :class:`pymtl.DecoderHead`.
        ValueError: its sizes are not known yet, as no model was built with it.
    """
    if not isinstance(head, DecoderHead):
        raise TypeError(f"head: expected a pymtl.DecoderHead, got {type(head).__name__}")
    if isinstance(head.bias, nn.UninitializedParameter):
        raise ValueError("head: expected one of a MultiTaskModel, which gives it its sizes, got one that is in none")
    if head.training:
        raise RuntimeError("export_step: expected a head in eval mode, got one in training: call model.eval()")
    like = {"dtype": head.bias.dtype, "device": head.bias.device}
    number = {"dtype": torch.int64, "device": head.bias.device}
    state = tuple(torch.zeros(head.num_layers, 3, head.hidden_size, **like) for _ in range(1 + (head.cell == "lstm")))
    width = head.in_features if head.reader.score == "dot" else head.hidden_size
    arguments: tuple[Any, ...] = (
        torch.zeros(3, **number),
        state,
        torch.zeros(4, width, **like),
        torch.zeros(4, head.in_features, **like),
        torch.tensor([2, 2]),
        torch.tensor([0, 1, 1], **number),
    )
    many, count, steps = (torch.export.Dim(name) for name in ("hypotheses", "tokens", "steps"))
    dims: tuple[Any, ...] = ({0: many}, tuple({1: many} for _ in state), {0: count}, {0: count}, {0: steps}, {0: many})
    if head.copy:
        counts = torch.tensor([1, 3], **number) + head.out_features
        arguments += ((torch.zeros(4, **number), counts, torch.arange(head.out_features + 3, **number)),)
        dims += (({0: count}, {0: torch.export.Dim("batch")}, {0: torch.export.Dim("classes")}),)
    with torch.no_grad():
        return torch.export.export(_Step(head), arguments, dynamic_shapes=dims, strict=False)
