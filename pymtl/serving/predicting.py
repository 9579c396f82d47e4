"""A model that answers texts; what runs it is for the class that derives from :class:`Answering` to say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from .answers import Scored, details_of
from .errors import DataError
from .generation import Search
from .records import Record, given_tokens, text_field, text_record, unlabelled_record
from .tokenizing import Place, places

# A text, its tokens, or a record with the fields that training read.
Input = str | Sequence[str] | Mapping[str, Any]
Answer = dict[str, Any]
MOST_UNKNOWN = 8  # unknown tokens that are printed with an answer


def input_of(line: str, number: int, as_record: bool) -> Input:
    """What a line of input says: a text, or a record in JSON. An empty line is an empty text.

    Args:
        line: as it was read, where ``surrogateescape`` stands for bytes that are not UTF-8.
        number: of the line, for errors.

    Raises:
        DataError: it is no JSON object.
    """
    if not as_record:
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"input {number}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"input {number}: expected a JSON object, got {type(record).__name__}")
    return record


class Answering:
    """A trained model that answers.

    Attributes:
        tasks: each task's settings, as the configuration has them.
        labels: each task's labels, in the order of its logits; of a task of numbers their means and standard
            deviations in training.
        vocabulary: the tokens that training has seen, and the labels.
        config: the whole configuration.
    """

    config: Any
    vocabulary: Any
    _uncertainty: Mapping[str, Any]
    _known: frozenset[str]  # the tokens of the vocabulary

    @property
    def tasks(self) -> dict[str, Any]:
        return self.config.main_tasks

    @property
    def labels(self) -> dict[str, list[Any]]:
        return {name: labels for name, labels in self.vocabulary.labels.items() if name in self.tasks}

    def answer_batch(
        self,
        records: Sequence[Record],
        dataset: str,
        search: Search | None,
        distributions: bool,
        numbers: Sequence[int],
    ) -> list[Answer]:
        """What the model says of some records, which run together. ``numbers``: theirs, by which samples are drawn."""
        raise NotImplementedError

    @overload
    def predict(
        self,
        inputs: str | Mapping[str, Any],
        batch_size: int = 64,
        beam_size: int | None = None,
        distributions: bool = True,
        first: int = 1,
        search: Search | None = None,
    ) -> Answer: ...
    @overload
    def predict(
        self,
        inputs: Sequence[Input],
        batch_size: int = 64,
        beam_size: int | None = None,
        distributions: bool = True,
        first: int = 1,
        search: Search | None = None,
    ) -> list[Answer]: ...
    def predict(
        self,
        inputs: str | Mapping[str, Any] | Sequence[Input],
        batch_size: int = 64,
        beam_size: int | None = None,
        distributions: bool = True,
        first: int = 1,
        search: Search | None = None,
    ) -> Answer | list[Answer]:
        """What the model says of some texts.

        Args:
            inputs: a list of texts, of lists of tokens, or of records with the fields that training read; or one text
                or record by itself.
            batch_size: how many run at a time, ordered by length. The answers do not depend on it.
            beam_size: how many hypotheses are kept in the search for CTC's labels and for generated answers; 1 takes
                the likeliest at each step. None: as the task's configuration says, of CTC 1.
            distributions: whether to say how probable all labels are.
            first: the number of the first input: errors name it, and samples are drawn by it and the seed.
            search: how answers are looked for, or drawn, in the place of ``beam_size``.

        Returns:
            A dictionary for each input, in the order of the inputs (of a single one itself):

            - ``tokens``: as they were given, or as the text was split
            - ``unknown_tokens``: those that training has not seen
            - ``<task>``: the answer, in the form of the labels in the data; an ordered class is the middle one of its
              distribution, which need not be the likeliest
            - ``<task>/probability``: of the answer; of tags and of CTC's labels only with ``distributions``
            - ``<task>/ended``: of a generated answer, whether it ended, or was cut off at the longest that it may be
            - ``<task>/nbest``: of generated answers, if several are asked for: of each ``answer``, ``probability``,
              ``score`` and ``ended``; the best first, or samples as they were drawn
            - ``<task>/written``, ``<task>/attention``: of generated answers, the tokens as they were written, and how
              much each of them, and the end, has read of each token of the text. Only with ``distributions``
            - ``<task>/probabilities``: of each label by name; of tags, of each token's tag. Only with ``distributions``
            - ``<task>/split``: the tokens that the answer is of, where the task's data set splits texts in another way
              than the first
            - ``<task>/uncertainty``: of numbers, the root mean squared error in validation, in the data's units
            - ``<task>/spans``: of tags of spans, ``start`` and ``end`` of each in the text (a list's tokens with a
              space between them), ``label``, ``text`` and ``probability``

            An input without a token gives no tokens and no answers.

        Raises:
            TypeError: an input, or ``search``, is of another type.
            DataError: a record lacks a field, or one does not fit; the message names it.
        """
        if isinstance(inputs, str | Mapping):
            return self.predict([inputs], batch_size, beam_size, distributions, first, search)[0]
        if not isinstance(inputs, Iterable):
            raise TypeError(f"inputs: expected a text, a record or a list of them, got {type(inputs).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a number above 0, got {batch_size}")
        # Not by its class: pymtl and pymtl_runtime have one each.
        if search is not None and not hasattr(search, "with_beam"):
            raise TypeError(f"search: expected a Search, as pymtl.Search(beam_size=5), got {type(search).__name__}")
        if beam_size is not None:
            if search is not None:
                raise ValueError(f"beam_size: expected none beside search, which has its own, got {beam_size}")
            search = Search(beam_size=beam_size)
        answers: list[Answer] = []
        work: dict[str, list[tuple[int, Record]]] = {dataset: [] for dataset in self.config.sets}
        for index, given in enumerate(inputs):
            records = self._records(given, f"input {first + index}")
            with_tokens = {name: record for name, record in records.items() if record.tokens}
            dataset, record = next(iter((with_tokens or records).items()))
            tokens = given_tokens(record, self.config.sets[dataset])
            answers.append({"tokens": tokens})
            if with_tokens:
                unknown = [t for t, read in zip(tokens, record.tokens) if read not in self._known]
                answers[-1]["unknown_tokens"] = unknown if self.config.model.words else []
                for name, each in with_tokens.items():
                    work[name].append((index, each))
        for dataset, own in work.items():
            numbers = [first + index for index, _ in own]
            found = self.predict_records(
                [record for _, record in own], dataset, batch_size, search, distributions, numbers
            )
            for (index, record), prediction in zip(own, found):
                tokens = given_tokens(record, self.config.sets[dataset])
                text, where = self._located(record, tokens, dataset)
                answer = self._with_places(prediction, text, where)
                if tokens != answers[index]["tokens"]:  # its data set splits texts in another way
                    answer |= {f"{name}/split": tokens for name in self.tasks if name in prediction}
                answers[index] |= answer
        return answers

    def predict_records(
        self,
        records: Sequence[Record],
        dataset: str = "",
        batch_size: int = 64,
        search: Search | None = None,
        distributions: bool = True,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """What the model says of a data set's records, as training reads them; of each task that it has. ``numbers``:
        of the records, by which samples are drawn; by default from 0 on."""
        answers: list[Answer] = [{} for _ in records]
        order = sorted(range(len(records)), key=lambda i: len(records[i].tokens))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            own = part if numbers is None else [numbers[i] for i in part]
            found = self.answer_batch([records[i] for i in part], dataset, search, distributions, own)
            for index, prediction in zip(part, found):
                answers[index] = prediction
        return answers

    def records_to_run(self, inputs: Sequence[Input], dataset: str) -> list[Record]:
        """The records of some texts, all of which are to be in one batch.

        Raises:
            TypeError: the inputs are no list.
            DataError: there is none, one has no token, or ``dataset`` is unknown.
        """
        if isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs: expected a list of texts or records, got {type(inputs).__name__}")
        if dataset not in self.config.sets:
            raise DataError(f"dataset: expected one of {list(self.config.sets)}, got {dataset!r}")
        records = [self.record_of(given, f"input {number}", dataset) for number, given in enumerate(inputs, 1)]
        if not records:
            raise DataError("inputs: expected at least one, got none")
        return records

    def record_of(self, given: Input, where: str, dataset: str) -> Record:
        """The record of one text of a data set.

        Raises:
            TypeError: it is of another type.
            DataError: a field does not fit, or there is no token; ``where`` begins the message.
        """
        record = self.record_or_none(given, where, dataset)
        if record is None:
            raise DataError(f"{where}: expected at least one token, got none")
        return record

    def record_or_none(self, given: Input, where: str, dataset: str) -> Record | None:
        """As :meth:`record_of`; None where there is no token."""
        records = self._records(given, where)
        if dataset not in records:
            expected = self.config.sets[dataset].tokens
            raise DataError(f"{where}: expected a record of the data set {dataset!r}, with its {expected!r}")
        return records[dataset] if records[dataset].tokens else None

    def _records(self, given: Input, where: str) -> dict[str, Record]:
        """The input as each data set's training read it. Of several data sets those count whose text a record has."""
        itself = {name: True for name, task in self.config.main_tasks.items() if task.rules.labels_itself}
        if isinstance(given, bytes):
            raise TypeError(f"{where}: expected a text, a list of tokens or a record, got bytes: decode them first")
        is_blank = isinstance(given, str) and not given.strip()  # which has no tokens, and so no fields
        if isinstance(given, str | Sequence) and self.config.fields and not is_blank:
            raise DataError(f"{where}: expected a record with the fields {', '.join(self.config.fields)}, got a text")
        if isinstance(given, str):
            records = {name: text_record(given, self.config, name) for name in self.config.sets}
        elif isinstance(given, Sequence | Mapping):
            try:
                records = {
                    name: unlabelled_record(
                        given if isinstance(given, Mapping) else {data.tokens: list(given)}, self.config, name
                    )
                    for name, data in self.config.sets.items()
                    if not isinstance(given, Mapping) or name in self._sets_of(given)
                }
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        else:
            raise TypeError(f"{where}: expected a text, a list of tokens or a record, got {type(given).__name__}")
        for record in records.values():
            record.labels.update(itself)
        return records

    def _sets_of(self, given: Mapping[str, Any]) -> list[str]:
        """The data sets whose text a record has; all, if it has none."""
        known = [name for name, data in self.config.sets.items() if text_field(given, data) in given]
        return known or list(self.config.sets)

    def _located(self, record: Record, tokens: Sequence[str], dataset: str) -> tuple[str, list[Place]]:
        """The text, and where its tokens stand in it."""
        if isinstance(record.source, str):
            return record.source, places(record.source, self.config.sets[dataset].splits_by)
        found, start = [], 0
        for token in tokens:
            found.append((start, start + len(token)))
            start += len(token) + 1
        return " ".join(tokens), found

    def _with_places(self, prediction: Answer, text: str, found: list[Place]) -> Answer:
        """A prediction, with what it says of the text."""
        for name, task in self.tasks.items():
            if name in prediction:
                details, scored = details_of(name, prediction), Scored(task, self.labels.get(name, []))
                more = task.rules.in_text(prediction[name], details, scored, text, found)
                if name in self._uncertainty:
                    more["uncertainty"] = self._uncertainty[name]
                prediction |= {f"{name}/{key}": value for key, value in more.items()}
        return prediction


def described(answer: Answer, model: Answering) -> list[str]:
    """An answer for a person to read: a line for each task, and one for words that training has not seen."""
    lines = []
    for name, task in model.tasks.items():
        if name in answer:  # else it is of another data set
            details = details_of(name, answer)
            tokens = details.get("split", answer["tokens"])
            lines.append(f"{name}: {task.rules.describe(answer[name], details, tokens, task)}")
    unknown = answer["unknown_tokens"]
    if unknown:
        names = list(dict.fromkeys(unknown))
        shown = ", ".join(names[:MOST_UNKNOWN]) + (", …" if len(names) > MOST_UNKNOWN else "")
        lines.append(f"unknown tokens: {shown} ({len(unknown)} of {len(answer['tokens'])})")
    return lines
