"""What freezing keeps: prepacked weights, and how to tell whether the parameters are still those."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pymtl import _native, ops

_version_of = Tensor._version.__get__


class Snapshot(NamedTuple):
    """Prepacked weights and the parameters, with their versions and memory, that they were made from."""

    parameters: list[Tensor]
    versions: list[int]
    memory: list[Tensor]  # kept, so that no other tensor comes to the same address
    addresses: list[int]
    origin: Tensor  # int64: the versions and then the addresses, for compiled code
    isa: str
    dtype: torch.dtype  # of the prepacked matrices
    is_narrow: bool  # whether that has fewer bits than the parameters: then the results are others than theirs
    prepacked: list[Tensor]  # of each layer
    stacks: list[ops.RNNFrozen]  # of the first layer, of the first two, and so on; over the same memory

    @staticmethod
    def of(parameters: list[Tensor], dtype: torch.dtype, prepacked: list[Tensor], whole: ops.RNNFrozen) -> Snapshot:
        """``prepacked`` of each layer, and all of it in one."""
        memory = [p.detach() for p in parameters]
        addresses = [p.data_ptr() for p in memory]
        sizes = [len(part) for part in prepacked]
        stacks = [whole.first(n, sum(sizes[:n])) for n in range(1, len(sizes) + 1)]
        versions = [p._version for p in parameters]
        parts = list(whole.prepacked.split(sizes))
        origin = torch.tensor([*versions, *addresses])
        narrow = dtype != parameters[0].dtype
        isa = _native.active_isa()
        return Snapshot(parameters, versions, memory, addresses, origin, isa, dtype, narrow, parts, stacks)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a module is not frozen: None takes this one's place there."""

    def bytes(self) -> int:
        """Of the prepacked weights."""
        return self.stacks[-1].prepacked.nbytes

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        return (
            all(map(is_, parameters, self.parameters))
            and list(map(_version_of, parameters)) == self.versions
            and list(map(Tensor.data_ptr, parameters)) == self.addresses
            and self.isa == _native.active_isa()
        )


@cache
def notice_fused_optimizers() -> None:
    """Makes optimizers with ``fused=True`` count their steps in the parameters' versions, as all others do."""

    def count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version([p for p in group["params"] if not p.is_inference()])

    register_optimizer_step_post_hook(count_step)
