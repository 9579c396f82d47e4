"""A tag of each token."""

from __future__ import annotations

import ast
import dataclasses
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymtl.crf import CRF
from pymtl.heads import CRFHead, Head, TokenClassificationHead
from pymtl.serving import tags as schemes
from pymtl.serving.answers import NO_LABEL, Scored, TaggingAnswers, are_of_spans, scheme_of
from pymtl.serving.tokenizing import Place
from pymtl.serving.values import as_name, shown
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import (
    Column,
    CrossEntropyOptions,
    Kind,
    Learned,
    MissingOptions,
    Requirement,
    Source,
    confusion_of,
    rows_of_classes,
    weights_fit,
)


@dataclass(frozen=True, kw_only=True)
class TaggingOptions(CrossEntropyOptions, MissingOptions):
    decoder: Literal["softmax", "crf"] = "softmax"  # each tag by itself, or the best sequence of tags
    # Of tags of spans: iob2 is another name of bio, bioes of iobes; "auto": as seen; "none": the tags are not of spans
    scheme: Literal["auto", "bio", "iob2", "iobes", "bioes", "bilou", "iob1", "none"] = "auto"
    constrained: bool = False  # whether a crf keeps to sequences that the scheme allows
    bio: bool = False  # the older way to write scheme = "bio" with constrained = true


