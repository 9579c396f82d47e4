"""Checks of single values of records, and how errors show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .errors import DataError

LARGEST_FLOAT32 = 3.4028234663852886e38


def number_of(cell: str) -> Any:
    """The number a cell of CSV holds, or the cell, for a check to name it."""
    try:
        return float(cell)
    except ValueError:
        return cell


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def has_numbers(value: Any, size: int) -> bool:
    """Whether it is a list of so many finite numbers, also in float32; of one, also a number by itself."""
    numbers = [value] if size == 1 and not isinstance(value, list) else value
    if not isinstance(numbers, list) or len(numbers) != size:
        return False
    return all(is_number(number) and abs(number) <= LARGEST_FLOAT32 for number in numbers)


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_label(value: Any) -> bool:
    """Whether it can name a class: a string, a whole number (also as 1.0, which spreadsheets make of it) or a truth
    value."""
    return isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())


def as_name(label: Any) -> str:
    """A class as text: what stands in a cell of CSV for it. ``1``, ``1.0`` and ``"1"`` are the same class."""
    if isinstance(label, str):
        return label
    return str(label).lower() if isinstance(label, bool) else str(int(label))


def is_missing(value: Any) -> bool:
    """Whether it says that there is no label: null, NaN, or a text without a letter."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (is_string(value) and not value.strip())


def are_strings(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(map(is_string, value))


def check_text(field: str, texts: Sequence[str]) -> None:
    """Half of a surrogate pair is JSON, but no text.

    Raises:
        DataError: there is such a half.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {field!r}: {error}") from None


def shown(value: Any, right: Callable[[Any], bool] | None = None) -> str:
    """A value for an error; of a list its length, and the first element that is not ``right``."""
    if not isinstance(value, list):
        return repr(value)
    wrong = next((i for i, item in enumerate(value) if right is not None and not right(item)), None)
    return f"a list of {len(value)}" + ("" if wrong is None else f", in which {value[wrong]!r} is number {wrong + 1}")
