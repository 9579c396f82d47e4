"""What a kind of task has to say, for every step from a record to a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymtl.crf import CRF
from pymtl.heads import Head, Reads
from pymtl.losses import CrossEntropy
from pymtl.pooling import AttentionPooling
from pymtl.serving.answers import NO_LABEL, Answers, Scored
from pymtl.serving.records import Record
from pymtl.serving.tokenizing import Place
from pymtl.serving.values import as_name, check_text, is_label, is_number, number_of, shown
from pymtl.training.errors import DataError

if TYPE_CHECKING:
    from pymtl.training.config import Config, TaskConfig

WEIGHTS = ("none", "balanced")

# Whether an option's value fits, the option's key, and what was expected
Requirement = tuple[bool, str, str]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of a kind that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class AttentionHeadsOptions:
    """Of kinds whose head may attend."""

    attention_heads: int = 1  # of attention: how many averages of the states, each with weights of its own


@dataclass(frozen=True, kw_only=True)
class PoolingOptions(AttentionHeadsOptions):
    """Of kinds whose head reads a whole sentence."""

    pooling: Literal["last", "mean", "max", "attention"] = "last"  # how a text's states become one vector


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions:
    """Of kinds whose loss is a cross-entropy."""

    label_smoothing: float = 0.0  # the share of each target that is spread over all classes


@dataclass(frozen=True, kw_only=True)
class CrossEntropyOptions(SmoothingOptions):
    """Of kinds whose classes may weigh differently in it."""

    # Of each class in the loss: "none"; "balanced", a class of n among N labels of C classes weighs N / (C n); or a
    # table of those that are not 1, as {rude = 3.0}
    class_weights: str | dict[str, float] = "none"


@dataclass(frozen=True, kw_only=True)
class MissingOptions:
    """Of kinds whose label may be that there is none."""

    # What a missing label means: "unknown", the record teaches this task nothing; "none", there are no labels or spans
    missing: Literal["unknown", "none"] = "unknown"


class Kind(Answers, ABC):
    """A kind of task. An instance has no state: each method is given the task's configuration.

    A new kind is a class like this in a file of its own, and a line in :data:`pymtl.training.kinds.KINDS`.
    """

    Options: ClassVar[type] = NoOptions  # a dataclass; its fields are keys of the task's section
    scores: ClassVar[tuple[str, ...]]  # a task is judged by the first it has
    lower_is_better: ClassVar[frozenset[str]] = frozenset()  # scores of which less is better
    is_bounded: ClassVar[bool] = True  # whether that first score has a limit
    aligned: ClassVar[bool] = False  # whether there is a target for every token
    is_discrete: ClassVar[bool] = False  # classes or tags, which another task may read
    is_exact: ClassVar[bool] = False  # an answer is right or wrong: "exact_match" counts it
    has_reference: ClassVar[bool] = False  # whether the plain PyTorch backend has the head
    has_squared_error: ClassVar[bool] = False  # for a loss, which some balancing methods weigh otherwise
    least_labels: ClassVar[int] = 1  # that scores need
    parts_are: ClassVar[tuple[str, str]] = ("label", "labels")  # what its answers are made of, one and several
    special_labels: ClassVar[int] = 0  # how many of the vocabulary's first labels stand for no part of an answer
    looked_for: ClassVar[int] = 9  # a kind with a lower number is tried first on the fields of a new file

    @classmethod
    def has_option(cls, key: str) -> bool:
        return any(field.name == key for field in fields(cls.Options))

    def requirements(self, task: TaskConfig, config: Config) -> list[Requirement]:
        """What the options have to fulfil, besides being of the right type."""
        return []

    # From records to targets.

    def starting(self, column: Column) -> list[str]:
        """The lines of a new task's section, for a field with such values."""
        return []

    def suits(self, column: Column) -> str | None:
        """Why a field with such values may be such a task; None: it may not."""
        return None

    def of_cell(self, cell: str, task: TaskConfig) -> Any:
        """The label in a cell of CSV that is not empty, in the form JSON has it."""
        return cell.strip()

    def of_value(self, value: Any, task: TaskConfig, source: Source) -> Any:
        """The label in the form :meth:`check_label` expects, of a value in one of the forms that files have it in.

        Raises:
            DataError: it does not fit the text.
        """
        return value

    def when_missing(self, task: TaskConfig, length: int) -> Any:
        """The label of a record, of ``length`` tokens, in which it is missing; None if nothing is known of it."""
        return None

    def reads_numbers(self, task: TaskConfig) -> bool:
        """Whether its labels are numbers, which some tables write with a comma."""
        return False

    def count_tags(self, value: Any) -> int | None:
        """Of kinds with a label for each token, how many a value has; None if it does not say."""
        return None

    def as_cell(self, value: Any) -> str:
        """A label, or an answer, as :meth:`of_cell` reads it."""
        return self.label_name(value)

    def check_label(self, field: str, label: Any, task: TaskConfig, length: int) -> None:
        """Checks a record's label, in a text of ``length`` tokens.

        Raises:
            DataError: it does not fit.
        """
        fits, expected = self.expects(label, task, length)
        if not fits:
            raise DataError(f"field {field!r}: expected {expected}, got {shown(label, self.is_element)}")
        texts = [label] if isinstance(label, str) else label if isinstance(label, list) else []
        check_text(field, [text for text in texts if isinstance(text, str)])

    def expects(self, label: Any, task: TaskConfig, length: int) -> tuple[bool, str]:
        """Whether a label fits, and what would."""
        return is_label(label), "a string or a whole number"

    def in_report(self, label: Any, task: TaskConfig) -> Any:
        """A label as reports have it, plain values."""
        return label

    def is_element(self, value: Any) -> bool:
        """Whether it may stand in a label that is a list."""
        return is_label(value)

    def parts(self, label: Any) -> Iterable[Any]:
        """The classes or tags that a label is made of, to be counted; those of the vocabulary, if there is one."""
        return () if label is None else (part for part in label if part is not None)

    def strata(self, label: Any) -> Iterable[str]:
        """What has to be among the records that are held out as often as among all."""
        return map(self.label_name, self.parts(label))

    def vocabulary(self, name: str, values: Sequence[Any], task: TaskConfig) -> list[Any]:
        """The labels of the task called ``name``, in the order of their ids, from the training records' own."""
        return in_order(part for value in values for part in self.parts(value))

    def has_vocabulary(self, task: TaskConfig) -> bool:
        """Whether training learns labels: :meth:`vocabulary` or :meth:`vocabulary_of_tokens` has them."""
        return True

    def vocabulary_of_tokens(self, counts: Mapping[str, int], task: TaskConfig) -> list[Any]:
        """As :meth:`vocabulary`, of a kind whose texts are their own labels: from how often each token of the run's
        vocabulary occurs in the training texts, in the order of their ids."""
        raise NotImplementedError

    def is_vocabulary(self, labels: Any) -> bool:
        """Whether this is what :meth:`vocabulary` gave."""
        return isinstance(labels, list) and len(labels) > 0 and all(map(is_label, labels))

    def check_options(self, name: str, task: TaskConfig, labels: Sequence[Any]) -> None:
        """Checks options that name labels, by those there are.

        Raises:
            DataError: there is no such label.
        """
        known = list(map(self.label_name, labels)) if isinstance(task.class_weights, dict) else []
        for label in task.class_weights if known else ():
            if label not in known:
                raise DataError(f"tasks.{name}.class_weights: expected labels of {', '.join(known)}, got {label!r}")

    def older_vocabulary(self, task: TaskConfig) -> list[Any] | None:
        """What :meth:`vocabulary` stands for in runs from before there was one; None if there has always been one."""
        return None

    def unknown(self, label: Any, encoding: Any) -> list[str]:
        """The parts of a label that training has not seen, which no answer can have."""
        return [self.label_name(part) for part in self.parts(label) if self.label_name(part) not in encoding]

    def unreachable(self, label: Any, tokens: Sequence[str], encoding: Any, task: TaskConfig) -> list[str]:
        """The parts of a label that no answer to these tokens can have: training has not seen them, nor can they be
        copied."""
        copied = self.sources(tokens, encoding, task)
        return self.unknown(label, encoding if copied is None else copied)

    def remarks(self, name: str, task: TaskConfig, records: Sequence[Record]) -> list[str]:
        """What is worth knowing of the training records' texts and labels, a line each."""
        return []

    def target(self, label: Any, encoding: Any, tokens: Tensor, task: TaskConfig, config: Config) -> Tensor:
        """What the loss takes for a label; a label that training has not seen counts as missing. Here of texts that are
        their own labels."""
        directions = 2 if config.model.bidirectional else 1
        return torch.from_numpy(self.own_targets(tokens.numpy(), encoding, task, directions))

    def count_labels(self, target: Tensor, weight: Sequence[float] | None = None) -> float:
        """What the loss of such targets is a mean over: their number, or the sum of their classes' weights."""
        if target.is_floating_point():
            return int((~target.isnan()).sum())
        known = target[target != NO_LABEL]
        return len(known) if weight is None else float(torch.tensor(weight, dtype=torch.float64)[known].sum())

    def settled(self, name: str, task: TaskConfig, values: Sequence[Any], notes: list[str]) -> TaskConfig:
        """The task's options with what all training labels say in place of "auto"; ``notes`` takes what was found.

        Raises:
            DataError: the labels are not what an option asks for.
        """
        return task

    def check_trainable(self, label: Any, task: TaskConfig, at: str) -> None:
        """Checks a training label by what :meth:`settled` found; ``at`` names it.

        Raises:
            DataError: no model can be trained on it.
        """
        return

    # The model.

    @abstractmethod
    def head(self, task: TaskConfig, learned: Learned, words: nn.Embedding | None) -> Head:
        """The head; ``words``: the embedding of words, if there is one."""

    def crf(self, task: TaskConfig, labels: Sequence[Any]) -> CRF | None:
        """What decodes the head's tags together, if something does."""
        return None

    @staticmethod
    def reads(task: TaskConfig) -> Reads:
        return Reads(task.skip, task.after)

    @staticmethod
    def pooling(task: TaskConfig) -> Any:
        return AttentionPooling(task.attention_heads) if task.pooling == "attention" else task.pooling

    @staticmethod
    def cross_entropy(task: TaskConfig, learned: Learned) -> CrossEntropy:
        return CrossEntropy(learned.weights(task), NO_LABEL, task.label_smoothing)

    # From answers to scores.

    @abstractmethod
    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        """The scores of some sentences; ``details`` of each sentence. Empty where nothing can be said."""

    def is_right(self, truth: Any, guess: Any, task: TaskConfig) -> bool:
        """Whether an answer is right in every part."""
        return self.label_name(truth) == self.label_name(guess)

    def mistakes(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> list[int]:
        """Which answers are wrong, by their places; the worst first, where some are worse than others."""
        return [i for i, (a, b) in enumerate(zip(truth, guess)) if not self.is_right(a, b, scored.task)]

    def uncertainty(self, truth: Sequence[Any], guess: Sequence[Any], task: TaskConfig) -> Any:
        """How far off answers are on records that were not trained on, of kinds whose logits do not tell it of each
        answer; None of others."""
        return None

    def breakdown(self, truth: Sequence[Any], guess: Sequence[Any], scored: Scored) -> dict[str, Any]:
        """What an evaluation shows beside the scores, each under a name of its own:

        - ``classes``: a row for each label, ``label``, ``precision``, ``recall``, ``f1`` and ``support``
        - ``confusion``: ``labels`` and ``counts``, a row for each true label, a column for each predicted one
        - ``errors``: numbers of a task of numbers by name
        """
        return {}


@dataclass(frozen=True)
class Source:
    """Where a label is from: the number of its text's tokens, where they stand in it (None of a list of tokens), the
    text itself, and the record; and what had to be changed to make labels fit: how often, and an example of each."""

    length: int
    places: Sequence[Place] | None = None
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)  # the record's fields
    cells: Collection[str] = ()  # those that are cells of a table
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, what: str, example: str = "") -> None:
        self.counts[what] += 1
        self.examples.setdefault(what, f", as {example}" if example else "")


