"""The LSTM beside nn.LSTM, on shapes of one's own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark.machine import peak_gflops
from pymtl.benchmark.timing import interleaved

_BLOCKS = 5  # in which the kernel and its limit take turns
DEFAULT_SHAPES = (  # batch, steps, input size, hidden size
    (1, 32, 100, 128),
    (1, 128, 300, 256),
    (4, 64, 128, 128),
    (8, 64, 300, 256),
    (16, 50, 64, 64),
    (32, 50, 300, 256),
    (32, 50, 300, 512),
)
FILL = 0.55  # mean length over the longest, in the rows of variable length


@dataclass(frozen=True)
class Shape:
    """One bidirectional layer over B sequences of T steps, I input features and H hidden units a direction."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int

    @staticmethod
    def parse(text: str) -> Shape:
        """From ``"B,T,I,H"``. Raises ValueError otherwise."""
        parts = text.split(",")
        if len(parts) != 4 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"expected B,T,I,H as four numbers above 0, got {text!r}")
        return Shape(*(int(p) for p in parts))

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"

    def forward_flops(self, tokens: int, directions: int = 2) -> int:
        """Floating-point operations of the matrix products of a forward pass."""
        return directions * tokens * 8 * self.hidden_size * (self.input_size + self.hidden_size)

    def lengths(self, generator: torch.Generator) -> Tensor:
        """Uniform, T times FILL on average, the longest T."""
        least = max(1, round((2 * FILL - 1) * self.steps))
        lengths = torch.randint(least, self.steps + 1, (self.batch,), generator=generator)
        lengths[0] = self.steps
        return lengths


def run(
    shapes: Sequence[Shape],
    seconds: float = 1.0,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures every shape; yields a row after each mode of each shape. ``weights`` adds a frozen contender that keeps
    its matrices in that dtype.

    Modes: ``inference`` (ours, ours frozen, nn.LSTM), ``training`` (forward and backward; ours, nn.LSTM), both
    on dense batches; for B > 1 ``inference, lengths`` and ``training, lengths`` on batches of variable length,
    where ours runs packed and nn.LSTM both packed and over the padding.
    """
    threads = torch.get_num_threads()
    for shape in shapes:
        for mode, contenders, tokens, parity in _contenders(shape, dtype, weights):
            peak = peak_gflops(threads, _name(dtype))  # each time: a machine's speed drifts
            training = mode.startswith("training")
            with torch.inference_mode(not training):
                repeats = _repeats(contenders.values(), seconds)
                timed = interleaved({k: _ignoring(f) for k, f in contenders.items()}, [None] * repeats, "pymtl")
            gflops = (3 if training else 1) * shape.forward_flops(tokens) / timed["pymtl"]["p50"] * 1e-6
            yield {
                "shape": str(shape),
                "mode": mode,
                "tokens": tokens,
                "threads": threads,
                "runs": repeats,
                "contenders": timed,
                "gflops": gflops,
                "peak_gflops": peak,
                "share_of_peak": gflops / peak,
                "parity": parity,
            }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def recurrence(seconds: float = 0.5, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """The kernel beside the core's limit: one direction, one thread, weights packed before, I = H.

    Blocks of calls and short measurements of the limit take turns; the share of the limit is the median of their
    ratios.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for hidden_size in (64, 128, 256, 512):
            for batch in (1, 8, 16, 32):
                shape = Shape(batch, 64, hidden_size, hidden_size)
                module = pymtl.freeze(pymtl.LSTM(hidden_size, hidden_size, dtype=dtype).eval())
                x = torch.randn(shape.steps, batch, hidden_size, dtype=dtype)
                operations = shape.forward_flops(batch * shape.steps, directions=1)
                call = _call(module, x)
                times, peaks = [], []
                with torch.inference_mode():
                    repeats = _repeats([call], seconds)
                    for _ in range(_BLOCKS):
                        block = []
                        for _ in range(math.ceil(repeats / _BLOCKS)):
                            started = time.perf_counter()
                            call()
                            block.append(time.perf_counter() - started)
                        times.append(statistics.median(block))
                        peaks.append(peak_gflops(1, _name(dtype), runs=1))
                yield {
                    "shape": str(shape),
                    "p50": 1e3 * statistics.median(times),
                    "gflops": 1e-9 * operations / statistics.median(times),
                    "peak_gflops": statistics.median(peaks),
                    "share_of_peak": statistics.median(
                        1e-9 * operations / each / limit for each, limit in zip(times, peaks)
                    ),
                }
    finally:
        torch.set_num_threads(threads)


def _contenders(
    shape: Shape, dtype: torch.dtype, weights: torch.dtype | None
) -> Iterator[tuple[str, dict[str, Callable[[], Any]], int, float]]:
    generator = torch.Generator().manual_seed(0)
    theirs = nn.LSTM(shape.input_size, shape.hidden_size, bidirectional=True, dtype=dtype).eval()
    ours = pymtl.convert(theirs)
    frozen = pymtl.freeze(pymtl.convert(theirs))
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=generator).to(dtype)
    dense = {"pymtl": _call(ours, x), "pymtl frozen": _call(frozen, x), "nn.LSTM": _call(theirs, x)}
    if weights is not None:
        dense[f"pymtl frozen {_name(weights)}"] = _call(pymtl.freeze(pymtl.convert(theirs), weights), x)
    tokens = shape.batch * shape.steps
    yield "inference", dense, tokens, _parity(ours, theirs, x)
    training = {"pymtl": _train(ours, x), "nn.LSTM": _train(theirs, x)}
    yield "training", training, tokens, _parity(ours, theirs, x, backward=True)
    if shape.batch == 1:
        return
    lengths = shape.lengths(generator)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    tokens = int(lengths.sum())
    varying = {
        "pymtl": _call(ours, packed),
        "nn.LSTM packed": _call(theirs, packed),
        "nn.LSTM padded": _call(theirs, x),
    }
    yield "inference, lengths", varying, tokens, _parity(ours, theirs, packed)
    varying = {
        "pymtl": _train(ours, packed),
        "nn.LSTM packed": _train(theirs, packed),
        "nn.LSTM padded": _train(theirs, x),
    }
    yield "training, lengths", varying, tokens, _parity(ours, theirs, packed, backward=True)


