"""Predictions and their scores, by seqeval, scikit-learn, scipy and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymtl.crf import CRF
from pymtl.decoder import Memory
from pymtl.generation import generate
from pymtl.serving import answers
from pymtl.serving.answers import Scored, details_of
from pymtl.serving.generation import UNKNOWN, Hypothesis, Search
from pymtl.serving.records import Record
from pymtl.training.batches import Batch
from pymtl.training.config import Config, TaskConfig, TrainingConfig
from pymtl.training.errors import DataError
from pymtl.training.kinds import KINDS
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.reference_decoder import PlainMemory
from pymtl.training.vocabulary import Vocabulary

LOWER_IS_BETTER = frozenset().union(*(kind.lower_is_better for kind in KINDS.values()))
UNBOUNDED = frozenset(kind.scores[0] for kind in KINDS.values() if not kind.is_bounded)


def decode(
    logits: Mapping[str, Tensor | Memory | PlainMemory],
    batch: Batch,
    config: Config,
    vocabulary: Vocabulary,
    crfs: Mapping[str, CRF] | None = None,
    search: Search | None = None,
    distributions: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """For each sentence, each task's label in the form of the records, and ``<task>/probability`` of a class.

    Of a language model the perplexity, with ``<task>/tokens``, how many were predicted; None of none.

    Args:
        logits: padded, batch first, of the tasks to decode; of a task whose answers are generated what its decoder
            reads.
        batch: what they are of.
        crfs: of the tasks whose tags are decoded together.
        search: for CTC's labels and generated answers; None: as each task's configuration says.
        distributions: whether to say how probable other labels are too, ``<task>/probabilities``.
        numbers: of the sentences, by which samples are drawn.
    """
    lengths = batch.lengths.tolist()

    def rows(padded: Tensor) -> list[np.ndarray]:
        return [row[:length] for row, length in zip(padded.cpu().numpy(), lengths)]

    found: dict[str, answers.Logits] = {}
    targets, paths = {}, {}
    for name, z in logits.items():
        task = config.tasks[name]
        rules = task.rules
        if rules.generates:
            found[name] = generated(z, task, search, distributions, numbers)
            continue
        z = z.detach() if z.dtype == torch.float64 else z.detach().float()
        found[name] = rows(z) if rules.of_tokens else z.cpu().numpy()
        if rules.labels_itself:
            targets[name] = rows(batch.targets[name])
        if crfs and name in crfs:
            paths[name] = _paths(crfs[name], z, lengths, distributions)
    decoded = answers.decode(
        found, config.tasks, vocabulary.labels, targets, paths, search, distributions, batch.copied
    )
    return decoded if found else [{} for _ in lengths]


def generated(
    memory: Memory | PlainMemory,
    task: TaskConfig,
    search: Search | None = None,
    attention: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The answers of a task that generates. Arguments as for :func:`decode`; ``attention``: whether to give it too."""
    settings = task.rules.search(task, search)
    if isinstance(memory, Memory):
        return generate(memory, settings, task.max_length, attention, [UNKNOWN], numbers)
    return memory.generate(settings, task.max_length, attention, [UNKNOWN])


def _paths(crf: CRF, emissions: Tensor, lengths: Sequence[int], probabilities: bool) -> answers.Paths:
    tags, scores = crf.decode(emissions, lengths)
    of_each = [row[:length] for row, length in zip(tags.tolist(), lengths)]
    if not probabilities:
        return answers.Paths(of_each)
    marginals = crf.marginals(emissions, lengths).gather(-1, tags.unsqueeze(-1)).squeeze(-1).tolist()
    whole = (scores - crf.log_partition(emissions, lengths)).exp().tolist()
    return answers.Paths(of_each, [row[:length] for row, length in zip(marginals, lengths)], whole)


