"""A run's model that answers texts: what :func:`load` gives."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .library import Model, ModelError, Session
from .serving.answers import SOURCES, Logits, Paths, decode
from .serving.encoding import Encoder
from .serving.generation import UNKNOWN, Search
from .serving.predicting import Answer, Answering, Input
from .serving.records import Record
from .serving.settings import Settings


def load(path: str | os.PathLike[str], threads: int = 0, memory_limit: int = 0) -> Predictor:
    """A trained model, to predict with.

    Args:
        path: the file that ``pymtl export RUN FILE.pymtl`` wrote.
        threads: that a call may run on; 0: as many as there are cores for this process. 1 where several threads or
            processes ask at once.
        memory_limit: bytes that packed weights may take, and the buffers of a batch; 0: 4 GiB.

    Raises:
        MemoryError: the packed weights take more than ``memory_limit``.
        ModelError: the file is missing, damaged, written by a newer version, or of a model that was not trained by
            ``pymtl train``: :class:`Model` loads that.
        ValueError: a number is out of range.

    ::

        model = pymtl_runtime.load("orders.pymtl")
        answer = model.predict("bring me a large coffee now")
        answer["mood"], answer["mood/probability"]  # "rude", 0.98
    """
    return Predictor(path, threads, memory_limit)


@dataclass(frozen=True)
class Vocabulary:
    """Names in the order of their ids."""

    tokens: list[str]
    labels: dict[str, list[Any]]
    characters: list[str] = field(default_factory=list)
    categories: dict[str, list[str]] = field(default_factory=dict)


class Predictor(Answering):
    """A trained model; made by :func:`load`. Several threads may use it at a time.

    Attributes:
        tasks: each task's settings, as the configuration has them.
        labels: each task's labels, in the order of its logits; of a task of numbers their means and standard
            deviations in training.
        vocabulary: the tokens that training has seen, and the labels.
        weights: what recurrent layers keep their matrices in: "float32", "bfloat16" or "int8".
        model: the same model of ids, for its logits and answers as they are.
    """

    config: Settings
    vocabulary: Vocabulary

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, memory_limit: int = 0) -> None:
        self.model = Model(path, threads, memory_limit)
        try:
            about = json.loads(self.model.description)
            if "settings" not in about:
                raise ModelError(
                    f"{os.fspath(path)}: expected the model of a run, got one that was exported from Python: "
                    "pymtl_runtime.Model loads it"
                )
            self.config = Settings.from_plain(about["settings"])
            self.weights: str = about["weights"]
            self.vocabulary = self._read_vocabulary(about["labels"])
            self._uncertainty = dict(about.get("uncertainty", {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{os.fspath(path)}: damaged: {type(error).__name__}: {error}") from None
        self._known = frozenset(self.vocabulary.tokens)
        self._encoder = Encoder(self.vocabulary, self.config, remember=False)
        self._encodings = {
            name: task.rules.encoding(self.vocabulary.labels.get(name, []), self.vocabulary.tokens)
            for name, task in self.tasks.items()
            if task.rules.labels_itself or self._copies(name)
        }
        self._own = threading.local()  # a session for each thread

    def _read_vocabulary(self, labels: dict[str, list[Any]]) -> Vocabulary:
        """Raises KeyError or ValueError: the tasks, fields or labels are not the model's."""
        for name in self.tasks:
            own = self.model.tasks[self.model.place(name)].labels
            if own and len(labels[name]) != len(own):
                raise ValueError(f"task {name!r}: expected {len(own)} labels, got {len(labels[name])}")
        read = {each.name for each in self.model.inputs}
        for name in self.config.fields:
            if name not in read:
                raise ValueError(f"the model reads no field {name!r}")
        categories = {n: self.model.names(n) for n, info in self.config.fields.items() if info.kind == "category"}
        return Vocabulary(self.model.names("words"), labels, self.model.names("characters"), categories)

    def __reduce__(self) -> Any:
        """A copy, or one in another process, loads the file again."""
        return Predictor, self.model._arguments

    def __repr__(self) -> str:
        return f"Predictor({self.model._arguments[0]!r}, tasks={list(self.tasks)}, weights={self.weights!r})"

    def answer_batch(
        self,
        records: Sequence[Record],
        dataset: str,
        search: Search | None,
        distributions: bool,
        numbers: Sequence[int],
    ) -> list[Answer]:
        names = self.config.main_tasks_of(dataset)
        if not names:
            return [{} for _ in records]
        session = self._session()
        copied = self._run(session, records, names, distributions)
        return self._decoded(session, records, names, copied, search, distributions, numbers)

    def logits(self, inputs: Sequence[Input], dataset: str = "") -> dict[str, np.ndarray]:
        """Every task's logits of some texts, all in one batch: [B, C], or [B, T, C] of each token, padded to the
        longest with zeros.

        Args:
            inputs: a list as for :meth:`predict`, each input of at least one token.
            dataset: the data set whose tasks are asked, where there are several.

        Returns:
            The logits by task. Tasks whose answers are generated have none.

        Raises:
            TypeError: the inputs are no list.
            DataError: there is none, or one has no token.
        """
        records = self.records_to_run(inputs, dataset)
        names = [name for name in self.config.main_tasks_of(dataset) if not self.tasks[name].rules.generates]
        if not names:
            return {}
        session = self._session()
        self._run(session, records, names, False)
        lengths = np.array([len(record.tokens) for record in records])
        found = {}
        for name in names:
            rows = session.logits(name)
            if self.model.tasks[self.model.place(name)].of_tokens:
                padded = np.zeros((len(lengths), lengths.max(), rows.shape[1]), rows.dtype)
                padded[np.arange(lengths.max()) < lengths[:, None]] = rows
                rows = padded
            found[name] = rows
        return found

    def stream(self, dataset: str = "") -> Stream:
        """For one text whose tokens come one after the other: a model that reads in one direction.

        Raises:
            ValueError: no task's answers follow from the tokens so far.
        """
        return Stream(self, dataset)

    def _session(self) -> Session:
        session = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = self.model.session()
        return session

    def _run(
        self, session: Session, records: Sequence[Record], names: Sequence[str], probabilities: bool
    ) -> dict[str, list[list[str]]]:
        """Gives, of tasks that copy, the tokens of each record that are no labels."""
        fields: dict[str, np.ndarray] = {}
        if self.config.model.words:
            ids = [i for record in records for i in self._encoder.tokens(record)]
            fields["words"] = np.array(ids, dtype=np.int64)
        own = [self._encoder.fields(record) for record in records]
        fields |= {name: np.concatenate([each[name] for each in own]) for name in own[0]}
        copied = {}
        for name in filter(self._copies, names):
            task, encoding = self.tasks[name], self._encodings[name]
            known = [task.rules.sources(record.tokens, encoding, task) for record in records]
            ids = [own[token] for own, record in zip(known, records) for token in record.tokens]
            fields[SOURCES.format(name)] = np.array(ids, dtype=np.int64)
            copied[name] = [list(own.maps[0]) for own in known]
        # Of other tasks than paths probabilities are made of the logits.
        paths = any(self.model.tasks[self.model.place(name)].kind == "path" for name in names)
        lengths = [len(record.tokens) for record in records]
        session.run(lengths, fields, names, probabilities and paths, by_steps=True)
        return copied

    def _decoded(
        self,
        session: Session,
        records: Sequence[Record],
        names: Sequence[str],
        copied: dict[str, list[list[str]]],
        search: Search | None,
        distributions: bool,
        numbers: Sequence[int] | None = None,
        with_paths: bool = True,
    ) -> list[Answer]:
        ends = np.cumsum([len(record.tokens) for record in records])[:-1]
        logits: dict[str, Logits] = {}
        targets, paths = {}, {}
        for name in names:
            info = self.model.tasks[self.model.place(name)]
            task = self.tasks[name]
            if task.rules.generates:
                settings = task.rules.search(task, search)
                logits[name] = session.generate(name, settings, task.max_length, distributions, [UNKNOWN], numbers)
                continue
            rows = session.logits(name)
            logits[name] = np.split(rows, ends) if info.of_tokens else rows
            if task.rules.labels_itself:
                targets[name] = list(self._targets(name, records))
            if info.kind == "path" and with_paths:
                found = session.answer(name)
                tags = [row.tolist() for row in found.ids]
                if distributions:
                    each = [row.tolist() for row in found.probabilities]
                    paths[name] = Paths(tags, each, found.probability.tolist())
                else:
                    paths[name] = Paths(tags)
        return decode(logits, self.tasks, self.vocabulary.labels, targets, paths, search, distributions, copied)

    def _copies(self, name: str) -> bool:
        return self.tasks[name].rules.generates and self.tasks[name].copy

    def _targets(self, name: str, records: Sequence[Record]) -> Iterator[np.ndarray]:
        directions = 2 if self.config.model.bidirectional else 1
        for record in records:
            ids = np.array(self._encoder.tokens(record), dtype=np.int64)
            yield self.tasks[name].rules.own_targets(ids, self._encodings[name], self.tasks[name], directions)


