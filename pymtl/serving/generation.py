"""Sequences from a model that says, step by step, how probable each next token is: by search or by sampling.

All sentences' hypotheses make each step together, in one call of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from .probabilities import log_softmax

END = 0  # the token that ends a sequence, and that a decoder reads before the first
UNKNOWN = 1  # the token that stands for all others, which no answer has
MAX_LENGTH = 100  # tokens of an answer at most, where nothing else is said
LONGEST = 1 << 20  # and whatever is said
NAN_LOGITS = "logits: expected numbers to choose the next token by, got nan: is a weight or an input nan?"
NO_COVERAGE = 1e-9  # the least attention that the coverage penalty knows


@dataclass(frozen=True)
class Search:
    """How sequences are looked for.

    Args:
        beam_size: how many hypotheses of a sentence are kept at each step; 1 takes the likeliest token each time. None:
            as many as the task's configuration says, and ``nbest`` at least.
        nbest: how many answers are given: of a search ``beam_size`` at most, the best first; any number of samples.
        length_penalty: the power a of the length by which scores are divided, ``((5 + length) / 6)^a`` (Wu et al. 2016,
            "Google's Neural Machine Translation System", equation 14); 0 prefers short answers.
        coverage_penalty: the weight b of that equation's second term, which prefers answers whose attention has passed
            over every token of the sentence.
        no_repeat_ngram: n, if no n tokens may stand in an answer twice (Paulus et al. 2018, "A Deep Reinforced Model
            for Abstractive Summarization", section 2.5); 0: they may.
        max_length: tokens of an answer at most; None: as many as the task allows. A search then looks whether the end
            follows; a sample of so many tokens is cut off.
        sample: draw each token by its probability instead of looking for the likeliest.
        temperature: by which logits are divided before a token is drawn.
        top_k: draw among the k likeliest tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"); 0: among
            all.
        top_p: draw among the fewest tokens that together are this probable (Holtzman et al. 2020, "The Curious Case of
            Neural Text Degeneration").
        seed: of the draws; a sentence's depend on it and on the sentence's number alone.

    Raises:
        ValueError: a number does not fit.
    """

    beam_size: int | None = None
    nbest: int = 1
    length_penalty: float = 1.0
    coverage_penalty: float = 0.0
    no_repeat_ngram: int = 0
    max_length: int | None = None
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"beam_size": 1, "nbest": 1, "max_length": 1, "no_repeat_ngram": 0, "top_k": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            fits = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least
            fits = fits or (value is None and name in ("beam_size", "max_length"))
            _require(fits, name, f"a whole number {'above 0' if least else 'of at least 0'}", value)
        _require((self.max_length or 1) <= LONGEST, "max_length", f"a number of at most {LONGEST}", self.max_length)
        fits = self.sample or self.beam_size is None or self.nbest <= self.beam_size
        _require(fits, "nbest", f"at most beam_size = {self.beam_size} without sampling", self.nbest)
        fits = not self.sample or self.beam_size in (None, 1)
        _require(fits, "beam_size", "none with sampling (nbest says how many samples)", self.beam_size)
        for name in ("length_penalty", "coverage_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < math.inf, name, "a number of at least 0", value)
        fits = _is_number(self.temperature) and 0 < self.temperature < math.inf
        _require(fits, "temperature", "a number above 0", self.temperature)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0, at most 1", self.top_p)

    def with_beam(self, usual: int = 1) -> Search:
        """The same with a ``beam_size``, where there is none the ``usual`` one."""
        if self.beam_size is not None:
            return self
        return replace(self, beam_size=1 if self.sample else max(usual, self.nbest))

    def normalised(self, log_probability: np.ndarray | float, length: int) -> np.ndarray | float:
        """The score of ``length`` tokens, the end among them, without the coverage penalty."""
        return log_probability * math.exp(-self.length_penalty * math.log((5 + length) / 6))


@dataclass(frozen=True)
class Hypothesis:
    """One answer: its ``tokens`` without the end; ``log_probability`` of all its tokens, the end's too; ``score``, by
    which a search ranks it; whether it ``ended`` or was cut off; and where it was asked for, how much each of its steps
    (the end is one) read of each token of the sentence, ``attention`` [S, T]."""

    tokens: list[int]
    log_probability: float
    score: float
    ended: bool = True
    attention: np.ndarray | None = field(default=None, compare=False)


class Scores(NamedTuple):
    """What a model says of M hypotheses' next tokens: log-probabilities ``values`` [M, k] of the likeliest ``ids``
    [M, k], falling; and how much each read of its sentence's tokens, ``attention`` [M, T], if it does."""

    values: np.ndarray
    ids: np.ndarray
    attention: np.ndarray | None = None


class Steps(Protocol):
    """A model that goes on step by step, with a state for each hypothesis."""

    first: np.ndarray  # int64 [B], what each sentence's hypotheses read first
    ends: bool  # whether a sequence may end by itself
    lengths: np.ndarray  # int64 [B], of the sentences whose tokens ``attention`` is over

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        """Reads a token of each of M hypotheses.

        Args:
            tokens: int64 [M].
            parents: int64 [M], the hypothesis of the last step that each goes on from; at the first step, the sentence.
            sentences: int64 [M], which each belongs to.
            count: k, how many tokens are wanted; 0 for all.
            banned: hypotheses and tokens, in pairs, that are not to come.
        """
        ...


Banned = tuple[Sequence[int], Sequence[int]]


def likeliest(
    logits: np.ndarray, count: int, banned: Banned, never: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities and ids of the ``count`` likeliest tokens (0: all), falling, of logits [M, C]; of equal
    ones any. What is banned does not come, and neither does ``never``; probabilities are of all tokens, these among
    them.

    Raises:
        RuntimeError: a logit is nan.
    """
    scores = log_softmax(logits.astype(np.float64))
    if np.isnan(scores).any():
        raise RuntimeError(NAN_LOGITS)
    scores[:, list(never)] = -np.inf
    scores[list(banned[0]), list(banned[1])] = -np.inf
    size = scores.shape[1]
    kept = min(count, size) if count > 0 else size
    if kept == 1:
        ids = scores.argmax(1)[:, None]
        return np.take_along_axis(scores, ids, 1), ids
    ids = np.broadcast_to(np.arange(size), scores.shape)
    if kept < size:
        ids = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
    found = np.take_along_axis(scores, ids, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(found, order, 1), np.take_along_axis(ids, order, 1)


def check_limits(max_length: int, never: Sequence[int], classes: int) -> None:
    """Of generated answers the longest, and the tokens that are not to come.

    Raises:
        TypeError, ValueError: one is no whole number, or does not fit.
    """
    for name, value, least, most in (
        ("max_length", max_length, 1, LONGEST),
        *(("never", token, 0, classes - 1) for token in never),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name}: expected whole numbers, got {value!r}")
        if not least <= value <= most:
            raise ValueError(f"{name}: expected a number from {least} to {most}, got {value}")


def search(
    model: Steps, settings: Search, max_length: int, numbers: Sequence[int] | None = None
) -> list[list[Hypothesis]]:
    """The ``nbest`` sequences of each sentence, the best first; samples in the order they were drawn.

    Args:
        max_length: tokens at most, where the settings say nothing.
        numbers: of the sentences, by which samples are drawn; by default from 0 on.

    Raises:
        ValueError: there are more or fewer ``numbers`` than sentences.
    """
    settings = settings.with_beam()
    limit = settings.max_length or max_length
    if numbers is not None and len(numbers) != len(model.first):
        raise ValueError(f"numbers: expected one for each of {len(model.first)} sentences, got {len(numbers)}")
    if len(model.first) == 0:
        return []
    if settings.sample:
        return _sampled(model, settings, limit, range(len(model.first)) if numbers is None else numbers)
    # With a coverage penalty a search goes on behind the first end.
    if settings.beam_size == 1 and settings.coverage_penalty == 0:
        return [[found] for found in _greedy(model, settings, limit)]
    return _searched(model, settings, limit)


def _greedy(model: Steps, settings: Search, limit: int) -> list[Hypothesis]:
    """What a search with a beam of one finds, in fewer steps of Python: each sentence has one hypothesis."""
    batch = len(model.first)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    read: list[list[np.ndarray]] = [[] for _ in range(batch)]
    sums, ended = [0.0] * batch, [False] * batch
    sentences = parents = np.arange(batch)
    last = model.first
    # One step more than there may be tokens, at which only an end counts.
    for length in range(limit + model.ends):
        banned: Banned = ([], [])
        if settings.no_repeat_ngram > 0:
            banned = _repeats(np.array([tokens[i] for i in sentences]), settings.no_repeat_ngram)
        scores = model.step(last, parents, sentences, 1, banned)
        last = scores.ids[:, 0]
        go_on = []
        for row, (sentence, token, value) in enumerate(
            zip(sentences.tolist(), last.tolist(), scores.values[:, 0].tolist())
        ):
            ends = model.ends and token == END
            if value == -math.inf or (length == limit and not ends):
                continue
            sums[sentence] += value
            ended[sentence] = ends
            if scores.attention is not None:
                read[sentence].append(scores.attention[row, : model.lengths[sentence]])
            if not ends:
                tokens[sentence].append(token)
                go_on.append(row)
        if not go_on:
            break
        parents = np.array(go_on)
        sentences, last = sentences[parents], last[parents]
    scored = [settings.normalised(total, max(len(own) + end, 1)) for own, total, end in zip(tokens, sums, ended)]
    attention = [np.array(steps) if steps else None for steps in read]
    return [Hypothesis(*each) for each in zip(tokens, sums, scored, ended, attention)]


@dataclass
class _Live:
    """Hypotheses that go on, those of a sentence side by side: [M, ...] each."""

    sentences: np.ndarray
    parents: np.ndarray  # at the step before; at the first, the sentences
    tokens: np.ndarray  # [M, S] so far
    sums: np.ndarray  # of log-probabilities
    attention: np.ndarray | None = None  # [M, S, T]

    @staticmethod
    def begin(batch: int, each: int) -> _Live:
        sentences = np.arange(batch).repeat(each)
        return _Live(sentences, sentences, np.zeros((len(sentences), 0), dtype=np.int64), np.zeros(len(sentences)))

    def following(self, model: Steps, count: int, settings: Search) -> Scores:
        """What the model says of the next tokens."""
        last = self.tokens[:, -1] if self.tokens.shape[1] else model.first[self.sentences]
        banned = _repeats(self.tokens, settings.no_repeat_ngram)
        return model.step(last, self.parents, self.sentences, count, banned)

    def grown(self, rows: np.ndarray, ids: np.ndarray, sums: np.ndarray, read: np.ndarray | None) -> _Live:
        """The hypotheses ``rows`` with a token more."""
        tokens = np.concatenate([self.tokens[rows], ids[:, None]], axis=1)
        return _Live(self.sentences[rows], rows, tokens, sums, self.attended(rows, read))

    def attended(self, rows: np.ndarray, read: np.ndarray | None) -> np.ndarray | None:
        """The attention of ``rows``, this step's with it."""
        if read is None:
            return None
        last = read[rows, None]
        return last if self.attention is None else np.concatenate([self.attention[rows], last], axis=1)

    def hypothesis(
        self, model: Steps, settings: Search, row: int, log_probability: float, read: np.ndarray | None, ended: bool
    ) -> Hypothesis:
        """A row as an answer; ``read``: its attention."""
        length = max(self.tokens.shape[1] + ended, 1)
        own = None if read is None else read[:, : model.lengths[self.sentences[row]]]
        score = settings.normalised(log_probability, length) + _coverage(own, settings)
        return Hypothesis(self.tokens[row].tolist(), log_probability, score, ended, own)

    def cut_off(self, model: Steps, settings: Search, row: int) -> Hypothesis:
        """A row as an answer that has not ended."""
        read = None if self.attention is None else self.attention[row]
        return self.hypothesis(model, settings, row, float(self.sums[row]), read, False)


def _searched(model: Steps, settings: Search, limit: int) -> list[list[Hypothesis]]:
    size, batch = settings.beam_size, len(model.first)
    found: list[list[Hypothesis]] = [[] for _ in range(batch)]
    cut: list[list[Hypothesis]] = [[] for _ in range(batch)]  # those that did not end
    live = _Live.begin(batch, 1)
    # One step more than there may be tokens, at which only an end counts.
    for length in range(1, limit + 1 + model.ends):
        # Twice as many as are kept, since half of them may be ends.
        scores = live.following(model, 2 * size, settings)
        rows, ids, sums, ranks = _best(live, scores, 2 * size)
        of, ends = live.sentences[rows], (ids == END) & model.ends
        counted = ends & (ranks < size)
        for i in np.flatnonzero(counted):
            read = live.attended(rows[i : i + 1], scores.attention)
            ended = live.hypothesis(model, settings, rows[i], float(sums[i]), None if read is None else read[0], True)
            found[of[i]] = sorted([*found[of[i]], ended], key=lambda own: -own.score)[:size]
        stopped = scores.values[:, 0] == -np.inf  # nothing may come
        if length > limit:
            stopped = ~np.isin(np.arange(len(stopped)), rows[counted])
        for row in np.flatnonzero(stopped):
            cut[live.sentences[row]].append(live.cut_off(model, settings, row))
        if length > limit:
            break
        # A sentence goes on while it has too few answers, or a hypothesis that is better than the worst of them.
        goes_on = ~ends & (_place_among(~ends, of) < size)
        best = np.full(batch, -np.inf)
        np.maximum.at(best, of[goes_on], settings.normalised(sums[goes_on], length))
        worst = np.array([own[-1].score if len(own) == size else -np.inf for own in found])
        goes_on &= (best > worst)[of]
        live = live.grown(rows[goes_on], ids[goes_on], sums[goes_on], scores.attention)
        if len(live.sentences) == 0:
            break
    else:
        for row in range(len(live.sentences)):
            cut[live.sentences[row]].append(live.cut_off(model, settings, row))
    # What was cut off fills up what is missing, the longest first.
    rest = (sorted(own, key=lambda each: -len(each.tokens)) for own in cut)
    return [[*own, *more][: settings.nbest] for own, more in zip(found, rest)]


def _best(live: _Live, scores: Scores, count: int) -> tuple[np.ndarray, ...]:
    """Of each sentence the ``count`` likeliest hypotheses with a token more, falling: their rows, the tokens, the sums,
    and the place of each among them."""
    new = _begins(live.sentences)
    firsts = np.flatnonzero(new)
    group = np.cumsum(new) - 1
    slot = np.arange(len(group)) - firsts[group]
    width = scores.values.shape[1]
    grid = np.full((len(firsts), slot.max() + 1, width), -np.inf)
    grid[group, slot] = live.sums[:, None] + scores.values
    flat = grid.reshape(len(firsts), -1)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    sums = np.take_along_axis(flat, chosen, 1)
    rows = firsts[:, None] + chosen // width
    known = sums > -np.inf
    rows = rows[known]
    return rows, scores.ids[rows, (chosen % width)[known]], sums[known], known.nonzero()[1]


def _place_among(chosen: np.ndarray, group: np.ndarray) -> np.ndarray:
    """How many before each are chosen of its group; groups stand together."""
    if len(group) == 0:
        return np.zeros(0, dtype=np.int64)
    before = np.cumsum(chosen) - chosen
    new = _begins(group)
    return before - before[new][np.cumsum(new) - 1]


def _begins(group: np.ndarray) -> np.ndarray:
    """Whether each is the first of its group; groups stand together."""
    new = np.ones(len(group), dtype=bool)
    np.not_equal(group[1:], group[:-1], out=new[1:])
    return new


def _repeats(tokens: np.ndarray, n: int) -> Banned:
    """The tokens with which n tokens would come a second time."""
    rows: list[int] = []
    ids: list[int] = []
    if 0 < n <= tokens.shape[1]:
        for row, own in enumerate(tokens.tolist()):
            end = own[len(own) - n + 1 :]
            seen = {own[i + n - 1] for i in range(len(own) - n + 1) if own[i : i + n - 1] == end}
            rows += [row] * len(seen)
            ids += sorted(seen)
    return rows, ids


def _coverage(attention: np.ndarray | None, settings: Search) -> float:
    """The coverage penalty (Wu et al. 2016, equation 14) of the attention [S, T]."""
    if settings.coverage_penalty == 0 or attention is None:
        return 0.0
    covered = attention.sum(0, dtype=np.float64).clip(NO_COVERAGE, 1.0)
    return settings.coverage_penalty * float(np.log(covered).sum())


def _sampled(model: Steps, settings: Search, limit: int, numbers: Sequence[int]) -> list[list[Hypothesis]]:
    each = settings.nbest
    found: list[list[Hypothesis]] = [[] for _ in model.first]
    live = _Live.begin(len(model.first), each)
    generators = np.array(
        [np.random.Generator(np.random.Philox([settings.seed, n, i])) for n in numbers for i in range(each)]
    )
    drawn: list[Hypothesis | None] = [None] * len(generators)
    own = np.arange(len(generators))  # whose draw each hypothesis is
    for _ in range(limit):
        scores = live.following(model, settings.top_k, settings)
        uniform = np.array([generator.random() for generator in generators[own]])
        column = _draw(scores.values, uniform, settings)[:, None]
        ids = np.take_along_axis(scores.ids, column, 1)[:, 0]
        sums = live.sums + np.take_along_axis(scores.values, column, 1)[:, 0]
        stopped = sums == -np.inf  # nothing may come
        ends = (ids == END) & model.ends & ~stopped
        for row in np.flatnonzero(stopped):
            drawn[own[row]] = live.cut_off(model, settings, row)
        for row in np.flatnonzero(ends):
            read = live.attended(rows=np.array([row]), read=scores.attention)
            weights = None if read is None else read[0]
            drawn[own[row]] = live.hypothesis(model, settings, row, float(sums[row]), weights, True)
        rows = np.flatnonzero(~ends & ~stopped)
        live, own = live.grown(rows, ids[rows], sums[rows], scores.attention), own[rows]
        if len(rows) == 0:
            break
    for row, number in enumerate(own):
        drawn[number] = live.cut_off(model, settings, row)
    for number, hypothesis in enumerate(drawn):
        found[number // each].append(hypothesis)
    return found


def _draw(log_probabilities: np.ndarray, uniform: np.ndarray, settings: Search) -> np.ndarray:
    """A column of each row [M, k], falling, for a number from 0 to below 1 each."""
    # Where nothing may come, the first is as good as any.
    largest = np.maximum(log_probabilities[:, :1], np.finfo(np.float64).min)
    with np.errstate(over="ignore"):  # by a tiny temperature
        chances = np.exp(np.minimum((log_probabilities - largest) / settings.temperature, 0.0))
    chances[:, 0] = 1.0
    chances /= chances.sum(1, keepdims=True)
    reached = np.cumsum(chances, axis=1)
    if settings.top_p < 1:
        chances = np.where(reached - chances < settings.top_p, chances, 0.0)
        reached = np.cumsum(chances, axis=1)
    return np.minimum((reached <= uniform[:, None] * reached[:, -1:]).sum(1), (chances > 0).sum(1) - 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _require(fits: bool, name: str, expected: str, actual: object) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {repr(actual) if isinstance(actual, str) else actual}")
