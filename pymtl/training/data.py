"""Records: what a configuration reads in the rows of data files."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pymtl.serving.records import Record, names_of_text, read_record, text_field
from pymtl.serving.tokenizing import Tokenizer, places, tokens_of
from pymtl.serving.values import as_name, is_label, is_missing, number_of
from pymtl.training.config import Config, DataConfig, FieldConfig
from pymtl.training.errors import DataError
from pymtl.training.files import TABLES, Row, count_columns, format_of, read_lines, read_rows, with_points
from pymtl.training.holdout import stratified
from pymtl.training.kinds.base import Source

_HANGING = re.compile(r"\w[,;:!?]|\w\.$")  # a sign on a word
LISTS_TO_TRY = 2000  # lists of tokens, to see which tokenizer would have made them


@dataclass(frozen=True)
class Sets:
    """All records of a configuration, by data set; and the configuration with what the data told of it."""

    config: Config
    train: dict[str, list[Record]]
    valid: dict[str, list[Record]]
    test: dict[str, list[Record]]
    notes: list[str] = field(default_factory=list)  # what a person should know of how the files were read
    # Further texts to train on, of the data sets that have some; only tasks that need no labels have some of them
    unlabelled: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def trained_on(self) -> list[Record]:
        """All records that training reads."""
        return [record for own in (*self.train.values(), *self.unlabelled.values()) for record in own]


def read_records(
    path: Path,
    config: Config,
    labelled: bool = True,
    dataset: str = "",
    notes: list[str] | None = None,
    complete: bool = True,
) -> list[Record]:
    """Reads a data file; :mod:`pymtl.training.files` says in which formats.

    Of a row of CSV and the like tokens, tags and further fields have spaces between them, several labels a ``|``
    (alone: none of them), and a missing label is an empty cell. Texts without a token are left out.

    Args:
        path: the file.
        config: names the fields of the text and of each task's label.
        labelled: whether labels are read at all.
        dataset: the data set it belongs to, where there are several.
        notes: takes what a person should know of how the file was read.
        complete: whether a table must have a column for each task.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is malformed; the message names file, line number and reason.
    """
    return _read(path, config, labelled, dataset, notes, complete)[0]


def rows_of(path: Path, config: Config) -> list[Row]:
    """The rows of a file that is to be labelled, its cells as the fields are read in training; a ``.txt`` file has a
    text a line. Of several data sets the first says how the file is read.

    Raises:
        FileNotFoundError, DataError: as :func:`read_records`.
    """
    dataset = config.main_sets[0]
    data = config.sets[dataset]
    if _has_a_text_a_line(path, data):
        fields = [each.tokens for each in config.sets.values()]
        return [Row(number, dict.fromkeys(fields, line)) for number, line in enumerate(read_lines(path), 1)]
    form, _ = format_of(path, data.format)
    columns = _columns(path, config, dataset) if form == "conll" else ()
    rows = list(read_rows(path, data.format, columns, unnamed=True))
    if not rows:
        raise DataError(f"{path}: expected at least one record, got none")
    if form in TABLES:
        _check_columns(rows[0], config, dataset, False, None, path)
    rows = with_points(rows, _number_fields(config))
    for row in rows:
        for name, info in config.fields.items():
            if (info.field or name) in row.cells:
                row.values[info.field or name] = _of_field(row.values[info.field or name], info)
    return rows


def read_all(config: Config) -> Sets:
    """The records of every data set; those to validate on held out where it has no ``valid`` file.

    Training records without a label of any task that needs labels are left out, or are unlabelled texts where a task
    needs none. An unlabelled text is left out if the same line of the same file is a record of another part already.
    What is "auto" in the configuration becomes what the training records say.

    Raises:
        FileNotFoundError, DataError: as :func:`read_records`; or nothing is left to train on or to validate.
    """
    train: dict[str, list[Record]] = {}
    held_out: dict[str, list[Record]] = {}
    unlabelled: dict[str, list[Record]] = {}
    notes: list[str] = []
    for name, data in config.sets.items():
        records, tokenizer = _read(_existing(config, name, "train"), config, True, name, notes, True)
        train[name] = records
        if data.tokenizer == "auto" and tokenizer is not None:
            config = _with_data(config, name, tokenizer=tokenizer)
    config = _settled(config, train, notes)
    for name, data in config.sets.items():
        _check_trainable(train[name], config, name)
        if data.valid is None:
            train[name], held_out[name] = _hold_out(train[name], data, config)
        every = train[name]
        own = config.tasks_of(name)
        asked = [task for task, settings in own.items() if not settings.rules.labels_itself] or list(own)
        train[name] = labelled(every, data.train, asked)
        if len(train[name]) < len(every):
            without = f"{data.train}: {len(every) - len(train[name]):,} records have no label of any task"
            if _label_themselves(config, name):
                kept = {id(record) for record in train[name]}
                unlabelled[name] = [record for record in every if id(record) not in kept]
                notes.append(f"{without} that needs some: they are texts without labels")
            else:
                notes.append(f"{without} and were left out")
        if data.limit:
            key = f"datasets.{name}.limit" if name else "data.limit"
            train[name] = _limited(train[name], data, key, config.seed)
    valid = {
        name: held_out[name]
        if data.valid is None
        else read_records(_existing(config, name, "valid"), config, True, name, notes, False)
        for name, data in config.sets.items()
    }
    test = read_test_sets(config, notes)
    for name, data in config.sets.items():
        if data.unlabelled is not None:
            others = {r.place for own in (train, unlabelled, held_out, valid, test) for r in own.get(name, ())}
            unlabelled[name] = [*unlabelled.get(name, ()), *_unlabelled(config, name, others, notes)]
    return Sets(config, train, valid, test, notes, unlabelled)


def _limited(records: list[Record], data: DataConfig, key: str, seed: int) -> list[Record]:
    """As many records as the data's limit, in a random order whose beginning a smaller limit has too.

    Raises:
        DataError: there are fewer.
    """
    if data.limit > len(records):
        held = "" if data.valid is not None else " (those that validate are held out first)"
        raise DataError(
            f"{data.train}: expected at least {key} = {data.limit:,} labelled records, got {len(records):,}{held}"
        )
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    return shuffled[: data.limit]


def _label_themselves(config: Config, dataset: str) -> dict[str, Any]:
    """The labels that a text without any has, of a data set's tasks."""
    return {name: True for name, task in config.tasks_of(dataset).items() if task.rules.labels_itself}


