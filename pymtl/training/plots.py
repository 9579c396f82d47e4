"""Plots of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pymtl.training.metrics import best_epoch


def training_curves(epochs: list[dict[str, Any]]) -> Figure:
    """Losses in training on the left, scores in validation on the right, over the epochs."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    best = best_epoch(epochs)["epoch"]
    for axes, part, title in ((left, "loss", "training loss"), (right, "valid", "validation score")):
        for name in _shown(list(epochs[0][part])):
            width = 2.5 if name == "total" else 1.5
            axes.plot(numbers, [epoch[part].get(name) for epoch in epochs], label=name, linewidth=width, marker=".")
        axes.axvline(best, color="grey", linestyle=":", label="best epoch")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    if all(value > 0 for epoch in epochs for value in epoch["loss"].values()):
        left.set_yscale("log")
    return figure


def _shown(names: Sequence[str]) -> list[str]:
    """All, or of many scores the first of each task: no two lines of a plot have one colour."""
    tasks = {name.partition("/")[0]: name for name in reversed(names)}
    return list(names) if len(names) <= 9 else [name for name in names if name in tasks.values()]


def comparison_plot(result: dict[str, Any]) -> Figure:
    """A panel for each score, a point with its standard deviation for each variant; a line where the task is alone."""
    names: list[str] = []
    for row in result["rows"]:
        names += [name for name in row["scores"] if name not in names]
    variants = [row for row in result["rows"] if row["single"] is None]
    figure = Figure(figsize=(3.2 * len(names) + 2, 0.32 * len(variants) + 1.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rows = [(i, row["scores"][name]) for i, row in enumerate(variants) if name in row["scores"]]
        places = [-i for i, _ in rows]
        means, deviations = [value["mean"] for _, value in rows], [value["std"] for _, value in rows]
        axes.errorbar(means, places, xerr=deviations, fmt="o", capsize=3)
        for row in result["rows"]:
            if row["single"] is not None and name in row["scores"]:
                axes.axvline(row["scores"][name]["mean"], color="grey", linestyle="--", label=row["variant"])
                axes.legend(fontsize="small")
        axes.set(title=name.replace("/", " "), yticks=[-i for i in range(len(variants))])
        first = name == names[0]
        axes.set_yticklabels([row["variant"] for row in variants] if first else [""] * len(variants))
        axes.grid(alpha=0.3)
    return figure


def evaluation_plot(evaluation: dict[str, Any]) -> Figure | None:
    """A confusion matrix and the calibration of each task that has them; None if none has."""
    panels = []
    for name, found in evaluation["tasks"].items():
        if found.get("confusion"):
            panels.append((name, "confusion", found["confusion"]))
        if found.get("calibration", {}).get("bins"):
            panels.append((name, "calibration", found["calibration"]))
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each, (name, what, found) in zip(axes, panels):
        (_confusion if what == "confusion" else _calibration)(each, name, found)
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    return figure


def _confusion(axes: Any, name: str, confusion: dict[str, Any]) -> None:
    """Shares of each true label; only the most frequent labels where there are many."""
    totals = [sum(row) for row in confusion["counts"]]
    kept = sorted(sorted(range(len(totals)), key=lambda i: -totals[i])[:20])
    counts = [[confusion["counts"][i][j] for j in kept] for i in kept]
    shares = [[count / max(totals[i], 1) for count in row] for i, row in zip(kept, counts)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_short(confusion["labels"][i]) for i in kept]
    axes.set_xticks(range(len(kept)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(len(kept)), labels)
    if len(kept) <= 12:
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    of = f" (the {len(kept)} most frequent of {len(totals)} labels)" if len(kept) < len(totals) else ""
    axes.set(title=f"{name}{of}", xlabel="predicted", ylabel="true")


def _calibration(axes: Any, name: str, found: dict[str, Any]) -> None:
    """The share of right answers over their probability, and how many answers there are."""
    bins = found["bins"]
    most = max(each["count"] for each in bins)
    for each in bins:
        share = each["count"] / most
        axes.bar(each["from"] + 0.05, share, width=0.095, color="lightgrey", zorder=1)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", zorder=2)
    axes.plot([b["probability"] for b in bins], [b["right"] for b in bins], marker="o", zorder=3)
    axes.set(
        title=f"{name}: calibration (bars: number of answers)", xlabel="probability", ylabel="share of right answers"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.05))
    axes.grid(alpha=0.3)


def _short(label: str, width: int = 18) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"
