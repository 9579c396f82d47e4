"""How good a trained model is on labelled records: scores, each label's own, calibration, and the wrong answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pymtl.serving.answers import Scored, details_of
from pymtl.serving.generation import Search
from pymtl.serving.records import Record
from pymtl.training.markdown import table
from pymtl.training.metrics import exact_tasks, score
from pymtl.training.predictor import Answer, Predictor
from pymtl.training.survey import unknown_share

BINS = 10  # of a calibration
MOST_LABELS = 12  # of a confusion matrix in a page
MOST_MISTAKES = 10  # in a page

Evaluation = dict[str, Any]


def evaluate(
    predictor: Predictor,
    sets: Mapping[str, Sequence[Record]],
    batch_size: int = 64,
    search: Search | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Evaluates a model on labelled records of each data set. ``search``: for generated answers and CTC's labels.

    Returns:
        The evaluation, plain values:

        - ``sentences``, and ``unknown_tokens``, the share of tokens that training has not seen
        - ``scores``: as of ``pymtl train``
        - ``tasks``: of each task ``labelled``, the number of records with a label; ``unknown_labels``, how often labels
          occur that training has not seen, nor an answer can copy; what the kind's ``breakdown`` says; and
          ``calibration`` of the probabilities

        And the wrong answers, a dictionary each: ``task``, ``text``, ``truth``, ``answer``, and ``probability`` of it.
    """
    records = [record for own in sets.values() for record in own]
    answers: list[Answer] = []
    for dataset, own in sets.items():
        answers += predictor.predict_records(own, dataset, batch_size, search, distributions=False)
    result: Evaluation = {
        "sentences": len(records),
        "unknown_tokens": unknown_share(records, predictor.vocabulary),
        "scores": score(records, answers, predictor.config, predictor.labels),
        "tasks": {},
    }
    wrong: list[dict[str, Any]] = []
    for name, task in predictor.tasks.items():
        pairs = [(r, a) for r, a in zip(records, answers) if r.labels.get(name) is not None and name in a]
        if not pairs:
            continue
        truth, guess = [r.labels[name] for r, _ in pairs], [a[name] for _, a in pairs]
        scored = Scored(task, predictor.labels.get(name, []))
        mistakes = task.rules.mistakes(truth, guess, scored)
        found: dict[str, Any] = {"labelled": len(pairs), **task.rules.breakdown(truth, guess, scored)}
        if task.rules.has_vocabulary(task):
            encoding = task.rules.encoding(predictor.labels[name])
            found["unknown_labels"] = dict(
                Counter(
                    label
                    for r, _ in pairs
                    for label in task.rules.unreachable(r.labels[name], r.tokens, encoding, task)
                ).most_common()
            )
        chances = [details_of(name, answer).get("probability") for _, answer in pairs]
        if all(chance is not None for chance in chances):
            missed = set(mistakes)
            found["calibration"] = calibration(chances, [i not in missed for i in range(len(pairs))])
        result["tasks"][name] = found
        for i in mistakes:
            line = {
                "task": name,
                "text": _text(pairs[i][0]),
                "truth": task.rules.in_report(truth[i], task),
                "answer": guess[i],
            }
            wrong.append(line if chances[i] is None else {**line, "probability": chances[i]})
    return result, wrong


def calibration(chances: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """How far probabilities are from the share of right answers: ``error``, the expected calibration error over ten
    bins of equal width (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"), and the
    ``bins`` that are not empty."""
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for chance, hit in zip(chances, right):
        rows[min(int(chance * BINS), BINS - 1)].append((chance, hit))
    bins = [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "count": len(row),
            "probability": sum(chance for chance, _ in row) / len(row),
            "right": sum(hit for _, hit in row) / len(row),
        }
        for i, row in enumerate(rows)
        if row
    ]
    error = sum(each["count"] * abs(each["probability"] - each["right"]) for each in bins) / max(len(chances), 1)
    return {"error": error, "bins": bins}


def page(evaluation: Evaluation, wrong: Sequence[Mapping[str, Any]], title: str, exact: Sequence[str]) -> str:
    """The evaluation in Markdown."""
    lines = [
        f"# {title}",
        "",
        f"{evaluation['sentences']:,} sentences; {100 * evaluation['unknown_tokens']:.1f} % of their tokens are "
        "unknown to training.",
        "",
        *table(
            ["score", ""],
            [
                [name + (f" ({', '.join(exact)})" if name == "exact_match" else ""), f"{value:.4f}"]
                for name, value in evaluation["scores"].items()
            ],
        ),
    ]
    for name, found in evaluation["tasks"].items():
        lines += ["", f"## {name}", "", f"{found['labelled']:,} sentences have a label."]
        if found.get("unknown_labels"):
            shown = ", ".join(f"{label} {count:,}" for label, count in found["unknown_labels"].items())
            lines += ["", f"Labels that training has not seen, each one missed: {shown}."]
        if found.get("classes"):
            rows = [
                [row["label"], *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
                for row in found["classes"]
            ]
            lines += ["", *table(["label", "precision", "recall", "F1", "support"], rows)]
        if found.get("errors"):
            lines += ["", *table(["error", ""], [[key, f"{value:.6g}"] for key, value in found["errors"].items()])]
        confusion = found.get("confusion")
        if confusion and len(confusion["labels"]) <= MOST_LABELS:
            lines += ["", "Rows are true labels, columns predicted ones.", ""]
            rows = [[label, *map(str, row)] for label, row in zip(confusion["labels"], confusion["counts"])]
            lines += table(["", *confusion["labels"]], rows)
        if "calibration" in found:
            rows = [
                [f"{b['from']:.1f} to {b['to']:.1f}", f"{b['count']:,}", f"{b['probability']:.3f}", f"{b['right']:.3f}"]
                for b in found["calibration"]["bins"]
            ]
            lines += ["", f"Expected calibration error {found['calibration']['error']:.3f}:", ""]
            lines += table(["probability", "answers", "their mean", "share of right ones"], rows)
        own = [line for line in wrong if line["task"] == name]
        if own:
            many = f", {MOST_MISTAKES} of them here, all in `errors.jsonl`" if len(own) > MOST_MISTAKES else ""
            far = ", off by more than two standard deviations" if found.get("errors") else ""
            lines += ["", f"{len(own):,} wrong answers{far}{many}:", ""]
            rows = [
                [line["text"], _plain(line["truth"]), _plain(line["answer"]), _chance(line)]
                for line in own[:MOST_MISTAKES]
            ]
            lines += table(["text", "truth", "answer", "probability"], rows)
    return "\n".join(lines) + "\n"


def exact_of(predictor: Predictor, evaluation: Evaluation) -> list[str]:
    """The tasks that ``exact_match`` counts here."""
    return [name for name in exact_tasks(predictor.config) if name in evaluation["tasks"]]


def _text(record: Record) -> str:
    source = record.source
    return source if isinstance(source, str) else " ".join(record.tokens if source is None else source)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _chance(line: Mapping[str, Any]) -> str:
    return f"{line['probability']:.3f}" if "probability" in line else ""


def lines_of(wrong: Sequence[Mapping[str, Any]]) -> str:
    """The wrong answers as JSON lines."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in wrong)