class Stream:
    """One text whose tokens come one after the other; made by :meth:`Predictor.stream`.

    ``tasks``: those it has answers of. They depend on no later token: models of one direction have them, of heads of
    tokens, and of heads of texts that pool by "last". A CRF's best path and CTC's labels depend on all tokens; what a
    stream says of such tags is each one's likeliest by itself.
    """

    def __init__(self, predictor: Predictor, dataset: str = "") -> None:
        self._predictor = predictor
        self._dataset = dataset
        self._session = predictor.model.stream()
        if dataset not in predictor.config.sets:
            raise ValueError(f"dataset: expected one of {list(predictor.config.sets)}, got {dataset!r}")
        infos = {task.name: task for task in predictor.model.tasks}
        rules = {name: predictor.tasks[name].rules for name in predictor.config.main_tasks_of(dataset)}
        self.tasks = [name for name, own in rules.items() if infos[name].streams and not own.labels_itself]
        if not self.tasks:
            raise ValueError(f"dataset: expected one with tasks that follow from the tokens so far, got {dataset!r}")

    def feed(self, given: Input, distributions: bool = False) -> Answer:
        """What the model says with these further tokens: of tasks of tokens, of each of them; of tasks of texts, of all
        tokens so far. The keys are those of :meth:`Predictor.predict`, without places in a text.

        Args:
            given: a text, tokens, or a record with the fields that training read; of at least one token.

        Raises:
            TypeError: it is of another type.
            DataError: there is no token, or a field does not fit.
        """
        record = self._predictor.record_of(given, "input", self._dataset)
        predictor, session, records = self._predictor, self._session, [record]
        copied = predictor._run(session, records, self.tasks, False)
        (answer,) = predictor._decoded(session, records, self.tasks, copied, None, distributions, with_paths=False)
        return {"tokens": record.tokens, **answer}

    def reset(self) -> None:
        """Begins a new text."""
        self._session.reset()

    @property
    def state(self) -> np.ndarray:
        """The states behind the tokens so far, float32 [S], to keep and to put back: ``stream.state = kept``."""
        return self._session.state

    @state.setter
    def state(self, kept: np.ndarray) -> None:
        self._session.state = kept
