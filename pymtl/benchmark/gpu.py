"""The LSTM beside nn.LSTM (cuDNN) on a GPU, timed by CUDA events."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark.timing import percentile
from pymtl.ops.dtypes import has_cuda

Call = Callable[[], Any]
DEFAULT_SHAPES = (  # batch, steps, input size, hidden size
    (1, 64, 256, 256),
    (8, 64, 256, 256),
    (32, 128, 256, 256),
    (64, 128, 256, 256),
    (8, 128, 512, 512),
    (64, 128, 512, 512),
)


@dataclass(frozen=True)
class Case:
    """One layer on a GPU. ``fill``: the mean length over the longest; ``tf32``: whether recurrent layers may use it, of
    float32."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16
    directions: int = 2
    fill: float = 1.0
    tf32: bool = False

    def __str__(self) -> str:
        text = f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size} "
        text += "bi" if self.directions == 2 else "uni"
        text += f" {str(self.dtype).removeprefix('torch.')}" + (" tf32" if self.tf32 else "")
        return text + (f" fill {self.fill:.1f}" if self.fill < 1 else "")

    def lengths(self) -> Tensor:
        """Uniform about T times ``fill``, the longest T."""
        least = max(1, round((2 * self.fill - 1) * self.steps))
        lengths = torch.randint(least, self.steps + 1, (self.batch,), generator=torch.Generator().manual_seed(0))
        lengths[0] = self.steps
        return lengths

    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations of the matrix products of a forward pass."""
        return self.directions * tokens * 8 * self.hidden_size * (self.input_size + self.hidden_size)

    def blocks(self) -> int:
        """Of the smallest cluster whose registers and shared memory hold W_hh."""
        units = 32 if self.dtype == torch.float32 else 64 if self.hidden_size <= 512 else 48
        return -(-self.hidden_size // units)


@dataclass(frozen=True)
class Limits:
    """What the device was measured to reach, and cannot be beaten."""

    matmul_tflops: dict[str, float]  # a large product, for each dtype and in TF32
    copy_gigabytes: float  # GB/s, read and written
    exchange_us: dict[int, float]  # a message from every block of a cluster to every other, by the number of blocks
    barrier_us: dict[int, float]  # a cluster's barrier

    def least_ms(self, case: Case, tokens: int, passes: int) -> float | None:
        """What a case takes at least: an exchange at each step and all products at the speed of a large one, one after
        the other. ``passes`` 1: forward, 2: backward too, with thrice the products. None where no cluster was measured
        that holds the weights."""
        exchanges = [us for blocks, us in self.exchange_us.items() if blocks >= case.blocks()]
        if not exchanges:
            return None
        tflops = self.matmul_tflops["tf32" if case.tf32 else str(case.dtype).removeprefix("torch.")]
        products = case.forward_flops(tokens) * (1 if passes == 1 else 3)
        return 1e-3 * passes * case.steps * min(exchanges) + 1e-9 * products / tflops


def measure(case: Case, limits: Limits, seconds: float = 0.5) -> Iterator[dict[str, Any]]:
    """Times a case; yields a row for ``forward`` and one for ``forward+backward``.

    Contenders take turns: ours and nn.LSTM called as a user calls them, and both replayed from a CUDA graph where the
    batch is dense. A ratio is the median over the rounds of nn.LSTM's time over ours, called alike; the share of the
    limit is that of ours, from a graph where there is one.
    """
    theirs = nn.LSTM(
        case.input_size, case.hidden_size, bidirectional=case.directions == 2, device="cuda", dtype=case.dtype
    )
    ours = pymtl.convert(theirs)
    x: Any = torch.randn(case.steps, case.batch, case.input_size, device="cuda", dtype=case.dtype)
    tokens = case.steps * case.batch
    if case.fill < 1:
        lengths = case.lengths()
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        tokens = int(lengths.sum())
    with _fp32_precision(case):
        for passes, (mode, make) in enumerate((("forward", _forward), ("forward+backward", _training)), 1):
            calls = {"pymtl": make(ours, x), "nn.LSTM": make(theirs, x)}
            with torch.set_grad_enabled(mode != "forward"):
                if case.fill == 1:
                    calls |= {f"{name}, graph": recorded(call) for name, call in calls.items()}
                timed = timed_in_turns(calls, seconds)
            flops = case.forward_flops(tokens) * (1 if passes == 1 else 3)
            least = limits.least_ms(case, tokens, passes)
            best = timed["pymtl, graph" if case.fill == 1 else "pymtl"]["p50"]
            yield {
                "case": str(case),
                "mode": mode,
                "kernels": "pymtl" if ours.kernels_take(torch.empty(0, device="cuda", dtype=case.dtype)) else "torch",
                "contenders": timed,
                "us_per_step": 1e3 * timed["pymtl"]["p50"] / case.steps,
                "tflops": 1e-9 * flops / timed["pymtl"]["p50"],
                "share_of_limit": None if least is None else least / best,
                "ratio": timed["nn.LSTM"]["ratio"],
                "ratio_of_graphs": timed["nn.LSTM, graph"]["ratio"] if case.fill == 1 else None,
                "difference": _difference(ours, theirs, x),
            }


def device_facts() -> dict[str, Any]:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver.stdout.split("\n")[0] if driver is not None and driver.returncode == 0 else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def table_of(rows: list[dict[str, Any]]) -> Any:
    """The rows of :func:`measure` as a table of rich's."""
    from rich.table import Table

    table = Table(
        title="A layer beside nn.LSTM on the GPU",
        caption="x: how many times as fast as nn.LSTM, called and as CUDA graphs. % limit: of the speed at which every "
        "step takes one exchange within a cluster and all products run at the measured peak.",
    )
    for heading in ("case", "mode", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "us/step", "TFLOP/s", "% limit", "nn.LSTM ms", "x", "x, graphs", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        timed = row["contenders"]
        graphs = row["ratio_of_graphs"]
        table.add_row(
            row["case"],
            row["mode"],
            row["kernels"],
            f"{timed['pymtl']['p50']:.3f}",
            f"{row['us_per_step']:.2f}",
            f"{row['tflops']:.1f}",
            "" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.0f}",
            f"{timed['nn.LSTM']['p50']:.3f}",
            f"{row['ratio']:.2f}",
            "" if graphs is None else f"{graphs:.2f}",
            f"{row['difference']:.0e}",
        )
    return table


