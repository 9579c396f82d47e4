"""From logits to answers, by the kind of task.

Of a task of sequences logits are an array [B, C]; of a task of tokens a list of arrays [T_i, C], one for each sequence;
of a task whose answers are generated the answers themselves, each sequence's best first.
A task is what a run's configuration says of it: its ``kind``, and the options of that kind.
"""

from __future__ import annotations

import math
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from . import ctc
from . import tags as schemes
from .encoding import FIRST_TOKEN
from .generation import END, UNKNOWN, Hypothesis, Search
from .probabilities import log_softmax, sigmoid, softmax
from .tokenizing import JOINER, Place, joined, pieces_of
from .values import as_name

NO_LABEL = -100  # the target of what has no label
SUFFIX = 3  # characters that a language model of suffixes predicts
SOURCES = "{}/sources"  # the field of a model's file that says what the text's tokens are among a task's labels

Logits = np.ndarray | list[np.ndarray] | list[list[Hypothesis]]


@dataclass(frozen=True)
class Paths:
    """The likeliest paths of a conditional random field: each sequence's ``tags``; and where they are asked for, how
    probable each tag is over all paths, and each whole path."""

    tags: list[list[int]]
    probabilities: list[list[float]] | None = None
    probability: list[float] | None = None


@dataclass(frozen=True)
class Decoding:
    """What decoding reads besides the logits. ``targets``: of tasks whose texts are their own labels, of each sequence
    what it has to predict. ``copied``: of tasks whose answers may copy tokens, each sequence's that are no labels, in
    the order of the ids behind the labels'."""

    task: Any
    labels: Sequence[Any]
    targets: Sequence[np.ndarray] | None = None
    paths: Paths | None = None
    copied: Sequence[Sequence[str]] | None = None
    search: Search = field(default_factory=lambda: Search(beam_size=1))


@dataclass(frozen=True)
class Scored:
    """A task and its labels."""

    task: Any
    labels: Sequence[Any]


class Answers:
    """What a kind of task says. An instance has no state."""

    name: ClassVar[str]
    of_tokens: ClassVar[bool] = False  # whether there are logits of every token, not of a whole sentence
    generates: ClassVar[bool] = False  # whether answers are written token by token
    labels_itself: ClassVar[bool] = False  # whether every text is its own label

    def label_name(self, part: Any) -> str:
        """A class or tag as text."""
        return as_name(part)

    def encoding(self, labels: Sequence[Any], tokens: Sequence[str] = ()) -> Any:
        """What targets are read by: the labels' ids, by name. ``tokens``: the vocabulary's names, where the texts are
        their own labels."""
        return {self.label_name(label): i for i, label in enumerate(labels)}

    def own_targets(self, tokens: np.ndarray, encoding: Any, task: Any, directions: int) -> np.ndarray:
        """Of a kind whose texts are their own labels, what the tokens (ids [T]) have to be predicted as.
        ``directions``: of the encoder."""
        raise NotImplementedError

    def sources(self, tokens: Sequence[str], encoding: Any, task: Any) -> ChainMap[str, int] | None:
        """Of a task whose answers may copy a text's tokens: the ids that these have, and all labels'. The first of the
        maps has the tokens that are no labels, with ids behind the labels'. None of other tasks."""
        return None

    def search(self, task: Any, asked: Search | None) -> Search:
        """How answers are looked for."""
        return Search(beam_size=1 if asked is None else asked.beam_size or 1)

    def decode(self, logits: Logits, given: Decoding) -> list[Any]:
        """Each sentence's label in the form of the records."""
        raise NotImplementedError

    def details(self, logits: Logits, given: Decoding) -> dict[str, list[Any]]:
        """What a prediction says besides the label, for each sentence, by the name behind ``<task>/``."""
        return {}

    def distributions(self, logits: Logits, given: Decoding) -> dict[str, list[Any]]:
        """As :meth:`details`, what only a program reads: the probabilities of all labels."""
        return {}

    def in_text(
        self, value: Any, details: Mapping[str, Any], scored: Scored, text: str, places: Sequence[Place]
    ) -> dict[str, Any]:
        """What an answer says of the text besides, by the name behind ``<task>/``; ``places`` are its tokens'."""
        return {}

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        """A prediction for a person to read."""
        raise NotImplementedError


