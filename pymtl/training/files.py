"""Rows of data files: JSON lines, JSON lists, CSV and its kin, CoNLL's columns; plain or .gz."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from pymtl.serving.tags import scheme_of_labels
from pymtl.training.errors import DataError

Format = Literal["jsonl", "json", "csv", "tsv", "conll"]

_OF_SUFFIX: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".conll", ".conllu", ".iob", ".iob2", ".bio"), "conll"),
}
_TITLES = {"jsonl": "JSON lines", "json": "JSON", "csv": "CSV", "tsv": "tab-separated", "conll": "CoNLL columns"}
TABLES = ("csv", "tsv")  # formats with a header
MOST_LINES = 2000  # that are looked at to see what a file is
_BOM = b"\xef\xbb\xbf"
_COMMA = re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+),\d+")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?")
_COMMENT = re.compile(r"#\s+([\w.-]+)(?:\s*=|:\s)\s*([^\t]*)")  # CoNLL-U's, of a sentence


@dataclass(frozen=True)
class Row:
    """What a file says of one text: values by the name of their field.

    ``place`` is its line, or its number in a JSON list. ``cells`` are the fields that are text as a spreadsheet has
    it, to be read by what they are of; the values of others have their type. ``decimal_comma``: whether numbers in
    cells may have a comma for a point, as spreadsheets write them that separate cells by semicolons.
    """

    place: int
    values: dict[str, Any]
    cells: frozenset[str] = field(default=frozenset())
    decimal_comma: bool = False
    of_list: bool = False

    @property
    def where(self) -> str:
        """Its place, behind the file's name."""
        return f": record {self.place}" if self.of_list else f":{self.place}"


def format_of(path: Path, asked: str = "auto") -> tuple[Format, str]:
    """How a file is read, and why, in words."""
    if asked != "auto":
        return asked, f"as {_TITLES[asked]}, as the configuration says"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in _OF_SUFFIX:
        found = _OF_SUFFIX[suffix]
        return found, f"as {_TITLES[found]}, since its name ends in {suffix}"
    sniffed = _sniffed(path)
    if sniffed is not None:
        return sniffed, f"as {_TITLES[sniffed]}, since it looks like that"
    others = ", ".join(f'"{name}"' for name in _TITLES)
    return (
        "jsonl",
        f"as JSON lines, since its name ends in {suffix or 'nothing else'}: set data.format to one of {others}",
    )


def _sniffed(path: Path) -> Format | None:
    """CoNLL's columns, of a file whose name does not say it: as many cells in each line, tags of spans in the last one,
    and blank lines between."""
    if not path.is_file():
        return None
    try:
        lines = [line for line, _ in zip(_Lines(path), range(MOST_LINES))]
    except (DataError, OSError, EOFError, zlib.error):
        return None  # to be named when it is read
    tokens = [_cells(line) for line in lines if line.strip() and not line.startswith(("-DOCSTART-", "#"))]
    same = len({len(cells) for cells in tokens}) == 1 and len(tokens[0]) > 1
    separated = any(not line.strip() for line in lines[:-1])
    return "conll" if same and separated and scheme_of_labels(cells[-1] for cells in tokens) is not None else None


def with_points(rows: Sequence[Row], names: Iterable[str]) -> list[Row]:
    """The rows with points in the numbers of some columns, where these have commas for them."""
    commas = {
        name
        for row in rows
        for name in names
        if row.decimal_comma and name in row.cells and any(map(_COMMA.fullmatch, row.values[name].split()))
    }
    if not commas:
        return list(rows)
    return [
        replace(row, values={**row.values, **{name: _points(row.values[name]) for name in commas if name in row.cells}})
        for row in rows
    ]


def _points(cell: str) -> str:
    """Numbers as ``1.234,5`` as ``1234.5``; in a column that has such numbers ``1.234`` is ``1234``."""
    parts = (part.replace(".", "").replace(",", ".") if _NUMBER.fullmatch(part) else part for part in cell.split())
    return " ".join(parts)


