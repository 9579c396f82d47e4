"""What a call costs before any arithmetic: our ops and modules beside torch's on almost nothing.

    python benchmarks/overhead.py [--json FILE]

Sizes are so small that checks, dispatch, allocation and autograd are all there is. Each ratio is the median of
interleaved runs. "registered" is the raw op with the derivative registered for it, which the wrappers replace by
a torch.autograd.Function where they can.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pymtl
from pymtl import ops
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved

Call = Callable[[], Tensor]


def contenders() -> dict[str, tuple[dict[str, Call], list[Tensor]]]:
    """For each thing that is called: by whom, and the leaves of its gradients, none if it has no gradients."""
    torch.manual_seed(0)
    theirs = nn.LSTM(8, 8, bidirectional=True)
    ours = pymtl.convert(theirs)
    frozen = pymtl.freeze(pymtl.convert(theirs).eval())
    x = torch.randn(1, 1, 8, requires_grad=True)
    z = torch.randn(2, 16, requires_grad=True)
    weight, bias = torch.randn(5, 16, requires_grad=True), torch.randn(5, requires_grad=True)
    classes = torch.tensor([1, 3])
    joint = pymtl.JointLoss({"a": 0.5, "b": 0.5})
    missing = torch.empty(0)
    settings = (["cross_entropy"] * 2, [missing] * 2, [-100] * 2, [0.0] * 2, True)

    def losses_registered() -> Tensor:
        return torch.ops.pymtl.joint_loss([z, z], [classes, classes], *settings)[0].sum()

    return {
        "LSTM, bidirectional, frozen": ({"pymtl": lambda: frozen(x)[0], "torch": lambda: theirs(x)[0]}, []),
        "LSTM, bidirectional": (
            {"pymtl": lambda: ours(x)[0], "torch": lambda: theirs(x)[0]},
            [x, *theirs.parameters()],
        ),
        "projection": (
            {
                "pymtl": lambda: ops.heads(z, weight, bias, parts=2),
                "registered": lambda: torch.ops.pymtl.heads(z, weight, bias, 2),
                "torch": lambda: F.linear(z, weight, bias),
            },
            [z, weight, bias],
        ),
        "joint loss of two tasks": (
            {
                "pymtl": lambda: ops.joint_loss([z, z], [classes, classes], ["cross_entropy"] * 2).sum(),
                "registered": losses_registered,
                "pymtl.JointLoss": lambda: joint({"a": z, "b": z}, {"a": classes, "b": classes}).total,
                "torch": lambda: 0.5 * F.cross_entropy(z, classes) + 0.5 * F.cross_entropy(z, classes),
            },
            [z],
        ),
        "dropout": (
            {"pymtl": lambda: ops.dropout(z, 0.5), "torch": lambda: F.dropout(z, 0.5)},
            [z],
        ),
    }


def backward(call: Call, leaves: list[Tensor]) -> Callable[[None], None]:
    def run(_: None) -> None:
        output = call()
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


def forward(call: Call) -> Callable[[None], None]:
    def run(_: None) -> None:
        with torch.no_grad():
            call()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    table = Table(title="Microseconds of a call on almost nothing")
    for heading in ("", "by", "inference", "pymtl is faster by", "forward and backward", "pymtl is faster by"):
        table.add_column(heading, justify="right" if heading not in ("", "by") else "left")
    rows = {}
    for name, (calls, leaves) in contenders().items():
        modes = {"inference": interleaved({k: forward(c) for k, c in calls.items()}, [None] * 1000, "pymtl")}
        if leaves:
            trained = {k: backward(c, leaves) for k, c in calls.items()}
            modes["training"] = interleaved(trained, [None] * 1000, "pymtl")
        rows[name] = modes
        for contender in calls:
            cells = []
            for timed in modes.values():
                ratio = "" if contender == "pymtl" else f"{timed[contender]['ratio']:.2f} x"
                cells += [f"{1e3 * timed[contender]['p50']:.0f}", ratio]
            table.add_row(name if contender == "pymtl" else "", contender, *cells)
        table.add_section()
    Console(width=110).print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows), arguments.json)


if __name__ == "__main__":
    main()
