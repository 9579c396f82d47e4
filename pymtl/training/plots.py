"""Plots of a training run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pymtl.serving.values import is_number, number_of
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
    """A panel for each score: of a setting with three numbers or more curves over it; else a point with its standard
    deviation for each variant, and beside it a line and a band where the task is alone with the same settings."""
    key = _numbered(result)
    return _points(result) if key is None else _curves(result, key)


def _numbered(result: dict[str, Any]) -> str | None:
    """The first setting whose values are three different numbers or more."""
    values: dict[str, set[str]] = {}
    for row in result["rows"]:
        for key, value in row["settings"].items():
            values.setdefault(key, set()).add(value)
    found = [key for key, own in values.items() if len(own) >= 3 and all(is_number(number_of(v)) for v in own)]
    return found[0] if found else None


def _curves(result: dict[str, Any], key: str) -> Figure:
    """Scores over a setting, a line and a band of one standard deviation for all that have the other settings alike."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["scores"]))
    figure = Figure(figsize=(5.2 * len(names), 4.2), layout="constrained")

    def place(row: dict[str, Any]) -> float:
        """The number; of a limit of 0, which means all, how many that are."""
        number = number_of(row["settings"][key])
        return row["records"] if key.endswith(".limit") and number == 0 else number

    numbers = [place(row) for row in result["rows"] if key in row["settings"]]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if key in row["settings"]:
            others = [value for name, value in row["settings"].items() if name != key]
            label = f"{row['single']} alone" if row["single"] is not None else "together"
            lines.setdefault(" ".join([label, *others]), []).append(row)
    together = [label for label, rows in lines.items() if rows[0]["single"] is None]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        scored = {label: [row for row in rows if name in row["scores"]] for label, rows in lines.items()}
        scored = {label: sorted(rows, key=place) for label, rows in scored.items() if rows}
        singles = [label for label, rows in scored.items() if rows[0]["single"] is not None]
        for label, own in scored.items():
            places = [place(row) for row in own]
            means, deviations = ([row["scores"][name][which] for row in own] for which in ("mean", "std"))
            if own[0]["single"] is None:
                style = {"color": f"C{together.index(label)}"}
            else:
                style = {"linestyle": "--", "color": "grey" if len(singles) == 1 else f"C{singles.index(label)}"}
            (line,) = axes.plot(places, means, marker="o", markersize=4, label=_plain(label), **style)
            lower, upper = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
            axes.fill_between(places, lower, upper, color=line.get_color(), alpha=0.15, linewidth=0)
        if min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
        axes.set_xticks(sorted(set(numbers)), [f"{number:,g}" for number in sorted(set(numbers))])
        axes.minorticks_off()
        axes.set(title=f"{name.replace('/', ' ')}, mean and one standard deviation", xlabel=key)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _points(result: dict[str, Any]) -> Figure:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["scores"]))
    variants = [row for row in result["rows"] if row["single"] is None]
    figure = Figure(figsize=(3.2 * len(names) + 2, 0.32 * len(variants) + 1.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rows = [(i, row["scores"][name]) for i, row in enumerate(variants) if name in row["scores"]]
        places = [-i for i, _ in rows]
        means, deviations = [value["mean"] for _, value in rows], [value["std"] for _, value in rows]
        axes.errorbar(means, places, xerr=deviations, fmt="o", capsize=3)
        alone = [(i, row["alone"][name]) for i, row in enumerate(variants) if name in row["alone"]]
        if alone:
            lines = [(value["mean"], -i - 0.5, -i + 0.5) for i, value in alone]
            axes.vlines(*zip(*lines), color="grey", linestyle="--", label="alone")
            for (mean, *ends), (_, value) in zip(lines, alone):
                band = mean - value["std"], mean + value["std"]
                axes.fill_betweenx(ends, *band, color="grey", alpha=0.15, linewidth=0)
            axes.legend(fontsize="small")
        axes.set(title=name.replace("/", " "), xlabel="mean and one standard deviation")
        axes.set(yticks=[-i for i in range(len(variants))], ylim=(0.5 - len(variants), 0.5))
        axes.xaxis.get_major_locator().set_params(nbins=5)
        first = name == names[0]
        axes.set_yticklabels([_plain(row["variant"]) for row in variants] if first else [""] * len(variants))
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


MOST_TICKS = 48  # tokens that are named along a side of a picture
WIDE = 9  # inches of a panel that stands alone in its row
Read = tuple[Sequence[str], Sequence[str], Sequence[Sequence[float]], str]


def attention_plot(answers: Sequence[Read]) -> Figure:
    """A panel for each answer of a task that generates: how much each of its tokens, and its end, read of each token of
    the text. ``answers``: the text's tokens, the answer's, a row of weights for each of these and the end, and a title.
    """
    width, height = (0.34 * min(max(len(each[i]) for each in answers), MOST_TICKS) + 1.4 for i in (0, 1))
    width, height = max(width, 3.5), max(height, 2.8)
    columns = min(len(answers), 2 if width < WIDE else 1)
    rows = -(-len(answers) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each, (text, answer, weights, title) in zip(axes, answers):
        image = each.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        long = max(map(len, text)) > 2
        each.set_xticks(*_ticks(text), rotation=90 if long else 0)
        each.set_yticks(*_ticks([*answer, "end"][: len(weights)]))
        each.set(xlabel="text", ylabel="answer")
        lines = textwrap.fill(title, int(11 * width), max_lines=2, placeholder=" …")
        each.set_title(_plain(lines), fontsize="medium")
    for empty in axes[len(answers) :]:
        empty.set_axis_off()
    figure.colorbar(image, ax=axes, label="share read", shrink=0.8 / rows, anchor=(0, 1) if rows > 1 else (0, 0.5))
    return figure


def _ticks(tokens: Sequence[str]) -> tuple[range, list[str]]:
    """Where tokens are named and how, at most so many as can be read."""
    places = range(0, len(tokens), max(-(-len(tokens) // MOST_TICKS), 1))
    return places, [_short(tokens[i]) for i in places]


def _short(label: str, width: int = 18) -> str:
    label = label if label.strip() else label.replace(" ", "␣")
    return _plain(label if len(label) <= width else label[: width - 1] + "…")


def _plain(text: str) -> str:
    """Text in which dollars are dollars, and do not begin a formula."""
    return text.replace("$", r"\$")
