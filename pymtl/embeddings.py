"""From fields of tokens to features: words, their characters, and what else is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymtl import ops
from pymtl.custom import runs_own_code
from pymtl.dropout import dropout
from pymtl.recurrent.lstm import LSTM


class TokenFeatures(nn.Module):
    """Several fields of each token, each through a module of its own, side by side.

    ``TokenFeatures({"words": nn.Embedding(10_000, 100), "characters": CharacterLSTM(80), "signal": nn.Identity()})``
    takes a dictionary with those fields: packed ids [N], characters [N, W] and features [N, F].

    Args:
        fields: a module for each field, from packed rows [N, ...] to features [N, E_i].

    Raises:
        ValueError: there is no field.
    """

    def __init__(self, fields: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not fields:
            raise ValueError("fields: expected at least one, got none")
        self.fields = nn.ModuleDict(fields)

    def forward(self, data: Mapping[str, Tensor]) -> Tensor:
        """[N, sum of E_i].

        Raises:
            KeyError: a field is missing.
        """
        for name in self.fields:
            if name not in data:
                raise KeyError(f"inputs: expected the field {name!r}, got {list(data)}")
        parts = [module(data[name]) for name, module in self.fields.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class CharacterLSTM(nn.Module):
    """A word as its characters read by a bidirectional LSTM: the final states of both directions (Lample et al. 2016,
    "Neural Architectures for Named Entity Recognition", section 4.1). The different words of a batch are one batch
    of the fused kernel.

    Args:
        num_characters: ids from 0, which is no character, to ``num_characters`` - 1.
        embedding_dim: of a character.
        hidden_size: H of each direction.
        dropout: of the characters' embeddings, in training.
    """

    def __init__(
        self, num_characters: int, embedding_dim: int = 25, hidden_size: int = 25, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, embedding_dim, padding_idx=0)
        self.dropout = dropout
        self.encoder = LSTM(embedding_dim, hidden_size, batch_first=True, bidirectional=True)
        self.out_features = 2 * hidden_size

    def forward(self, characters: Tensor) -> Tensor:
        """The features [N, 2H] of words [N, W], character ids padded with 0; an empty word counts as one character."""
        # A graph compiled for any batch size must not branch on the size of this batch.
        if not torch.compiler.is_compiling() and characters.shape[0] == 0:
            return self.embedding.weight.new_zeros(0, self.out_features)
        if characters.shape[1] == 0:
            characters = characters.new_zeros(characters.shape[0], 1)
        words, places = distinct(characters)
        lengths = (words != 0).sum(1).clamp(min=1)
        embedded = _drop(self.embedding(words), self.dropout, self.training)
        _, (h_n, _) = self.encoder(embedded, lengths=lengths.cpu())
        found = h_n.transpose(0, 1).flatten(1)
        return found if places is None else found.index_select(0, places)


class CharacterCNN(nn.Module):
    """A word as its characters under convolutions: the maximum of each filter over the word (Ma & Hovy 2016,
    "End-to-end Sequence Labeling via Bi-directional LSTM-CNNs-CRF", section 2.1; several widths as Kim 2014).

    Args:
        num_characters: ids from 0, which is no character, to ``num_characters`` - 1.
        embedding_dim: of a character.
        filters: of each width.
        kernel_sizes: widths in characters, odd.
        dropout: of the characters' embeddings, in training: in all words of a call the same numbers of a character.

    Raises:
        ValueError: a width is even or below 1.
    """

    _ALPHABET = 4096  # up to here all characters are looked at, whether they occur or not

    def __init__(
        self,
        num_characters: int,
        embedding_dim: int = 30,
        filters: int = 50,
        kernel_sizes: Sequence[int] = (3, 5),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for width in kernel_sizes:
            if width < 1 or width % 2 == 0:
                raise ValueError(f"kernel_sizes: expected odd widths, got {list(kernel_sizes)}")
        self.embedding = nn.Embedding(num_characters, embedding_dim, padding_idx=0)
        self.dropout = dropout
        self.convolutions = nn.ModuleList(
            nn.Conv1d(embedding_dim, filters, width, padding=width // 2) for width in kernel_sizes
        )
        self.out_features = filters * len(kernel_sizes)

    def forward(self, characters: Tensor) -> Tensor:
        """The features [N, filters * widths] of words [N, W], character ids padded with 0.

        Raises:
            IndexError: a character is out of range.
            RuntimeError: the ids are neither int64 nor int32.
        """
        if characters.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"characters: expected int64 or int32 ids, got {characters.dtype}")
        if characters.shape[1] == 0:
            characters = characters.new_zeros(characters.shape[0], 1)
        ids, words = self._characters(characters.long())
        embedded = _drop(self.embedding(ids), self.dropout, self.training)
        if self._takes_kernels(embedded):
            return self._filtered(words, embedded)
        return self._convolved(words, embedded)

    def _characters(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """The characters to look at, of which the first is none, and the words by their places among these: all
        characters, or of a large alphabet those that occur."""
        if torch.compiler.is_compiling() or self.embedding.num_embeddings <= self._ALPHABET:
            return torch.arange(self.embedding.num_embeddings, device=words.device), words
        ids, places = torch.unique(F.pad(words.flatten(), (1, 0)), return_inverse=True)
        return ids, places[1:].view(words.shape)

    def _takes_kernels(self, embedded: Tensor) -> bool:
        """Whether the convolutions do nothing but what :func:`pymtl.ops.char_cnn` does, and that takes the dtype."""
        return (
            ops.has_kernels(embedded)
            and not torch.is_autocast_enabled("cpu")
            and all(
                type(convolution) is nn.Conv1d
                and not runs_own_code(convolution, nn.Conv1d)
                and convolution.bias is not None
                and convolution.padding == (convolution.kernel_size[0] // 2,)
                and convolution.padding_mode == "zeros"
                and convolution.stride == convolution.dilation == (1,)
                and convolution.groups == 1
                for convolution in self.convolutions
            )
        )

    def _filtered(self, words: Tensor, embedded: Tensor) -> Tensor:
        weights = [convolution.weight.permute(2, 0, 1).flatten(0, 1) for convolution in self.convolutions]
        # What each character adds at each place of each filter's window; by a product whose rows do not depend on their
        # number.
        table = ops.heads(embedded, torch.cat(weights), None)
        found = ops.char_cnn(words, table, [convolution.kernel_size[0] for convolution in self.convolutions])
        # A filter's bias is the same at all places, so it may be added to the maximum.
        return found + torch.cat([convolution.bias for convolution in self.convolutions])

    def _convolved(self, words: Tensor, embedded: Tensor) -> Tensor:
        """By the convolutions themselves, of each different word once."""
        words, places = distinct(words)
        rows = F.embedding(words, embedded).transpose(1, 2)
        # Padding is no place for a filter to find anything.
        columns = torch.arange(words.shape[1], device=words.device)
        outside = columns >= (words != 0).sum(1, keepdim=True).clamp(min=1)
        values = [
            convolution(rows).masked_fill(outside.unsqueeze(1), -torch.inf).amax(2) for convolution in self.convolutions
        ]
        found = torch.cat(values, dim=1)
        return found if places is None else found.index_select(0, places)


def distinct(words: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows of [N, W], and for each row the index of its distinct row: a text repeats many words.

    Without rows, or while a compiler traces the call: all rows, and None for the indices.
    """
    if torch.compiler.is_compiling() or words.shape[0] == 0:
        return words, None
    keys = (words * _multipliers(words.shape[1]).to(words.device)).sum(1)
    _, places = torch.unique(keys, return_inverse=True)
    count = int(places.max()) + 1
    of_each = places.new_empty(count).scatter_(0, places, torch.arange(len(words), device=words.device))
    rows = words.index_select(0, of_each)
    if torch.equal(rows.index_select(0, places), words):
        return rows, places
    return torch.unique(words, dim=0, return_inverse=True)  # two words had one key


@cache
def _multipliers(width: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0))


def _drop(embedded: Tensor, p: float, training: bool) -> Tensor:
    return dropout(embedded, p) if training and p > 0 else embedded
