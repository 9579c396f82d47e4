"""Puts the results into the tables of README.md, each behind its marker.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STEP = ("clear", "forward and loss", "backward", "clip", "Adam", "step")
BASELINES = ("nn.LSTM", "nn.LSTM packed", "nn.LSTM padded")

Cells = Iterable[Any]


def layers(result: dict[str, Any]) -> Iterator[Cells]:
    theirs = [name.removeprefix("nn.LSTM ") for name in BASELINES]
    yield "shape", "mode", "pymtl", "frozen", *theirs, "times as fast", "% peak", "largest difference"
    for row in result["rows"]:
        timed = row["contenders"]
        times = [f"{timed[n]['p50']:.2f}" if n in timed else "" for n in ("pymtl", "pymtl frozen", *BASELINES)]
        ratios = " / ".join(f"{timed[n]['ratio']:.2f}" for n in BASELINES if n in timed)
        yield row["shape"], row["mode"], *times, ratios, f"{100 * row['share_of_peak']:.0f}", f"{row['parity']:.0e}"


def kernel(result: dict[str, Any]) -> Iterator[Cells]:
    yield "shape", "ms", "GFLOP/s", "% peak"
    for row in result["recurrence"]:
        yield row["shape"], f"{row['p50']:.2f}", f"{row['gflops']:.0f}", f"{100 * row['share_of_peak']:.0f}"


def training_step(result: dict[str, Any]) -> Iterator[Cells]:
    yield "batches", "", *STEP, "times as fast"
    for kind, contenders in result["rows"].items():
        for name, row in contenders.items():
            yield kind, name, *(f"{row[part]:.2f}" for part in STEP), _ratio(name, row)


def generation_step(*found: dict[str, Any]) -> Iterator[Cells]:
    yield "B", "batches", "", "forward and loss", "backward", "step", "times as fast"
    for result in found:
        for kind, contenders in result["rows"].items():
            for name, row in contenders.items():
                times = (f"{row[part]:.1f}" for part in ("forward and loss", "backward", "step"))
                yield result["batch_size"], kind, name, *times, _ratio(name, row)


def generation(result: dict[str, Any]) -> Iterator[Cells]:
    yield "", *(heading for search in result["rows"] for heading in (search, "time beside the first row's"))
    names = list(dict.fromkeys(name for contenders in result["rows"].values() for name in contenders))
    for name in names:
        cells = []
        for contenders in result["rows"].values():
            row = contenders.get(name)
            cells += ["", ""] if row is None else [f"{row['texts a second']:,.0f}", f"{row['ratio']:.2f}"]
        yield name, *cells


def heads(result: dict[str, Any]) -> Iterator[Cells]:
    yield "shape", "fused ms", "unfused ms", "times as fast", "MB of h not written"
    for row in result["rows"]:
        fused, unfused = row["contenders"]["fused"], row["contenders"]["unfused"]
        megabytes = row["bytes_of_h_not_written"] / 1e6
        yield (
            row["shape"],
            f"{fused['p50']:.3f}",
            f"{unfused['p50']:.3f}",
            f"{unfused['ratio']:.2f}",
            f"{megabytes:.2f}",
        )


def crf(result: dict[str, Any]) -> Iterator[Cells]:
    others = ("plain", "pytorch-crf")
    one = [heading for name in others for heading in (name, "times as fast")]
    yield "shape", "loss and gradients", *one, "decoding", *one, "error", "plain's"
    for row in result["rows"]:
        cells = []
        for part in ("training", "decoding"):
            cells.append(f"{row[part]['pymtl']['p50']:.3f}")
            for name in others:
                cells += [f"{row[part][name]['p50']:.2f}", f"{row[part][name]['ratio']:.0f}"]
        yield row["shape"], *cells, f"{row['errors']['pymtl']:.0e}", f"{row['errors']['plain']:.0e}"


def encoders(result: dict[str, Any]) -> Iterator[Cells]:
    names = list(result["rows"][0]["contenders"])
    yield "shape", "calls", names[0], *(heading for name in names[1:] for heading in (name, "times as fast"))
    for row in result["rows"]:
        timed = row["contenders"]
        cells = [cell for n in names[1:] for cell in (f"{timed[n]['p50']:.2f}", f"{timed[n]['ratio']:.2f}")]
        yield row["shape"], row["launches"], f"{timed[names[0]]['p50']:.2f}", *cells


def sharing(result: dict[str, Any]) -> Iterator[Cells]:
    yield "sharing", "ms", "times hard sharing's"
    for name, timed in result["schemes"].items():
        yield name, f"{timed['p50']:.2f}", f"{timed['ratio']:.2f}"


def overhead(result: dict[str, Any]) -> Iterator[Cells]:
    yield "", "by", "inference", "times as fast", "forward and backward", "times as fast"
    for what, modes in result["rows"].items():
        for name in modes["inference"]:
            cells = []
            for mode in ("inference", "training"):
                timed = modes.get(mode)
                cells += [f"{1e3 * timed[name]['p50']:.0f}", _ratio(name, timed[name])] if timed else ["", ""]
            yield what, name, *cells


def grids(result: dict[str, Any]) -> Iterator[Cells]:
    head = ("geometric mean", "aim", "at the limit", "worst", "aim", "worst at", "cases", "% of limit")
    yield "grid", "", "against", *head
    for line in result["summary"]:
        yield (
            line["grid"],
            line["ours"],
            line["theirs"],
            f"{line['geometric mean']:.2f}",
            f"{line['aim']:g}",
            f"{line['at the limit']:.1f}",
            f"{line['worst']:.2f}",
            f"{line['aim of the worst']:g}",
            line["worst shape"],
            line["cases"],
            f"{100 * line['share of limit']:.0f}",
        )


def growth(result: dict[str, Any]) -> Iterator[Cells]:
    yield "sweep", "", "inference", "nn.LSTM", "times as fast", "training", "nn.LSTM", "times as fast"
    points: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        points.setdefault((row["sweep"], row["value"]), {})[row["mode"]] = row["contenders"]
    for (sweep, value), modes in points.items():
        cells = []
        for mode in ("inference", "training"):
            timed = modes.get(mode)
            cells += [f"{timed[name]['p50']:.2f}" for name in ("pymtl", "nn.LSTM")] if timed else ["", ""]
            cells.append(f"{timed['nn.LSTM']['ratio']:.2f}" if timed else "")
        yield sweep, value, *cells


def memory(result: dict[str, Any]) -> Iterator[Cells]:
    yield "shape", "mode", "pymtl", "nn.LSTM", "% of nn.LSTM's"
    for row in result["rows"]:
        ours, theirs = row["megabytes"]["pymtl"], row["megabytes"]["nn.LSTM"]
        yield row["shape"], row["mode"], f"{ours:.1f}", f"{theirs:.1f}", f"{100 * ours / max(theirs, 0.1):.0f}"


def threads(result: dict[str, Any]) -> Iterator[Cells]:
    yield "shape", "mode", *result["rows"][0]["times as fast"]
    for row in result["rows"]:
        yield row["shape"], row["mode"], *(f"{gain:.2f}" for gain in row["times as fast"].values())


def cells(result: dict[str, Any]) -> Iterator[Cells]:
    names = list(result["rows"][0]["cells"])
    yield "shape", "mode", *names
    for row in result["rows"]:
        yield row["shape"], row["mode"], *(f"{own[f'nn.{name}']['ratio']:.2f}" for name, own in row["cells"].items())


def variants(result: dict[str, Any]) -> Iterator[Cells]:
    names = [name for row in result["rows"] for name in row["variants"]]
    names = list(dict.fromkeys(sorted(names, key=lambda name: names.count(name))))
    yield "shape", "mode", *(heading for name in names for heading in (name, "PyTorch"))
    for row in result["rows"]:
        line = []
        for name in names:
            own = row["variants"].get(name)
            costs = ("", "") if own is None else (own["cost"]["with"]["ratio"], own["beside"]["plain PyTorch"]["ratio"])
            line += [cost and f"{cost:.2f}" for cost in costs]
        yield row["shape"], row["mode"], *line


def beside_ours(result: dict[str, Any]) -> Iterator[Cells]:
    parts = ("forward", "training")
    names = list(result["rows"][0][parts[0]])
    yield "shape", "", f"{names[0]}, ms", *(f"{name}, times as long" for name in names[1:]), "GFLOP/s"
    for row in result["rows"]:
        for part in parts:
            timed = row[part]
            ratios = [f"{timed[name]['ratio']:.2f}" for name in names[1:]]
            rate = row["operations"] * (1 if part == "forward" else 3) / timed[names[0]]["p50"] / 1e6
            yield row["shape"], part, f"{timed[names[0]]['p50']:.2f}", *ratios, f"{rate:.0f}"


def narrow(result: dict[str, Any]) -> Iterator[Cells]:
    yield "", "against", "cases", "threads", "geometric mean", "aim", "worst", "aim", "worst at", "count"
    for line in result["summary"]:
        yield (
            line["ours"],
            line["against"],
            line["cases"],
            line["threads"],
            f"{line['geometric mean']:.2f}",
            f"{line['aim']:g}",
            f"{line['worst']:.2f}",
            f"{line['aim of the worst']:g}",
            line["worst shape"],
            line["count"],
        )


def narrow_errors(result: dict[str, Any]) -> Iterator[Cells]:
    yield "error from float64", "layers", "geometric mean of the ratios", "largest", "layers above 1"
    names = {"rms": "root mean square", "max": "largest difference"}
    for kind, found in result["errors over ONNX Runtime int8's"].items():
        ratios = (f"{found['geometric mean']:.2f}", f"{found['largest']:.2f}")
        yield names[kind], found["layers"], *ratios, found["above 1"]


def busy(result: dict[str, Any]) -> Iterator[Cells]:
    names = list(result["rows"][0]["contenders"])
    yield "shape", "neighbours", *(f"{name}: p50 / p90 / p99, ms" for name in names), "p99 over own idle p50"
    idle: dict[str, float] = {}
    for row in result["rows"]:
        timed = row["contenders"]
        if row["neighbours"] == 0:
            idle = {name: timed[name]["p50"] for name in names}
        times = [" / ".join(f"{timed[name][part]:.2f}" for part in ("p50", "p90", "p99")) for name in names]
        over = " / ".join(f"{timed[name]['p99'] / idle[name]:.1f}" for name in names)
        yield row["shape"], row["neighbours"], *times, over


def busy_training(result: dict[str, Any]) -> Iterator[Cells]:
    yield "beside", *result["training"][0]["contenders"]
    for row in result["training"]:
        yield row["beside"], *(f"{timed['mean']:.1f}" for timed in row["contenders"].values())


def runtime(result: dict[str, Any]) -> Iterator[Cells]:
    names = list(result["latency"][0]["us"])
    yield "model", "H", "tokens", "threads", *(f"{name}, µs" for name in names)
    for row in result["latency"]:
        cells = [
            f"{row['us'][name]:.0f}" + (f" ({row['ratios'][name]:.2f})" if name in row["ratios"] else "")
            for name in names
        ]
        yield row["model"], row["hidden size"], row["tokens"], row["threads"], *cells


def runtime_neighbours(result: dict[str, Any]) -> Iterator[Cells]:
    names = list(result["neighbours"][0]["us"])
    yield "neighbours", "H", "tokens", *(f"{name}: p50 / p99, µs" for name in names)
    for row in result["neighbours"]:
        times = [f"{row['us'][name]['p50']:.0f} / {row['us'][name]['p99']:.0f}" for name in names]
        yield row["neighbours"], row["hidden size"], row["tokens"], *times


def runtime_rest(result: dict[str, Any]) -> Iterator[Cells]:
    yield "what", "contender", "measured"
    for name, us in result["step"].items():
        yield (
            "a step of a stream, H = 128, µs",
            "pymtl_runtime, " + name if name in ("C", "Python") else name,
            f"{us:.1f}",
        )
    for name, count in result["texts a second"].items():
        yield "texts a second, batches of 64", name, f"{count:,.0f}"
    for name, start in result.get("start", {}).items():
        yield "from starting Python to the first answer", name, f"{start['seconds']:.2f} s, {start['MB']:.0f} MB"


def _ratio(name: str, row: dict[str, float]) -> str:
    return "" if name == "pymtl" else f"{row['ratio']:.2f}"


# The lines that say where a result was measured.
ORIGINS = {
    "Latest": "latest",
    "AVX2": "grids_avx2",
    "The same kernel with AVX2": "latest_avx2",
    "Training step": "training_step",
    "Generated answers": "generation",
    "Training steps of a decoder": "generation_step",
    "Overhead": "overhead",
    "Threads": "threads",
    "Cells": "cells",
    "Resets": "resets",
    "Alternating": "alternating",
    "Weights in fewer bits": "narrow",
    "Busy": "busy",
    "Without torch": "runtime",
}


def origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['instruction set in use']}, {machine['threads']} threads"
    return f"{result['date'][:10]}, {where}, torch {machine['torch']}"


def markdown(rows: Iterable[Cells]) -> str:
    """A table whose columns are left-aligned as long as their cells are words."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    number = re.compile(r"[\d./ e+-]*")
    lines = ["---:" if all(number.fullmatch(row[i]) for row in body) else "---" for i in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, lines, *body))


