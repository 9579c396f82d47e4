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
