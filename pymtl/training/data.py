"""Records from JSON lines and CSV."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pymtl.training.config import Config, DataConfig, FieldConfig
from pymtl.training.errors import DataError
from pymtl.training.values import check_text, has_numbers, number_of, shown


@dataclass(frozen=True)
class Record:
    """One text: its tokens, and for each task of its data set its label, or None where it has none.

    ``fields`` are the further fields of its tokens; ``held_out`` tells whether the configuration's ``holdout_field``
    puts it among the validation records. A record of features alone has as many empty tokens.
    """

    tokens: list[str]
    labels: dict[str, Any]
    fields: dict[str, list[Any]] = field(default_factory=dict)
    held_out: bool = False


def read_records(path: Path, config: Config, labelled: bool = True, dataset: str = "") -> list[Record]:
    """Reads a JSON-lines or CSV file, plain or .gz.

    Args:
        path: the file; one JSON object a line, the tokens, the further fields and each task's label in the fields the
            configuration names. A label may be null or missing. Of a file called .csv each row is a record: tokens,
            tags and further fields with spaces between them, several labels with a ``|`` (alone: none of them), a
            missing label an empty cell.
        labelled: whether labels are read at all.
        dataset: the data set it belongs to, where there are several.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is malformed; the message names file, line number and reason.
    """
    records = []
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            if path.name.removesuffix(".gz").endswith(".csv"):
                rows = csv.DictReader(io.TextIOWrapper(lines, encoding="utf-8-sig", newline=""), strict=True)
                _check_columns(rows.fieldnames or [])
                for row in rows:
                    number = rows.line_num
                    if None in row or None in row.values():
                        count = len(rows.fieldnames)
                        raise DataError(f"expected {count} cells, got more or fewer")
                    records.append(_record(row, config, labelled, dataset, cells=True))
            else:
                for line in lines:
                    number += 1
                    if line.strip():
                        records.append(parse_record(line, config, labelled, dataset))
    except csv.Error as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None
    except (ValueError, TypeError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number}: {error}") from None
    if not records:
        raise DataError(f"{path}: expected at least one record, got none")
    return records


def _check_columns(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"expected columns of different names, got {name!r} twice")


def read_sets(config: Config) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The training and validation records of every data set; held out from the former where it has no ``valid`` file.

    Training records without a label of any task are left out.

    Raises:
        FileNotFoundError, DataError: as :func:`read_records`; or nothing is left to train on or to validate.
    """
    train, valid = {}, {}
    for name, data in config.sets.items():
        records = read_records(config.path(data.train), config, dataset=name)
        _check_bio(records, config, data.train)
        if data.valid is not None:
            valid[name] = read_records(config.path(data.valid), config, dataset=name)
        else:
            records, valid[name] = _hold_out(records, data, config.seed)
        train[name] = labelled(records, data.train)
    return train, valid


def read_test_sets(config: Config) -> dict[str, list[Record]]:
    """The test records of the data sets that have some. Errors as :func:`read_records`."""
    return {
        name: read_records(config.path(data.test), config, dataset=name)
        for name, data in config.sets.items()
        if data.test is not None
    }


def labelled(records: list[Record], where: str) -> list[Record]:
    """The records with a label of any task: what one can train on.

    Raises:
        DataError: there is none.
    """
    kept = [record for record in records if any(label is not None for label in record.labels.values())]
    if not kept:
        raise DataError(f"{where}: no record has a label of any task")
    return kept


def _check_bio(records: list[Record], config: Config, where: str) -> None:
    """What a conditional random field that forbids some tags can be trained on.

    Raises:
        DataError: there is a tag that it forbids.
    """
    for name, task in config.tasks.items():
        for number, record in enumerate(records if task.bio else (), 1):
            before: str | None = "O"
            for place, tag in enumerate(record.labels.get(name) or (), 1):
                inside = tag is not None and tag.partition("-")[0] == "I"
                kind = tag.partition("-")[2] if inside else ""
                if inside and before is not None and before not in (tag, f"B-{kind}" if kind else "B"):
                    raise DataError(
                        f"{where}: record {number}, field {task.field or name!r}: {tag!r} at token {place} follows "
                        f"{before!r}, which bio = true forbids"
                    )
                before = tag


