"""Attention of a decoder's states over the encoder's."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pymtl import ops
from pymtl.linear import linear

Score = Literal["dot", "general", "additive"]
SCORES = ("dot", "general", "additive")


class Attended(NamedTuple):
    """The encoder's states as attention reads them: packed ``keys`` [N, D] and ``values`` [N, F], and their
    ``batch_sizes`` int64 [T] on the CPU."""

    keys: Tensor
    values: Tensor
    batch_sizes: Tensor


class Attention(nn.Module):
    """How much each state h of a decoder reads of each state s of its sentence: ``softmax_s(score(h, s))``; and the
    mean of the states s with these weights.

    ``score``:

    - ``"dot"``: ``h . s``, of states of one size (Luong et al. 2015, "Effective Approaches to Attention-based Neural
      Machine Translation", equation 8)
    - ``"general"``: ``h . W s`` (the same)
    - ``"additive"``: ``v . tanh(W_h h + W_s s)`` (Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning
      to Align and Translate", appendix A.1.2), of h itself rather than of the state before it

    Several heads divide the scores' products and the averaged states among them, each with weights of its own (Vaswani
    et al. 2017, "Attention Is All You Need", section 3.2.2, without its projections).

    Args:
        query_size: H, of the decoder's states.
        memory_size: F, of the encoder's.
        score: as above.
        num_heads: J, a divisor of both.

    Raises:
        ValueError: a name or number does not fit.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        score: Score = "general",
        num_heads: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
        if score == "dot" and query_size != memory_size:
            raise ValueError(
                f"score: expected 'general' or 'additive' for states of {query_size} and {memory_size} features, "
                "got 'dot', which takes states of one size"
            )
        for size in (query_size, memory_size):
            if num_heads < 1 or size % num_heads != 0:
                raise ValueError(f"num_heads: expected a divisor of {size} features, got {num_heads}")
        self.num_heads = num_heads
        self.score = score
        kind = {"device": device, "dtype": dtype}
        if score != "dot":
            self.key = nn.Linear(memory_size, query_size, bias=score == "additive", **kind)
        if score == "additive":
            self.query = nn.Linear(query_size, query_size, bias=False, **kind)
            self.weight = nn.Parameter(torch.empty(query_size, **kind).uniform_(-1, 1).mul_(query_size**-0.5))

    def attended(self, memory: Tensor, batch_sizes: Tensor) -> Attended:
        """The encoder's states [N, F], made ready to be read any number of times."""
        return Attended(memory if self.score == "dot" else linear(memory, self.key), memory, batch_sizes)

    def forward(self, states: Tensor, attended: Attended, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Reads the encoder's states.

        Args:
            states: the decoder's, [M, H].
            attended: of :meth:`attended`.
            sequences: of each of these states, its sentence's place in the packed order, int64 [M].

        Returns:
            The means of the encoder's states [M, F], and the weights [M, J, T], zero behind each sentence's last token.

        Raises:
            RuntimeError: a size or device does not fit; or, on the CPU, there is no such sentence.
        """
        query, score = (linear(states, self.query), self.weight) if self.score == "additive" else (states, None)
        return ops.attend(query, attended.keys, attended.values, sequences, attended.batch_sizes, self.num_heads, score)

    def extra_repr(self) -> str:
        return f"score={self.score!r}, num_heads={self.num_heads}"
