"""A model's file in the runtime without torch, beside torch and ONNX Runtime.

    python benchmarks/runtime.py [--json FILE] [--plot FILE] [--run RUN]

Two models answer one text: "joint" has words and characters (filters of two widths), attention over the text for a
class, and 72 tags by a conditional random field; "tagger" has words and 20 tags. Contenders: the file of pymtl.export
in pymtl_runtime, float32 and int8; the frozen model in torch, float32 and int8, with its decoding; the same file as
ONNX in ONNX Runtime, whose graph decodes too, and the same after its quantize_dynamic. Each gets ids, and says classes
and tags.

They take turns in one process, in blocks of calls with a pause before each; a ratio is the median over the blocks of
their time over that of pymtl_runtime with the same weights. Percentiles beside a neighbour, which keeps one core busy,
are of contenders each in a process of its own, on two threads. Then: how fast the tagger reads its recurrent weights,
and how fast the core can; one step of a stream (H = 128, one direction, its states kept), through C and through Python,
beside ONNX Runtime with the states as inputs; texts a second in batches of 64; and, of a run (--run), the time from
starting Python to the first answer, and the memory it takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pymtl_runtime
import torch
from busy import apart, neighbours, percentiles_of
from grids import BLOCKS, blocks
from matplotlib.figure import Figure
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.machine import read_gigabytes

MODELS = ("joint", "tagger")
SIZES = (128, 256)
LENGTHS = (10, 40)
OURS, OURS8 = "pymtl_runtime", "pymtl_runtime int8"
TORCH, TORCH8 = "torch, frozen", "torch, frozen int8"
ORT, ORT8 = "ONNX Runtime", "ONNX Runtime int8"
SAME_WEIGHTS = {TORCH: OURS, ORT: OURS, TORCH8: OURS8, ORT8: OURS8}
WORDS, CHARACTERS, LETTERS = 11_000, 80, 12
STREAM_STEPS = 20_000
SOURCE = Path(__file__).with_name("step.c")


def model_of(kind: str, hidden: int) -> pymtl.MultiTaskModel:
    torch.manual_seed(0)
    words = nn.Embedding(WORDS, 128, padding_idx=0)
    if kind == "tagger":
        encoder = pymtl.LSTM(128, hidden, batch_first=True, bidirectional=True)
        return pymtl.MultiTaskModel(words, encoder, {"tags": pymtl.TokenClassificationHead(20)}).eval()
    embedding = pymtl.TokenFeatures({"words": words, "characters": pymtl.CharacterCNN(CHARACTERS, 30, 50)})
    encoder = pymtl.LSTM(228, hidden, batch_first=True, bidirectional=True)
    heads = {"intent": pymtl.ClassificationHead(7, "attention"), "slots": pymtl.CRFHead(72)}
    return pymtl.MultiTaskModel(embedding, encoder, heads).eval()


def inputs_of(kind: str, length: int, batch: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    found = {"words": random.integers(2, WORDS, (batch, length))}
    if kind == "joint":
        found["characters"] = random.integers(2, CHARACTERS, (batch, length, LETTERS))
    return found


def runtime_call(path: Path, kind: str, length: int, threads: int) -> Callable[[], Any]:
    session = pymtl_runtime.Model(path, threads).session()
    flat = {name: values[0] for name, values in inputs_of(kind, length).items()}
    names = [task.name for task in session.model.tasks]

    def call() -> Any:
        session.run([length], flat)
        return [session.answer(name).ids for name in names]

    return call


def torch_call(kind: str, hidden: int, length: int, threads: int, weights: torch.dtype | None) -> Callable[[], Any]:
    model = pymtl.freeze(model_of(kind, hidden), weights)
    given = {name: torch.from_numpy(values) for name, values in inputs_of(kind, length).items()}
    inputs = given if kind == "joint" else given["words"]
    lengths = torch.tensor([length])

    def call() -> Any:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            logits = model(inputs, lengths)
            crf = getattr(model.heads["slots"], "crf", None) if kind == "joint" else None
            return [crf.decode(z, lengths)[0] if crf and t == "slots" else z.argmax(-1) for t, z in logits.items()]

    return call


def onnx_call(path: Path, kind: str, length: int, threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {**inputs_of(kind, length), "lengths": np.array([length])}
    answers = [output.name for output in session.get_outputs() if output.name.endswith("/answer")]
    return lambda: session.run(answers, given)


def write_files(kind: str, hidden: int, folder: Path) -> dict[str, Path]:
    stem = folder / f"{kind}{hidden}"
    paths = {OURS: f"{stem}.pymtl", OURS8: f"{stem}8.pymtl", ORT: f"{stem}.onnx", ORT8: f"{stem}8.onnx"}
    found = {name: Path(path) for name, path in paths.items()}
    if not found[ORT8].exists():
        model = model_of(kind, hidden)
        pymtl.export(model, found[OURS])
        pymtl.export(model, found[OURS8], weights=torch.int8)
        pymtl.export(model, found[ORT])
        quantize_dynamic(found[ORT], found[ORT8], weight_type=QuantType.QInt8, op_types_to_quantize=["LSTM"])
    return found


def call_of(name: str, kind: str, hidden: int, length: int, threads: int, folder: Path) -> Callable[[], Any]:
    files = write_files(kind, hidden, folder)
    if name in (OURS, OURS8):
        return runtime_call(files[name], kind, length, threads)
    if name in (ORT, ORT8):
        return onnx_call(files[name], kind, length, threads)
    return torch_call(kind, hidden, length, threads, torch.int8 if name == TORCH8 else None)


CONTENDERS = (OURS, OURS8, TORCH, TORCH8, ORT, ORT8)


def latencies(seconds: float, folder: Path) -> Iterator[dict[str, Any]]:
    for kind in MODELS:
        for hidden in SIZES:
            for length in LENGTHS:
                for threads in (1, 2):
                    calls = {name: call_of(name, kind, hidden, length, threads, folder) for name in CONTENDERS}
                    taken = blocks(calls, seconds)
                    yield {
                        "model": kind,
                        "hidden size": hidden,
                        "tokens": length,
                        "threads": threads,
                        "us": {name: 1e3 * statistics.median(times) for name, times in taken.items()},
                        "ratios": {
                            name: statistics.median(theirs / own for theirs, own in zip(taken[name], taken[ours]))
                            for name, ours in SAME_WEIGHTS.items()
                        },
                    }


def percentiles(
    name: str, kind: str, hidden: int, length: int, threads: int, folder: Path, seconds: float
) -> dict[str, float]:
    return percentiles_of(call_of(name, kind, hidden, length, threads, folder), seconds, per_second=1e6)


def beside_neighbours(seconds: float, folder: Path) -> Iterator[dict[str, Any]]:
    for count in (0, 1):
        for hidden in SIZES:
            for length in LENGTHS:
                row: dict[str, Any] = {"neighbours": count, "hidden size": hidden, "tokens": length, "us": {}}
                with neighbours(count):
                    for name in (OURS, OURS8, ORT, ORT8, TORCH):
                        row["us"][name] = apart(percentiles, name, "joint", hidden, length, 2, folder, seconds)
                yield row


def stream_step(folder: Path) -> dict[str, float]:
    """Microseconds of a step of one direction, H = 128 = I."""
    torch.manual_seed(0)
    layer = pymtl.LSTM(128, 128)
    path = folder / "layer.pymtl"
    pymtl.export(layer, path)
    library = Path(
        os.environ.get("PYMTL_RUNTIME_LIBRARY") or Path(pymtl_runtime.__file__).with_name("libpymtl_runtime.so")
    )
    header = SOURCE.parents[1] / "csrc" / "c"
    program = folder / "step"
    compiler = ["cc", "-O2", str(SOURCE), f"-I{header}", f"-L{library.parent}", "-lpymtl_runtime", "-o", str(program)]
    subprocess.run(compiler, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    command = [str(program), str(path), str(STREAM_STEPS)]
    through_c = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    frame = np.zeros((1, 128), np.float32)
    stream = pymtl_runtime.Model(path, 1).stream()
    lengths = np.ones(1, np.int64)

    def python() -> None:
        stream.run(lengths, {"features": frame})
        stream.logits("output")

    step = onnx_step(layer)
    with torch.inference_mode():
        frozen, x = pymtl.freeze(layer.eval()), torch.zeros(1, 1, 128)
        state: Any = None

        def torchs() -> None:
            nonlocal state
            _, state = frozen(x, state)

        timed = {"Python": python, ORT: step, TORCH: torchs}
        torch.set_num_threads(1)
        taken = blocks(timed, 3.0)
    return {"C": through_c, **{name: 1e3 * statistics.median(times) for name, times in taken.items()}}


def onnx_step(layer: nn.LSTM) -> Callable[[], Any]:
    """A step with the states as inputs and outputs."""

    def gates(weight: torch.Tensor) -> np.ndarray:
        i, f, g, o = weight.detach().chunk(4)
        return torch.cat([i, o, f, g]).numpy()

    weights = {
        "W": gates(layer.weight_ih_l0)[None],
        "R": gates(layer.weight_hh_l0)[None],
        "B": np.concatenate([gates(layer.bias_ih_l0), gates(layer.bias_hh_l0)])[None],
    }
    node = helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["y", "h_n", "c_n"], hidden_size=128)

    def info(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "step",
        [info(name, [1, 1, 128]) for name in ("x", "h", "c")],
        [info("y", [1, 1, 1, 128]), *(info(name, [1, 1, 128]) for name in ("h_n", "c_n"))],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.zeros((1, 1, 128), np.float32)
    state = [np.zeros((1, 1, 128), np.float32)] * 2

    def step() -> None:
        _, state[0], state[1] = session.run(None, {"x": x, "h": state[0], "c": state[1]})

    return step


def throughput(folder: Path) -> dict[str, float]:
    """Texts a second in batches of 64 texts of 5 to 40 tokens, joint model, H = 128, two threads."""
    lengths = np.random.default_rng(0).integers(5, 41, 64)
    padded = inputs_of("joint", 40, 64)
    mask = np.arange(40) < lengths[:, None]
    session = pymtl_runtime.Model(write_files("joint", 128, folder)[OURS], 2).session()
    flat = {name: values[mask] for name, values in padded.items()}
    model = pymtl.freeze(model_of("joint", 128))
    given = {name: torch.from_numpy(values) for name, values in padded.items()}
    of_each = torch.from_numpy(lengths)

    def ours() -> None:
        session.run(lengths, flat)
        for name in ("intent", "slots"):
            session.answer(name)

    def torchs() -> None:
        torch.set_num_threads(2)
        with torch.inference_mode():
            logits = model(given, of_each)
            model.heads["slots"].crf.decode(logits["slots"], of_each)

    taken = blocks({OURS: ours, TORCH: torchs}, 6.0)
    return {name: 64e3 / statistics.median(times) for name, times in taken.items()}


STARTS = {
    OURS: "import pymtl_runtime; pymtl_runtime.load({file!r}).predict('play some jazz by miles davis')",
    TORCH: "import pymtl; pymtl.load({run!r}).predict('play some jazz by miles davis')",
}
MEMORY = "; print([int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')][0] / 1e3)"


def starts(run: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds from starting Python to its end behind the first answer, and megabytes then in memory."""
    file = folder / "run.pymtl"
    subprocess.run([sys.executable, "-m", "pymtl", "export", str(run), str(file)], check=True, capture_output=True)
    found = {}
    for name, code in STARTS.items():
        command = [sys.executable, "-c", code.format(file=str(file), run=str(run)) + MEMORY]
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            taken.append(time.perf_counter() - started)
        found[name] = {"seconds": statistics.median(taken), "MB": float(done.stdout.splitlines()[-1])}
    return found


