"""Attention over the tokens of each sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymtl import ops, reference
from pymtl.states import States


class AttentionPooling(nn.Module):
    """Pools a sequence's states by learned attention (Lin et al. 2017, "A Structured Self-attentive Sentence
    Embedding", equations 5 and 6): head j gives token t the weight ``softmax_t(w_j . tanh(W s_t))`` and sums its own
    slice of the states; the slices stand side by side, as in multi-head attention (Vaswani et al. 2017).

    Args:
        num_heads: a divisor of the states' size; 1 is plain attention pooling.
        attention_size: rows of W; as many as there are features if None.

    Parameters, which take their size from the model: ``weight`` [A, F], ``query`` [J, A].

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, num_heads: int = 1, attention_size: int | None = None) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("attention_size", attention_size)):
            if (value is not None or name == "num_heads") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        self.num_heads = num_heads
        self.attention_size = attention_size
        self.weight = nn.UninitializedParameter()
        self.query = nn.UninitializedParameter()

    def materialize(self, in_features: int, like: Tensor | None = None) -> None:
        """Gives the parameters their size, F features.

        Raises:
            ValueError: ``num_heads`` does not divide it, or they have another size already.
        """
        if in_features % self.num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of {in_features} features, got {self.num_heads}")
        if isinstance(self.weight, nn.UninitializedParameter):
            size = self.attention_size or in_features
            kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
            self.weight.materialize((size, in_features), **kind)
            self.query.materialize((self.num_heads, size), **kind)
            nn.init.uniform_(self.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
            nn.init.uniform_(self.query, -1 / math.sqrt(size), 1 / math.sqrt(size))
        elif self.weight.shape[1] != in_features:
            raise ValueError(f"expected states of {self.weight.shape[1]} features, got {in_features}")

    def forward(self, states: States) -> Tensor:
        """[B, F] in the packed order."""
        tokens = states.tokens
        scores = torch.tanh(tokens @ self.weight.t()) @ self.query.t()
        if ops.has_kernels(tokens) and states.batch_sizes.shape[0] > 0:
            return ops.attention_pool(tokens, scores.to(tokens.dtype), states.batch_sizes)
        return reference.attention_pool(tokens, scores, states.batch_sizes, states.batch)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