def limits(seconds: float = 0.2) -> Limits:
    """Measures the device's limits."""
    large, tflops = 8192, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(large, large, device="cuda", dtype=dtype)
        taken = timed_in_turns({"pymtl": lambda a=a: a @ a}, seconds)["pymtl"]["p50"]
        tflops[str(dtype).removeprefix("torch.")] = 2e-9 * large**3 / taken
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tflops["tf32"] = 2e-9 * large**3 / timed_in_turns({"pymtl": lambda: a @ a}, seconds)["pymtl"]["p50"]
    torch.backends.cuda.matmul.fp32_precision = before
    memory = torch.empty(1 << 28, device="cuda")
    copied = torch.empty_like(memory)
    taken = timed_in_turns({"pymtl": lambda: copied.copy_(memory)}, seconds)["pymtl"]["p50"]
    rounds = 10000
    # A block of the float32 kernels has 32 units: so many blocks has the device's largest cluster.
    largest = torch.ops.pymtl.rnn_hidden_size_limit(memory[:0]) // 32 if has_cuda(memory) else 0
    found: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for messages, by_blocks in found.items():
        for blocks in (2, 4, 8, 16):
            if blocks > largest:
                continue
            calls = {"pymtl": lambda b=blocks, m=messages: torch.ops.pymtl.cluster_rounds(memory, b, rounds, m)}
            by_blocks[blocks] = 1e3 * timed_in_turns(calls, seconds)["pymtl"]["p50"] / rounds
    return Limits(tflops, 2e-6 * memory.nbytes / taken, found[True], found[False])


def timed_in_turns(calls: Mapping[str, Call], seconds: float) -> dict[str, dict[str, float]]:
    """``p50`` and ``p90`` milliseconds of each call, and ``ratio``, the median of its time over that of "pymtl" called
    alike in the same round."""
    for call in calls.values():
        for _ in range(3):
            call()
    once = sum(_elapsed(_events(call)) for call in calls.values())
    rounds = max(5, min(200, int(1e3 * seconds / max(once, 1e-3))))
    pairs = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            pairs[name].append(_events(call))
    torch.cuda.synchronize()
    times = {name: [start.elapsed_time(end) for start, end in of_call] for name, of_call in pairs.items()}
    result = {}
    for name, own in times.items():
        ours = times["pymtl, graph" if name.endswith(", graph") else "pymtl"]
        result[name] = {
            "p50": statistics.median(own),
            "p90": percentile(own, 0.9),
            "ratio": statistics.median(a / b for a, b in zip(own, ours)),
        }
    return result


def recorded(call: Call) -> Call:
    """The call's work as a CUDA graph, to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _events(call: Call) -> tuple[Any, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def _elapsed(events: tuple[Any, Any]) -> float:
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def _forward(module: nn.Module, x: Tensor | PackedSequence) -> Call:
    return lambda: module(x)


def _training(module: nn.Module, x: Tensor | PackedSequence) -> Call:
    data = _data(x).detach().requires_grad_()
    wanted = [data, *module.parameters()]
    batch = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data

    def step() -> tuple[Tensor, ...]:
        output = _data(module(batch)[0])
        return torch.autograd.grad(output, wanted, torch.ones_like(output))

    return step


def _data(batch: Tensor | PackedSequence) -> Tensor:
    return batch.data if isinstance(batch, PackedSequence) else batch


def _difference(ours: nn.Module, theirs: nn.Module, x: Tensor | PackedSequence) -> float:
    """The largest difference over the largest value."""
    with torch.no_grad():
        a, b = _data(ours(x)[0]).float(), _data(theirs(x)[0]).float()
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def _fp32_precision(case: Case) -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
