"""A configuration to begin with, from the fields of a data file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pymtl._native import version
from pymtl.serving.tokenizing import tokens_of
from pymtl.serving.values import is_missing, number_of
from pymtl.training.config import is_task_name
from pymtl.training.errors import DataError
from pymtl.training.files import TABLES, Row, count_columns, format_of, read_rows, with_points
from pymtl.training.kinds import KINDS
from pymtl.training.kinds.base import Column

MOST_ROWS = 5000  # that are looked at
USUAL = ("tokens", "text", "sentence", "words", "utterance", "message", "comment", "review", "query", "title", "body")


@dataclass(frozen=True)
class Start:
    """A configuration's text, and what was found, a line each."""

    toml: str
    lines: list[str]


def start(path: Path, text: str | None = None, written: str | None = None, asked: str = "auto") -> Start:
    """A commented configuration for a data file.

    Args:
        path: the file, in a format of :mod:`pymtl.training.files`.
        text: the field of the text; None: the one that looks like it.
        written: the file's name in the configuration; None: as seen from its own folder.
        asked: how the file is read, "auto" as its name says.

    Raises:
        FileNotFoundError, DataError: it cannot be read, or no field looks like a text.
    """
    form = format_of(path, asked)[0]
    columns = _columns_of(path) if form == "conll" else ()
    rows = []
    for row in read_rows(path, asked, columns):
        rows.append(row)
        if len(rows) == MOST_ROWS:
            break
    if not rows:
        raise DataError(f"{path}: expected at least one record, got none")
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    rows = with_points(rows, names)
    odd = [name for name in names if number_of(name) != name or len(name.split()) > 8] if form in TABLES else []
    if odd:
        raise DataError(f"{path}:1: expected the names of the columns in the first line, got {odd[0]!r}: add them")
    field = text if text is not None else _text_field(rows, names, path)
    if field not in names:
        raise DataError(f"--text: expected one of {', '.join(names)}, got {field!r}")
    found, others = [], []
    for name in names:
        if name != field:
            suits = _kind_of(name, field, rows)
            (found if suits is not None else others).append((name, suits))
    if not found:
        raise DataError(
            f"{path}: no field beside the text {field!r} looks like a label: {', '.join(names)}. If one is an answer "
            'to be written, as a translation is, write a section [tasks.NAME] with kind = "generation" yourself'
        )
    sections = [_head(written or path.name, field, form if asked != "auto" else None, columns, len(found) > 1)]
    used: set[str] = set()
    sections += [_task(_task_name(name, used), name, suits) for name, suits in found]
    if others:
        sections.append("# Not used: " + ", ".join(" ".join(name.split()) for name, _ in others) + "\n")
    sections.append(_TRAINING)
    lines = [f"text: {field}", *(f"{name}: {suits.kind}, {suits.reason}" for name, suits in found)]
    lines += [f"{name}: not used" for name, _ in others]
    return Start("\n".join(sections), lines)


def _columns_of(path: Path) -> list[str]:
    return ["tokens", *(["tags"] if (n := count_columns(path)) == 2 else [f"column{i}" for i in range(2, n + 1)])]


def _text_field(rows: list[Row], names: list[str], path: Path) -> str:
    """The longest of the fields with a usual name, or else of all."""

    def words(name: str) -> float:
        values = [row.values.get(name) for row in rows]
        return sum(len(value.split()) for value in values if isinstance(value, str)) / len(rows)

    usual = [name for name in names if name.lower() in USUAL]
    lists = [name for name in usual if any(_is_tokens(row.values.get(name)) for row in rows)]
    best = max(usual or names, key=words)
    if lists and words(best) == 0:
        return lists[0]
    if words(best) < 2 and not usual:
        raise DataError(f"{path}: no field looks like a text: say which with --text: {', '.join(names)}")
    return best


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(token, str) for token in value)


