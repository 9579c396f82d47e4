"""Records: what a configuration reads of a text.

``config`` is a run's configuration, of which these are read: ``sets``, each with ``tokens``, ``splits_by`` and
``lowercase``; ``fields``, each with ``kind``, ``field`` and ``size``; and ``model.words``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import DataError
from .tokenizing import Tokenizer, tokens_of
from .values import check_text, has_numbers, shown


@dataclass(frozen=True)
class Record:
    """One text: its tokens, and for each task of its data set its label, or None where it has none.

    ``fields`` are the further fields of its tokens; ``held_out`` tells whether the configuration's ``holdout_field``
    puts it among the validation records; ``source`` is the text, or the list of tokens, as the file has it. A record of
    features alone has as many empty tokens.
    """

    tokens: list[str]
    labels: dict[str, Any]
    fields: dict[str, list[Any]] = field(default_factory=dict)
    held_out: bool = False
    source: str | list[str] | None = field(default=None, compare=False)
    place: str = field(default="", compare=False)  # the file and the line it is from


def text_record(text: str, config: Any, dataset: str = "") -> Record:
    """The record of a text alone."""
    data = config.sets[dataset]
    tokens = tokens_of(text, data.splits_by)
    return Record([t.lower() for t in tokens] if data.lowercase else tokens, {}, source=text)


def unlabelled_record(values: Mapping[str, Any], config: Any, dataset: str = "") -> Record:
    """The record of a JSON object, whose labels are not read.

    Raises:
        DataError: a field does not fit.
    """
    given = {name: values.get(info.field or name) for name, info in config.fields.items()}
    return read_record(values, given, config, dataset, config.sets[dataset].splits_by)


def read_record(
    values: Mapping[str, Any], fields: Mapping[str, Any], config: Any, dataset: str, tokenizer: Tokenizer
) -> Record:
    """The record of a row, without labels; without tokens if its text is empty. ``fields``: those of its tokens.

    Raises:
        DataError: a field does not fit.
    """
    data = config.sets[dataset]
    text: Any = None
    if config.model.words:
        text = values.get(text_field(values, data))
        tokens = _tokens(text, values, data, tokenizer)
        if not tokens:
            return Record([], {}, source=text)
    else:
        first = next(iter(config.fields))
        if not isinstance(fields[first], list) or not fields[first]:
            name = config.fields[first].field or first
            raise DataError(f"field {name!r}: expected a list of at least one token's, got {shown(fields[first])}")
        tokens = [""] * len(fields[first])
    for name, info in config.fields.items():
        _check_field(info.field or name, fields[name], info, len(tokens))
    return Record(tokens, {}, dict(fields), source=text)


def given_tokens(record: Record, data: Any) -> list[str]:
    """A record's tokens before ``lowercase``."""
    if isinstance(record.source, str):
        return tokens_of(record.source, data.splits_by)
    return record.tokens if record.source is None else record.source


def text_field(values: Mapping[str, Any], data: Any) -> str:
    """The field of the text or of the tokens: ``text`` where records have that and no ``tokens``, or tokens of another
    tool, which are objects."""
    own = values.get("tokens")
    foreign = isinstance(own, list) and len(own) > 0 and isinstance(own[0], dict)
    by_default = data.tokens == "tokens" and ("tokens" not in values or foreign)
    return "text" if by_default and "text" in values else data.tokens


def names_of_text(data: Any) -> str:
    """What the field of the text may be called."""
    return "'tokens' or 'text'" if data.tokens == "tokens" else repr(data.tokens)


def _tokens(text: Any, values: Mapping[str, Any], data: Any, tokenizer: Tokenizer) -> list[str]:
    if text_field(values, data) not in values:
        got = ", ".join(values) or "none"
        raise DataError(
            f"expected a field {names_of_text(data)}, a text or a list of tokens (data.tokens names it), got {got}"
        )
    if text is None:
        return []
    if isinstance(text, str):
        tokens = tokens_of(text, tokenizer)
    elif isinstance(text, list) and all(isinstance(token, str) for token in text):
        tokens = text
    else:
        raise DataError(f"field {data.tokens!r}: expected a text or a list of strings, got {text!r}")
    check_text(data.tokens, tokens)
    return [t.lower() for t in tokens] if data.lowercase else tokens


def _check_field(field: str, values: Any, info: Any, length: int) -> None:
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