class ClassificationAnswers(Answers):
    """A class of each sentence."""

    name = "classification"

    def decode(self, logits: np.ndarray, given: Decoding) -> list[Any]:
        return [given.labels[index] for index in logits.argmax(-1).tolist()]

    def details(self, logits: np.ndarray, given: Decoding) -> dict[str, list[float]]:
        return {"probability": softmax(logits).max(-1).tolist()}

    def distributions(self, logits: np.ndarray, given: Decoding) -> dict[str, list[dict[str, float]]]:
        names = list(map(as_name, given.labels))
        return {"probabilities": [dict(zip(names, row)) for row in softmax(logits).tolist()]}

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return f"{as_name(value)} ({100 * details['probability']:.1f} %)"


class OrdinalAnswers(Answers):
    """An ordered class of each sentence, from the logits of being above each class but the last."""

    name = "ordinal"

    def label_name(self, part: Any) -> str:
        """Numbers may have fractions."""
        return part if isinstance(part, str) else f"{part:.15g}"

    def decode(self, logits: np.ndarray, given: Decoding) -> list[Any]:
        labels = given.labels
        if all(isinstance(label, float) and label.is_integer() for label in labels):
            labels = list(map(int, labels))
        return [labels[index] for index in self._classes(logits).tolist()]

    def details(self, logits: np.ndarray, given: Decoding) -> dict[str, list[float]]:
        own = np.take_along_axis(self._probabilities(logits), self._classes(logits)[:, None], -1)
        return {"probability": own[:, 0].tolist()}

    def distributions(self, logits: np.ndarray, given: Decoding) -> dict[str, list[dict[str, float]]]:
        names = list(map(self.label_name, given.labels))
        return {"probabilities": [dict(zip(names, row)) for row in self._probabilities(logits).tolist()]}

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return f"{self.label_name(value)} ({100 * details['probability']:.1f} %)"

    @staticmethod
    def _classes(logits: np.ndarray) -> np.ndarray:
        return (logits > 0).sum(-1)

    @staticmethod
    def _probabilities(logits: np.ndarray) -> np.ndarray:
        """Of each class [B, C]."""
        above = sigmoid(logits)
        one, zero = np.ones_like(above[:, :1]), np.zeros_like(above[:, :1])
        found = np.concatenate([one, above], -1) - np.concatenate([above, zero], -1)
        found = found.clip(min=0)  # thresholds may cross
        return found / found.sum(-1, keepdims=True)


