"""Predictions and their scores, by seqeval, scikit-learn, scipy and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymtl.crf import CRF
from pymtl.ctc import ctc_beam, ctc_greedy
from pymtl.heads import OrdinalHead
from pymtl.training.backends import Backend
from pymtl.training.batches import NO_LABEL, Batch
from pymtl.training.config import Config, TrainingConfig
from pymtl.training.data import Record
from pymtl.training.errors import DataError
from pymtl.training.vocabulary import Vocabulary

LOWER_IS_BETTER = ("perplexity",)


def decode(
    logits: Mapping[str, Tensor],
    batch: Batch,
    config: Config,
    vocabulary: Vocabulary,
    crfs: Mapping[str, CRF] | None = None,
    beam_size: int = 1,
) -> list[dict[str, Any]]:
    """For each sentence, each task's label in the form of the records, and ``<task>/probability`` of a class.

    Of a language model the perplexity, with ``<task>/tokens``, how many were predicted; None of none.

    Args:
        logits: padded, batch first, of the tasks to decode.
        batch: what they are of.
        crfs: of the tasks whose tags are decoded together.
        beam_size: of the search for CTC's labels; 1 takes the likeliest at each step.
    """
    lengths = batch.lengths
    predictions: list[dict[str, Any]] = [{} for _ in range(lengths.shape[0])]
    for name, z in logits.items():
        task = config.tasks[name]
        labels = vocabulary.labels.get(name, [])
        if task.kind == "regression":
            values = z[:, 0].tolist() if task.num_targets == 1 else z.tolist()
        elif task.kind == "classification":
            best = z.softmax(-1).max(-1)
            values = [labels[index] for index in best.indices.tolist()]
            for prediction, p in zip(predictions, best.values.tolist()):
                prediction[f"{name}/probability"] = p
        elif task.kind == "ordinal":
            values = [labels[index] for index in OrdinalHead.classes(z).tolist()]
        elif task.kind == "tagging":
            tags = crfs[name].decode(z, lengths)[0] if crfs and name in crfs else z.argmax(-1)
            values = [[labels[i] for i in row[:length]] for row, length in zip(tags.tolist(), lengths.tolist())]
        elif task.kind == "ctc":
            best = ctc_greedy(z, lengths) if beam_size == 1 else [row for row, _ in ctc_beam(z, lengths, beam_size)]
            values = [[labels[i] for i in row] for row in best]
        elif task.kind == "multilabel":
            values = [[label for label, yes in zip(labels, row) if yes] for row in (z > 0).tolist()]
        else:
            entropies, counts = _entropies(z, batch.targets[name])
            values = [_perplexity(e, n) if n > 0 else None for e, n in zip(entropies, counts)]
            for prediction, count in zip(predictions, counts):
                prediction[f"{name}/tokens"] = count
        for prediction, value in zip(predictions, values):
            prediction[name] = value
    return predictions


def _entropies(z: Tensor, targets: Tensor) -> tuple[list[float], list[int]]:
    """Of each sentence the sum of its predicted neighbours' cross-entropies, and their number."""
    entropies = F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=NO_LABEL, reduction="none")
    sums = entropies.view(len(targets), -1).double().sum(1)
    return sums.tolist(), (targets != NO_LABEL).flatten(1).sum(1).tolist()


def _perplexity(entropy: float, count: int) -> float:
    return math.exp(min(entropy / count, 700.0))  # a number still


