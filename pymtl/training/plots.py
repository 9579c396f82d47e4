"""Plots of a training run."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def training_curves(epochs: list[dict[str, Any]]) -> Figure:
    """Losses in training on the left, scores in validation on the right, over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    best = max(epochs, key=lambda epoch: epoch["selection"])["epoch"]
    for axes, part, title in ((left, "loss", "training loss"), (right, "valid", "validation score")):
        for name in epochs[0][part]:
            width = 2.5 if name == "total" else 1.5
            axes.plot(numbers, [epoch[part].get(name) for epoch in epochs], label=name, linewidth=width, marker=".")
        axes.axvline(best, color="grey", linestyle=":", label="best epoch")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    if all(value > 0 for epoch in epochs for value in epoch["loss"].values()):
        left.set_yscale("log")
    return figure


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
