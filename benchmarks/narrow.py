"""LSTMs frozen in 8-bit integers and in bfloat16, beside float32 and beside other runtimes' 8-bit integers.

    python benchmarks/narrow.py [--threads N]... [--json FILE] [--plot FILE]

Contenders: pymtl frozen in int8, in bfloat16 and in float32; nn.LSTM; the same after torch's quantize_dynamic; ONNX
Runtime, and the same after its quantize_dynamic (DynamicQuantizeLSTM). They take turns in one process, in blocks of
calls with a pause before each; a ratio is the median over the blocks of their time over that of pymtl in int8 (of
the last row, of pymtl in bfloat16).

Errors are of layers with random sizes, weights and inputs: the root mean square of the outputs' differences from
float64, over the same of ONNX Runtime's int8; and the same of the largest difference, which chance decides more.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from grids import BLOCKS, Case, blocks, geometric_mean
from matplotlib.figure import Figure
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from runtimes import onnx_model, onnx_runtime
from torch import Tensor, nn

import pymtl
from pymtl.benchmark import results

OURS = "pymtl int8"
SIZES = (64, 128, 256, 512)
CASES = tuple(
    Case(batch, steps, size, size, layers, directions)
    for size in SIZES
    for layers, directions in ((1, 1), (1, 2), (2, 2))
    for steps in (8, 32, 128)
    for batch in (1, 2, 4)
)
# Against whom, for which cases, and the geometric mean and worst aimed at.
AIMS: tuple[tuple[str, str, Callable[[Case], bool], float, float], ...] = (
    ("pymtl float32", "H >= 256", lambda case: case.hidden_size >= 256, 3.0, 1.7),
    ("pymtl float32", "H < 256", lambda case: case.hidden_size < 256, 1.4, 1.0),
    ("ONNX Runtime int8", "all", lambda _: True, 1.5, 1.0),
    ("quantize_dynamic", "all", lambda _: True, 3.0, 1.5),
    ("nn.LSTM", "all", lambda _: True, 8.0, 2.5),
)
LAYERS = 300  # of the errors


def calls_of(case: Case, threads: int, folder: Path) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    theirs = nn.LSTM(case.input_size, case.hidden_size, case.layers, bidirectional=case.directions == 2).eval()
    x = torch.randn(case.steps, case.batch, case.input_size)
    with warnings.catch_warnings():  # that it goes away
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(theirs, {nn.LSTM}, dtype=torch.qint8)

    def frozen(dtype: torch.dtype) -> Callable[[], Any]:
        module = pymtl.freeze(pymtl.convert(theirs), dtype)
        return lambda: module(x)[0]

    return {
        OURS: frozen(torch.int8),
        "pymtl bfloat16": frozen(torch.bfloat16),
        "pymtl float32": frozen(torch.float32),
        "nn.LSTM": lambda: theirs(x)[0],
        "quantize_dynamic": lambda: dynamic(x)[0],
        "ONNX Runtime": onnx_runtime(theirs, x, threads),
        "ONNX Runtime int8": onnx_runtime_int8(theirs, x, threads, folder),
    }


def onnx_runtime_int8(module: nn.LSTM, x: Tensor, threads: int, folder: Path) -> Callable[[], Any]:
    plain, quantised = folder / "lstm.onnx", folder / "lstm.int8.onnx"
    onnx.save(onnx_model(module), plain)
    quantize_dynamic(plain, quantised, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(quantised), options, providers=["CPUExecutionProvider"])
    feed = {"input": x.numpy()}
    return lambda: session.run(None, feed)[0]


def speeds(threads: int, seconds: float, folder: Path) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(threads)
    for case in CASES:
        calls = calls_of(case, threads, folder)
        with torch.inference_mode():
            outputs = {name: torch.as_tensor(call()) for name, call in calls.items()}
            for name, output in outputs.items():
                difference = float((output - outputs["nn.LSTM"]).abs().max())
                if not difference < 0.1:
                    raise SystemExit(f"{name}: differs from nn.LSTM by {difference}")
            taken = blocks(calls, seconds)
        yield {
            "shape": str(case),
            "threads": threads,
            "ms": {who: statistics.median(times) for who, times in taken.items()},
            "ratios": {
                who: statistics.median(b / a for a, b in zip(taken[OURS], times))
                for who, times in taken.items()
                if who != OURS
            },
            "bfloat16 against float32": statistics.median(
                b / a for a, b in zip(taken["pymtl bfloat16"], taken["pymtl float32"])
            ),
        }


def errors(folder: Path) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def any_of(*numbers: Any) -> Any:
        return numbers[int(torch.randint(len(numbers), (1,), generator=generator))]

    for number in range(LAYERS):
        torch.manual_seed(number)
        input_size, hidden_size = any_of(8, 30, 64, 100, 300), any_of(16, 33, 64, 128, 200)
        module = nn.LSTM(input_size, hidden_size, bidirectional=any_of(True, False)).eval()
        x = any_of(0.1, 1.0, 3.0) * torch.randn(any_of(1, 10, 50), any_of(1, 4), input_size)
        with torch.no_grad():
            frozen = pymtl.freeze(pymtl.convert(module), torch.int8)
            ours = frozen(x)[0]
            theirs = torch.as_tensor(onnx_runtime_int8(module, x, 1, folder)())
            truth = module.double()(x.double())[0]
        found = {
            name: {"rms": float((output - truth).square().mean().sqrt()), "max": float((output - truth).abs().max())}
            for name, output in ((OURS, ours), ("ONNX Runtime int8", theirs))
        }
        yield {"shape": f"B{x.shape[1]} T{x.shape[0]} I{input_size} H{hidden_size}", **found}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_shape = {str(case): case for case in CASES}
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        own = [row for row in rows if row["threads"] == threads]
        for against, which, chosen, mean, worst in AIMS:
            found = [(row["ratios"][against], row["shape"]) for row in own if chosen(by_shape[row["shape"]])]
            lines.append(_line(OURS, against, which, threads, found, mean, worst))
        found = [
            (row["bfloat16 against float32"], row["shape"])
            for row in own
            if by_shape[row["shape"]].hidden_size >= 256 and by_shape[row["shape"]].batch == 1
        ]
        lines.append(_line("pymtl bfloat16", "pymtl float32", "H >= 256, B = 1", threads, found, 1.3, 1.1))
    return lines


def _line(
    ours: str, against: str, which: str, threads: int, found: list[tuple[float, str]], mean: float, worst: float
) -> dict[str, Any]:
    lowest, shape = min(found)
    return {
        "ours": ours,
        "against": against,
        "cases": which,
        "threads": threads,
        "count": len(found),
        "geometric mean": geometric_mean(ratio for ratio, _ in found),
        "aim": mean,
        "worst": lowest,
        "aim of the worst": worst,
        "worst shape": shape,
    }


def _errors_summary(ratios: list[float]) -> dict[str, Any]:
    return {
        "layers": len(ratios),
        "geometric mean": geometric_mean(ratios),
        "largest": max(ratios),
        "above 1": sum(ratio > 1 for ratio in ratios),
    }


def plot(result: dict[str, Any]) -> Figure:
    """Milliseconds of one sequence of 32 steps over the hidden size, for each number of threads."""
    counts = sorted({row["threads"] for row in result["rows"]})
    figure = Figure(figsize=(4.5 * len(counts), 4.2), layout="constrained")
    for axes, threads in zip(figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts):
        own = {row["shape"]: row["ms"] for row in result["rows"] if row["threads"] == threads}
        rows = [own[str(Case(1, 32, size, size))] for size in SIZES]
        for name in ("ONNX Runtime", "ONNX Runtime int8", "pymtl float32", "pymtl bfloat16", OURS):
            style = "--" if name.startswith("ONNX") else "-"
            axes.plot(SIZES, [ms[name] for ms in rows], style, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.set_xlabel("hidden size = input size")
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("ms, one sequence of 32 steps, bidirectional")
    figure.axes[0].legend(fontsize=8)
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['instruction set in use']}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", metavar="N", help="may be repeated (default: 1 and 2)")
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="of each shape, about (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency over the hidden size (PNG)")
    arguments = parser.parse_args()
    counts = arguments.threads or [1, 2]
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime recommends a step more for each model
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    result = results.stamped(rows=[], errors=[], blocks=BLOCKS)
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("errors", total=LAYERS)
        for row in errors(Path(folder)):
            result["errors"].append(row)
            progress.advance(task)
        task = progress.add_task("speed", total=len(CASES) * len(counts))
        for row in itertools.chain(*(speeds(count, arguments.seconds, Path(folder)) for count in counts)):
            result["rows"].append(row)
            progress.advance(task)
    result["summary"] = summary(result["rows"])
    result["errors over ONNX Runtime int8's"] = {
        kind: _errors_summary([row[OURS][kind] / row["ONNX Runtime int8"][kind] for row in result["errors"]])
        for kind in ("rms", "max")
    }
    table = Table(title="How many times as fast: geometric mean and worst (aim)")
    for heading in ("", "against", "cases", "threads", "mean", "worst", "worst at"):
        table.add_column(heading, justify="right" if heading in ("threads", "mean", "worst") else "left")
    for line in result["summary"]:
        table.add_row(
            line["ours"],
            line["against"],
            line["cases"],
            str(line["threads"]),
            f"{line['geometric mean']:.2f} ({line['aim']:g})",
            f"{line['worst']:.2f} ({line['aim of the worst']:g})",
            line["worst shape"],
        )
    console.print(table)
    for kind, found in result["errors over ONNX Runtime int8's"].items():
        console.print(
            f"errors from float64 over ONNX Runtime int8's, {kind}, {found['layers']} layers: geometric mean "
            f"{found['geometric mean']:.2f}, largest {found['largest']:.2f}, above 1 in {found['above 1']}"
        )
    if arguments.json:
        results.write(result, arguments.json)
    if arguments.plot:
        plot(result).savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
