"""The program of a model: a flat list of instructions over named buffers, as ``docs/file_format.md`` describes it.

A buffer is a matrix with a row for each token, for each sequence, or for each character of the batch's distinct words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

VERSION = 1  # of the file's format: raised when an older reader could not read what is written any more

Space = Literal["tokens", "sequences", "characters"]


@dataclass(frozen=True)
class Buffer:
    """What an instruction writes: ``width`` columns, and the rows of its space."""

    name: str
    space: Space
    width: int


@dataclass
class Program:
    """A program as it is being written.

    Attributes:
        inputs: what is read of a token, each a dictionary as in the file.
        instructions: the same.
        tasks: the same.
        tensors: by the name that instructions call them by.
        weights: what matrices of recurrent layers are kept in; None: float32.
    """

    inputs: list[dict[str, Any]] = field(default_factory=list)
    instructions: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: torch.dtype | None = None
    _known: dict[str, Buffer] = field(default_factory=dict)  # by the instruction that writes it
    _names: dict[int, str] = field(default_factory=dict)  # of the tensors that were given, by their identity
    _given: list[Tensor] = field(default_factory=list)  # kept, so that no other tensor comes to an identity

    def input(self, name: str, kind: str, **facts: Any) -> None:
        """Declares what is read of a token; ``kind``: ids, characters or numbers.

        Raises:
            ValueError: there is one of this name.
        """
        if any(each["name"] == name for each in self.inputs):
            raise ValueError(f"inputs: expected fields of different names, got {name!r} twice")
        self.inputs.append({"name": name, "kind": kind, **facts})

    def numbers(self, name: str, size: int) -> Buffer:
        """An input that is a buffer already."""
        self.input(name, "numbers", size=size)
        return Buffer(name, "tokens", size)

    def tensor(self, name: str, value: Tensor) -> str:
        """Adds a tensor; one that was added before keeps its name."""
        known = self._names.get(id(value))
        if known is not None:
            return known
        own, number = name, 2
        while own in self.tensors:
            own, number = f"{name}.{number}", number + 1
        self.tensors[own] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._names[id(value)] = own
        self._given.append(value)
        return own

    def emit(self, op: str, inputs: Sequence[Buffer | str], space: Space, width: int, **attributes: Any) -> Buffer:
        """Adds an instruction, or finds the one that computes the same, and returns what it writes."""
        names = [each.name if isinstance(each, Buffer) else each for each in inputs]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        key = json.dumps([op, names, attributes])
        if key not in self._known:
            output = f"{op}.{len(self.instructions)}"  # no field is called so: names of modules have no dots
            self.instructions.append({"op": op, "inputs": names, "output": output, **attributes})
            self._known[key] = Buffer(output, space, width)
        return self._known[key]

    def step(self) -> Program:
        """A program of a step of generated answers, whose only input is ``token``; it shares this one's tensors."""
        return Program(tensors=self.tensors, weights=self.weights, _names=self._names, _given=self._given)

    # The instructions that are not of one module alone.

    def linear(self, x: Buffer, name: str, weight: Tensor, bias: Tensor | None = None, parts: int = 1) -> Buffer:
        """``x W^T + b``, the sum over the depth in equal parts."""
        return self.emit(
            "linear",
            [x],
            x.space,
            weight.shape[0],
            weight=self.tensor(f"{name}.weight", weight),
            bias=None if bias is None else self.tensor(f"{name}.bias", bias),
            parts=parts if parts > 1 else None,
        )

    def activation(self, x: Buffer, kind: Literal["tanh", "sigmoid"]) -> Buffer:
        return self.emit("activation", [x], x.space, x.width, kind=kind)

    def softmax(self, x: Buffer) -> Buffer:
        return self.emit("softmax", [x], x.space, x.width)

    def columns(self, parts: Sequence[tuple[Buffer, int, int]]) -> Buffer:
        """Columns side by side: of each part a buffer, the first column and how many."""
        buffer, first, count = parts[0]
        if len(parts) == 1 and first == 0 and count == buffer.width:
            return buffer
        whole = all(first == 0 and count == buffer.width for buffer, first, count in parts)
        columns = None if whole else [{"first": first, "count": count} for _, first, count in parts]
        width = sum(count for _, _, count in parts)
        return self.emit("concatenate", [each for each, _, _ in parts], buffer.space, width, columns=columns)

    def beside(self, buffers: Sequence[Buffer]) -> Buffer:
        """Whole buffers side by side."""
        return self.columns([(buffer, 0, buffer.width) for buffer in buffers])

    def pool(self, x: Buffer, kind: str, reverse: Sequence[bool]) -> Buffer:
        """A row for each sequence of tokens, or for each word of characters."""
        space: Space = "sequences" if x.space == "tokens" else "tokens"
        return self.emit("pool", [x], space, x.width, kind=kind, reverse=list(reverse))

    def as_json(self, description: Mapping[str, Any]) -> str:
        """What the file's metadata hold, but for the tensors."""
        return json.dumps(
            {
                "version": VERSION,
                "inputs": self.inputs,
                "instructions": self.instructions,
                "tasks": self.tasks,
                "description": json.dumps(description, ensure_ascii=False),
            },
            ensure_ascii=False,
        )

    def check_finite(self) -> None:
        """Checks what JSON has to hold.

        Raises:
            ValueError: a number of an instruction or of a task, as a mean, is nan or inf.
        """
        for each in [*self.instructions, *self.tasks]:
            try:
                json.dumps(each, allow_nan=False)
            except ValueError:
                what = each.get("name", each.get("output"))
                raise ValueError(f"{what}: expected finite numbers, got nan or inf among {each}") from None
