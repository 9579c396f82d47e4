"""From records to numbers: ids of tokens, of their characters and of their fields.

A ``vocabulary`` has ``tokens``, ``characters`` and ``categories``, names in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .records import Record

UNKNOWN = "<unk>"
SPECIAL = ["<pad>", UNKNOWN]  # the first names of every vocabulary
FIRST_TOKEN = len(SPECIAL)  # the id of the most frequent other one


class Encoder:
    """By a run's vocabulary and configuration.

    Args:
        remember: keep the characters of each token for the next time it comes.
    """

    def __init__(self, vocabulary: Any, config: Any, remember: bool = True) -> None:
        self.config = config
        self.remember = remember
        self._tokens = ids_of(vocabulary.tokens)
        self._characters = ids_of(vocabulary.characters)
        self._categories = {name: ids_of(values) for name, values in vocabulary.categories.items()}
        self._words: dict[str, list[int]] = {}

    def tokens(self, record: Record) -> list[int]:
        unknown = self._tokens[UNKNOWN]
        return [self._tokens.get(token, unknown) for token in record.tokens]

    def fields(self, record: Record) -> dict[str, np.ndarray]:
        """What the model reads besides, by field: ``characters`` int64 [T, W], filled up with 0; categories int64 [T];
        numbers float32 [T, F]."""
        found: dict[str, np.ndarray] = {}
        if self.config.characters is not None:
            found["characters"] = np.array([self._word(token) for token in record.tokens], dtype=np.int64)
        for name, info in self.config.fields.items():
            values = record.fields[name]
            if info.kind == "category":
                ids = self._categories[name]
                found[name] = np.array([ids.get(str(value), ids[UNKNOWN]) for value in values], dtype=np.int64)
            else:
                found[name] = np.array(values, dtype=np.float32).reshape(len(values), info.size)
        return found

    def _word(self, token: str) -> list[int]:
        """The ids of a word's characters, filled up with 0."""
        found = self._words.get(token)
        if found is None:
            width = self.config.characters.max_length
            unknown = self._characters[UNKNOWN]
            ids = [self._characters.get(character, unknown) for character in token[:width]]
            found = ids + [0] * (width - len(ids))
            if self.remember:
                self._words[token] = found
        return found


def ids_of(names: Sequence[Any]) -> Mapping[Any, int]:
    return {name: i for i, name in enumerate(names)}
