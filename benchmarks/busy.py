"""Short calls and training steps beside busy neighbours: what a process sees that shares its machine.

    python benchmarks/busy.py [--json FILE]

One layer in two directions, frozen, is called again and again on two threads while 0, 1 or 2 processes of this
script's own keep a core busy each. Beside it stand nn.LSTM and, where they are installed, ONNX Runtime. Each contender
runs in a process of its own, one after the other. Shown are the median, the 90th and the 99th percentile of a call in
milliseconds, and the 99th in units of the contender's own median without neighbours.

Then a training step of such a layer with Adam: its mean on two threads, on one, and, of pymtl, on as many as the
command line takes by itself beside these neighbours. With a CPU quota instead of neighbours (--quota CORES, where the
control groups let this process make one) the same steps show what a container gets.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
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
from pymtl.commands import cores, positive

SHAPES = ((1, 24, 128), (1, 64, 256), (8, 64, 256))  # batch, steps, hidden size
TRAINED = (16, 32, 128)
NEIGHBOURS = (0, 1, 2)
ROOT = Path("/sys/fs/cgroup")
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


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: threads that spin after one contender's call would take the core from another's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def percentiles(name: str, shape: tuple[int, int, int], threads: int, seconds: float) -> dict[str, float]:
    with torch.no_grad():
        return percentiles_of(CONTENDERS[name](*shape, threads), seconds, per_second=1e3)


def percentiles_of(call: Callable[[], Any], seconds: float, per_second: float) -> dict[str, float]:
    """Percentiles of the time of a call, after 50 calls to warm up; ``per_second`` says the unit, 1e3 milliseconds."""
    for _ in range(50):
        call()
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        taken.append(per_second * (time.perf_counter() - started))
    return {"p50": percentile(taken, 0.5), "p90": percentile(taken, 0.9), "p99": percentile(taken, 0.99)}


def step_mean(name: str, threads: int | None, seconds: float, group: Path | None) -> dict[str, float]:
    """The mean milliseconds of a training step, and on how many threads; None: on those of the free cores."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    if threads is None:
        cores.begin()
        threads = cores.free()[0]
    batch, steps, hidden = TRAINED
    module, x = nn_lstm(batch, steps, hidden, threads)
    module.train()
    if name == "pymtl":
        module = pymtl.convert(module)
    optimizer = torch.optim.Adam(module.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module(x)[0].square().mean().backward()
        optimizer.step()

    for _ in range(10):
        step()
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        step()
        count += 1
    return {"mean": 1e3 * (time.perf_counter() - started) / count, "threads": threads}


@contextmanager
def quota_group(quota: float) -> Iterator[Path]:
    """A control group with a quota of so many cores.

    Raises:
        OSError: this process may not make one.
    """
    second = ROOT / "cgroup.controllers"
    group = (ROOT if second.exists() else ROOT / "cpu") / f"pymtl_busy_{os.getpid()}"
    group.mkdir()
    try:
        period = 100_000
        if second.exists():
            (group / "cpu.max").write_text(f"{int(quota * period)} {period}")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(int(quota * period)))
        yield group
    finally:
        for _ in range(50):  # until the last process in it is gone
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def training_rows(seconds: float, quota: float | None) -> list[dict[str, Any]]:
    """A row for each number of neighbours, and one for the quota."""
    cases = [("pymtl", 2), ("pymtl", 1), ("pymtl", None), ("nn.LSTM", 2), ("nn.LSTM", 1)]

    def timed(group: Path | None = None) -> dict[str, dict[str, float]]:
        named = {f"{name}, {threads or 'free'}": (name, threads) for name, threads in cases}
        return {label: apart(step_mean, *case, seconds, group) for label, case in named.items()}

    rows = []
    for count in NEIGHBOURS:
        with neighbours(count):
            rows.append({"beside": f"{count} neighbour{'s' * (count != 1)}", "contenders": timed()})
    if quota is not None:
        with quota_group(quota) as group:
            rows.append({"beside": f"a quota of {quota:g} core{'s' * (quota != 1)}", "contenders": timed(group)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each contender and case (8)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of every contender (2)")
    parser.add_argument("--quota", type=float, metavar="CORES", help="a CPU quota for training steps (none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    if arguments.quota is not None:
        try:
            with quota_group(arguments.quota):
                pass
        except OSError as error:
            parser.error(f"--quota: this process may not make a control group: {error}")
    console = Console(width=132)
    rows = []
    for shape, count in track(
        [(shape, count) for shape in SHAPES for count in NEIGHBOURS],
        "shapes and neighbours",
        console=console,
        transient=True,
    ):
        with neighbours(count):
            timed = {name: apart(percentiles, name, shape, arguments.threads, arguments.seconds) for name in CONTENDERS}
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
    batch, steps, hidden = TRAINED
    with console.status("training steps"):
        training = training_rows(arguments.seconds, arguments.quota)
    table = Table(title=f"A training step of B{batch} T{steps} H{hidden}: its mean in ms, on so many threads")
    table.add_column("beside", no_wrap=True)
    for name in training[0]["contenders"]:
        table.add_column(name, justify="right")
    for row in training:
        cells = [f"{timed['mean']:.1f} on {timed['threads']}" for timed in row["contenders"].values()]
        table.add_row(row["beside"], *cells)
    console.print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows, training=training), arguments.json)


if __name__ == "__main__":
    main()
