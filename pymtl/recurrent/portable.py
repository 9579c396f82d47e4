"""Weights in fewer bits as an exported program holds them: in the order of no instruction set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl import ops


class PortableWeights(nn.Module):
    """The matrices of a stack of layers in bfloat16 or int8, as buffers. Each call packs them, as it does float32's."""

    def __init__(self, layers: Sequence[ops.RNNWeights], dtype: torch.dtype) -> None:
        super().__init__()
        for number, weights in enumerate(layers):
            for name, group in ops.NarrowWeights.of(weights, dtype)._asdict().items():
                for g, tensor in enumerate(group):
                    self.register_buffer(f"{name}_l{number}_{g}", tensor)

    def prepacked(self, number: int, weights: ops.RNNWeights) -> Tensor:
        """A layer's, with its biases."""
        groups = [
            [getattr(self, f"{name}_l{number}_{g}") for g in range(len(weights.weight_hh)) if self._has(name, number)]
            for name in ops.NarrowWeights._fields
        ]
        return ops.NarrowWeights(*groups).prepack(weights)

    def _has(self, name: str, number: int) -> bool:
        return f"{name}_l{number}_0" in self._buffers