def score(
    records: Sequence[Record],
    predictions: Sequence[Mapping[str, Any]],
    config: Config,
    labels: Mapping[str, Sequence[Any]],
) -> dict[str, float]:
    """The scores of all tasks, the one a task is judged by first; higher is better, but for the perplexity.

    Accuracy and macro F1 of classes; quadratically weighted kappa and accuracy of ordered ones; for tags span F1 by
    seqeval where the task's tags are BIO, else token accuracy; R², Pearson's and Spearman's correlation of numbers;
    micro F1 of multiple labels; one minus the label error rate of CTC; a language model's perplexity; and
    ``exact_match``, the share of sentences with every class and tag right. Records and tokens without a label do not
    count.

    Args:
        records, predictions: of the same sentences.
        config: whose tasks they are.
        labels: of each task, as the vocabulary has them.
    """
    scores: dict[str, float] = {}
    for name, task in config.tasks.items():
        pairs = [(r.labels[name], p[name], p) for r, p in zip(records, predictions) if r.labels.get(name) is not None]
        if not pairs:
            continue
        truth, guess = [a for a, _, _ in pairs], [b for _, b, _ in pairs]
        if task.kind == "language_model":
            counts = [p[f"{name}/tokens"] for _, _, p in pairs]
            total = sum(math.log(value) * count for value, count in zip(guess, counts) if count > 0)
            own = {"perplexity": _perplexity(total, sum(counts))} if sum(counts) > 0 else {}
        elif task.kind == "tagging":
            own = _tagging(truth, guess, is_bio(labels[name]))
        else:
            if task.kind == "ordinal" and task.order:
                truth, guess = ([float(task.order.index(v)) for v in values] for values in (truth, guess))
            own = _SCORERS[task.kind](truth, guess)
        scores |= {f"{name}/{metric}": value for metric, value in own.items()}
    discrete = [name for name, task in config.tasks.items() if task.kind in ("classification", "tagging")]
    if discrete:
        right = [
            all(_is_right(r.labels.get(name), p.get(name)) for name in discrete)
            for r, p in zip(records, predictions)
            if any(r.labels.get(name) is not None for name in discrete)
        ]
        if right:
            scores["exact_match"] = sum(right) / len(right)
    return scores


def _is_right(truth: Any, guess: Any) -> bool:
    """Whether every label there is was found."""
    if isinstance(truth, list):
        return all(a is None or a == b for a, b in zip(truth, guess))
    return truth is None or truth == guess


def _classification(truth: list[str], guess: list[str]) -> dict[str, float]:
    from sklearn import metrics as sk

    return {
        "accuracy": float(sk.accuracy_score(truth, guess)),
        "macro_f1": float(sk.f1_score(truth, guess, average="macro", zero_division=0.0)),
    }


def _ordinal(truth: list[float], guess: list[float]) -> dict[str, float]:
    from sklearn import metrics as sk

    truth = [float(value) for value in truth]
    labels = sorted(set(truth) | set(guess))
    if len(labels) < 2:
        return {"kappa": 1.0, "accuracy": 1.0}  # all the same, and all of them found
    names = [labels.index(value) for value in truth], [labels.index(value) for value in guess]
    kappa = float(sk.cohen_kappa_score(*names, weights="quadratic"))
    return {"kappa": kappa, "accuracy": float(sk.accuracy_score(*names))}


def _tagging(truth: list[list[str | None]], guess: list[list[str]], bio: bool) -> dict[str, float]:
    if bio:
        from seqeval.metrics import f1_score

        spans = [["O" if tag is None else tag for tag in tags] for tags in truth]
        found = [
            ["O" if tag is None else other for tag, other in zip(tags, others, strict=True)]
            for tags, others in zip(truth, guess, strict=True)
        ]
        return {"f1": float(f1_score(spans, found))}
    from sklearn import metrics as sk

    flat = [(a, b) for tags, others in zip(truth, guess) for a, b in zip(tags, others) if a is not None]
    return {"accuracy": float(sk.accuracy_score(*map(list, zip(*flat)))) if flat else 0.0}


