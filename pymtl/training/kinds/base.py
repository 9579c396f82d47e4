"""What a kind of task has to say, for every step from a record to a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymtl.crf import CRF
from pymtl.heads import Head, Reads
from pymtl.losses import CrossEntropy
from pymtl.pooling import AttentionPooling
from pymtl.training.errors import DataError
from pymtl.training.values import check_text, is_string, shown

if TYPE_CHECKING:
    from pymtl.training.config import Config, TaskConfig

NO_LABEL = -100  # the target of what has no label

# Whether an option's value fits, the option's key, and what was expected
Requirement = tuple[bool, str, str]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of a kind that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class PoolingOptions:
    """Of kinds whose head reads a whole sentence."""

    pooling: Literal["last", "mean", "max", "attention"] = "last"  # of a sentence's states
    attention_heads: int = 1  # of pooling = "attention"


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions:
    """Of kinds whose loss is a cross-entropy."""

    label_smoothing: float = 0.0


class Kind(ABC):
    """A kind of task. An instance has no state: each method is given the task's configuration.

    A new kind is a class like this in a file of its own, and a line in :data:`pymtl.training.kinds.KINDS`.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions  # a dataclass; its fields are keys of the task's section
    scores: ClassVar[tuple[str, ...]]  # a task is judged by the first it has
    lower_is_better: ClassVar[bool] = False  # of that score; it then has no upper limit either
    of_tokens: ClassVar[bool] = False  # whether the head reads every token, not a whole sentence
    aligned: ClassVar[bool] = False  # whether there is a target for every token
    has_vocabulary: ClassVar[bool] = True  # of labels
    is_discrete: ClassVar[bool] = False  # classes or tags: another task may read them, and "exact_match" counts them
    labels_itself: ClassVar[bool] = False  # whether every text is its own label
    has_reference: ClassVar[bool] = False  # whether the plain PyTorch backend has the head
    has_squared_error: ClassVar[bool] = False  # for a loss, which some balancing methods weigh otherwise
    least_labels: ClassVar[int] = 1  # that scores need

    @classmethod
    def has_option(cls, key: str) -> bool:
        return any(field.name == key for field in fields(cls.Options))

    def requirements(self, task: TaskConfig, config: Config) -> list[Requirement]:
        """What the options have to fulfil, besides being of the right type."""
        return []

    # From records to targets.

    def of_cell(self, cell: str, task: TaskConfig) -> Any:
        """The label in a cell of CSV that is not empty, in the form JSON has it."""
        return cell.strip()

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
        return isinstance(label, str), "a string"

    def is_element(self, value: Any) -> bool:
        """Whether it may stand in a label that is a list."""
        return is_string(value)

    def vocabulary(self, name: str, values: Sequence[Any], task: TaskConfig) -> list[Any]:
        """The labels of the task called ``name``, in the order of their ids, from the training records' own."""
        return sorted({label for value in values for label in value if label is not None})

    def is_vocabulary(self, labels: Any) -> bool:
        """Whether this is what :meth:`vocabulary` gave."""
        return isinstance(labels, list) and len(labels) > 0 and all(map(is_string, labels))

    @abstractmethod
    def target(self, label: Any, ids: Mapping[Any, int], tokens: Tensor, task: TaskConfig, config: Config) -> Tensor:
        """What the loss takes for a label; a label without an id counts as missing."""

    def count_labels(self, target: Tensor) -> int:
        """What the loss of such targets is a mean over."""
        if target.is_floating_point():
            return int((~target.isnan()).sum())
        return int((target != NO_LABEL).sum())

    # The model.

    @abstractmethod
    def head(self, task: TaskConfig, labels: Sequence[Any], words: nn.Embedding | None) -> Head:
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
    def cross_entropy(task: TaskConfig) -> CrossEntropy:
        return CrossEntropy(ignore_index=NO_LABEL, label_smoothing=task.label_smoothing)

    # From logits to scores.

    @abstractmethod
    def decode(self, logits: Tensor, given: Decoding) -> list[Any]:
        """Each sentence's label in the form of the records."""

    def details(self, logits: Tensor, given: Decoding) -> dict[str, list[Any]]:
        """What a prediction says besides the label, for each sentence, by the name behind ``<task>/``."""
        return {}

    @abstractmethod
    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        """The scores of some sentences; ``details`` of each sentence. Empty where nothing can be said."""

    @abstractmethod
    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        """A prediction for a person to read."""


@dataclass(frozen=True)
class Decoding:
    """What decoding reads besides the logits [B, ...]."""

    task: TaskConfig
    labels: Sequence[Any]
    lengths: Tensor
    target: Tensor | None
    crf: CRF | None = None
    beam_size: int = 1


@dataclass(frozen=True)
class Scored:
    """What scoring reads besides truth and guess."""

    task: TaskConfig
    labels: Sequence[Any]


def missing_like(known: Tensor) -> float:
    """The target of what has no label, in the dtype of one that has."""
    return torch.nan if known.is_floating_point() else NO_LABEL