@dataclass(frozen=True)
class Column:
    """The values of a field that are not missing, how many tokens each one's text has by either tokenizer, and whether
    they are cells of a table."""

    values: Sequence[Any]
    lengths: Sequence[int]
    words: Sequence[int]
    is_cells: bool

    def numbers(self) -> list[float] | None:
        """The values as numbers; None if one is not."""
        found = [number_of(value) if isinstance(value, str) else value for value in self.values]
        return [float(value) for value in found] if all(map(is_number, found)) else None


@dataclass(frozen=True)
class Learned:
    """What training has learnt of a task's labels: which there are, and how often each is in the training records."""

    labels: Sequence[Any]
    counts: Sequence[int] = ()

    def weights(self, task: TaskConfig) -> tuple[float, ...] | None:
        """Of each class in the loss, as ``class_weights`` says; None if all are 1."""
        if task.class_weights == "none":
            return None
        if task.class_weights == "balanced":
            total = sum(self.counts)
            return tuple(total / (len(self.labels) * count) for count in self.counts)
        given = task.class_weights
        return tuple(float(given.get(as_name(label), 1.0)) for label in self.labels)


def weights_fit(task: TaskConfig) -> Requirement:
    """Whether ``class_weights`` can be weights; that its table names classes is known with the data only."""
    given = task.class_weights
    fits = all(0 < weight < float("inf") for weight in given.values()) if isinstance(given, dict) else given in WEIGHTS
    return fits, "class_weights", '"none", "balanced" or a table of numbers above 0'