def _unlabelled(config: Config, dataset: str, others: set[str], notes: list[str]) -> list[Record]:
    """The records of a data set's unlabelled file but those from the same places as others; of the training file itself
    none may be left.

    Raises:
        DataError: none is left of another file.
    """
    path = _existing(config, dataset, "unlabelled")
    for part in ("train", "valid", "test"):  # one file may have two names
        other = getattr(config.sets[dataset], part)
        if other is not None and path.samefile(config.path(other)):
            path = config.path(other)
    again = path == config.path(config.sets[dataset].train)  # what there is to know of it has been said
    records = read_records(path, config, labelled=False, dataset=dataset, notes=None if again else notes)
    itself = _label_themselves(config, dataset)
    further = [dataclasses.replace(record, labels=dict(itself)) for record in records if record.place not in others]
    if not further and not again:
        raise DataError(
            f"{config.sets[dataset].unlabelled}: expected texts that are not trained on, validated on or tested on "
            "already, got none"
        )
    notes.append(f"{path.name}: {len(further):,} texts without labels")
    return further


def read_test_sets(config: Config, notes: list[str] | None = None) -> dict[str, list[Record]]:
    """The test records of the data sets that have some. Errors as :func:`read_records`."""
    return {
        name: read_records(_existing(config, name, "test"), config, True, name, notes, False)
        for name, data in config.sets.items()
        if data.test is not None
    }


