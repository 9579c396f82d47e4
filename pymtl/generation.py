"""Models that go on step by step, for :mod:`pymtl.serving.generation` to search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.decoder import Memory, State
from pymtl.language_model import LanguageModelHead
from pymtl.packing import pack
from pymtl.recurrent import Recurrent
from pymtl.serving.generation import END, NAN_LOGITS, Banned, Hypothesis, Scores, Search, search
from pymtl.sharing import HardSharing, Sharing


class DecoderSteps:
    """The hypotheses of a :class:`pymtl.DecoderHead`.

    Args:
        memory: what it answers from.
        attention: whether to say what each step reads.
        never: tokens that are not to come.
    """

    ends = True

    def __init__(self, memory: Memory, attention: bool = False, never: Sequence[int] = ()) -> None:
        self.memory = memory
        self.attention = attention
        self.never = list(never)
        self.first = np.full(memory.places.shape[0], END, dtype=np.int64)
        self.lengths = memory.lengths().numpy()
        self._state: State = tuple(state.index_select(1, memory.places) for state in memory.initial)

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        memory = self.memory
        device = memory.places.device
        read, rows, of = (torch.from_numpy(each).to(device) for each in (tokens, parents, sentences))
        state = tuple(each.index_select(1, rows) for each in self._state)
        places = memory.places.index_select(0, of)
        logits, self._state, weights = memory.step(read, state, memory.attended, places, memory.copied)
        values, ids = likeliest(logits, count, banned, self.never)
        return Scores(values, ids, weights.mean(1).double().cpu().numpy() if self.attention else None)


class LanguageModelSteps:
    """Texts that a language model of one direction goes on with: each step reads one token from the state behind the
    last.

    Args:
        embedding, encoder, head: the model; see :func:`why_not_on`.
        tokens: ids [B, T] of the texts so far, batch first.
        lengths: theirs, int64 [B].
        never: tokens that are not to come.
    """

    ends = False

    def __init__(
        self,
        embedding: nn.Embedding,
        encoder: Recurrent | HardSharing,
        head: LanguageModelHead,
        tokens: Tensor,
        lengths: Tensor,
        never: Sequence[int] = (),
    ) -> None:
        self.never = list(never)
        self.embedding, self.layers, self.head = embedding, _layers_of(encoder), head
        self.lengths = np.zeros(len(lengths), dtype=np.int64)  # nothing attends
        self.first = tokens[torch.arange(len(lengths)), lengths - 1].cpu().numpy()
        self._state = _begin(self.layers, len(lengths))
        read = lengths > 1  # the last token is what the first step reads
        if bool(read.any()):
            packed = pack(tokens[read], lengths[read] - 1, batch_first=True)
            _, state = self.layers(packed._replace(data=embedding(packed.data)))
            for every, own in zip(self._state, state if isinstance(state, tuple) else (state,)):
                every[:, read] = own

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        device = self._state[0].device
        rows = torch.from_numpy(parents).to(device)
        state = tuple(each.index_select(1, rows) for each in self._state)
        embedded = self.embedding(torch.from_numpy(tokens).to(device))
        packed = PackedSequence(embedded, torch.tensor([len(tokens)]))
        output, after = self.layers(packed, state if len(state) > 1 else state[0])
        self._state = after if isinstance(after, tuple) else (after,)
        logits = self.head(output.data)[:, 0]
        return Scores(*likeliest(logits, count, banned, self.never))


def _layers_of(encoder: Recurrent | Sharing) -> Recurrent | Sharing:
    return encoder.encoder if isinstance(encoder, HardSharing) else encoder


def _begin(layers: Recurrent, batch: int) -> tuple[Tensor, ...]:
    """The states before the first token."""
    like = next(layers.parameters())
    sizes = [layers.proj_size or layers.hidden_size, layers.hidden_size][: 2 if layers.mode == "LSTM" else 1]
    return tuple(like.new_zeros(layers.num_layers, batch, size) for size in sizes)


def likeliest(logits: Tensor, count: int, banned: Banned, never: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """:func:`pymtl.serving.generation.likeliest` of a tensor, on its device."""
    scores = logits.double().log_softmax(-1)
    if never:
        scores[:, list(never)] = -torch.inf
    if banned[0]:
        scores[torch.tensor(banned[0]), torch.tensor(banned[1])] = -torch.inf
    size = scores.shape[1]
    values, ids = (each.cpu().numpy() for each in scores.topk(min(count, size) if count > 0 else size, dim=-1))
    if np.isnan(values).any():
        raise RuntimeError(NAN_LOGITS)
    return values, ids


def generate(
    memory: Memory,
    settings: Search,
    max_length: int,
    attention: bool = False,
    never: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The ``nbest`` answers to each sentence.

    Args:
        memory: of a model in eval mode.
        settings: how they are looked for.
        max_length: tokens at most, where the settings say nothing.
        attention: whether to give what each step read.
        never: tokens that are not to come.
        numbers: of the sentences, by which samples are drawn; by default from 0 on.
    """
    with torch.no_grad():
        steps = DecoderSteps(memory, attention or settings.coverage_penalty > 0, never)
        return search(steps, settings, max_length, numbers)


def go_on(
    embedding: nn.Embedding,
    encoder: Recurrent | HardSharing,
    head: LanguageModelHead,
    tokens: Tensor,
    lengths: Tensor,
    settings: Search,
    max_length: int,
    never: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The ``nbest`` continuations of each text by a language model. Arguments as for :class:`LanguageModelSteps` and
    :func:`generate`."""
    with torch.no_grad():
        return search(
            LanguageModelSteps(embedding, encoder, head, tokens, lengths, never), settings, max_length, numbers
        )


def why_not_on(embedding: nn.Module | None, encoder: Recurrent | Sharing) -> str | None:
    """What is expected of a language model that is to go on with texts, and what this one has; None if it can."""
    layers = _layers_of(encoder)
    if not isinstance(layers, Recurrent):
        return f"an encoder that all tasks share, got {type(layers).__name__}"
    if layers.bidirectional:
        return "an encoder of one direction, got two"
    if not isinstance(embedding, nn.Embedding):
        return f"an embedding of words alone, got {type(embedding).__name__}"
    return None
