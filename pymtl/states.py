"""An encoder's states, and the features that heads read from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from pymtl import ops, reference
from pymtl.reference.pooling import sequences_of


class States:
    """The states of packed tokens, and what is pooled from them; each feature is computed once, when it is asked for.

    Args:
        tokens: [N, F] in the packed order; the halves of F are the directions' if there are two.
        batch_sizes: int64 [T] on the CPU, as in PackedSequence.
        directions: 1 or 2.
        last: [B, F] each direction's own final state, in the packed order; found among the tokens if None.
        fused: whether the kernels take such tensors; otherwise plain PyTorch runs.
        batch: B; read from ``batch_sizes`` if None, which a tracer cannot do.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_sizes: Tensor,
        directions: int,
        last: Tensor | None = None,
        fused: bool = True,
        batch: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.batch_sizes = batch_sizes
        self.directions = directions
        self.fused = fused
        self._batch = batch if last is None else last.shape[0]
        self._has_own_last = last is not None
        self._pooled: dict[str, Tensor] = {} if last is None else {"last": last}

    @staticmethod
    def of(
        tokens: Tensor, batch_sizes: Tensor, directions: int, last: Tensor | None = None, batch: int | None = None
    ) -> States:
        """States whose pooling runs through the kernels where those take such a tensor."""
        fused = ops.has_kernels(tokens, bfloat16=True, cuda=True)
        return States(tokens, batch_sizes, directions, last, fused, batch)

    @property
    def batch(self) -> int:
        """The batch size B: the number of sequences."""
        if self._batch is None:
            self._batch = int(self.batch_sizes[0]) if len(self.batch_sizes) > 0 else 0
        return self._batch

    def pooled(self, kind: str) -> Tensor:
        """[B, F] in the packed order: ``"last"``, ``"mean"`` or ``"max"`` of each sequence's tokens."""
        if kind not in self._pooled:
            if kind == "last":
                self._pooled[kind] = self._last()
            else:
                pool = ops.pool if self.fused else reference.pool
                reverse = [False, True][: self.directions]
                self._pooled[kind] = pool(self.tokens, self.batch_sizes, kind, reverse=reverse)
        return self._pooled[kind]

    def map(self, function: Callable[[Tensor], Tensor], with_last: bool) -> States:
        """The states with ``function`` applied to the tokens' states; ``with_last`` to the final ones too, if given."""
        last = self._pooled.get("last")
        return States(
            function(self.tokens),
            self.batch_sizes,
            self.directions,
            function(last) if with_last and last is not None else None,
            self.fused,
            self.batch,
        )

    def dropped(self, drop: Callable[[Tensor], Tensor], poolings: Collection[str | None]) -> States:
        """The states with ``drop`` applied to the tokens' states, which ``"mean"`` and attention then read.

        Final states that were given, and the maximum, are dropped themselves where they are among ``poolings``: the
        maximum over states that are dropped or scaled up would be larger in training than in evaluation.
        """
        states = self.map(drop, with_last="last" in poolings)
        if "max" in poolings:
            states._pooled["max"] = drop(self.pooled("max"))
        return states

    def tensors(self) -> tuple[Tensor, ...]:
        """The states themselves, nothing made from them."""
        return (self.tokens, self._pooled["last"]) if self._has_own_last else (self.tokens,)

    def rows(self) -> Tensor:
        """The sequence of each token, int64 [N]."""
        return sequences_of(self.batch_sizes, self.tokens.shape[0]).to(self.tokens.device, non_blocking=True)

    def _last(self) -> Tensor:
        finals = self.tokens.index_select(
            0, last_tokens(self.batch_sizes, self.batch).to(self.tokens.device, non_blocking=True)
        )
        if self.directions == 1:
            return finals
        half = self.tokens.shape[1] // 2
        firsts = torch.arange(self.batch, device=self.tokens.device)
        return torch.cat([finals[:, :half], self.tokens.index_select(0, firsts)[:, half:]], dim=1)


def beside(states: Sequence[Tensor], directions: int) -> Tensor:
    """States [N, F_i] side by side as [N, sum of F_i], the directions' halves again together."""
    if directions == 1:
        return torch.cat(list(states), dim=1)
    halves = [s.chunk(2, dim=1) for s in states]
    return torch.cat([forward for forward, _ in halves] + [backward for _, backward in halves], dim=1)


def last_tokens(batch_sizes: Tensor, batch: int) -> Tensor:
    """The packed position of the last token of each of B sequences, int64 [B]."""
    sequences = torch.arange(batch)
    lengths = (batch_sizes.unsqueeze(0) > sequences.unsqueeze(1)).sum(1)
    starts = batch_sizes.cumsum(0) - batch_sizes
    return starts[lengths - 1] + sequences