def _regression(truth: list[Any], guess: list[Any]) -> dict[str, float]:
    from scipy import stats
    from sklearn import metrics as sk

    targets, outputs = ([row if isinstance(row, list) else [row] for row in rows] for rows in (truth, guess))
    columns = []
    for expected, actual in zip(zip(*targets), zip(*outputs), strict=True):
        known = [(float(a), float(b)) for a, b in zip(expected, actual) if a is not None]
        if len(known) > 1:
            columns.append(list(zip(*known)))
    if not columns:
        return {}
    scores: dict[str, list[float]] = {"r2": [], "pearson": [], "spearman": []}
    for expected, actual in columns:
        scores["r2"].append(float(sk.r2_score(expected, actual)))
        constant = len(set(expected)) == 1 or len(set(actual)) == 1
        for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            scores[name].append(0.0 if constant else float(correlation(expected, actual).statistic))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _multilabel(truth: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    from sklearn import metrics as sk

    labels = sorted({label for row in (*truth, *guess) for label in row})
    flat = [[label in row for row in rows for label in labels] for rows in (truth, guess)]
    return {"f1": float(sk.f1_score(*flat, labels=[True], average="micro", zero_division=0.0)) if labels else 0.0}


def _ctc(truth: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    from torchmetrics.functional.text import word_error_rate

    # Labels may hold spaces, words may not.
    ids = {label: str(i) for i, label in enumerate(sorted({label for row in (*truth, *guess) for label in row}))}
    texts = [[" ".join(ids[label] for label in row) for row in rows] for rows in (guess, truth)]
    return {"label_accuracy": 1 - float(word_error_rate(*texts))}


_SCORERS = {
    "classification": _classification,
    "ordinal": _ordinal,
    "regression": _regression,
    "multilabel": _multilabel,
    "ctc": _ctc,
}


def check_scorable(records: Sequence[Record], config: Config, where: str) -> None:
    """What validation needs before training begins.

    Raises:
        DataError: no task can be scored on these records, or not what ``select_by`` asks for.
    """
    scored = []
    for name, task in config.tasks.items():
        count = sum(record.labels.get(name) is not None for record in records)
        if count > 1 or (count == 1 and task.kind != "regression"):
            scored.append(name)
    select_by = config.training.select_by
    if select_by == "delta":
        asked = [name.partition("/")[0] for name in config.training.baseline]
    elif select_by == "exact_match":
        asked = [name for name, task in config.tasks.items() if task.kind in ("classification", "tagging")]
    else:
        asked = list(config.tasks) if select_by == "mean" else [select_by]
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
            chosen.setdefault(task, -value if _is_lower_better(name) else value)
    return chosen


def _is_lower_better(name: str) -> bool:
    return name.partition("/")[2] in LOWER_IS_BETTER


def selection_score(scores: Mapping[str, float], settings: TrainingConfig | None = None) -> float:
    """What the best epoch is chosen by: the mean of the tasks' scores, or as ``select_by`` says.

    Tasks without an upper limit (a language model) count only if there is no other. Of "delta" it is the mean relative
    improvement on the baseline's scores (Maninis et al. 2019, "Attentive Single-Tasking of Multiple Tasks").
    """
    select_by = "mean" if settings is None else settings.select_by
    by_task = primary(scores)
    if select_by == "delta":
        return delta(scores, settings.baseline)
    if select_by == "exact_match":
        return scores.get("exact_match", -math.inf)
    if select_by != "mean":
        return by_task.get(select_by, -math.inf)
    unbounded = {name.partition("/")[0] for name in scores if _is_lower_better(name)}
    counted = [value for task, value in by_task.items() if task not in unbounded] or list(by_task.values())
    return sum(counted) / len(counted)


def delta(scores: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """The mean over the baseline's scores of how much better these are, relative to them; NaN if one of those is 0."""
    changes = []
    for name, base in baseline.items():
        if name in scores:
            sign = -1 if _is_lower_better(name) else 1
            changes.append(sign * (scores[name] - base) / abs(base) if base != 0 else math.nan)
    return sum(changes) / len(changes) if changes else -math.inf


def is_bio(tags: Iterable[str]) -> bool:
    """Whether these are tags of spans: O, B-x and I-x, or B and I alone."""
    tags = set(tags)
    return all(tag in ("O", "B", "I") or tag.startswith(("B-", "I-")) for tag in tags) and not tags <= {"O"}


@torch.no_grad()
def evaluate(
    backend: Backend,
    batches: Mapping[str, Sequence[Batch]],
    records: Mapping[str, Sequence[Record]],
    config: Config,
    vocabulary: Vocabulary,
) -> dict[str, float]:
    """The scores of a model, where it is, over batches that together hold all ``records`` of each data set."""
    device = next(backend.parameters()).device
    everything: list[Record] = []
    predictions: list[dict[str, Any]] = []
    for dataset, own in batches.items():
        found: list[dict[str, Any]] = [{} for _ in records[dataset]]
        for batch in own:
            there = batch.to(device)
            decoded = decode(backend.logits(there, dataset), there, config, vocabulary, backend.crfs)
            for index, prediction in zip(batch.indices, decoded):
                found[index] = prediction
        everything += records[dataset]
        predictions += found
    return score(everything, predictions, config, vocabulary.labels)
