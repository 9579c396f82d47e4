"""What kinds have in common whose labels are sequences, of which several may be right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pymtl.serving.values import check_text, is_missing, shown
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import Kind, Source


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    # The field of further right answers, if several may be right: a list of them, in a table with | between. Scores go
    # by the nearest; the task's own field is right too, and is what is trained on
    references: str | None = None


@dataclass(frozen=True)
class RightAnswers:
    """A label: the answer that is trained on, and further ones that are right; whether it is a text in the records."""

    tokens: tuple[str, ...]
    further: tuple[tuple[str, ...], ...] = ()
    is_text: bool = False

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        yield self.tokens
        yield from self.further


class SequenceKind(Kind):
    """A kind of such labels."""

    def sequence_of(self, answer: Any, task: Any) -> tuple[str, ...]:
        """The tokens of an answer as the records have it.

        Raises:
            DataError: it is none.
        """
        raise NotImplementedError

    def in_form(self, tokens: Sequence[str], task: Any) -> Any:
        """An answer as the records have it, of its tokens."""
        return list(tokens)

    def of_value(self, value: Any, task: Any, source: Source) -> RightAnswers:
        first = self.sequence_of(value, task)
        try:
            others = [self.sequence_of(answer, task) for answer in self._references(task, source)]
            check_text(str(task.references), ["".join(other) for other in others])
        except DataError as error:
            raise DataError(f"its references in {task.references!r}: {error}") from None
        distinct = tuple(dict.fromkeys(other for other in others if other != first))
        return RightAnswers(first, distinct, isinstance(value, str))

    def _references(self, task: Any, source: Source) -> list[Any]:
        """The right answers that a record names besides, in its own form."""
        given = None if task.references is None else source.values.get(task.references)
        if is_missing(given):
            return []
        if isinstance(given, str) and task.references in source.cells:
            return [self.of_cell(part, task) for part in given.split("|") if part.strip()]
        if not isinstance(given, list):
            raise DataError(f"expected a list of answers, got {shown(given)}")
        if any(map(is_missing, given)):
            raise DataError("expected answers, got an empty one")
        return given

    def settled(self, name: str, task: Any, values: Sequence[RightAnswers], notes: list[str]) -> Any:
        if task.references is not None and not any(label.further for label in values):
            notes.append(f"{name}: no record has another right answer in {task.references!r}")
        return task

    def as_cell(self, value: Any) -> str:
        return value if isinstance(value, str) else " ".join(value)

    def check_label(self, field: str, label: RightAnswers, task: Any, length: int) -> None:
        check_text(field, label.tokens)

    def strata(self, label: Any) -> tuple[str, ...]:
        return ()

    def parts(self, label: RightAnswers | None) -> tuple[str, ...]:
        return () if label is None else label.tokens

    def in_report(self, label: RightAnswers, task: Any) -> Any:
        answers = [self.in_form(answer, task) for answer in label]
        return answers if label.further else answers[0]

    def is_right(self, truth: RightAnswers, guess: Any, task: Any) -> bool:
        return tuple(guess) in set(truth)


def exact_matches(truth: Sequence[RightAnswers], guess: Sequence[tuple[str, ...]]) -> float:
    """The share of guesses that are one of the right answers."""
    return sum(own in set(right) for right, own in zip(truth, guess)) / len(truth)


def error_rate(truth: Sequence[Sequence[Sequence[str]]], guess: Sequence[Sequence[str]]) -> float:
    """The edit distance of each guess to the nearest of its right answers, over that one's length, summed over all."""
    from rapidfuzz.distance import Levenshtein

    distance, length = 0, 0
    for right, own in zip(truth, guess):
        nearest, size = min(((Levenshtein.distance(one, own), len(one)) for one in right), key=lambda pair: pair[0])
        distance, length = distance + nearest, length + size
    return distance / max(length, 1)
