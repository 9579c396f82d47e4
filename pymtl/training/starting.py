"""A configuration to begin with, from the fields of a data file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pymtl._native import version
from pymtl.training.errors import DataError
from pymtl.training.files import Row, count_columns, format_of, read_rows
from pymtl.training.kinds import KINDS
from pymtl.training.kinds.base import Column
from pymtl.training.tokenizing import tokens_of
from pymtl.training.values import is_missing

MOST_ROWS = 5000  # that are looked at
USUAL = ("tokens", "text", "sentence", "words", "utterance", "message", "comment", "review", "query", "title", "body")


@dataclass(frozen=True)
class Start:
    """A configuration's text, and what was found, a line each."""

    toml: str
    lines: list[str]


def start(path: Path, text: str | None = None, written: str | None = None) -> Start:
    """A commented configuration for a data file.

    Args:
        path: the file, in a format of :mod:`pymtl.training.files`.
        text: the field of the text; None: the one that looks like it.
        written: the file's name in the configuration; None: as seen from its own folder.

    Raises:
        FileNotFoundError, DataError: it cannot be read, or no field looks like a text.
    """
    form = format_of(path)[0]
    columns = _columns_of(path) if form == "conll" else ()
    rows = []
    for row in read_rows(path, "auto", columns):
        rows.append(row)
        if len(rows) == MOST_ROWS:
            break
    if not rows:
        raise DataError(f"{path}: expected at least one record, got none")
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    field = text if text is not None else _text_field(rows, names, path)
    if field not in names:
        raise DataError(f"--text: expected one of {', '.join(names)}, got {field!r}")
    found, others = [], []
    for name in names:
        if name != field:
            suits = _kind_of(name, field, rows)
            (found if suits is not None else others).append((name, suits))
    if not found:
        raise DataError(f"{path}: no field beside the text {field!r} looks like a label: {', '.join(names)}")
    sections = [_head(written or path.name, field, form, columns)]
    sections += [_task(name, *suits) for name, suits in found]
    if others:
        sections.append("# Not used: " + ", ".join(name for name, _ in others) + "\n")
    sections.append(_TRAINING)
    lines = [f"text: {field}", *(f"{name}: {suits[0]}, {suits[1]}" for name, suits in found)]
    lines += [f"{name}: not used" for name, _ in others]
    return Start("\n".join(sections), lines)


def _columns_of(path: Path) -> list[str]:
    return ["tokens", *(["tags"] if (n := count_columns(path)) == 2 else [f"column{i}" for i in range(2, n + 1)])]


def _text_field(rows: list[Row], names: list[str], path: Path) -> str:
    """The usual name, or else the field with the longest texts."""
    for name in USUAL:
        if name in names:
            return name

    def words(name: str) -> float:
        values = [row.values.get(name) for row in rows]
        return sum(len(value.split()) for value in values if isinstance(value, str)) / len(rows)

    best = max(names, key=words)
    if words(best) < 2:
        raise DataError(f"{path}: no field looks like a text: say which with --text: {', '.join(names)}")
    return best


def _kind_of(name: str, field: str, rows: list[Row]) -> tuple[str, str] | None:
    """A kind that suits the values of a field, and why."""
    values, lengths = [], []
    for row in rows:
        value, text = row.values.get(name), row.values.get(field)
        if not is_missing(value) and not is_missing(text):
            values.append(value)
            lengths.append(len(tokens_of(text, "whitespace")) if isinstance(text, str) else len(text))
    if not values:
        return None
    column = Column(values, lengths, any(name in row.cells for row in rows))
    for kind in sorted(KINDS.values(), key=lambda kind: kind.looked_for):
        reason = kind.suits(column)
        if reason is not None:
            return kind.name, reason
    return None


def _head(train: str, field: str, form: str, columns: list[str] | tuple[str, ...]) -> str:
    lines = [
        "# Written by pymtl init: look it over, then",
        "#   pymtl train THIS_FILE",
        f'pymtl = "{version}"',
        "seed = 1",
        "",
        "[data]",
        f"train = {json.dumps(train)}",
        "holdout = 0.1              # no validation file: a tenth of the records is kept for it",
        '# valid = "valid.csv"      # or files of their own',
        '# test = "test.csv"',
        f"tokens = {json.dumps(field)}            # the field of the text",
        "# lowercase = true",
    ]
    if form == "conll":
        lines.append(f"columns = {json.dumps(list(columns))}  # the fields of the file's columns")
    return "\n".join(lines) + "\n"


def _task(name: str, kind: str, reason: str) -> str:
    task = re.sub(r"\W+", "_", name).strip("_") or "task"
    lines = [f"# {reason}", f"[tasks.{task}]", f'kind = "{kind}"']
    if task != name:
        lines.append(f"field = {json.dumps(name, ensure_ascii=False)}")
    lines += KINDS[kind].starting
    return "\n".join(lines) + "\n"


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
