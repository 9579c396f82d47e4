"""The arguments that the recurrent ops share, by name, and the cells' sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pymtl import _native

_LISTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm")
_TENSORS = ("input", "batch_sizes", "h0", "c0", "dropout", "zoneout_h", "zoneout_c")
_DIFFERENTIABLE = ("input", "h0", "c0", *_LISTS)  # masks are constants


class RNNArguments(NamedTuple):
    """In the order of the ops' schemas (RNN_ARGUMENTS in csrc/ops/library.cpp, which says what they are).

    An empty list stands for a missing one. A call's gradients stand in one of these too, each in its argument's place.
    """

    input: Any = None
    batch_sizes: Any = None
    weight_ih: Sequence[Any] = ()
    weight_hh: Sequence[Any] = ()
    bias_ih: Sequence[Any] = ()
    bias_hh: Sequence[Any] = ()
    reverse: Any = None
    mode: Any = None
    h0: Any = None
    c0: Any = None
    dropout: Any = None
    zoneout_h: Any = None
    zoneout_c: Any = None
    norm: Sequence[Any] = ()
    allow_tf32: Any = None

    @staticmethod
    def of_op(*arguments: Any) -> RNNArguments:
        """From what an op was called with, whose missing lists are None."""
        given = RNNArguments(*arguments)
        return given._replace(**{name: getattr(given, name) or () for name in _LISTS})

    def for_op(self) -> tuple[Any, ...]:
        """What an op is called with: None for empty lists, which AOTInductor does not pass on."""
        return (
            *self[:2],
            self.weight_ih or None,
            self.weight_hh,
            self.bias_ih or None,
            self.bias_hh or None,
            *self[6:13],
            self.norm or None,
            self.allow_tf32,
        )

    def no_gradients(self) -> RNNArguments:
        """None wherever an argument stands."""
        return RNNArguments(**{name: [None] * len(getattr(self, name)) for name in _LISTS})

    def as_gradients_of(self, missing: Sequence[bool]) -> tuple[Any, ...]:
        """For torch.library, which expects None for an argument that was None (see :func:`missing_of`)."""
        return tuple(None if none else value for none, value in zip(missing, self, strict=True))

    def for_reference(self) -> dict[str, Any]:
        """What :func:`pymtl.reference.rnn` is called with."""
        return {name: value for name, value in self._asdict().items() if name != "allow_tf32"}

    @property
    def normalised(self) -> bool:
        """Whether the cells are layer-normalised: then the input is projected already, and ``weight_ih`` is empty."""
        return len(self.norm) > 0

    @property
    def masks(self) -> dict[str, Tensor | None]:
        return {"dropout": self.dropout, "zoneout_h": self.zoneout_h, "zoneout_c": self.zoneout_c}

    def tensors(self) -> list[Tensor | None]:
        """All of them, flat."""
        return self._flat(_TENSORS) + self._flat(_LISTS)

    def differentiable(self) -> list[Tensor | None]:
        """Those that may require a gradient, flat: the input, the states, and the lists one after the other."""
        return self._flat(_DIFFERENTIABLE)

    def _flat(self, names: Sequence[str]) -> list[Tensor | None]:
        flat: list[Tensor | None] = []
        for name in names:
            value = getattr(self, name)
            flat += value if name in _LISTS else [value]
        return flat

    def without_tensors(self) -> RNNArguments:
        """All but the tensors, whose places stay, for :meth:`with_tensors`."""
        lists = {name: (None,) * len(getattr(self, name)) for name in _LISTS}
        return self._replace(**dict.fromkeys(_TENSORS), **lists)

    def with_tensors(self, flat: Iterable[Tensor | None]) -> RNNArguments:
        """With the tensors in the order of :meth:`tensors`."""
        return self._filled(_TENSORS + _LISTS, flat)

    def with_differentiable(self, flat: Iterable[Tensor | None]) -> RNNArguments:
        """With the tensors in the order of :meth:`differentiable`."""
        return self._filled(_DIFFERENTIABLE, flat)

    def _filled(self, names: Sequence[str], flat: Iterable[Tensor | None]) -> RNNArguments:
        tensors = iter(flat)
        filled: dict[str, Any] = {}
        for name in names:
            if name in _LISTS:
                filled[name] = [next(tensors) for _ in getattr(self, name)]
            else:
                filled[name] = next(tensors)
        return self._replace(**filled)


def missing_of(arguments: Sequence[Any]) -> list[bool]:
    """Which of an op's arguments are None."""
    return [argument is None for argument in arguments]


class CellSizes(NamedTuple):
    """How large a cell is, from csrc/kernels/cells.h: the last four are counts of blocks of H numbers."""

    mode: str
    normalised: bool
    has_cell: bool
    gates: int
    reserve: int
    reserve_candidate: int
    gradients: int

    def reserve_with(self, zoneout_h: bool) -> int:
        """What a token keeps for the backward pass, in blocks of H numbers."""
        return self.reserve + (self.reserve_candidate if zoneout_h else 0)


_CELLS = {(cell.mode, cell.normalised): cell for cell in (CellSizes(**sizes) for sizes in _native.cells())}
MODES = [mode for mode, normalised in _CELLS if not normalised]


def cell_of(mode: str, normalised: bool = False) -> CellSizes:
    """The cell of one of :data:`MODES`, which are :class:`torch.nn.RNNBase`'s."""
    return _CELLS[mode, normalised]