def in_order(labels: Iterable[Any]) -> list[Any]:
    """Each label once, whole numbers by size and others by name."""
    every: dict[str, Any] = {}
    for label in labels:
        name = as_name(label)
        # What is a number here and a text there is a text.
        every[name] = label if type(every.get(name, label)) is type(label) else name
    numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in every.values())
    found = sorted(every.values(), key=float if numbers else as_name)
    return [int(label) if isinstance(label, float) else label for label in found]


def rows_of_classes(truth: Sequence[str], guess: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class, by scikit-learn."""
    from sklearn import metrics as sk

    labels = sorted(set(truth) | set(guess))
    columns = sk.precision_recall_fscore_support(truth, guess, labels=labels, zero_division=0.0)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, *columns)
    ]


def confusion_of(truth: Sequence[str], guess: Sequence[str]) -> dict[str, Any]:
    """How often each class was taken for each, by scikit-learn."""
    from sklearn import metrics as sk

    labels = sorted(set(truth) | set(guess))
    if len(labels) == 1:  # scikit-learn would warn
        return {"labels": labels, "counts": [[len(truth)]]}
    return {"labels": labels, "counts": sk.confusion_matrix(truth, guess, labels=labels).tolist()}


def missing_like(known: Tensor) -> float:
    """The target of what has no label, in the dtype of one that has."""
    return torch.nan if known.is_floating_point() else NO_LABEL