@dataclass(frozen=True)
class Suits:
    """A kind that suits a field, why, and the lines of its section."""

    kind: str
    reason: str
    lines: list[str]


def _kind_of(name: str, field: str, rows: list[Row]) -> Suits | None:
    """A kind that suits the values of a field."""
    values, lengths, words = [], [], []
    for row in rows:
        value, text = row.values.get(name), row.values.get(field)
        if not is_missing(value) and not is_missing(text):
            values.append(value)
            lengths.append(len(tokens_of(text, "whitespace")) if isinstance(text, str) else len(text))
            words.append(len(tokens_of(text, "words")) if isinstance(text, str) else len(text))
    if not values or _is_of_records(name, values):
        return None
    column = Column(values, lengths, words, any(name in row.cells for row in rows))
    for kind in sorted(KINDS.values(), key=lambda kind: kind.looked_for):
        reason = kind.suits(column)
        if reason is not None:
            return Suits(kind.name, reason, kind.starting(column))
    return None


def _is_of_records(name: str, values: list[Any]) -> bool:
    """Whether a field looks like the record's own number, date or place rather than a label of its text."""
    if re.search(
        r"(^|[_\s-])(id|ids|uuid|hash|timestamp|date|url|file|index|created|updated)s?([_\s-]at)?$", name.lower()
    ):
        return True
    plain = [str(value).strip() for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
    if len(plain) < len(values):
        return False
    dates = sum(_DATE.fullmatch(value) is not None for value in plain) > 0.9 * len(plain)
    numbers = [int(value) for value in plain if re.fullmatch(r"\d+", value)]
    counted = len(numbers) == len(plain) > 10 and all(a < b for a, b in pairwise(numbers))
    return dates or counted


_DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}([T\s].*)?")


def _head(train: str, field: str, form: str | None, columns: list[str] | tuple[str, ...], several: bool) -> str:
    suffix = Path(train.removesuffix(".gz")).suffix
    lines = [
        "# Written by pymtl init: look it over, then",
        "#   pymtl train THIS_FILE",
        f'pymtl = "{version}"',
        "seed = 1",
        *([_SHARING] if several else []),
        "",
        "[data]",
        f"train = {json.dumps(train, ensure_ascii=False)}",
        "holdout = 0.1              # no validation file: a tenth of the records is kept for it",
        f'# valid = "valid{suffix}"      # or files of their own',
        f'# test = "test{suffix}"',
        f"tokens = {json.dumps(field, ensure_ascii=False)}            # the field of the text",
        "# lowercase = true",
    ]
    if form is not None:
        lines.insert(lines.index("[data]") + 2, f'format = "{form}"')
    if columns:
        lines.append(f"columns = {json.dumps(list(columns), ensure_ascii=False)}  # the fields of the file's columns")
    return "\n".join(lines) + "\n"


def _task_name(field: str, used: set[str]) -> str:
    """A name for a field's task that TOML takes without quotes and that no other task has."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", field).strip("_") or "task"
    plain = plain if is_task_name(plain) else f"{plain}_label"
    name, number = plain, 1
    while name in used:
        number += 1
        name = f"{plain}_{number}"
    used.add(name)
    return name


def _task(name: str, field: str, suits: Suits) -> str:
    lines = [f"# {suits.reason}", f"[tasks.{name}]", f'kind = "{suits.kind}"']
    if name != field:
        lines.append(f"field = {json.dumps(field, ensure_ascii=False)}")
    lines += suits.lines
    return "\n".join(lines) + "\n"


_SHARING = '# sharing = "hard"           # one encoder for all tasks: faster, but they compete for its units'
_TRAINING = """\
[model]
embedding_dim = 64
hidden_size = 64
dropout = 0.3

[training]
epochs = 20
patience = 5               # epochs without a better validation score before stopping
learning_rate = 2e-3
rare_word_dropout = 1.0    # rare words are sometimes read as unknown ones, which new texts have
"""
