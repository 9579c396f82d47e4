"""Language modelling as a task beside others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.heads import Head
from pymtl.linear import linear
from pymtl.losses import CrossEntropy


class LanguageModelHead(Head):
    """Predicts each token's neighbours: the forward direction's state the next token, the backward direction's the one
    before (Rei 2017, "Semi-supervised Multitask Learning for Sequence Labeling", equations 6 to 10). Neither has read
    what it predicts, if the encoder has one layer or one direction; a :class:`pymtl.MultiTaskModel` refuses others.

    Each direction goes through ``m = tanh(W_m h)`` of size E, and then through the output layer that both share:
    logits [B, T, D, V]. Targets are those of :func:`language_model_targets`.

    Args:
        num_tokens: V, the tokens that can be predicted: ids 0 to V-1.
        hidden_size: E.
        embedding: to tie the output layer to, [at least V, E]; E is its size then (Press & Wolf 2017).

    Raises:
        ValueError: the embedding has fewer tokens or another size.
    """

    def __init__(self, num_tokens: int, hidden_size: int = 64, embedding: nn.Embedding | None = None) -> None:
        super().__init__(num_tokens, None, CrossEntropy())
        if embedding is not None and embedding.num_embeddings < num_tokens:
            raise ValueError(f"embedding: expected at least {num_tokens} tokens, got {embedding.num_embeddings}")
        self.hidden_size = hidden_size if embedding is None else embedding.embedding_dim
        self.directions = 2
        # In a tuple, and so no submodule of this one: the model holds it already.
        self._tied = None if embedding is None else (embedding,)
        if embedding is not None:
            del self.weight

    def materialize(
        self, in_features: int, like: Tensor | None = None, input_size: int = 0, before: Head | None = None
    ) -> None:
        size = in_features // self.directions
        if not isinstance(self.bias, nn.UninitializedParameter):
            if self.hidden[0].in_features != size:
                raise ValueError(f"{type(self).__name__}: expected {self.hidden[0].in_features} states, got {size}")
            return
        kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.hidden = nn.ModuleList(nn.Linear(size, self.hidden_size, **kind) for _ in range(self.directions))
        if self._tied is None:
            self.weight.materialize((self.out_features, self.hidden_size), **kind)
        self.bias.materialize((self.out_features,), **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self._tied is None:
            nn.init.normal_(self.weight, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias)

    def projection(self) -> tuple[Tensor, Tensor]:
        weight = self.weight if self._tied is None else self._tied[0].weight[: self.out_features]
        return weight, self.bias

    def forward(self, features: Tensor) -> Tensor:
        """[N, D*H] to [N, D, V]."""
        states = features.chunk(self.directions, dim=-1)
        parts = [torch.tanh(linear(h, hidden)) for hidden, h in zip(self.hidden, states)]
        return super().forward(torch.stack(parts, 1).flatten(0, 1)).unflatten(0, (-1, self.directions))


def language_model_targets(tokens: PackedSequence, num_tokens: int, directions: int = 2) -> PackedSequence:
    """What a :class:`LanguageModelHead` has to predict: after each token the next one, before it the one before.

    Args:
        tokens: ids, packed, int64 [N].
        num_tokens: V; a token of another id is none that can be predicted.
        directions: D of the encoder.

    Returns:
        int64 [N, D], packed likewise; -100 where there is nothing to predict.
    """
    ids, sizes = tokens.data, tokens.batch_sizes
    device = ids.device
    starts = sizes.cumsum(0) - sizes
    step = torch.arange(len(sizes)).repeat_interleave(sizes)
    row = torch.arange(len(ids)) - starts[step]
    following = torch.cat([sizes[1:], sizes.new_zeros(1)])[step] > row
    known = torch.where((ids >= 0) & (ids < num_tokens), ids, -100)
    last = max(len(ids) - 1, 0)
    ahead = known[(starts.roll(-1)[step] + row).clamp(max=last).to(device)]
    behind = known[(starts.roll(1)[step] + row).clamp(max=last).to(device)]
    columns = [torch.where(following.to(device), ahead, -100), torch.where((step > 0).to(device), behind, -100)]
    return tokens._replace(data=torch.stack(columns[:directions], 1))
