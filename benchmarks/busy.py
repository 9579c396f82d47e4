"""Short calls beside busy neighbours: what a server sees that shares its machine.

    python benchmarks/busy.py [--json FILE]

One layer in two directions, frozen, is called again and again on two threads while 0, 1 or 2 processes of this
script's own keep a core busy each. Beside it stand nn.LSTM and, where they are installed, ONNX Runtime. Each contender
runs in a process of its own, one after the other. Shown are the median, the 90th and the 99th percentile of a call in
milliseconds, and the 99th in units of the contender's own median without neighbours.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.timing import percentile
from pymtl.commands import positive

SHAPES = ((1, 24, 128), (1, 64, 256), (8, 64, 256))  # batch, steps, hidden size
NEIGHBOURS = (0, 1, 2)
OURS = "pymtl, frozen"


def keep_busy() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    processes = [multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(1.0 if count else 0.0)  # until they run
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def nn_lstm(batch: int, steps: int, hidden: int, threads: int) -> tuple[nn.LSTM, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    return nn.LSTM(hidden, hidden, bidirectional=True).eval(), torch.randn(steps, batch, hidden)


def ours(*shape: int) -> Callable[[], Any]:
    plain, x = nn_lstm(*shape)
    module = pymtl.freeze(pymtl.convert(plain))
    return lambda: module(x)


def torchs(*shape: int) -> Callable[[], Any]:
    module, x = nn_lstm(*shape)
    return lambda: module(x)


def onnx_runtimes(*shape: int) -> Callable[[], Any]:
    from runtimes import onnx_runtime

    return onnx_runtime(*nn_lstm(*shape), shape[-1])


CONTENDERS: dict[str, Callable[..., Callable[[], Any]]] = {OURS: ours, "nn.LSTM": torchs}
if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "openvino")):
    CONTENDERS["ONNX Runtime"] = onnx_runtimes


def measure(name: str, shape: tuple[int, int, int], threads: int, seconds: float) -> dict[str, float]:
    """In a process of its own: threads that spin after one contender's call would take the core from another's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(percentiles, (name, shape, threads, seconds))


def percentiles(name: str, shape: tuple[int, int, int], threads: int, seconds: float) -> dict[str, float]:
    with torch.no_grad():
        call = CONTENDERS[name](*shape, threads)
        for _ in range(50):
            call()
        taken = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - started))
    return {"p50": percentile(taken, 0.5), "p90": percentile(taken, 0.9), "p99": percentile(taken, 0.99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each contender and case (8)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of every contender (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    console = Console(width=132)
    rows = []
    for shape, count in track(
        [(shape, count) for shape in SHAPES for count in NEIGHBOURS],
        "shapes and neighbours",
        console=console,
        transient=True,
    ):
        with neighbours(count):
            timed = {name: measure(name, shape, arguments.threads, arguments.seconds) for name in CONTENDERS}
        batch, steps, hidden = shape
        rows.append({"shape": f"B{batch} T{steps} H{hidden}", "neighbours": count, "contenders": timed})
    table = Table(title=f"Calls on {arguments.threads} threads: p50 / p90 / p99 in ms (p99 over own idle p50)")
    table.add_column("shape", no_wrap=True)
    table.add_column("beside", justify="right")
    names = list(CONTENDERS)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    idle: dict[str, float] = {}
    for row in rows:
        timed = row["contenders"]
        if row["neighbours"] == 0:
            idle = {name: timed[name]["p50"] for name in names}
        cells = [
            f"{timed[n]['p50']:.2f} / {timed[n]['p90']:.2f} / {timed[n]['p99']:.2f} ({timed[n]['p99'] / idle[n]:.1f} x)"
            for n in names
        ]
        table.add_row(row["shape"], str(row["neighbours"]), *cells, end_section=row["neighbours"] == NEIGHBOURS[-1])
    console.print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