def _hold_out(records: list[Record], data: DataConfig, seed: int) -> tuple[list[Record], list[Record]]:
    if data.holdout_field is not None:
        held_out = [record for record in records if record.held_out]
        kept = [record for record in records if not record.held_out]
    else:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, round(data.holdout * len(records)))
        chosen = set(order[:count])
        held_out = [record for i, record in enumerate(records) if i in chosen]
        kept = [record for i, record in enumerate(records) if i not in chosen]
    if not held_out or not kept:
        by = "" if data.holdout_field is None else f" by {data.holdout_field!r} = {' or '.join(data.holdout_values)}"
        counts = f"{len(kept)} and {len(held_out)}"
        raise DataError(f"{data.train}: expected records to train on and others to hold out{by}, got {counts}")
    return kept, held_out


def parse_record(line: bytes, config: Config, labelled: bool = True, dataset: str = "") -> Record:
    """The record of one line of JSON.

    Raises:
        DataError: it is malformed.
    """
    try:
        raw = json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"expected a JSON object, got {type(raw).__name__}")
    return _record(raw, config, labelled, dataset)


def _of_field(cell: str | None, info: FieldConfig) -> Any:
    if cell is None:
        return None
    parts = cell.split()
    return parts if info.kind == "category" else [number_of(part) for part in parts]


def _record(raw: dict[str, Any], config: Config, labelled: bool, dataset: str, cells: bool = False) -> Record:
    """Of a JSON object, or of a row of CSV if ``cells``."""
    data = config.sets[dataset]
    fields = {name: raw.get(info.field or name) for name, info in config.fields.items()}
    if cells:
        if config.model.words and data.tokens not in raw:
            raise DataError(f"expected a column {data.tokens!r}, got {', '.join(raw)}")
        fields = {name: _of_field(cell, config.fields[name]) for name, cell in fields.items()}
        if isinstance(raw.get(data.tokens), str):
            raw = {**raw, data.tokens: raw[data.tokens].split()}
    if config.model.words:
        tokens = _tokens(raw, data)
    else:
        first = next(iter(config.fields))
        if not isinstance(fields[first], list) or not fields[first]:
            name = config.fields[first].field or first
            raise DataError(f"field {name!r}: expected a list of at least one token's, got {shown(fields[first])}")
        tokens = [""] * len(fields[first])
    for name, info in config.fields.items():
        _check_field(info.field or name, fields[name], info, len(tokens))
    labels = {}
    for name, task in config.tasks_of(dataset).items() if labelled else ():
        if task.rules.labels_itself:
            labels[name] = True
            continue
        field_name = task.field or name
        label = raw.get(field_name)
        if cells:
            if label is None:
                raise DataError(f"expected a column {field_name!r}, got {', '.join(raw)}")
            label = task.rules.of_cell(label, task) if label.strip() else None
        if label is not None:
            task.rules.check_label(field_name, label, task, len(tokens))
        labels[name] = label
    held_out = data.holdout_field is not None and raw.get(data.holdout_field) in data.holdout_values
    return Record(tokens, labels, fields, held_out)


def _tokens(raw: dict[str, Any], data: DataConfig) -> list[str]:
    tokens = raw.get(data.tokens)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise DataError(f"field {data.tokens!r}: expected a list of at least one string, got {tokens!r}")
    check_text(data.tokens, tokens)
    return [t.lower() for t in tokens] if data.lowercase else tokens


def _check_field(field: str, values: Any, info: FieldConfig, length: int) -> None:
    if info.kind == "category":
        expected = f"a list of {length} strings or whole numbers, one a token"
        fits = isinstance(values, list) and len(values) == length and all(_is_category(value) for value in values)
    else:
        one = "a number" if info.size == 1 else f"a list of {info.size} numbers"
        expected = f"a list of {length}, one a token, each {one}"
        fits = isinstance(values, list) and len(values) == length and all(has_numbers(v, info.size) for v in values)
    if not fits:
        right = _is_category if info.kind == "category" else lambda value: has_numbers(value, info.size)
        raise DataError(f"field {field!r}: expected {expected}, got {shown(values, right)}")
    if info.kind == "category":
        check_text(field, [value for value in values if isinstance(value, str)])


def _is_category(value: Any) -> bool:
    return isinstance(value, str | int)