def reading(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How fast the tagger reads its recurrent weights on one thread, float32: both directions' W_hh in the time of each
    further token; and how fast the core reads one direction's again and again."""
    us = {
        (row["hidden size"], row["tokens"]): row["us"]
        for row in rows
        if row["model"] == "tagger" and row["threads"] == 1
    }
    first, last = LENGTHS
    for hidden in SIZES:
        size = 4 * hidden * hidden * 4
        further = {
            name: (us[hidden, last][name] - us[hidden, first][name]) / (last - first) for name in ("pymtl_runtime", ORT)
        }
        yield {
            "hidden size": hidden,
            "bytes of a direction": size,
            "us a token": further,
            "GB/s": {name: 2 * size / taken / 1e3 for name, taken in further.items()},
            "GB/s of the core": read_gigabytes(1, size),
        }


def plot(result: dict[str, Any]) -> Figure:
    """Microseconds of the joint model's answer to one text on one thread."""
    rows = [row for row in result["latency"] if row["model"] == "joint" and row["threads"] == 1]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows)), rows):
        names = list(reversed(CONTENDERS))
        colours = ["tab:blue" if name.startswith("pymtl_runtime") else "tab:gray" for name in names]
        bars = axes.barh(range(len(names)), [row["us"][name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axes.set_yticks(range(len(names)), names if row is rows[0] else [""] * len(names), fontsize=8)
        axes.set_title(f"H = {row['hidden size']}, {row['tokens']} tokens", fontsize=9)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=7)
    machine = result["machine"]
    figure.suptitle(
        f"µs an answer, joint model, one thread: {machine['cpu']}, {machine['instruction set in use']}", fontsize=9
    )
    return figure


def tables(result: dict[str, Any]) -> Iterator[Table]:
    table = Table(title="Microseconds of one answer; and how many times as long as pymtl_runtime's, same weights")
    for heading in ("model", "H", "tokens", "threads", *CONTENDERS):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in result["latency"]:
        cells = [
            f"{row['us'][name]:.0f}" + (f" ({row['ratios'][name]:.2f})" if name in row["ratios"] else "")
            for name in CONTENDERS
        ]
        table.add_row(row["model"], *(str(row[key]) for key in ("hidden size", "tokens", "threads")), *cells)
    yield table
    table = Table(title="GB/s of reading W_hh: the tagger, one thread, each further token")
    for heading in ("H", "KiB a direction", "pymtl_runtime", ORT, "the core reads"):
        table.add_column(heading, justify="right")
    for row in result["reading"]:
        rates = (row["GB/s"]["pymtl_runtime"], row["GB/s"][ORT], row["GB/s of the core"])
        table.add_row(
            str(row["hidden size"]), str(row["bytes of a direction"] >> 10), *(f"{rate:.0f}" for rate in rates)
        )
    yield table
    table = Table(title="p50 / p99 in microseconds beside neighbours, joint model, two threads")
    names = list(result["neighbours"][0]["us"])
    for heading in ("neighbours", "H", "tokens", *names):
        table.add_column(heading, justify="right")
    for row in result["neighbours"]:
        cells = [f"{row['us'][name]['p50']:.0f} / {row['us'][name]['p99']:.0f}" for name in names]
        table.add_row(*(str(row[key]) for key in ("neighbours", "hidden size", "tokens")), *cells)
    yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="of each shape, about (default: 1.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies (PNG)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run to measure starting with")
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime recommends a step more for each model
    console = Console(width=170)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = results.stamped(blocks=BLOCKS)
        rows = latencies(arguments.seconds, folder)
        result["latency"] = list(track(rows, "latency", total=16, console=console))
        result["reading"] = list(reading(result["latency"]))
        rows = beside_neighbours(arguments.seconds, folder)
        result["neighbours"] = list(track(rows, "neighbours", total=8, console=console))
        result["step"] = stream_step(folder)
        result["texts a second"] = throughput(folder)
        if arguments.run:
            result["start"] = starts(arguments.run, folder)
    for table in tables(result):
        console.print(table)
    for key in ("step", "texts a second", "start"):
        if key in result:
            console.print(f"{key}: {result[key]}")
    if arguments.json:
        results.write(result, arguments.json)
    if arguments.plot:
        plot(result).savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