def main() -> None:
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "results").glob("*.json")}
    tables = {
        "layers": layers(results["latest"]),
        "kernel": kernel(results["latest"]),
        "kernel avx2": kernel(results["latest_avx2"]),
        "training step": training_step(results["training_step"]),
        "generation": generation(results["generation"]),
        "generation step": generation_step(results["generation_step"], results["generation_step_32"]),
        "heads": heads(results["heads"]),
        "crf": crf(results["crf"]),
        "encoders": encoders(results["sharing"]),
        "sharing": sharing(results["sharing"]),
        "overhead": overhead(results["overhead"]),
        "grids": grids(results["grids"]),
        "grids avx2": grids(results["grids_avx2"]),
        "growth": growth(results["growth"]),
        "threads": threads(results["threads"]),
        "cells": cells(results["cells"]),
        "variants": variants(results["cells"]),
        "memory": memory(results["memory"]),
        "resets": beside_ours(results["resets"]),
        "alternating": beside_ours(results["alternating"]),
        "narrow": narrow(results["narrow"]),
        "narrow errors": narrow_errors(results["narrow"]),
        "busy": busy(results["busy"]),
        "busy_training": busy_training(results["busy"]),
        "runtime": runtime(results["runtime"]),
        "runtime neighbours": runtime_neighbours(results["runtime"]),
        "runtime rest": runtime_rest(results["runtime"]),
    }
    for name, rows in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n)(?:\|.*\n)*")
        text, count = place.subn(rf"\g<1>{markdown(rows)}", text)
        if count != 1:
            raise SystemExit(f"README.md: expected one <!-- {name} -->, got {count}")
    for label, result in ORIGINS.items():
        text, count = re.subn(rf"^{label}: .*", f"{label}: {origin(results[result])}.", text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"README.md: expected one line of {label}, got {count}")
    readme.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