class Tagging(TaggingAnswers, Kind):
    """Span F1 where the tags are of spans, else the accuracy of tokens."""

    Options = TaggingOptions
    scores = ("f1", "accuracy")
    aligned = True
    is_discrete = True
    is_exact = True
    has_reference = True

    looked_for = 1

    def starting(self, column: Column) -> list[str]:
        tags = [value for value in map(self._tags, column.values) if all(map(self.is_element, value))]
        lines = ['decoder = "crf"']
        if not tags or schemes.scheme_of(tags) is not None:
            lines.append("constrained = true         # only sequences that the tags' scheme allows")
        return lines

    def _tags(self, value: Any) -> Any:
        return self.of_cell(value, None) if isinstance(value, str) else value

    def suits(self, column: Column) -> str | None:
        values = list(map(self._tags, column.values))
        if not all(isinstance(value, list) for value in values) or not any(values):
            return None
        if any(isinstance(item, dict | list) for value in values for item in value):
            return "spans with their places in the text"
        for lengths in (column.lengths, column.words):
            whole = all(len(value) == length for value, length in zip(values, lengths))
            if whole and any(length > 1 for length in lengths):
                return "a tag for each token"
        return None

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        crf = task.decoder == "crf"
        return [
            (not task.bio or crf, "bio", "decoder = 'crf' with it"),
            (not task.bio or task.scheme in ("auto", "bio", "iob2"), "scheme", "'bio' with bio = true"),
            (not task.constrained or crf, "constrained", "decoder = 'crf' with it"),
            (not task.constrained or task.scheme != "none", "scheme", "a scheme of spans beside constrained = true"),
            (not crf or task.label_smoothing == 0, "label_smoothing", "0 for a crf"),
            (not crf or task.class_weights == "none", "class_weights", "'none' for a crf"),
            weights_fit(task),
        ]

    def of_cell(self, cell: str, task: Any) -> Any:
        spans = _spans_in(cell)
        return cell.split() if spans is None else spans

    def count_tags(self, value: Any) -> int | None:
        tags = self._tags(value)
        whole = isinstance(tags, list) and len(tags) > 0 and not any(isinstance(tag, dict | list) for tag in tags)
        return len(tags) if whole else None

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[str]:
        """With what every path through partly known tags needs, where the scheme binds paths: the tags that begin and
        end spans of each type."""
        labels = super().vocabulary(name, values, task)
        scheme = scheme_of(task, labels) if is_constrained(task) else None
        letters = {"bio": "B", "iob1": "I", "iobes": "BE", "bilou": "BL"}.get(scheme or "", "")
        missing = set()
        for label in labels:
            letter, kind = schemes.split(label)
            if letter in ("B", "I", "E", "L"):
                missing |= {f"{each}-{kind}" if kind else each for each in letters} - set(labels)
        return sorted({*labels, *missing}) if missing else labels

    def as_cell(self, value: Any) -> str:
        return " ".join("" if tag is None else as_name(tag) for tag in value)

    def of_value(self, value: Any, task: Any, source: Source) -> Any:
        """Tags of each token as they are; tags of spans, ``{"start", "end", "label"}`` or ``[start, end, label]`` with
        their characters' places in the text."""
        if isinstance(value, str):
            value = self.of_cell(value, task)
        if not isinstance(value, list):
            return value
        spans = [item for item in value if isinstance(item, dict | list)]
        if not spans and (value or source.places is None):
            return (
                [None if tag is None else tag if isinstance(tag, str) else as_name(tag) for tag in value]
                if all(map(self.is_element, value))
                else value
            )
        if source.places is None:
            raise DataError("spans with the places of their characters need a text that is a string")
        return _tags_of_spans([_span(item) for item in value], source)

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        fits = isinstance(label, list) and len(label) == length and all(map(self.is_element, label))
        return fits, f"a list of {length} strings (or null), one a token"

    def is_element(self, value: Any) -> bool:
        return value is None or (super().is_element(value) and value != "")

    def when_missing(self, task: Any, length: int) -> list[str] | None:
        return [schemes.OUTSIDE] * length if task.missing == "none" else None

    def settled(self, name: str, task: Any, values: Sequence[Any], notes: list[str]) -> Any:
        if task.scheme in schemes.ALIASES:
            task = dataclasses.replace(task, scheme=schemes.ALIASES[task.scheme])
        if task.scheme == "auto":
            found = "bio" if task.bio else schemes.scheme_of(values)
            if found is None and task.constrained:
                tags = [tag for value in values for tag in self.parts(value)]
                found = max(schemes.SCHEMES, key=lambda s: sum(schemes.belongs_to(tag, s) for tag in tags))
                strangers = [tag for tag in tags if not schemes.belongs_to(tag, found)]
                if len(strangers) > 0.1 * len(tags):  # else a few are mistyped, and check_trainable names one
                    got = strangers[0] if strangers else schemes.OUTSIDE
                    raise DataError(
                        f"task {name!r}: expected tags of spans with constrained = true, got {got!r}: leave "
                        "constrained out for other tags"
                    )
            task = dataclasses.replace(task, scheme=found or "none")
        if task.scheme != "none":
            notes.append(f"{name}: tags of spans, scheme {task.scheme}")
        return task

    def check_trainable(self, label: Sequence[Any], task: Any, at: str) -> None:
        if task.scheme == "none":
            return
        for place, tag in enumerate(label, 1):
            if tag is not None and not schemes.belongs_to(tag, task.scheme):
                raise DataError(f"{at}: expected tags of the scheme {task.scheme}, got {tag!r} at token {place}")
        fault = schemes.first_fault(label, task.scheme) if is_constrained(task) else None
        if fault is not None:
            place = "" if fault == len(label) else f"{label[fault]!r} at token {fault + 1}"
            if fault == len(label):
                what = f"the sentence ends behind {label[-1]!r}"
            elif fault == 0:
                what = f"{place} begins the sentence"
            else:
                what = f"{place} follows {label[fault - 1]!r}"
            asked = "bio = true" if task.bio else f"constrained = true with scheme = {task.scheme!r}"
            raise DataError(f"{at}: {what}, which {asked} forbids")

    def strata(self, label: Any) -> list[str]:
        return sorted({schemes.split(tag)[1] or tag for tag in self.parts(label)} - {schemes.OUTSIDE})

    def target(self, label: Any, encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor([encoding.get(tag, NO_LABEL) for tag in label])

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> Head:
        count = len(learned.labels)
        if task.decoder == "crf":
            return CRFHead(count, reads=self.reads(task), **_constraints(task, learned.labels))
        return TokenClassificationHead(count, self.cross_entropy(task, learned), reads=self.reads(task))

    def crf(self, task: Any, labels: Sequence[str]) -> CRF | None:
        if task.decoder != "crf":
            return None
        return CRF(len(labels), batch_first=True, **_constraints(task, labels))

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        if scheme_of(scored.task, scored.labels) is not None:
            from seqeval.metrics import f1_score

            return {"f1": float(f1_score(*_as_bio(truth, guess), zero_division=0))}
        from sklearn import metrics as sk

        flat = _known(truth, guess)
        return {"accuracy": float(sk.accuracy_score(*map(list, zip(*flat)))) if flat else 0.0}

    def is_right(self, truth: Sequence[Any], guess: Sequence[Any], task: Any) -> bool:
        """Whether all tags are the same; of a truth in another scheme of spans, whether all spans are."""
        if all(a is None or a == b for a, b in zip(truth, guess)):
            return True
        scheme = None if task.scheme in ("auto", "none") else schemes.ALIASES.get(task.scheme, task.scheme)
        known = [tag for tag in truth if tag is not None]
        foreign = scheme is not None and any(not schemes.belongs_to(tag, scheme) for tag in known)
        if not foreign or not are_of_spans([*known, *guess]):
            return False
        (expected,), (found,) = _as_bio([truth], [guess])
        return expected == found

    def unknown(self, label: Any, encoding: Mapping[str, int]) -> list[str]:
        """Of tags of spans those whose type training has not seen: other letters are of another scheme."""
        found = super().unknown(label, encoding)
        if not found or schemes.scheme_of_labels(encoding) is None:
            return found
        types = {schemes.split(tag)[1] for tag in encoding}
        return [tag for tag in found if not (are_of_spans([tag]) and schemes.split(tag)[1] in types)]

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        if scheme_of(scored.task, scored.labels) is not None:
            from seqeval.metrics import classification_report

            rows = _as_bio(truth, guess)
            if not any(tag != schemes.OUTSIDE for each in rows for tags in each for tag in tags):
                return {}
            report = classification_report(*rows, output_dict=True, zero_division=0)
            averages = ("micro avg", "macro avg", "weighted avg")
            return {
                "classes": [
                    {
                        "label": label,
                        "precision": float(row["precision"]),
                        "recall": float(row["recall"]),
                        "f1": float(row["f1-score"]),
                        "support": int(row["support"]),
                    }
                    for label, row in report.items()
                    if label not in averages
                ]
            }
        flat = _known(truth, guess)
        names = [a for a, _ in flat], [b for _, b in flat]
        return {"classes": rows_of_classes(*names), "confusion": confusion_of(*names)} if flat else {}


def _spans_in(cell: str) -> list[Any] | None:
    """The spans that a cell holds as JSON, or as Python writes a list; None if it holds something else."""
    if not cell.lstrip().startswith(("[{", "[[", "[]", "[(")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return [list(item) if isinstance(item, tuple) else item for item in found] if isinstance(found, list) else None
    return None


def is_constrained(task: Any) -> bool:
    """Whether only sequences of tags that the scheme allows are decoded."""
    return task.bio or task.constrained


def _constraints(task: Any, labels: Sequence[str]) -> dict[str, Any]:
    """What binds a CRF to the scheme, if the task asks for it."""
    scheme = scheme_of(task, labels) if is_constrained(task) else None
    return {} if scheme is None else {"labels": labels, "scheme": scheme}


def _known(truth: Sequence[Any], guess: Sequence[Any]) -> list[tuple[str, str]]:
    """True and predicted tag of each token that has a label."""
    return [(a, b) for tags, others in zip(truth, guess) for a, b in zip(tags, others) if a is not None]


def _as_bio(truth: Sequence[Any], guess: Sequence[Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Both in the one scheme that is scored, without what has no label."""
    known = [[schemes.OUTSIDE if tag is None else tag for tag in tags] for tags in truth]
    found = [
        [schemes.OUTSIDE if tag is None else other for tag, other in zip(tags, others, strict=True)]
        for tags, others in zip(truth, guess, strict=True)
    ]
    return tuple([schemes.tags_of(schemes.spans_of(tags), len(tags)) for tags in each] for each in (known, found))


def _span(item: Any) -> tuple[int, int, str]:
    """Start, end and label of a span as annotation tools write it."""
    if isinstance(item, dict):
        labels = item.get("labels")
        label = labels[0] if isinstance(labels, list) and len(labels) == 1 else item.get("label")
        parts = [item.get(key, item.get(f"{key}_offset")) for key in ("start", "end")] + [label]
    else:
        parts = item if isinstance(item, list) else []
    whole = len(parts) == 3 and all(type(part) is int for part in parts[:2]) and isinstance(parts[2], str)
    if not whole or not parts[2]:
        raise DataError(f'expected spans {{"start": 0, "end": 4, "label": "x"}} or [0, 4, "x"], got {shown(item)}')
    return tuple(parts)


def _tags_of_spans(spans: Sequence[tuple[int, int, str]], source: Source) -> list[str]:
    """Tags in the scheme ``bio``; a span that begins or ends within a token takes the whole token."""
    found: list[schemes.Span] = []
    before: tuple[int, int, str] | None = None
    starts, ends = [first for first, _ in source.places], [last for _, last in source.places]
    for start, end, label in sorted(set(spans)):
        if not 0 <= start < end <= len(source.text):
            size = len(source.text)
            raise DataError(f"expected spans within the text of {size} characters, got {start} to {end} ({label})")
        if before is not None and start < before[1]:
            raise DataError(
                f"expected spans that do not overlap, got {before[0]} to {before[1]} ({before[2]}) and {start} to "
                f"{end} ({label}): keep one of them"
            )
        before = (start, end, label)
        inside = range(bisect_right(ends, start), bisect_left(starts, end))
        if not inside:
            source.count("spans of spaces alone were left out")
            continue
        if found and inside[0] <= found[-1][2]:
            source.count("spans were left out, which begin within the last token of another")
            continue
        if not _is_whole(inside, source.places, start, end):
            whole = source.text[source.places[inside[0]][0] : source.places[inside[-1]][1]]
            example = f"{source.text[start:end]!r} to {whole!r}"
            source.count("spans begin or end within a token and were widened to it", example)
        found.append((label, inside[0], inside[-1]))
    return schemes.tags_of(found, source.length)


def _is_whole(inside: Sequence[int], places: Sequence[Place], start: int, end: int) -> bool:
    return places[inside[0]][0] >= start and places[inside[-1]][1] <= end