def score(
    records: Sequence[Record],
    predictions: Sequence[Mapping[str, Any]],
    config: Config,
    labels: Mapping[str, Sequence[Any]],
) -> dict[str, float]:
    """The scores of all tasks, the one a task is judged by first; higher is better, but for error rates and the
    perplexity.

    Accuracy and macro F1 of classes; quadratically weighted kappa and accuracy of ordered ones; for tags span F1 by
    seqeval where the task's tags are of spans, else token accuracy; R², Pearson's and Spearman's correlation of
    numbers; micro F1 of multiple labels; one minus the label error rate of CTC; of generated answers the token error
    rate, exact matches, of texts BLEU and chrF, of characters and pieces the word error rate; a language model's
    perplexity; and ``exact_match``, the share of sentences with every class, ordered class, set of labels and tag
    right. Records and tokens without a label do not count; a label that training has not seen counts as missed.

    Args:
        records, predictions: of the same sentences.
        config: whose tasks they are.
        labels: of each task, as the vocabulary has them.
    """
    scores: dict[str, float] = {}
    for name, task in config.main_tasks.items():
        pairs = [(r.labels[name], p[name], p) for r, p in zip(records, predictions) if r.labels.get(name) is not None]
        if not pairs:
            continue
        truth, guess = [a for a, _, _ in pairs], [b for _, b, _ in pairs]
        of_task = [details_of(name, p) for _, _, p in pairs]
        own = task.rules.score(truth, guess, of_task, Scored(task, labels.get(name, [])))
        scores |= {f"{name}/{metric}": value for metric, value in own.items()}
    exact = exact_tasks(config)
    right = [
        all(
            r.labels.get(n) is None or config.tasks[n].rules.is_right(r.labels[n], p[n], config.tasks[n])
            for n in exact
            if n in p
        )
        for r, p in zip(records, predictions)
        if any(r.labels.get(name) is not None for name in exact)
    ]
    if right:
        scores["exact_match"] = sum(right) / len(right)
    return scores


def exact_tasks(config: Config) -> list[str]:
    """The tasks that ``exact_match`` counts."""
    return [name for name, task in config.main_tasks.items() if task.rules.is_exact]


def check_scorable(records: Sequence[Record], config: Config, where: str) -> None:
    """What validation needs before training begins.

    Raises:
        DataError: no task can be scored on these records, or not what ``select_by`` asks for.
    """
    scored = []
    for name, task in config.main_tasks.items():
        count = sum(record.labels.get(name) is not None for record in records)
        if count >= task.rules.least_labels:
            scored.append(name)
    select_by = config.training.select_by
    if select_by == "delta":
        asked = [name.partition("/")[0] for name in config.training.baseline]
    elif select_by == "exact_match":
        asked = exact_tasks(config)
    else:
        asked = list(config.main_tasks) if select_by == "mean" else [select_by.partition("/")[0]]
    if not set(asked) & set(scored):
        raise DataError(
            f"{where}: expected a label of {' or '.join(asked)} to score in at least one record (two for a task of "
            "numbers), got too few"
        )


def primary(scores: Mapping[str, float]) -> dict[str, float]:
    """The score each task is judged by, by the task; the larger the better."""
    chosen: dict[str, float] = {}
    for name, value in scores.items():
        task, slash, _ = name.partition("/")
        if slash:
            chosen.setdefault(task, -value if lower_is_better(name) else value)
    return chosen


def lower_is_better(name: str) -> bool:
    """Whether a score, as ``"notes/perplexity"``, is the better the lower."""
    return name.partition("/")[2] in LOWER_IS_BETTER


def selection_score(scores: Mapping[str, float], settings: TrainingConfig | None = None) -> float:
    """What the best epoch is chosen by: the mean of the tasks' scores, or as ``select_by`` says.

    Into the mean a score enters as -1 at least: R² has no lower limit, and one task's could hide all others'. Tasks
    without an upper limit (a language model) count only if there is no other. Of "delta" it is the mean relative
    improvement on the baseline's scores (Maninis et al. 2019, "Attentive Single-Tasking of Multiple Tasks").
    """
    select_by = "mean" if settings is None else settings.select_by
    by_task = primary(scores)
    if select_by == "delta":
        return delta(scores, settings.baseline)
    if select_by == "exact_match":
        return scores.get("exact_match", -math.inf)
    if "/" in select_by:
        value = scores.get(select_by, -math.inf)
        return -value if lower_is_better(select_by) and math.isfinite(value) else value
    if select_by != "mean":
        return by_task.get(select_by, -math.inf)
    unbounded = {name.partition("/")[0] for name in scores if name.partition("/")[2] in UNBOUNDED}
    counted = [max(value, -1.0) for task, value in by_task.items() if task not in unbounded] or list(by_task.values())
    return sum(counted) / len(counted) if counted else -math.inf


