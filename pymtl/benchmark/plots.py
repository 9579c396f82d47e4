"""Plots of benchmark results."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def speed_ratios(result: dict[str, Any]) -> Figure:
    """How many times as fast as nn.LSTM, a bar for each row and contender; the line is parity."""
    bars = [
        (f"{row['shape']}  {row['mode']}", name, contender["ratio"])
        for row in result["rows"]
        for name, contender in row["contenders"].items()
        if name.startswith("nn.LSTM")
    ]
    figure = Figure(figsize=(9, 1.5 + 0.26 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = {"nn.LSTM": "tab:blue", "nn.LSTM packed": "tab:orange", "nn.LSTM padded": "tab:green"}
    for position, (_, name, ratio) in enumerate(bars):
        axes.barh(position, ratio, color=colours[name])
        axes.text(ratio, position, f" {ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast (median of interleaved ratios)")
    machine = result["machine"]
    axes.set_title(
        f"pymtl beside nn.LSTM, {result['dtype']}: {machine['cpu']}, {machine['instruction set in use']}, "
        f"{machine['threads']} threads",
        fontsize=10,
    )
    handles = [axes.barh(0, 0, color=colour) for colour in colours.values()]
    axes.legend(handles, [f"against {name}" for name in colours], loc="lower right")
    axes.margins(x=0.08, y=0.01)
    return figure