class MultilabelAnswers(Answers):
    """Any number of labels of each sentence."""

    name = "multilabel"

    def decode(self, logits: np.ndarray, given: Decoding) -> list[list[Any]]:
        return [[label for label, yes in zip(given.labels, row) if yes] for row in (logits > 0).tolist()]

    def details(self, logits: np.ndarray, given: Decoding) -> dict[str, list[float]]:
        """``probability`` of this very set of labels, were they independent."""
        return {"probability": sigmoid(np.abs(logits)).prod(-1).tolist()}

    def distributions(self, logits: np.ndarray, given: Decoding) -> dict[str, list[dict[str, float]]]:
        names = list(map(as_name, given.labels))
        return {"probabilities": [dict(zip(names, row)) for row in sigmoid(logits).tolist()]}

    def describe(self, value: list[Any], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return ", ".join(map(as_name, value)) or "none"


class RegressionAnswers(Answers):
    """A number, or several, of each sentence; the labels are each one's mean and standard deviation in training, or of
    its logarithm."""

    name = "regression"

    def older_vocabulary(self, task: Any) -> list[dict[str, float]]:
        """What the labels stand for in runs from before there were some."""
        return [{"mean": 0.0, "std": 1.0}] * task.num_targets

    def decode(self, logits: np.ndarray, given: Decoding) -> list[Any]:
        labels = given.labels or self.older_vocabulary(given.task)
        mean, std = (np.array([label[key] for label in labels], dtype=np.float64) for key in ("mean", "std"))
        values = mean + std * logits.astype(np.float64)
        if labels[0].get("log", False):
            with np.errstate(over="ignore"):
                values = np.exp(values)
        return values[:, 0].tolist() if given.task.num_targets == 1 else values.tolist()

    def describe(self, value: Any, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return " ".join(f"{number:.3f}" for number in (value if isinstance(value, list) else [value]))


class TaggingAnswers(Answers):
    """A tag of each token: the likeliest, or that of the likeliest path."""

    name = "tagging"
    of_tokens = True

    def decode(self, logits: list[np.ndarray], given: Decoding) -> list[list[str]]:
        rows = [z.argmax(-1).tolist() for z in logits] if given.paths is None else given.paths.tags
        return [[given.labels[i] for i in row] for row in rows]

    def distributions(self, logits: list[np.ndarray], given: Decoding) -> dict[str, list[Any]]:
        """``probabilities`` of each token's tag that was decoded, and ``probability`` of all of them together."""
        if given.paths is not None:
            return {"probabilities": given.paths.probabilities, "probability": given.paths.probability}
        best = [softmax(z).max(-1).tolist() for z in logits]
        return {"probabilities": best, "probability": list(map(math.prod, best))}

    def in_text(
        self, value: Any, details: Mapping[str, Any], scored: Scored, text: str, places: Sequence[Place]
    ) -> dict[str, Any]:
        """``spans``, of tags of spans: where each begins and ends, its label and text, and how sure the least sure of
        its tokens is."""
        if scheme_of(scored.task, scored.labels) is None:
            return {}
        found = []
        for label, first, last in schemes.spans_of(value):
            start, end = places[first][0], places[last][1]
            span = {"start": start, "end": end, "label": label, "text": text[start:end]}
            if "probabilities" in details:
                span["probability"] = min(details["probabilities"][first : last + 1])
            found.append(span)
        return {"spans": found}

    def describe(self, value: list[str], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        words = tokens if any(tokens) else [str(i) for i in range(len(tokens))]
        return mark_spans(words, value) if task.scheme != "none" else beside(words, value)


class CTCAnswers(Answers):
    """A sequence of labels of each sentence, shorter than it and aligned with nothing."""

    name = "ctc"
    of_tokens = True

    def decode(self, logits: list[np.ndarray], given: Decoding) -> list[list[str]]:
        return [[given.labels[i] for i in row] for row in self._ids(logits, given)]

    def distributions(self, logits: list[np.ndarray], given: Decoding) -> dict[str, list[float]]:
        """``probability`` of the labels that were decoded, over all their paths."""
        found = [
            math.exp(ctc.log_probability(log_softmax(z.astype(np.float64)), row))
            for z, row in zip(logits, self._ids(logits, given))
        ]
        return {"probability": found}

    @staticmethod
    def _ids(logits: list[np.ndarray], given: Decoding) -> list[list[int]]:
        size = given.search.beam_size
        if size == 1:
            return [ctc.greedy(z.argmax(-1).tolist()) for z in logits]
        return [ctc.beam(log_softmax(z.astype(np.float64)).tolist(), size)[0] for z in logits]

    def describe(self, value: list[str], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return " ".join(value) or "none"


class GenerationAnswers(Answers):
    """A sequence of tokens of each sentence, or a text. The labels are the tokens; the first ends a sequence, and the
    second stands for all that training has not seen, or too rarely."""

    name = "generation"
    generates = True

    def sources(self, tokens: Sequence[str], encoding: dict[str, int], task: Any) -> ChainMap[str, int] | None:
        if not task.copy:
            return None
        # A text may hold what the end and unknown tokens are called by. What joins pieces is never copied.
        others = [token for token in tokens if encoding.get(token, END) in (END, UNKNOWN)]
        never = dict.fromkeys((token for token in others if task.units == "pieces" and JOINER in token), UNKNOWN)
        further = dict.fromkeys(token for token in others if token not in never)
        return ChainMap({token: len(encoding) + i for i, token in enumerate(further)}, never, encoding)

    def search(self, task: Any, asked: Search | None) -> Search:
        """How answers are looked for: as the task's configuration says, unless something else is asked for."""
        return (Search() if asked is None else asked).with_beam(task.beam_size)

    def in_form(self, tokens: Sequence[str], task: Any) -> list[str] | str:
        """Tokens in the form of the records."""
        if task.units == "tokens":
            return list(tokens)
        if task.units == "pieces":
            return joined(tokens)
        return (" " if task.units == "words" else "").join(tokens)

    def tokens_of(self, answer: Any, task: Any) -> list[str]:
        """The tokens of an answer in the form of the records."""
        if task.units == "pieces":
            return pieces_of(answer)
        is_text = task.units == "words" or (task.units == "auto" and isinstance(answer, str))
        return answer.split() if is_text else list(answer)

    def decode(self, logits: list[list[Hypothesis]], given: Decoding) -> list[list[str] | str]:
        return [self._answer(found[0], given, i) for i, found in enumerate(logits)]

    def details(self, logits: list[list[Hypothesis]], given: Decoding) -> dict[str, list[Any]]:
        """``probability`` of the answer, the product of its tokens' and its end's; whether it ``ended``, or was cut off
        at the longest that it may be; and of several answers all, of a search the best first, as ``nbest``."""
        every = [[self._details(each, given, i) for each in found] for i, found in enumerate(logits)]
        details = {key: [own[0][key] for own in every] for key in ("probability", "ended")}
        return details | ({"nbest": every} if given.search.nbest > 1 else {})

    def _details(self, found: Hypothesis, given: Decoding, sentence: int) -> dict[str, Any]:
        probability = math.exp(found.log_probability)
        return {
            "answer": self._answer(found, given, sentence),
            "probability": probability,
            "score": found.score,
            "ended": found.ended,
        }

    def distributions(self, logits: list[list[Hypothesis]], given: Decoding) -> dict[str, list[Any]]:
        """``written``: the answer's tokens, as it was written; and ``attention``: of each of them, and of the end, how
        much was read of each token of the text."""
        return {
            "written": [self._tokens(found[0], given, i) for i, found in enumerate(logits)],
            "attention": [found[0].attention.tolist() for found in logits],
        }

    def _answer(self, found: Hypothesis, given: Decoding, sentence: int) -> list[str] | str:
        return self.in_form(self._tokens(found, given, sentence), given.task)

    def _tokens(self, found: Hypothesis, given: Decoding, sentence: int) -> list[str]:
        names = given.labels if given.copied is None else [*given.labels, *given.copied[sentence]]
        return [names[i] for i in found.tokens]

    def describe(self, value: list[str] | str, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        every = details.get("nbest") or [{"answer": value, **details}]
        lines = []
        for each in every:
            text = " ".join(each["answer"]) if task.units == "tokens" else each["answer"]
            said = [f"{100 * each['probability']:.1f} %"]
            if len(every) > 1 and "score" in each:  # by which they are in order
                said.append(f"score {each['score']:.2f}")
            said += [] if each["ended"] else ["cut off"]
            lines.append(f"{text or 'none'} ({', '.join(said)})")
        return "\n  ".join(lines)


class LogFrequencyAnswers(Answers):
    """How frequent each token is. The labels are the classes, the most frequent tokens' first, and how many tokens of
    the vocabulary each has."""

    name = "log_frequency"
    of_tokens = True
    labels_itself = True

    def label_name(self, part: Any) -> str:
        return str(part["class"] if isinstance(part, dict) else part)

    def encoding(self, labels: Sequence[Mapping[str, int]], tokens: Sequence[str] = ()) -> np.ndarray:
        """The first id behind each class."""
        return np.cumsum([label["tokens"] for label in labels], dtype=np.int64) + FIRST_TOKEN

    def own_targets(self, tokens: np.ndarray, encoding: np.ndarray, task: Any, directions: int) -> np.ndarray:
        """Tokens that training has not seen, or too rarely, have no label."""
        known = (tokens >= FIRST_TOKEN) & (tokens < encoding[-1])
        return np.where(known, np.searchsorted(encoding, tokens, side="right"), NO_LABEL)

    def decode(self, logits: list[np.ndarray], given: Decoding) -> list[list[int]]:
        classes = [label["class"] for label in given.labels]
        return [[classes[i] for i in z.argmax(-1).tolist()] for z in logits]

    def details(self, logits: list[np.ndarray], given: Decoding) -> dict[str, list[int]]:
        """How many ``tokens`` of a text have a label, and for how many of them it was ``right``."""
        known = [target != NO_LABEL for target in given.targets]
        right = [z.argmax(-1) == target for z, target in zip(logits, given.targets)]
        return {"tokens": [int(k.sum()) for k in known], "right": [int((r & k).sum()) for r, k in zip(right, known)]}

    def describe(self, value: Sequence[int], details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return " ".join(f"{token}/{number}" for token, number in zip(tokens, value))


class LanguageModelAnswers(Answers):
    """How well each text's words, or their suffixes, are predicted from their neighbours; logits [T, D, V], or side by
    side [T, D * V]."""

    name = "language_model"
    of_tokens = True
    labels_itself = True

    def encoding(self, labels: Sequence[str], tokens: Sequence[str] = ()) -> np.ndarray | None:
        """The suffix of each token, -1 if it is not predicted; None where tokens are."""
        if not labels:
            return None
        places = {suffix: i for i, suffix in enumerate(labels)}
        return np.array([-1] * FIRST_TOKEN + [places.get(suffix_of(token), -1) for token in tokens[FIRST_TOKEN:]])

    def own_targets(self, tokens: np.ndarray, encoding: np.ndarray | None, task: Any, directions: int) -> np.ndarray:
        """[T, D]: after each token the next one, before it the one before."""
        return neighbours(tokens if encoding is None else encoding[tokens], task.num_tokens, directions)

    def decode(self, logits: list[np.ndarray], given: Decoding) -> list[float | None]:
        """The perplexity, or None of a text without a word to predict."""
        found: list[float | None] = []
        for z, target in zip(logits, given.targets):
            known = target != NO_LABEL
            scores = log_softmax(z.reshape(*target.shape, -1))
            own = np.take_along_axis(scores, np.where(known, target, 0)[..., None], -1)[..., 0]
            entropy = -float(own[known].sum(dtype=np.float64))
            found.append(perplexity(entropy, int(known.sum())) if known.any() else None)
        return found

    def details(self, logits: list[np.ndarray], given: Decoding) -> dict[str, list[int]]:
        """How many words of each text are predicted."""
        return {"tokens": [int((target != NO_LABEL).sum()) for target in given.targets]}

    def describe(self, value: float | None, details: Mapping[str, Any], tokens: Sequence[str], task: Any) -> str:
        return "no word to predict" if value is None else f"perplexity {value:.1f}"


ANSWERS: dict[str, Answers] = {
    made.name: made()
    for made in (
        ClassificationAnswers,
        OrdinalAnswers,
        MultilabelAnswers,
        RegressionAnswers,
        TaggingAnswers,
        CTCAnswers,
        GenerationAnswers,
        LogFrequencyAnswers,
        LanguageModelAnswers,
    )
}


def decode(
    logits: Mapping[str, Logits],
    tasks: Mapping[str, Any],
    labels: Mapping[str, Sequence[Any]],
    targets: Mapping[str, Sequence[np.ndarray]],
    paths: Mapping[str, Paths],
    search: Search | None = None,
    distributions: bool = False,
    copied: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> list[dict[str, Any]]:
    """For each sentence, each task's label in the form of the records, and ``<task>/probability`` of a class.

    Of a language model the perplexity, with ``<task>/tokens``, how many were predicted; None of none.

    Args:
        logits: of the tasks to decode.
        tasks: what the configuration says of them, by name, each with its :class:`Answers` as ``rules``.
        labels: theirs.
        targets: of those whose texts are their own labels.
        paths: of those whose tags are decoded together.
        search: of CTC's labels, and how generated answers were looked for; None: as the task's configuration says.
        distributions: whether to say how probable other labels are too, ``<task>/probabilities``.
        copied: of those whose answers may copy tokens.
    """
    predictions: list[dict[str, Any]] = [{} for _ in range(max(map(len, logits.values()), default=0))]
    for name, z in logits.items():
        task = tasks[name]
        answers = task.rules
        own = answers.search(task, search)
        tokens = (copied or {}).get(name)
        given = Decoding(task, labels.get(name, []), targets.get(name), paths.get(name), tokens, own)
        details = answers.details(z, given)
        if distributions:
            details |= answers.distributions(z, given)
        columns = {name: answers.decode(z, given)}
        columns |= {f"{name}/{detail}": values for detail, values in details.items()}
        for key, values in columns.items():
            for prediction, value in zip(predictions, values, strict=True):
                prediction[key] = value
    return predictions


def details_of(name: str, prediction: Mapping[str, Any]) -> dict[str, Any]:
    """What a prediction says of a task besides its label."""
    begin = f"{name}/"
    return {key.removeprefix(begin): value for key, value in prediction.items() if key.startswith(begin)}


# Of tags.


def scheme_of(task: Any, labels: Sequence[str]) -> schemes.Scheme | None:
    """The scheme of a task's tags; None if they are not of spans."""
    if task.scheme == "none":
        return None
    if task.scheme != "auto":
        return schemes.ALIASES.get(task.scheme, task.scheme)
    return "bio" if task.bio else schemes.scheme_of_labels(labels)


def mark_spans(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """The text with its spans in brackets, ``play [some jazz | genre]``; other tags behind a slash each."""
    if not are_of_spans(tags):
        return beside(tokens, tags)
    words = list(tokens)
    for label, first, last in schemes.spans_of(tags):
        words[first] = f"[{words[first]}"
        words[last] = f"{words[last]} | {label}]"
    return " ".join(words)


def beside(tokens: Sequence[str], tags: Sequence[str]) -> str:
    return " ".join(f"{token}/{tag}" for token, tag in zip(tokens, tags))


def are_of_spans(tags: Sequence[str]) -> bool:
    return all(any(schemes.belongs_to(tag, scheme) for scheme in schemes.SCHEMES) for tag in tags)


# Of language models.


def suffix_of(token: str) -> str:
    return token[-SUFFIX:].lower()


def suffixes_of(counts: Mapping[str, int]) -> Counter[str]:
    """How often each suffix occurs, from how often each token does."""
    found: Counter[str] = Counter()
    for token, count in counts.items():
        found[suffix_of(token)] += count
    return found


def neighbours(ids: np.ndarray, num_tokens: int, directions: int) -> np.ndarray:
    """Of each id [T] the next one and, with two directions, the one before: [T, D]; NO_LABEL where there is none, or
    none below ``num_tokens``."""
    known = np.where((ids >= 0) & (ids < num_tokens), ids, NO_LABEL)
    found = np.full((len(ids), 2), NO_LABEL, dtype=np.int64)
    found[:-1, 0] = known[1:]
    found[1:, 1] = known[:-1]
    return found[:, :directions]


def perplexity(entropy: float, count: int) -> float:
    return math.exp(min(entropy / count, 700.0))  # a number still
