"""The LSTM beside nn.LSTM (cuDNN) on a GPU, timed by CUDA events."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark.timing import percentile
from pymtl.ops.dtypes import has_cuda

Call = Callable[[], Any]
DEVICE = "cuda"
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

    def small(self) -> Case:
        """The like of it on a tiny scale, to see whether it runs."""
        steps = 2 if self.steps <= 64 else 5
        return replace(self, batch=min(self.batch, 2), steps=steps, input_size=3, hidden_size=min(self.hidden_size, 20))

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
        """The least time of a case: an exchange at each step of each pass, and then all products at the speed of a
        large one. ``passes``: 1 for forward, 2 for forward and backward, which has three times the products. None if
        these limits were not measured, or no cluster holds the weights."""
        exchanges = [us for blocks, us in self.exchange_us.items() if blocks >= case.blocks()]
        tflops = self.matmul_tflops.get("tf32" if case.tf32 else str(case.dtype).removeprefix("torch."))
        if not exchanges or tflops is None:
            return None
        products = case.forward_flops(tokens) * (1 if passes == 1 else 3)
        return 1e-3 * passes * case.steps * min(exchanges) + 1e-9 * products / tflops


class Contenders:
    """Ours and nn.LSTM of the same weights, and a batch for them."""

    def __init__(self, case: Case) -> None:
        bidirectional = case.directions == 2
        self.case = case
        self.theirs = nn.LSTM(
            case.input_size, case.hidden_size, bidirectional=bidirectional, device=DEVICE, dtype=case.dtype
        )
        self.ours = pymtl.convert(self.theirs)
        self.x: Any = torch.randn(case.steps, case.batch, case.input_size, device=DEVICE, dtype=case.dtype)
        self.tokens = case.steps * case.batch
        if case.fill < 1:
            lengths = case.lengths()
            self.x = pack_padded_sequence(self.x, lengths, enforce_sorted=False)
            self.tokens = int(lengths.sum())

    def timed(self, mode: str, seconds: float) -> dict[str, dict[str, float]]:
        """Times of "pymtl" and "nn.LSTM", called as a user calls them, and where the batch is dense of both replayed
        from a CUDA graph. ``mode``: one of :data:`MODES`."""
        calls = {"pymtl": self.call(self.ours, mode), "nn.LSTM": self.call(self.theirs, mode)}
        with fp32_precision(self.case), torch.set_grad_enabled(mode != "forward"):
            if self.case.fill == 1:
                calls |= {f"{name}, graph": recorded(call) for name, call in calls.items()}
            return timed_in_turns(calls, seconds)

    def call(self, module: nn.Module, mode: str) -> Call:
        return _training(module, self.x) if mode == "forward+backward" else lambda: module(self.x)

    def kernels(self) -> str:
        """Whose run "pymtl"."""
        takes = self.ours.kernels_take(torch.empty(0, device=DEVICE, dtype=self.case.dtype))
        return "pymtl" if takes else "torch"

    def difference(self) -> float:
        """The largest difference of the outputs over the largest value."""
        with torch.no_grad(), fp32_precision(self.case):
            a, b = (_data(module(self.x)[0]).float() for module in (self.ours, self.theirs))
        return float((a - b).abs().max() / b.abs().max())


# Forward without gradients, forward keeping what a backward pass needs, and both passes.
MODES = ("forward", "training forward", "forward+backward")


def measure(case: Case, limits: Limits, seconds: float = 0.5) -> Iterator[dict[str, Any]]:
    """Times a case; yields a row for ``forward`` and one for ``forward+backward``.

    A ratio is the median over the rounds of nn.LSTM's time over ours, called alike; the share of the limit is that of
    ours, from a graph where there is one.
    """
    contenders = Contenders(case)
    for passes, mode in enumerate(("forward", "forward+backward"), 1):
        timed = contenders.timed(mode, seconds)
        flops = case.forward_flops(contenders.tokens) * (1 if passes == 1 else 3)
        least = limits.least_ms(case, contenders.tokens, passes)
        best = timed["pymtl, graph" if case.fill == 1 else "pymtl"]["p50"]
        yield {
            "case": str(case),
            "mode": mode,
            "kernels": contenders.kernels(),
            "contenders": timed,
            "us_per_step": 1e3 * timed["pymtl"]["p50"] / case.steps,
            "tflops": 1e-9 * flops / timed["pymtl"]["p50"],
            "share_of_limit": None if least is None else least / best,
            "ratio": timed["nn.LSTM"]["ratio"],
            "ratio_of_graphs": timed["nn.LSTM, graph"]["ratio"] if case.fill == 1 else None,
            "difference": contenders.difference(),
        }


def slopes(case: Case, lengths: tuple[int, int], seconds: float = 0.1) -> Iterator[dict[str, Any]]:
    """What a step costs, as the slope between two numbers of steps, and what starting costs, as the intercept.

    Yields a row for each of :data:`MODES`: the better of a call and a graph's replay for each contender. The
    last row has the times of our kernels.
    """
    pair = [Contenders(replace(case, steps=steps)) for steps in lengths]
    for mode in MODES:
        timed = [contenders.timed(mode, seconds) for contenders in pair]
        row: dict[str, Any] = {"case": str(pair[-1].case), "mode": mode, "kernels": pair[-1].kernels()}
        for name in ("pymtl", "nn.LSTM"):
            short, long = (min(times[name]["p50"], times[f"{name}, graph"]["p50"]) for times in timed)
            of_step, at_start = line(lengths, (short, long))
            row[name] = {"us_per_step": of_step, "start_us": at_start, "ms": [short, long]}
        row["ratios"] = [theirs / ours for ours, theirs in zip(row["pymtl"]["ms"], row["nn.LSTM"]["ms"])]
        yield row
    call = pair[-1].call(pair[-1].ours, "forward+backward")
    with fp32_precision(case):
        yield {"case": str(pair[-1].case), "mode": "kernels", "us": kernel_times(call)}


def line(steps: tuple[int, int], milliseconds: tuple[float, float]) -> tuple[float, float]:
    """Microseconds of a step, and of none, by two measurements."""
    slope = 1e3 * (milliseconds[1] - milliseconds[0]) / (steps[1] - steps[0])
    return slope, 1e3 * milliseconds[0] - slope * steps[0]


def kernel_times(call: Call) -> dict[str, float]:
    """Microseconds of each kernel that a call runs, by its name, as torch's profiler sees them."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {event.key: event.self_device_time_total for event in kernels}


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