def _existing(config: Config, dataset: str, part: str) -> Path:
    """The file of a part of a data set.

    Raises:
        FileNotFoundError: there is none; the message names the key.
    """
    path = config.path(getattr(config.sets[dataset], part))
    key = f"datasets.{dataset}.{part}" if dataset else f"data.{part}"
    if not path.exists():
        raise FileNotFoundError(f"{key}: there is no file {path}")
    if path.is_dir():
        raise DataError(f"{key}: expected a file, got the folder {path}")
    return path


def labelled(records: list[Record], where: str, tasks: Iterable[str]) -> list[Record]:
    """The records with a label of any of these tasks.

    Raises:
        DataError: there is none.
    """
    asked = list(tasks)
    kept = [record for record in records if any(record.labels.get(name) is not None for name in asked)]
    if not kept:
        raise DataError(f"{where}: no record has a label of any task")
    return kept


def _read(
    path: Path, config: Config, labelled: bool, dataset: str, notes: list[str] | None, complete: bool
) -> tuple[list[Record], Tokenizer | None]:
    """The records of a file, and the tokenizer of its texts: None where there is nothing to tell it from."""
    data = config.sets[dataset]
    form, _ = format_of(path, data.format)
    if not labelled and _has_a_text_a_line(path, data):
        rows = [Row(number, {data.tokens: line}) for number, line in enumerate(read_lines(path), 1)]
    else:
        columns = _columns(path, config, dataset, labelled) if form == "conll" else ()
        rows = list(read_rows(path, data.format, columns))
        if rows and form in TABLES:
            _check_columns(rows[0], config, dataset, labelled and complete, notes if labelled else None, path)
    numbers = [task.field or name for name, task in config.tasks_of(dataset).items() if task.rules.reads_numbers(task)]
    rows = with_points(rows, [*numbers, *_number_fields(config)])
    tokenizer = data.tokenizer if data.tokenizer != "auto" else _tokenizer_of(rows, config, dataset)
    changes = Source(0)
    records = []
    empty = 0
    for row in rows:
        try:
            record = _record(row, config, labelled, dataset, tokenizer or data.splits_by, changes)
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"{path}{row.where}: {error}") from None
        if record.tokens:
            records.append(dataclasses.replace(record, place=f"{path}{row.where}"))
        else:
            empty += 1
    if not records:
        raise DataError(f"{path}: expected at least one record, got none")
    if notes is not None:
        notes += [f"{path.name}: {empty:,} records without text were left out"] if empty else []
        for what, count in changes.counts.items():
            notes.append(f"{path.name}: {count:,} {what}{changes.examples[what]}")
    return records, tokenizer


def _has_a_text_a_line(path: Path, data: DataConfig) -> bool:
    """Whether a file of texts alone is plain text."""
    plain = path.name.lower().removesuffix(".gz").endswith(".txt") and format_of(path)[0] != "conll"
    return plain and data.format == "auto"


def _number_fields(config: Config) -> list[str]:
    """The further fields that hold numbers."""
    return [info.field or name for name, info in config.fields.items() if info.kind == "numbers"]


def _check_columns(row: Row, config: Config, dataset: str, complete: bool, notes: list[str] | None, path: Path) -> None:
    """That a table has the columns it needs, said of its header."""
    data = config.sets[dataset]
    where = f"{path}:1"
    how = f"(the file was read {format_of(path, data.format)[1]})"
    if config.model.words and row.values.get(text_field(row.values, data)) is None:
        raise DataError(
            f"{where}: expected a column {names_of_text(data)} with the text (data.tokens names it), got "
            f"{', '.join(row.values)} {how}"
        )
    for name, task in config.tasks_of(dataset).items():
        column = task.field or name
        references = getattr(task, "references", None)
        if complete and references is not None and references not in row.values:
            raise DataError(
                f"{where}: expected a column {references!r} (tasks.{name}.references names it), got "
                f"{', '.join(row.values)} {how}"
            )
        if column in row.values or task.rules.labels_itself:
            continue
        if complete:
            raise DataError(f"{where}: expected a column {column!r}, got {', '.join(row.values)} {how}")
        if notes is not None and not task.auxiliary:
            notes.append(f"{path.name}: has no column {column!r}: task {name!r} is not scored on it")


