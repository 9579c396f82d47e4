"""A conditional random field's loss and decoding beside a plain PyTorch one that takes a step of all sentences at once.

    python benchmarks/crf.py [--json FILE]

The plain one is pymtl.reference: log space, one logsumexp (or max) over [B, C, C] at every step, no padding. Ratios
are medians of interleaved runs; errors are of the gradient of the emissions, from float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pymtl import ops, reference
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved

SHAPES = (  # batch, longest sentence, tags
    (1, 10, 72),
    (16, 10, 9),
    (16, 16, 72),
    (32, 40, 20),
    (64, 50, 72),
    (64, 100, 200),
)


def measure(batch: int, steps: int, tags: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, steps // 3), steps + 1, (batch,), generator=generator).sort(descending=True).values
    lengths[0] = steps
    sizes = (torch.arange(steps).unsqueeze(1) < lengths).sum(1)
    tokens = int(lengths.sum())
    emissions = torch.randn(tokens, tags, generator=generator)
    gold = torch.randint(0, tags, (tokens,), generator=generator)
    others = [torch.randn(*shape, generator=generator) for shape in ((tags,), (tags,), (tags, tags))]

    def train(crf: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (emissions, *others)]
        loss = -crf(leaves[0], sizes, gold, *leaves[1:]).sum() / tokens
        return torch.autograd.grad(loss, leaves)[0]

    exact = train(reference.crf, torch.float64)
    contenders = {"pymtl": ops, "plain": reference}
    rounds = [None] * (20 if tokens * tags**2 < 10_000_000 else 5)
    training = interleaved({k: lambda _, m=m: train(m.crf) for k, m in contenders.items()}, rounds, "pymtl")
    decoding = interleaved(
        {k: lambda _, m=m: m.crf_decode(emissions, sizes, *others) for k, m in contenders.items()}, rounds, "pymtl"
    )
    return {
        "shape": f"B{batch} T{steps} C{tags}",
        "tokens": tokens,
        "training": training,
        "decoding": decoding,
        "errors": {k: float((train(m.crf) - exact).abs().max() / exact.abs().max()) for k, m in contenders.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    rows = [measure(*shape) for shape in SHAPES]
    table = Table(title="Conditional random field, milliseconds")
    table.add_column("shape")
    for heading in ("loss and gradients", "plain", "faster by", "decoding", "plain", "faster by", "error", "plain's"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for part in ("training", "decoding"):
            ours, plain = row[part]["pymtl"], row[part]["plain"]
            cells += [f"{ours['p50']:.3f}", f"{plain['p50']:.2f}", f"{plain['ratio']:.0f} x"]
        table.add_row(row["shape"], *cells, *(f"{row['errors'][k]:.0e}" for k in ("pymtl", "plain")))
    Console(width=120).print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
