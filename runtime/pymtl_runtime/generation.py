"""Generated answers: a session's steps, for :mod:`pymtl_runtime.serving.generation` to search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .serving.generation import END, Banned, Scores, likeliest

if TYPE_CHECKING:
    from .library import Session


class SessionSteps:
    """The hypotheses of a task's answers to a session's last batch.

    Args:
        session: one whose last batch asked for the task.
        task: whose answers are generated.
        attention: whether to say what each step reads.
        never: ids that are not to come.
    """

    ends = True

    def __init__(self, session: Session, task: str, attention: bool, never: Sequence[int]) -> None:
        self.lengths = session.lengths
        self.first = np.full(len(self.lengths), END, dtype=np.int64)
        self._session, self._task, self._attention, self._never = session, task, attention, list(never)
        self._began = False

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        whose = {"parents": parents} if self._began else {"sequences": sentences}
        logits, attention = self._session.step(self._task, tokens, **whose)
        self._began = True
        values, ids = likeliest(logits, count, banned, self._never)
        return Scores(values, ids, attention.astype(np.float64) if self._attention and attention is not None else None)
