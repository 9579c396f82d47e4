"""The arguments that the recurrent ops share, by name, and the cells' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pymtl import _native

_LISTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm")


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

    # Plain slices: these run at every call with gradients, where a microsecond is a percent.

    def tensors(self) -> list[Tensor | None]:
        """All of them, flat."""
        singles = [self.input, self.batch_sizes, self.h0, self.c0, self.dropout, self.zoneout_h, self.zoneout_c]
        return singles + self._lists()

    def differentiable(self) -> list[Tensor | None]:
        """Those that may require a gradient, flat: the input, the states, and the lists one after the other. Masks are
        constants."""
        return [self.input, self.h0, self.c0, *self._lists()]

    def _lists(self) -> list[Tensor | None]:
        return [*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh, *self.norm]

    def without_tensors(self) -> RNNArguments:
        """All but the tensors, whose places stay, for :meth:`with_tensors`."""
        return self._of_nothing(self.reverse, self.mode, self.allow_tf32)

    def no_gradients(self) -> RNNArguments:
        """None wherever an argument stands."""
        return self._of_nothing(None, None, None)

    def _of_nothing(self, reverse: Any, mode: Any, allow_tf32: Any) -> RNNArguments:
        weight_ih, weight_hh = [None] * len(self.weight_ih), [None] * len(self.weight_hh)
        bias_ih, bias_hh, norm = [None] * len(self.bias_ih), [None] * len(self.bias_hh), [None] * len(self.norm)
        weights = (weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode)
        return RNNArguments(None, None, *weights, None, None, None, None, None, norm, allow_tf32)

    def with_tensors(self, flat: Sequence[Tensor | None]) -> RNNArguments:
        """With the tensors in the order of :meth:`tensors`."""
        input, batch_sizes, h0, c0, *masks = flat[:7]
        *weights, norm = self._split(flat[7:])
        return RNNArguments(
            input, batch_sizes, *weights, self.reverse, self.mode, h0, c0, *masks, norm, self.allow_tf32
        )

    def with_differentiable(self, flat: Sequence[Tensor | None]) -> RNNArguments:
        """With the tensors in the order of :meth:`differentiable`."""
        input, h0, c0 = flat[:3]
        weight_ih, weight_hh, bias_ih, bias_hh, norm = self._split(flat[3:])
        return self._replace(
            input=input,
            h0=h0,
            c0=c0,
            weight_ih=weight_ih,
            weight_hh=weight_hh,
            bias_ih=bias_ih,
            bias_hh=bias_hh,
            norm=norm,
        )

    def _split(self, flat: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The lists, out of what stands one behind the other."""
        lists, first = [], 0
        for own in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.norm):
            lists.append(list(flat[first : first + len(own)]))
            first += len(own)
        return lists


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
    """The cell of one of :data:`MODES`, which are :class:`torch.nn.RNNBase`'s.

    Raises:
        RuntimeError: there is no such mode.
    """
    cell = _CELLS.get((mode, normalised))
    if cell is None:
        raise RuntimeError(f"mode: expected one of {', '.join(MODES)}, got {mode}")
    return cell
