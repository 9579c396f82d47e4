"""GRU and RNN beside torch's, and what the options beyond torch's cost.

    python benchmarks/cells.py [--device cuda] [--json FILE]

Modules of the same sizes take turns, dense batches, inference and training (forward, backward). An option is compared
with pymtl's module without it, and with the same formulas in plain PyTorch, one step after another: what one writes
where no library has the option. On a GPU lengths that are there are compared too: ours read them there, torch's modules
pack with them, and so wait for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl import reference
from pymtl.benchmark import results
from pymtl.benchmark.gpu import device_facts
from pymtl.benchmark.timing import interleaved

# B, T, I, H, all bidirectional
SHAPES = ((1, 8, 64, 64), (1, 64, 256, 256), (16, 50, 128, 128), (32, 50, 300, 256))
CELLS = ("LSTM", "GRU", "RNN")
VARIANTS: dict[str, dict[str, Any]] = {
    "recurrent dropout": {"recurrent_dropout": 0.25},
    "weight-drop": {"weight_drop": 0.5},
    "zoneout": {"zoneout": 0.1},
    "layer norm": {"layer_norm": True},
}
SECONDS = 1.5


def caller(module: nn.Module, mode: str, *inputs: Tensor) -> Callable[[None], None]:
    """What runs the module once, to its end."""
    module.train(mode == "training")

    def run(_: None) -> None:
        output = module(*inputs)[0]
        if mode == "training":
            module.zero_grad()
            output.backward(torch.ones_like(output))
        if output.is_cuda:
            torch.cuda.synchronize()

    return run


def timed(modules: Mapping[str, nn.Module], mode: str, *inputs: Tensor) -> dict[str, dict[str, float]]:
    """The modules' times; ratios to the first."""
    calls = {name: caller(module, mode, *inputs) for name, module in modules.items()}
    first = next(iter(calls.values()))
    with torch.inference_mode(mode == "inference"):
        alone = interleaved({"": first}, [None] * 10, "")[""]["p50"]
        repeats = max(5, min(500, int(1e3 * SECONDS / (4 * alone))))
        return interleaved(calls, [None] * repeats, next(iter(calls)))


class Plain(nn.Module):
    """A layer with its options in plain PyTorch, on the weights of pymtl's module."""

    def __init__(self, module: pymtl.LSTM) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module, variants = self.module, self.module._pymtl_variants
        weights, norm = module.layer_weights(0), module._layer_norm_of(0)
        if self.training and variants.weight_drop > 0:
            dropped = [nn.functional.dropout(w, variants.weight_drop) for w in weights.weight_hh]
            weights = weights._replace(weight_hh=dropped)
        gains = () if norm is None else (norm.within(), norm.gain_ih)
        masks = variants.masks(x, x.shape[1], len(weights.reverse), module.hidden_size, self.training)
        return reference.rnn(x, None, *weights, None, None, *masks, *gains)[:2]


class WithLengths(nn.Module):
    """Of ours or of torch's module, a padded batch with its lengths."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.module, pymtl.recurrent.Recurrent):
            return self.module(x, lengths=lengths)
        output, state = self.module(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False))
        return pad_packed_sequence(output, total_length=x.shape[0])[0], state


def measure(shape: tuple[int, int, int, int], mode: str, device: str) -> dict[str, Any]:
    """One shape: every cell beside torch's, every variant of the LSTM beside the plain one."""
    batch, steps, inputs, hidden = shape
    x = torch.randn(steps, batch, inputs, device=device)
    lengths = torch.linspace(0.1, 1.0, batch).mul(steps).ceil().long().flip(0).to(device)
    beside_torch, with_lengths = {}, {}
    for cell in CELLS:
        theirs = getattr(nn, cell)(inputs, hidden, bidirectional=True, device=device)
        both = {"pymtl": pymtl.convert(theirs), f"nn.{cell}": theirs}
        beside_torch[cell] = timed(both, mode, x)
        if x.is_cuda:
            with_lengths[cell] = timed({name: WithLengths(m) for name, m in both.items()}, mode, x, lengths)
    variants = {}
    for name, options in VARIANTS.items():
        plain = pymtl.LSTM(inputs, hidden, bidirectional=True, device=device)
        varied = pymtl.LSTM(inputs, hidden, bidirectional=True, device=device, **options)
        if varied._pymtl_variants.act(mode == "training"):
            # Apart: after plain PyTorch's thousands of small tensors the caches are cold.
            variants[name] = {
                "cost": timed({"without": plain, "with": varied}, mode, x),
                "beside": timed({"pymtl": varied, "plain PyTorch": Plain(varied)}, mode, x),
            }
    name = f"B{batch} T{steps} I{inputs} H{hidden}"
    return {"shape": name, "mode": mode, "cells": beside_torch, "lengths": with_lengths, "variants": variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/cells.py: there is no GPU, or this torch has no CUDA")
    console = Console(width=110)
    points = [(*shape_and_mode, arguments.device) for shape_and_mode in product(SHAPES, ("inference", "training"))]
    rows = [measure(*p) for p in track(points, "shapes", console=console, disable=not console.is_terminal)]
    for part, title in (("cells", "Times as fast as torch's"), ("lengths", "The same with lengths on the GPU")):
        if not rows[0][part]:
            continue
        table = Table(title=title)
        for heading in ("shape", "mode", *CELLS):
            table.add_column(heading, justify="right" if heading in CELLS else "left")
        for row in rows:
            gains = (f"{own[f'nn.{cell}']['ratio']:.2f}" for cell, own in row[part].items())
            table.add_row(row["shape"], row["mode"], *gains)
        console.print(table)
    table = Table(title="Options: times the time without, and times as fast as plain PyTorch")
    for heading in ("shape", "mode", *VARIANTS):
        table.add_column(heading, justify="right" if heading in VARIANTS else "left")
    for row in rows:
        table.add_row(row["shape"], row["mode"], *(" / ".join(cost(row["variants"].get(name))) for name in VARIANTS))
    console.print(table)
    if arguments.json:
        facts = device_facts() if arguments.device == "cuda" else {}
        results.write(results.stamped(rows=rows, **facts), arguments.json)


def cost(own: dict[str, Any] | None) -> tuple[str, ...]:
    """Of a variant: how many times the time without it, and how many times as fast as plain PyTorch."""
    if own is None:
        return ()
    return f"{own['cost']['with']['ratio']:.2f}", f"{own['beside']['plain PyTorch']['ratio']:.1f}"


if __name__ == "__main__":
    main()
