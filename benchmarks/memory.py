"""Peak memory of the LSTM's inference and training step beside nn.LSTM's.

    python benchmarks/memory.py [--json FILE]

Each measurement is a process of its own: what the resident memory grew by at its peak (Linux's VmHWM) over what it was
with model and input made and one small call done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark import results

SHAPES = (  # batch, steps, input size, hidden size, whether lengths vary
    (1, 128, 300, 256, False),
    (32, 50, 300, 256, False),
    (32, 50, 300, 256, True),
    (64, 200, 128, 128, False),
    (64, 200, 128, 128, True),
    (64, 200, 512, 512, False),
)
CONTENDERS = ("pymtl", "nn.LSTM")


def peak(contender: str, shape: tuple[int, int, int, int, bool], training: bool) -> float:
    """MB."""
    batch, steps, input_size, hidden_size, vary = shape
    torch.manual_seed(0)
    module: nn.Module = nn.LSTM(input_size, hidden_size, bidirectional=True)
    if contender == "pymtl":
        module = pymtl.convert(module)
    padded = torch.randn(steps, batch, input_size)
    x: torch.Tensor | PackedSequence = padded
    if vary:
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        x = pack_padded_sequence(padded, lengths, enforce_sorted=False)

    def call(value: torch.Tensor | PackedSequence) -> None:
        with torch.inference_mode(not training):
            output = module(value)[0]
            data = output.data if isinstance(output, PackedSequence) else output
            if training:
                data.backward(torch.ones_like(data))

    call(padded[:2, :1])
    module.zero_grad(set_to_none=False)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call(x)
    return max(0.0, (status("VmHWM") - before) / 1024)


def status(key: str) -> int:
    """kB, of this process."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {key}: this benchmark needs Linux")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    table = Table(title="Peak memory above model and input, MB")
    for heading in ("shape", "mode", *CONTENDERS, "share of nn.LSTM's"):
        table.add_column(heading, justify="left" if heading in ("shape", "mode") else "right")
    context = multiprocessing.get_context("spawn")
    for shape in SHAPES:
        name = "B{} T{} I{} H{}".format(*shape[:4]) + (", lengths" if shape[4] else "")
        for mode in ("inference", "training"):
            found = {}
            for contender in CONTENDERS:
                with context.Pool(1) as pool:
                    found[contender] = pool.apply(peak, (contender, shape, mode == "training"))
            rows.append({"shape": name, "mode": mode, "megabytes": found})
            share = found["pymtl"] / max(found["nn.LSTM"], 1e-9)
            table.add_row(name, mode, *(f"{found[c]:.1f}" for c in CONTENDERS), f"{100 * share:.0f} %")
    Console(width=110).print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
