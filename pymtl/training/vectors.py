"""Word vectors from text files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

from pymtl.training.errors import DataError


def read_vectors(path: Path, tokens: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Vectors of some words from a text file of word2vec, GloVe or fastText, plain or .gz: a word and its numbers a
    line, perhaps a first line with the number of words and the vectors' size.

    A word the file lacks takes the vector of its lower case, if the file has that.

    Args:
        path: the file.
        tokens: the words, V of them.
        size: E, of a vector.

    Returns:
        float32 [V, E], zero for words without a vector, and bool [V], whether a word has one.

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
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        number = 0
        try:
            for line in lines:
                number += 1
                # From the right: some words of GloVe's hold spaces.
                parts = line.decode("utf-8").rstrip("\r\n ").rsplit(" ", size)
                if not line.strip():
                    continue
                if number == 1 and len(line.split()) == 2 and all(part.isdigit() for part in line.split()):
                    if int(line.split()[1]) != size:
                        raise DataError(f"expected vectors of {size} numbers, got {int(line.split()[1])}")
                    continue
                if number <= 2 or " " in parts[0]:
                    _check_size(line, size)
                if len(parts) != size + 1:
                    raise DataError(f"expected a word and {size} numbers, got {len(parts) - 1} numbers")
                wanted = places.get(parts[0])
                if wanted is None:
                    continue
                vector = torch.tensor([float(cell) for cell in parts[1:]])
                if not vector.isfinite().all():
                    raise DataError(f"expected finite numbers of {parts[0]!r}, got {' '.join(parts[1:])}")
                for place in wanted:
                    is_own = tokens[place] == parts[0]
                    if is_own or not exact[place]:
                        vectors[place], found[place] = vector, True
                        exact[place] |= is_own
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return vectors, found


def _check_size(line: bytes, size: int) -> None:
    """A longer vector would pass for a word with spaces: what follows the first space must not be numbers only."""
    _, *cells = line.split()
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return
    if len(numbers) != size:
        raise DataError(f"expected vectors of {size} numbers, got {len(numbers)}")