def limits(seconds: float = 0.2, small: bool = False) -> Limits:
    """Measures the device's limits; ``small``: only sees whether that runs."""
    large, numbers, rounds = (64, 1 << 10, 10) if small else (8192, 1 << 28, 10000)
    tflops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(large, large, device=DEVICE, dtype=dtype)
        taken = timed_in_turns({"pymtl": lambda a=a: a @ a}, seconds)["pymtl"]["p50"]
        tflops[str(dtype).removeprefix("torch.")] = 2e-9 * large**3 / taken
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tflops["tf32"] = 2e-9 * large**3 / timed_in_turns({"pymtl": lambda: a @ a}, seconds)["pymtl"]["p50"]
    torch.backends.cuda.matmul.fp32_precision = before
    memory = torch.empty(numbers, device=DEVICE)
    copied = torch.empty_like(memory)
    taken = timed_in_turns({"pymtl": lambda: copied.copy_(memory)}, seconds)["pymtl"]["p50"]
    # A block of the float32 kernels has 32 units: so many blocks has the device's largest cluster.
    largest = torch.ops.pymtl.rnn_hidden_size_limit(memory[:0]) // 32 if has_cuda(memory) else 0
    found: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for messages, by_blocks in found.items():
        for blocks in [2, 4, 8, 16] if not small else [2]:
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


@contextmanager
def fp32_precision(case: Case) -> Iterator[None]:
    """Within it torch's recurrent layers use TF32 if the case says so, else full float32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
