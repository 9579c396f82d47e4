"""The product of a linear layer, where it can by the kernel, in which a row's bits do not depend on the others."""

from __future__ import annotations

from torch import Tensor, nn

from pymtl import ops, reference


def linear(input: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(input)``, [N, F] to [N, C]."""
    function = ops.heads if ops.has_kernels(input, bfloat16=True, cuda=True) else reference.heads
    return function(input, layer.weight, layer.bias)
