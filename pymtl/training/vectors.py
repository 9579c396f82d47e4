"""Word vectors from files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pymtl.training.errors import DataError

_Vector = tuple[str, np.ndarray]


def read_vectors(path: Path, tokens: list[str], size: int) -> tuple[Tensor, Tensor, int]:
    """Vectors of some words from a file of word2vec, GloVe or fastText, plain or .gz.

    Of text a word and its numbers a line, with spaces or tabs between them, perhaps a first line with the number of
    words and the vectors' size; word2vec's binary form where the name ends in ``.bin``. A word the file lacks takes the
    vector of its lower case, if the file has that.

    Args:
        path: the file.
        tokens: the words, V of them.
        size: E, of a vector.

    Returns:
        float32 [V, E], zero for words without a vector; bool [V], whether a word has one; and how many words of the
        file were skipped, whose bytes are no UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line holds something else; the message names file, line and reason.
    """
    places: dict[str, list[int]] = {}
    for place, token in enumerate(tokens):
        places.setdefault(token, []).append(place)
        if token.lower() != token:
            places.setdefault(token.lower(), []).append(place)
    vectors = torch.zeros(len(tokens), size)
    found = torch.zeros(len(tokens), dtype=torch.bool)
    exact = torch.zeros(len(tokens), dtype=torch.bool)
    reader = _Reader(path, size, frozenset(places))
    try:
        for word, vector in reader.vectors():
            if not np.isfinite(vector).all():
                raise DataError(f"expected finite numbers of {word!r}, got {' '.join(map(str, vector))}")
            for place in places[word]:
                is_own = tokens[place] == word
                if is_own or not exact[place]:
                    vectors[place], found[place] = torch.from_numpy(vector), True
                    exact[place] |= is_own
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{reader.number}: {error}") from None
    return vectors, found, reader.skipped


class _Reader:
    """The vectors of the wanted words, the number of the last line (or word) read, and of words that were skipped."""

    def __init__(self, path: Path, size: int, wanted: frozenset[str]) -> None:
        self.path = path
        self.size = size
        self.wanted = wanted
        self.number = 0
        self.skipped = 0

    def vectors(self) -> Iterator[_Vector]:
        name = self.path.name.lower()
        with gzip.open(self.path) if name.endswith(".gz") else open(self.path, "rb") as file:
            yield from self._binary(file) if name.removesuffix(".gz").endswith(".bin") else self._text(file)

    def _text(self, lines: IO[bytes]) -> Iterator[_Vector]:
        for line in lines:
            self.number += 1
            if self.number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            # From the right: some words of GloVe's hold spaces.
            cells = line.replace(b"\t", b" ").rstrip(b"\r\n ").rsplit(b" ", self.size)
            if self.number == 1 and len(line.split()) == 2 and all(part.isdigit() for part in line.split()):
                self._check_header(int(line.split()[1]))
                continue
            if self.number <= 2 or b" " in cells[0]:
                self._check_size(line)
            if len(cells) != self.size + 1:
                raise DataError(f"expected a word and {self.size} numbers, got {len(cells) - 1} numbers")
            word = self._decoded(cells[0])
            if word in self.wanted:
                with np.errstate(over="ignore"):  # the caller names what is not finite
                    vector = np.array([float(cell) for cell in cells[1:]], dtype=np.float32)
                yield word, vector

    def _binary(self, file: IO[bytes]) -> Iterator[_Vector]:
        header = file.readline(100).split()
        if len(header) != 2 or not all(part.isdigit() for part in header):
            raise DataError(
                "expected word2vec's binary form, the number of words and the size in a first line; "
                "fastText's own .bin is a model: take its .vec"
            )
        count, size = map(int, header)
        self._check_header(size)
        for _ in range(count):
            self.number += 1
            word = bytearray()
            while (byte := file.read(1)) != b" ":
                if not byte:
                    raise DataError(f"expected {count:,} words, the file ends after {self.number - 1:,}")
                word += byte
            data = file.read(4 * size)
            if len(data) < 4 * size:
                raise DataError(f"expected {count:,} words, the file ends within number {self.number:,}")
            text = self._decoded(bytes(word).lstrip(b"\n"))
            if text in self.wanted:
                yield text, np.frombuffer(data, dtype="<f4").astype(np.float32)

    def _decoded(self, word: bytes) -> str | None:
        try:
            return word.decode("utf-8")
        except UnicodeDecodeError:
            self.skipped += 1
            return None

    def _check_header(self, size: int) -> None:
        if size != self.size:
            raise DataError(f"expected vectors of {self.size} numbers, got {size}: set model.embedding_dim = {size}")

    def _check_size(self, line: bytes) -> None:
        """A longer vector would pass for a word with spaces: what follows the first space must not be numbers only."""
        _, *cells = line.split()
        try:
            numbers = [float(cell) for cell in cells]
        except ValueError:
            return
        if len(numbers) != self.size:
            raise DataError(f"expected vectors of {self.size} numbers, got {len(numbers)}")