def _columns(path: Path, config: Config, dataset: str, labelled: bool = True) -> Sequence[str]:
    """The fields of CoNLL's columns: tokens in the first, and the tags of the only task that has some in the last."""
    data = config.sets[dataset]
    if data.columns and labelled:
        return data.columns
    count = count_columns(path)
    if data.columns and count > 1:
        return data.columns
    tagging = {
        task.field or name
        for name, task in config.tasks_of(dataset).items()
        if task.rules.aligned and not task.rules.labels_itself
    }
    if count <= 1:
        return [data.tokens]
    if len(tagging) != 1:
        names = ", ".join(sorted(tagging)) or "none"
        raise DataError(
            f"{path}:1: expected data.columns, the fields of its {count} columns: which has the tokens, and which the "
            f"tags ({names}) is not clear"
        )
    return [data.tokens, *[""] * (count - 2), tagging.pop()]


def _tokenizer_of(rows: Sequence[Row], config: Config, dataset: str) -> Tokenizer | None:
    """What texts that are strings are split by.

    Tags beside a text that is a string say how many tokens it has: by the rule that fits more texts. Where all records
    are lists of tokens it is the rule that would have made them, for the texts that are asked later: ``words`` where
    signs are tokens of their own more often than they hang on a word.
    """
    data = config.sets[dataset]
    strings = False
    fits: Counter[str] = Counter()
    lists: list[list[Any]] = []
    for row in rows:
        text = row.values.get(text_field(row.values, data))
        if isinstance(text, str):
            strings = True
            for count in _counts_of_tags(row, config, dataset):
                for tokenizer in ("whitespace", "words"):
                    fits[tokenizer] += len(places(text, tokenizer)) == count
                fits["tagged"] += 1
        elif isinstance(text, list):
            lists.append(text)
    if strings:
        return "whitespace" if fits["tagged"] > 0 and fits["whitespace"] >= fits["words"] else "words"
    tokens = [token for text in islice(lists, LISTS_TO_TRY) for token in text if isinstance(token, str)]
    if not tokens:
        return None
    signs = sum(not any(character.isalnum() for character in token) for token in tokens)
    hanging = sum(_HANGING.search(token) is not None and len(tokens_of(token, "words")) > 1 for token in tokens)
    return "words" if hanging < signs or hanging <= 0.01 * len(tokens) else "whitespace"


def _counts_of_tags(row: Row, config: Config, dataset: str) -> Iterator[int]:
    """How many tags, and values of further fields, stand beside a text: of each of them one for each token."""
    for name, task in config.tasks_of(dataset).items():
        value = row.values.get(task.field or name)
        count = None if is_missing(value) else task.rules.count_tags(value)
        if count is not None:
            yield count
    for name, info in config.fields.items():
        value = row.values.get(info.field or name)
        if isinstance(value, str | list) and not is_missing(value):
            yield len(value.split()) if isinstance(value, str) else len(value)


