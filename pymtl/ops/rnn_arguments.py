"""The arguments that the recurrent ops share, by name, and the cells' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pymtl import _native

_LISTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm")
_MASKS = ("dropout", "zoneout_h", "zoneout_c")
_SINGLES = 7  # tensors that stand alone: input, batch_sizes, h0, c0 and the masks


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

    def for_compiler(self) -> tuple[Any, ...]:
        """What a compiled program calls an op with: None for empty lists, which AOTInductor does not pass on."""
        empty = {name: None for name in _LISTS if len(getattr(self, name)) == 0}
        return tuple(self._replace(**empty))

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

    def tensors(self) -> list[Tensor | None]:
        """All of them, flat."""
        lists = (*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh, *self.norm)
        masks = (self.dropout, self.zoneout_h, self.zoneout_c)
        return [self.input, self.batch_sizes, self.h0, self.c0, *masks, *lists]

    def differentiable(self) -> list[Tensor | None]:
        """Those that may require a gradient, flat: the input, the states, and the lists one after the other. Masks are
        constants."""
        lists = (*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh, *self.norm)
        return [self.input, self.h0, self.c0, *lists]

    def layout(self) -> RNNLayout:
        """What turns :meth:`tensors` into these arguments again."""
        weight_hh = _SINGLES + len(self.weight_ih)
        bias_ih = weight_hh + len(self.weight_hh)
        bias_hh = bias_ih + len(self.bias_ih)
        norm = bias_hh + len(self.bias_hh)
        return RNNLayout(weight_hh, bias_ih, bias_hh, norm, self.reverse, self.mode, self.allow_tf32)

    def no_gradients(self) -> RNNArguments:
        """None wherever an argument stands."""
        lists = {name: [None] * len(getattr(self, name)) for name in _LISTS}
        return RNNArguments(**lists)

    def with_differentiable(self, flat: Sequence[Tensor | None]) -> RNNArguments:
        """With the tensors in the order of :meth:`differentiable`."""
        input, h0, c0, *lists = flat
        of = self.layout().arguments([input, None, h0, c0, None, None, None, *lists])
        return of._replace(**{name: getattr(self, name) for name in ("batch_sizes", *_MASKS)})


class RNNLayout(NamedTuple):
    """Where in :meth:`RNNArguments.tensors` each list begins (``weight_ih`` behind those that stand alone), and the
    arguments that are no tensors."""

    weight_hh: int
    bias_ih: int
    bias_hh: int
    norm: int
    reverse: Sequence[bool]
    mode: str
    allow_tf32: bool

    def arguments(self, flat: list[Any]) -> RNNArguments:
        """The arguments whose tensors these are. By slices and positions: this runs at every backward pass."""
        weight_hh, bias_ih, bias_hh, norm, reverse, mode, allow_tf32 = self
        input, batch_sizes, h0, c0, dropout, zoneout_h, zoneout_c = flat[:_SINGLES]
        return RNNArguments(
            input,
            batch_sizes,
            flat[_SINGLES:weight_hh],
            flat[weight_hh:bias_ih],
            flat[bias_ih:bias_hh],
            flat[bias_hh:norm],
            reverse,
            mode,
            h0,
            c0,
            dropout,
            zoneout_h,
            zoneout_c,
            flat[norm:],
            allow_tf32,
        )


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
