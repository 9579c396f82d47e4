"""Predictions and their scores, by seqeval and scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymtl.crf import CRF
from pymtl.training.backends import Backend
from pymtl.training.config import Config
from pymtl.training.data import Batch, Record, Vocabulary
from pymtl.training.errors import DataError


def decode(
    logits: Mapping[str, Tensor],
    lengths: Tensor,
    config: Config,
    vocabulary: Vocabulary,
    crfs: Mapping[str, CRF] | None = None,
) -> list[dict[str, Any]]:
    """For each sentence, each task's label in the form of the records, and ``<task>/probability`` of a class.

    Args:
        logits: padded, batch first.
        crfs: of the tasks whose tags are decoded together.
    """
    predictions: list[dict[str, Any]] = [{} for _ in range(lengths.shape[0])]
    for name, task in config.tasks.items():
        z = logits[name]
        if task.kind == "regression":
            for prediction, value in zip(predictions, z[:, 0].tolist()):
                prediction[name] = value
            continue
        labels = vocabulary.labels[name]
        if task.kind == "classification":
            best = z.softmax(-1).max(-1)
            for prediction, index, p in zip(predictions, best.indices.tolist(), best.values.tolist()):
                prediction[name], prediction[f"{name}/probability"] = labels[index], p
        elif task.kind == "tagging":
            tags = crfs[name].decode(z, lengths)[0] if crfs and name in crfs else z.argmax(-1)
            for prediction, row, length in zip(predictions, tags.tolist(), lengths.tolist()):
                prediction[name] = [labels[i] for i in row[:length]]
        else:
            for prediction, row in zip(predictions, (z > 0).tolist()):
                prediction[name] = [label for label, yes in zip(labels, row) if yes]
    return predictions


def score(records: Sequence[Record], predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:
    """The scores of all tasks, from 0 to 1 (R² at most 1), higher is better.

    Accuracy of classes; for tags span F1 by seqeval where they are BIO, else token accuracy; R² of numbers;
    micro F1 of multiple labels; and ``exact_match``, the share of sentences with every class and tag right.
    Records without a label do not count.
    """
    from sklearn import metrics as sk

    scores: dict[str, float] = {}
    for name, task in config.tasks.items():
        pairs = [(r.labels[name], p[name]) for r, p in zip(records, predictions) if r.labels[name] is not None]
        if not pairs:
            continue
        truth, guess = [a for a, _ in pairs], [b for _, b in pairs]
        if task.kind == "classification":
            scores[f"{name}/accuracy"] = float(sk.accuracy_score(truth, guess))
        elif task.kind == "tagging" and _is_bio(truth):
            from seqeval.metrics import f1_score

            scores[f"{name}/f1"] = float(f1_score(truth, guess))
        elif task.kind == "tagging":
            flat = [tag for tags in truth for tag in tags], [tag for tags in guess for tag in tags]
            scores[f"{name}/accuracy"] = float(sk.accuracy_score(*flat))
        elif task.kind == "regression":
            if len(truth) > 1:  # of a single number there is no variance to explain
                scores[f"{name}/r2"] = float(sk.r2_score(truth, guess))
        else:
            labels = sorted({label for row in (*truth, *guess) for label in row})
            flat = [[label in row for row in rows for label in labels] for rows in (truth, guess)]
            scores[f"{name}/f1"] = (
                float(sk.f1_score(*flat, labels=[True], average="micro", zero_division=0.0)) if labels else 0.0
            )
    discrete = [name for name, task in config.tasks.items() if task.kind in ("classification", "tagging")]
    if discrete:
        right = [
            all(r.labels[name] is None or r.labels[name] == p[name] for name in discrete)
            for r, p in zip(records, predictions)
            if any(r.labels[name] is not None for name in discrete)
        ]
        if right:
            scores["exact_match"] = sum(right) / len(right)
    return scores


def check_scorable(records: Sequence[Record], config: Config, where: str) -> None:
    """What validation needs before training begins.

    Raises:
        DataError: no task can be scored on these records.
    """
    for name, task in config.tasks.items():
        count = sum(record.labels[name] is not None for record in records)
        if count > 1 or (count == 1 and task.kind != "regression"):
            return
    raise DataError(
        f"{where}: expected a label to score in at least one record (two for a task of numbers), got too few"
    )


def selection_score(scores: Mapping[str, float]) -> float:
    """What the best epoch is chosen by: the mean of the tasks' scores."""
    own = [value for name, value in scores.items() if "/" in name]
    return sum(own) / len(own)


def _is_bio(sequences: Sequence[Sequence[str]]) -> bool:
    tags = {tag for tags in sequences for tag in tags}
    return all(tag == "O" or tag.startswith(("B-", "I-")) for tag in tags) and tags != {"O"}


@torch.no_grad()
def evaluate(
    backend: Backend, batches: Sequence[Batch], records: Sequence[Record], config: Config, vocabulary: Vocabulary
) -> dict[str, float]:
    """The scores of a model over batches that together hold all ``records``."""
    predictions: list[dict[str, Any]] = [{} for _ in records]
    for batch in batches:
        decoded = decode(backend.logits(batch), batch.lengths, config, vocabulary, backend.crfs)
        for index, prediction in zip(batch.indices, decoded):
            predictions[index] = prediction
    return score(records, predictions, config)
