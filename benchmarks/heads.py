"""What fusing the heads' projection into the LSTM's walk gains, in time and in memory that is never written.

    python benchmarks/heads.py [--json FILE]

Both sides give the same bits; the fused one never writes h. Each ratio is the median of interleaved runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pymtl
from pymtl import ops
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved

SHAPES = (  # batch, steps, input size, hidden size, classes of all token heads
    (1, 32, 100, 128, 72),
    (8, 64, 300, 256, 72),
    (32, 50, 300, 256, 8),
    (32, 50, 300, 256, 72),
    (32, 50, 300, 256, 256),
    (256, 100, 128, 64, 72),
)


def measure(batch: int, steps: int, input_size: int, hidden_size: int, classes: int) -> dict:
    encoder = pymtl.freeze(pymtl.LSTM(input_size, hidden_size, bidirectional=True).eval())
    weight, bias = torch.randn(classes, 2 * hidden_size), torch.randn(classes)
    x = torch.randn(steps, batch, input_size)

    def fused(_: None) -> torch.Tensor:
        return encoder.forward_heads(x, None, weight, bias).logits

    def unfused(_: None) -> torch.Tensor:
        output, _ = encoder(x)
        return ops.heads(output.reshape(-1, 2 * hidden_size), weight, bias, parts=2)

    with torch.inference_mode():
        assert torch.equal(fused(None).reshape(-1, classes), unfused(None))
        timed = interleaved({"fused": fused, "unfused": unfused}, [None] * 60, "fused")
    return {
        "shape": f"B{batch} T{steps} I{input_size} H{hidden_size} C{classes}",
        "contenders": timed,
        "bytes_of_h_not_written": batch * steps * 2 * hidden_size * 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    rows = [measure(*shape) for shape in SHAPES]
    table = Table(title="Token heads fused into the LSTM's walk, inference")
    for heading in ("shape", "fused ms", "unfused ms", "faster by", "MB of h not written"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in rows:
        fused, unfused = row["contenders"]["fused"], row["contenders"]["unfused"]
        table.add_row(
            row["shape"],
            f"{fused['p50']:.3f}",
            f"{unfused['p50']:.3f}",
            f"{unfused['ratio']:.2f} x",
            f"{row['bytes_of_h_not_written'] / 1e6:.2f}",
        )
    Console(width=100).print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
