"""Matrices of 8-bit integers, and products with them.

A weight's row w is s q, where s = max |w| / 127 and q = round(w / s) is in [-127, 127] (symmetric quantisation, a scale
for each row). The rows that it is multiplied with become integers from 0 to 255 as the call meets them (dynamic
quantisation), each with a scale t of its own and a number z that stands for 0: x = t (p - z). The products' sum is an
exact integer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-30  # rows whose numbers lie within less than twice this count as zeros


BLOCK = 1 << 18  # numbers that are in float64 at a time


class Int8Weight(NamedTuple):
    """A matrix [C, K] of 8-bit integers: ``numbers`` int8 [C, K] in [-127, 127], ``scale`` float32 [C] of each row."""

    numbers: Tensor
    scale: Tensor

    def dequantised(self) -> Tensor:
        """float32 [C, K]."""
        return self.numbers * self.scale[:, None]


def int8_weight(weight: Tensor, name: str = "weight") -> Int8Weight:
    """A matrix [C, K] in 8-bit integers.

    Raises:
        ValueError: a number is infinite or not a number.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: expected finite numbers to make 8-bit integers of, got inf or nan")
    blocks = weight.detach().split(max(1, BLOCK // max(1, weight.shape[1])))
    numbers, scales = zip(*map(_int8_block, blocks))
    return Int8Weight(torch.cat(numbers), torch.cat(scales))


def _int8_block(rows: Tensor) -> tuple[Tensor, Tensor]:
    exact = rows.double()
    scale = exact.abs().amax(1, keepdim=True) / 127
    numbers = torch.where(scale > 0, exact / scale, 0.0).round().clamp(-127, 127)
    return numbers.to(torch.int8), scale[:, 0].float()


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as integers p - z [N, K] (in float64), and each row's scale [N, 1], NaN where one is not finite."""
    top, bottom = x.amax(1, keepdim=True).clamp(min=0), x.amin(1, keepdim=True).clamp(max=0)
    half = top / 2 - bottom / 2
    finite = x.isfinite().all(1, keepdim=True)
    counts = finite & (half >= LEAST)
    inverse = torch.where(counts, 127.5 / half, 0.0)
    zero = torch.where(counts, -bottom * inverse, 0.0).round()
    numbers = torch.where(finite, x * inverse, 0.0).round() + zero
    scale = torch.where(counts, half / 127.5, torch.where(finite, 0.0, float("nan")))
    return (numbers.clamp(0, 255) - zero).double(), scale


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """``x`` [N, K] times the transposed ``weight`` [C, K]: [N, C], float32."""
    numbers, scale = int8_rows(x)
    exact = numbers @ weight.numbers.double().t()
    return exact.float() * (weight.scale * scale)