def _record(row: Row, config: Config, labelled: bool, dataset: str, tokenizer: Tokenizer, changes: Source) -> Record:
    """Of a row; one without tokens if its text is empty. ``changes`` counts what had to be changed."""
    data = config.sets[dataset]
    fields = {name: row.values.get(info.field or name) for name, info in config.fields.items()}
    for name, info in config.fields.items():
        if (info.field or name) in row.cells:
            fields[name] = _of_field(fields[name], info)
    record = read_record(row.values, fields, config, dataset, tokenizer)
    tokens, text = record.tokens, record.source
    if not tokens:
        return record
    source = dataclasses.replace(changes, length=len(tokens), values=row.values, cells=row.cells)
    if isinstance(text, str):
        source = dataclasses.replace(source, places=places(text, tokenizer), text=text)
    labels = {}
    for name, task in config.tasks_of(dataset).items() if labelled else ():
        if task.rules.labels_itself:
            labels[name] = True
            continue
        field_name = task.field or name
        label = row.values.get(field_name)
        if is_missing(label):
            labels[name] = task.rules.when_missing(task, len(tokens))
            continue
        try:
            if field_name in row.cells:
                label = task.rules.of_cell(label, task)
            label = task.rules.of_value(label, task, source)
            if is_missing(label):  # a cell with nan
                labels[name] = None
                continue
        except DataError as error:
            raise DataError(f"field {field_name!r}: {error}") from None
        try:
            task.rules.check_label(field_name, label, task, len(tokens))
        except DataError as error:
            split = f" (the text is split by {tokenizer!r})" if source.places is not None and task.rules.aligned else ""
            raise DataError(f"{error}{split}") from None
        labels[name] = label
    kept_by = row.values.get(data.holdout_field) if data.holdout_field is not None else None
    held_out = is_label(kept_by) and as_name(kept_by) in data.holdout_values
    return dataclasses.replace(record, labels=labels, held_out=held_out)


def _of_field(cell: str | None, info: FieldConfig) -> Any:
    if cell is None:
        return None
    parts = cell.split()
    return parts if info.kind == "category" else [number_of(part) for part in parts]


def _hold_out(records: list[Record], data: DataConfig, config: Config) -> tuple[list[Record], list[Record]]:
    if data.holdout_field is not None:
        held_out = [record for record in records if record.held_out]
        kept = [record for record in records if not record.held_out]
    else:
        strata = [
            frozenset(
                (name, stratum)
                for name, label in record.labels.items()
                if not config.tasks[name].rules.labels_itself
                for stratum in config.tasks[name].rules.strata(label)
            )
            for record in records
        ]
        chosen = set(stratified(strata, max(1, round(data.holdout * len(records))), config.seed))
        held_out = [record for i, record in enumerate(records) if i in chosen]
        kept = [record for i, record in enumerate(records) if i not in chosen]
    if not held_out or not kept:
        by = "" if data.holdout_field is None else f" by {data.holdout_field!r} = {' or '.join(data.holdout_values)}"
        counts = f"{len(kept)} and {len(held_out)}"
        raise DataError(f"{data.train}: expected records to train on and others to hold out{by}, got {counts}")
    return kept, held_out


def _with_data(config: Config, dataset: str, **changes: Any) -> Config:
    """The configuration with some settings of a data set changed."""
    data = dataclasses.replace(config.sets[dataset], **changes)
    if config.data is not None:
        return dataclasses.replace(config, data=data)
    return dataclasses.replace(config, datasets={**config.datasets, dataset: data})


def _settled(config: Config, train: Mapping[str, Sequence[Record]], notes: list[str]) -> Config:
    """The configuration with what each task's kind sees in the labels of the training records."""
    tasks = dict(config.tasks)
    for dataset in config.sets:
        for name, task in config.tasks_of(dataset).items():
            values = [record.labels[name] for record in train[dataset] if record.labels.get(name) is not None]
            tasks[name] = task.rules.settled(name, task, values, notes)
    return dataclasses.replace(config, tasks=tasks)


def _check_trainable(records: list[Record], config: Config, dataset: str) -> None:
    """That all labels can be trained on.

    Raises:
        DataError: one cannot.
    """
    for name, task in config.tasks_of(dataset).items():
        for record in records:
            if record.labels.get(name) is not None:
                task.rules.check_trainable(record.labels[name], task, f"{record.place}: field {task.field or name!r}")