def best_epoch(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first of the epochs with the best selection score; of several the one with the best mean of the tasks."""
    return max(epochs, key=lambda epoch: (epoch["selection"], selection_score(epoch["valid"])))


def passed_over(epochs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """Of each of several tasks whose score was clearly better in another epoch than in the one that is kept for all
    tasks: that epoch, its score, and the kept one's. The score is a task's first of which more is better; clearly is by
    0.02, less than which is often noise."""
    kept = best_epoch(epochs)["valid"]
    first: dict[str, str] = {}
    for name in kept:
        if "/" in name and not lower_is_better(name):
            first.setdefault(name.partition("/")[0], name)
    found = {}
    for name in first.values() if len(first) > 1 else ():
        scored = [epoch for epoch in epochs if math.isfinite(epoch["valid"].get(name, math.nan))]
        best = max(scored, key=lambda epoch: epoch["valid"][name], default=None)
        if best is not None and best["valid"][name] - kept[name] >= 0.02:
            found[name] = (best["epoch"], best["valid"][name], kept[name])
    return found


def delta(scores: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """The mean over the baseline's scores of how much better these are, relative to them; NaN if one of those is 0."""
    changes = []
    for name, base in baseline.items():
        if name in scores:
            sign = -1 if lower_is_better(name) else 1
            changes.append(sign * (scores[name] - base) / abs(base) if base != 0 else math.nan)
    return sum(changes) / len(changes) if changes else -math.inf


@torch.no_grad()
def predict(
    model_with_loss: ModelWithLoss,
    batches: Mapping[str, Sequence[Batch]],
    records: Mapping[str, Sequence[Record]],
    config: Config,
    vocabulary: Vocabulary,
) -> tuple[list[Record], list[dict[str, Any]]]:
    """All records, and what a model, where it is, says of them; batches together hold all ``records`` of each data
    set."""
    device = next(model_with_loss.parameters()).device
    everything: list[Record] = []
    predictions: list[dict[str, Any]] = []
    for dataset, own in batches.items():
        found: list[dict[str, Any]] = [{} for _ in records[dataset]]
        for batch in own:
            there = batch.to(device)
            decoded = decode(model_with_loss.logits(there, dataset), there, config, vocabulary, model_with_loss.crfs)
            for index, prediction in zip(batch.indices, decoded):
                found[index] = prediction
        everything += records[dataset]
        predictions += found
    return everything, predictions


def evaluate(
    model_with_loss: ModelWithLoss,
    batches: Mapping[str, Sequence[Batch]],
    records: Mapping[str, Sequence[Record]],
    config: Config,
    vocabulary: Vocabulary,
) -> dict[str, float]:
    """The scores of a model. Arguments as for :func:`predict`."""
    everything, predictions = predict(model_with_loss, batches, records, config, vocabulary)
    return score(everything, predictions, config, vocabulary.labels)


def uncertainties(
    records: Sequence[Record], predictions: Sequence[Mapping[str, Any]], config: Config
) -> dict[str, Any]:
    """How far off answers are, of each task whose kind says it so."""
    found = {}
    for name, task in config.main_tasks.items():
        pairs = [(r.labels[name], p[name]) for r, p in zip(records, predictions) if r.labels.get(name) is not None]
        value = task.rules.uncertainty([a for a, _ in pairs], [b for _, b in pairs], task) if pairs else None
        if value is not None:
            found[name] = value
    return found
