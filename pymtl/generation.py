"""Models that go on step by step, for :mod:`pymtl.serving.generation` to search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pymtl.decoder import Memory, State
from pymtl.serving.generation import Banned, Hypothesis, Scores, Search, search

ANSWER_LENGTH = 100  # tokens at most, where nothing else is said


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
        self.first = np.zeros(memory.places.shape[0], dtype=np.int64)
        self.lengths = memory.lengths().numpy()
        self._state: State = tuple(state.index_select(1, memory.places) for state in memory.initial)

    def step(self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned) -> Scores:
        memory = self.memory
        device = memory.places.device
        read, rows, of = (torch.from_numpy(each).to(device) for each in (tokens, parents, sentences))
        state = tuple(each.index_select(1, rows) for each in self._state)
        logits, self._state, weights = memory.head.step(read, state, memory, memory.places[of])
        values, ids = likeliest(logits, count, banned, self.never)
        return Scores(values, ids, weights.mean(1).cpu().double().numpy() if self.attention else None)


def likeliest(logits: Tensor, count: int, banned: Banned, never: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities and ids of the ``count`` likeliest tokens (0: all), falling, of logits [M, C]; what is banned
    does not come. Probabilities are of all tokens, banned ones among them."""
    scores = logits.double().log_softmax(-1)
    if never:
        scores[:, list(never)] = -torch.inf
    if banned[0]:
        scores[torch.tensor(banned[0]), torch.tensor(banned[1])] = -torch.inf
    size = scores.shape[1]
    values, ids = scores.topk(min(count, size) if count > 0 else size, dim=-1)
    return values.cpu().numpy(), ids.cpu().numpy()


@torch.no_grad()
def generate(
    memory: Memory,
    settings: Search,
    max_length: int = ANSWER_LENGTH,
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
        numbers: of the sentences, for what is drawn; by default from 0 on.
    """
    steps = DecoderSteps(memory, attention or settings.coverage_penalty > 0, never)
    return search(steps, settings, max_length, numbers)
