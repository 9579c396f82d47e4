"""What nn.LSTM never had: recurrent dropout, weight-drop, zoneout, layer-normalised gates, and reading from the end."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

from torch import Tensor

from pymtl import ops
from pymtl.dropout import dropout


class Options(NamedTuple):
    """The options of a recurrent module; zeros and False leave the plain one."""

    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False
    reverse: bool = False

    @staticmethod
    def of(
        mode: str,
        recurrent_dropout: float,
        weight_drop: float,
        zoneout: float | tuple[float, float],
        layer_norm: bool,
        reverse: bool,
    ) -> Options:
        """From the arguments of a module's constructor.

        Raises:
            TypeError: ``layer_norm`` or ``reverse`` is not a bool.
            ValueError: as :meth:`changed`.
        """
        for name, value in (("layer_norm", layer_norm), ("reverse", reverse)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        given = {"recurrent_dropout": recurrent_dropout, "weight_drop": weight_drop, "zoneout": zoneout}
        return Options(layer_norm=layer_norm, reverse=reverse).changed(mode, **given)

    def changed(self, mode: str, **probabilities: float | tuple[float, float]) -> Options:
        """With other probabilities: ``recurrent_dropout``, ``weight_drop`` or ``zoneout``.

        Raises:
            ValueError: one is not from 0 to 1, or there are two of zoneout for a module without c.
        """
        changed = self
        for name, given in probabilities.items():
            if name == "zoneout":
                zoneout_h, zoneout_c = _zoneout_pair(mode, given)
                changed = changed._replace(zoneout_h=zoneout_h, zoneout_c=zoneout_c)
            else:
                changed = changed._replace(**{name: _probability(name, given)})
        return changed

    def act(self, training: bool) -> bool:
        """Whether they change the cell now: what a step computes."""
        recurrent_dropout, weight_drop, zoneout_h, zoneout_c, layer_norm, _ = self
        return bool(zoneout_h or zoneout_c or layer_norm or (training and (recurrent_dropout or weight_drop)))

    def masks(self, input: Tensor, batch: int, directions: int, hidden_size: int, training: bool) -> ops.RNNMasks:
        """For one layer of a batch [T, B, I] or packed [N, I]: drawn in training, else zoneout's expectation."""
        width = directions * hidden_size
        if not training:
            return ops.RNNMasks(None, *(self._expected(input, width, z) for z in (self.zoneout_h, self.zoneout_c)))
        factors = None
        if self.recurrent_dropout > 0:
            factors = dropout(input.new_ones(directions, batch, hidden_size), self.recurrent_dropout)
        size = (*input.shape[:-1], width)
        return ops.RNNMasks(factors, *(self._drawn(input, size, z) for z in (self.zoneout_h, self.zoneout_c)))

    @staticmethod
    def _expected(input: Tensor, width: int, z: float) -> Tensor | None:
        return input.new_full((width,), z) if z > 0 else None

    @staticmethod
    def _drawn(input: Tensor, size: tuple[int, ...], z: float) -> Tensor | None:
        return (dropout(input.new_ones(size), 1 - z) > 0).to(input.dtype) if z > 0 else None

    def describe(self, mode: str) -> str:
        """The options that are set, as they are written."""
        one = mode != "LSTM" or self.zoneout_h == self.zoneout_c
        options = {
            "recurrent_dropout": self.recurrent_dropout,
            "weight_drop": self.weight_drop,
            "zoneout": self.zoneout_h if one else (self.zoneout_h, self.zoneout_c),
            "layer_norm": self.layer_norm,
            "reverse": self.reverse,
        }
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)


def _probability(name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {p!r}")
    return float(p)


def _zoneout_pair(mode: str, zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """Of h and of c; c is an LSTM's."""
    if not isinstance(zoneout, tuple | list):
        z = _probability("zoneout", zoneout)
        return z, z if mode == "LSTM" else 0.0
    if mode != "LSTM" or len(zoneout) != 2:
        expected = "a number, or two for h and c" if mode == "LSTM" else "a number"
        raise ValueError(f"zoneout: expected {expected}, got {zoneout}")
    zoneout_h, zoneout_c = zoneout
    return _probability("zoneout", zoneout_h), _probability("zoneout", zoneout_c)