def read_rows(path: Path, asked: str = "auto", columns: Sequence[str] = (), unnamed: bool = False) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: the file. What its name ends in says how it is read, in lower or upper case.
        asked: a format, or "auto": by the name.
        columns: the fields of CoNLL's columns, from the first.
        unnamed: whether to keep a table's first column where it has no name, as ``""``.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: something in it does not fit its format; the message names file, line and reason.
    """
    form, reason = format_of(path, asked)
    lines = _Lines(path)
    try:
        if form in TABLES:
            yield from _csv_rows(lines, "\t" if form == "tsv" else None, unnamed)
        elif form == "conll":
            yield from _conll_rows(lines, columns)
        else:
            yield from _json_rows(lines, reason)
    except csv.Error as error:
        old = "new-line character" in str(error)
        text = "line ends as of an old Mac: save the file with those of Unix or Windows" if old else str(error)
        raise DataError(f"{path}:{max(lines.number, 1)}: {text} (the file was read {reason})") from None
    except (ValueError, TypeError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{max(lines.number, 1)}: {error}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a file of plain text. Errors as for :func:`read_rows`."""
    lines = _Lines(path)
    try:
        return [line.rstrip("\r\n") for line in lines]
    except (DataError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{max(lines.number, 1)}: {error}") from None


class _Lines:
    """The lines of a file as text, and the number of the last one read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            for line in file:
                self.number += 1
                if self.number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError("the file is in UTF-16: save it as UTF-8")
                    if line.startswith(b"PK\x03\x04"):
                        raise DataError("the file is a workbook of a spreadsheet, or a zip: export it as CSV")
                    line = line.removeprefix(_BOM)
                yield self._decoded(line)

    def _open(self) -> IO[bytes]:
        return gzip.open(self.path) if self.path.name.lower().endswith(".gz") else open(self.path, "rb")

    def _decoded(self, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            guess = " (it may be in Windows-1252)" if line[error.start] >= 0x80 else ""
            raise DataError(
                f"byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8: save the file as "
                f"UTF-8{guess}"
            ) from None


def _json_rows(lines: _Lines, reason: str) -> Iterator[Row]:
    every = iter(lines)
    first = next((line for line in every if line.strip()), "")
    if not first:
        return
    if first.lstrip().startswith("[") or not _is_json(first):
        # A list, or an object over several lines.
        start = lines.number
        whole = first + "".join(every)
        values = _parsed(whole, start, lines, reason)
        if isinstance(values, dict):
            values = [values]
        lines.number = start
        for number, value in enumerate(values, 1):
            yield Row(number, _object(value, reason, f"record {number}: "), of_list=True)
        return
    while True:
        if first.strip():
            yield Row(lines.number, _object(_parsed(first.strip(), lines.number, lines, reason), reason))
        following = next(every, None)
        if following is None:
            return
        first = following


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parsed(text: str, start: int, lines: _Lines, reason: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines.number = start + error.lineno - 1
        raise DataError(f"not JSON: {error.msg} at character {error.colno} (the file was read {reason})") from None


def _object(value: Any, reason: str, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}expected a JSON object, got {type(value).__name__} (the file was read {reason})")
    return value


def _csv_rows(lines: _Lines, delimiter: str | None, unnamed: bool) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # texts may be long
    every = iter(lines)
    header = next((line for line in every if line.strip()), "")
    if not header:
        return
    said = re.fullmatch(r"sep=(.)\s*", header)  # Excel's
    if said is not None:
        delimiter, header = said[1], next((line for line in every if line.strip()), "")
    delimiter = delimiter or _delimiter_of(header)
    reader = csv.reader(_chained(header, every), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader)]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"expected columns of different names, got {name!r} twice")
    named = frozenset(name for name in names if name)
    needed = max((i for i, name in enumerate(names, 1) if name), default=0)
    while True:
        start = lines.number + 1
        try:
            row = next(reader, None)
        except csv.Error:
            lines.number = start  # a quotation mark that is never closed takes all that follows
            raise
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue  # a spreadsheet's empty rows
        if len(row) < needed or any(cell.strip() for cell in row[len(names) :]):
            raise DataError(f"expected {len(names)} cells, got {len(row)}")
        values = {name: cell for name, cell in zip(names, row) if name}
        if unnamed and names[0] == "" and any(names):
            values = {"": row[0], **values}
        yield Row(start, values, named, delimiter == ";")


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter_of(header: str) -> str:
    """What separates the names of a header: of comma, semicolon, tab and bar the one that stands there most often."""
    outside = re.sub(r'"[^"]*"', "", header)
    return max(",;\t|", key=outside.count)


def _conll_rows(lines: _Lines, columns: Sequence[str]) -> Iterator[Row]:
    sentence: list[list[str]] = []
    said: dict[str, str] = {}
    start = 1

    def row() -> Row:
        fields = {name: list(column) for name, column in zip(columns, zip(*sentence)) if name}
        return Row(start, {**said, **fields}, frozenset(said) - frozenset(fields))

    for line in lines:
        text = line.rstrip("\r\n")
        comment = _COMMENT.fullmatch(text) if not sentence else None
        if comment is not None:
            said[comment[1]] = comment[2].strip()
        elif not text.strip():
            if sentence:
                yield row()
            sentence, said = [], {}
        elif not _is_skipped(text, not sentence, len(columns)):
            cells = _cells(text)
            if len(cells) != len(columns):
                raise DataError(
                    f"expected {len(columns)} columns ({', '.join(name or 'unused' for name in columns)}), "
                    f"got {len(cells)}: data.columns has to name them all, and each line has to have them all"
                )
            if not sentence:
                start = lines.number
            sentence.append([cell.strip() for cell in cells])
    if sentence:
        yield row()


def _is_skipped(text: str, at_start: bool, columns: int) -> bool:
    """Whether a line is neither a token nor a field of the sentence: the head of a document or a paragraph. A token may
    begin with a number sign: such a line has all columns."""
    if text.startswith("-DOCSTART-"):
        return True
    is_comment = at_start and text.startswith("#") and "\t" not in text
    return is_comment and (len(text.split()) != columns or text.split() in (["#", "newdoc"], ["#", "newpar"]))


def count_columns(path: Path) -> int:
    """How many columns CoNLL's lines have; 0 without one. Errors as for :func:`read_rows`."""
    lines = _Lines(path)
    try:
        looked_at = (line.rstrip("\r\n") for line, _ in zip(lines, range(MOST_LINES)))
        tokens = (line for line in looked_at if line.strip() and not line.startswith("-DOCSTART-"))
        counts = Counter(len(_cells(line)) for line in tokens if _COMMENT.fullmatch(line) is None)
    except (DataError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{max(lines.number, 1)}: {error}") from None
    return counts.most_common(1)[0][0] if counts else 0


def _cells(line: str) -> list[str]:
    """The cells of a line of CoNLL's columns."""
    return line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