def _call(module: nn.Module, x: Tensor | PackedSequence) -> Callable[[], Any]:
    return lambda: module(x)


def _train(module: nn.Module, x: Tensor | PackedSequence) -> Callable[[], Any]:
    def step() -> None:
        module.zero_grad()
        output = _data(module(x)[0])
        output.backward(torch.ones_like(output))

    return step


def _ignoring(call: Callable[[], Any]) -> Callable[[None], Any]:
    return lambda _: call()


def _data(output: Tensor | PackedSequence) -> Tensor:
    return output.data if isinstance(output, PackedSequence) else output


def _repeats(calls: Any, seconds: float) -> int:
    """How many rounds of all calls fit into the time, from 5 to 200."""
    once = []
    for call in calls:
        call()
        started = time.perf_counter()
        call()
        once.append(time.perf_counter() - started)
    return max(5, min(200, int(seconds / sum(once))))


def _parity(ours: nn.Module, theirs: nn.Module, x: Tensor | PackedSequence, backward: bool = False) -> float:
    """The largest difference of outputs (and, with backward, of parameters' gradients) over the largest value."""
    pairs = [(_data(ours(x)[0]).detach(), _data(theirs(x)[0]).detach())]
    if backward:
        # The two share their parameters: run one, keep its gradients, run the other.
        pairs += _gradient_pairs(ours, theirs, x)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _gradient_pairs(ours: nn.Module, theirs: nn.Module, x: Tensor | PackedSequence) -> list[tuple[Tensor, Tensor]]:
    gradients = []
    for module in (ours, theirs):
        _train(module, x)()
        gradients.append([p.grad.clone() for p in module.parameters()])
    return list(zip(*gradients))
