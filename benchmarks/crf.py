"""A conditional random field's loss and decoding beside plain PyTorch ones that take a step of all sentences at once.

    python benchmarks/crf.py [--json FILE]

The plain one is pymtl.reference: log space, one logsumexp (or max) over [B, C, C] at every step, no padding; beside it
the package pytorch-crf on padded sentences with a mask. Ratios are medians of interleaved runs; errors are of the
gradient of the emissions, from float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torchcrf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import ops, reference
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved

BLOCK = 5  # runs in a row: the others leave megabytes behind that the next one would have to be given anew
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

    package = torchcrf.CRF(tags, batch_first=True)
    for parameter, values in zip((package.start_transitions, package.end_transitions, package.transitions), others):
        parameter.data.copy_(values)
    padded, _ = pad_packed_sequence(PackedSequence(emissions, sizes), batch_first=True)
    padded_gold, _ = pad_packed_sequence(PackedSequence(gold, sizes), batch_first=True)
    mask = torch.arange(steps) < lengths.unsqueeze(1)

    def train_package(_: None) -> Tensor:
        leaf = padded.detach().requires_grad_()
        loss = -package(leaf, padded_gold, mask, reduction="token_mean")
        return torch.autograd.grad(loss, [leaf, *package.parameters()])[0]

    exact = train(reference.crf, torch.float64)
    found, _ = pad_packed_sequence(PackedSequence(exact, sizes), batch_first=True)
    torch.testing.assert_close(train_package(None).double(), found, rtol=1e-3, atol=1e-5)
    contenders = {"pymtl": ops, "plain": reference}
    rounds = [None] * (40 if tokens * tags**2 < 20_000_000 else 10)
    training = interleaved(
        {k: lambda _, m=m: train(m.crf) for k, m in contenders.items()} | {"pytorch-crf": train_package},
        rounds,
        "pymtl",
        BLOCK,
    )
    with torch.no_grad():
        decoding = interleaved(
            {k: lambda _, m=m: m.crf_decode(emissions, sizes, *others) for k, m in contenders.items()}
            | {"pytorch-crf": lambda _: package.decode(padded, mask)},
            rounds,
            "pymtl",
            BLOCK,
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
    for part in ("loss and gradients", "decoding"):
        for heading in (part, "plain", "pytorch-crf"):
            table.add_column(heading, justify="right")
    for heading in ("error", "plain's"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for part in ("training", "decoding"):
            cells.append(f"{row[part]['pymtl']['p50']:.3f}")
            others = (row[part][name] for name in ("plain", "pytorch-crf"))
            cells += [f"{other['p50']:.2f} ({other['ratio']:.0f} x)" for other in others]
        table.add_row(row["shape"], *cells, *(f"{row['errors'][k]:.0e}" for k in ("pymtl", "plain")))
    Console(width=140).print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
