"""Task encoders side by side beside one nn.LSTM for each, and what each sharing scheme costs a training step.

    python benchmarks/sharing.py [--json FILE]

First the encoders alone: forward and backward of K bidirectional LSTMs over the same sentences, as soft sharing runs
them, in one call a layer, against K nn.LSTM one after another, on packed and on padded batches (padding changes what
a backward direction sees; it is shown for its time). Then whole training steps (loss, backward, Adam) of a model with
a tagging and a classification task under each scheme, beside hard sharing. Ratios are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl.benchmark import results
from pymtl.benchmark.timing import interleaved
from pymtl.sharing import SCHEMES, ParallelLSTM

SHAPES = (  # encoders, batch, longest sentence, input size, hidden size, layers
    (4, 16, 16, 128, 128, 1),
    (4, 16, 16, 128, 128, 2),
    (4, 16, 50, 64, 64, 1),
    (4, 32, 40, 100, 100, 1),
    (2, 16, 16, 128, 128, 1),
    (8, 16, 16, 128, 128, 1),
)
TASKS = ("aspects", "sentiment")


def sentences(batch: int, longest: int) -> torch.Tensor:
    """Lengths from a quarter of the longest on."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, longest // 4), longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    return lengths


def encoders(count: int, batch: int, longest: int, input_size: int, hidden_size: int, layers: int) -> dict:
    """K encoders' forward and backward pass."""
    lengths = sentences(batch, longest)
    padded = torch.randn(batch, longest, input_size)
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    sizes = (input_size, hidden_size, layers)
    ours = ParallelLSTM({f"e{k}": pymtl.LSTM(*sizes, batch_first=True, bidirectional=True) for k in range(count)})
    theirs = nn.ModuleList(nn.LSTM(*sizes, batch_first=True, bidirectional=True) for _ in range(count))
    for own, plain in zip(ours.encoders.values(), theirs):
        plain.load_state_dict(own.state_dict())

    def side_by_side(_: None) -> torch.Tensor:
        ours.zero_grad()
        tokens, _ = ours(packed.data, packed.batch_sizes)
        tokens.sum().backward()
        return tokens

    def one_by_one(modules: list[nn.Module], given: torch.Tensor | PackedSequence) -> Callable[[None], list]:
        def run(_: None) -> list[torch.Tensor]:
            outputs = []
            for module in modules:
                module.zero_grad()
                output, _ = module(given)
                outputs.append(output.data if isinstance(output, PackedSequence) else output)
            torch.stack([output.sum() for output in outputs]).sum().backward()
            return outputs

        return run

    contenders = {
        "side by side": side_by_side,
        "pymtl.LSTM, one by one": one_by_one(list(ours.encoders.values()), packed),
        "nn.LSTM, packed": one_by_one(list(theirs), packed),
        "nn.LSTM, padded": one_by_one(list(theirs), padded),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = side_by_side(None)
    calls = sum(event.count for event in profile.key_averages() if event.key == "pymtl::rnn_training")
    torch.testing.assert_close(found, torch.stack(contenders["nn.LSTM, packed"](None), 1), rtol=1e-3, atol=1e-4)
    work = [None] * (60 if batch * longest * hidden_size < 100_000 else 30)
    return {
        "shape": f"K{count} B{batch} T{longest} I{input_size} H{hidden_size} L{layers}",
        "launches": calls,
        "contenders": interleaved(contenders, work, "side by side"),
    }


def schemes() -> dict:
    """A training step of a whole model under each scheme."""
    batch, longest, vocabulary, size = 16, 40, 5000, 64
    lengths = sentences(batch, longest)
    tokens = pymtl.pack(torch.randint(1, vocabulary, (batch, longest)), lengths, batch_first=True)
    targets = {
        "aspects": tokens._replace(data=torch.randint(0, 3, tokens.data.shape)),
        "sentiment": torch.randint(0, 3, (batch,)),
    }

    def stepping(scheme: str) -> Callable[[None], torch.Tensor]:
        torch.manual_seed(0)
        heads = {"aspects": pymtl.TokenClassificationHead(3), "sentiment": pymtl.ClassificationHead(3)}
        embedding = nn.Embedding(vocabulary, size, padding_idx=0)
        model = pymtl.MultiTaskModel(embedding, SCHEMES[scheme](list(TASKS), size, size), heads, dropout=0.3)
        joint = pymtl.JointLoss({"aspects": 0.5, "sentiment": 0.5}, model.losses)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step(_: None) -> torch.Tensor:
            optimizer.zero_grad()
            loss = joint(model(tokens), targets).total
            loss.backward()
            optimizer.step()
            return loss

        return step

    return interleaved({scheme: stepping(scheme) for scheme in SCHEMES}, [None] * 60, "hard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    console = Console(width=120)
    rows = [encoders(*shape) for shape in SHAPES]
    table = Table(title="K encoders over the same sentences, forward and backward, milliseconds")
    table.add_column("shape", no_wrap=True)
    table.add_column("calls", justify="right")
    for name in rows[0]["contenders"]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{timed['p50']:.2f} ({timed['ratio']:.2f} x)" for timed in row["contenders"].values()]
        cells[0] = f"{row['contenders']['side by side']['p50']:.2f}"
        table.add_row(row["shape"], str(row["launches"]), *cells)
    console.print(table)
    by_scheme = schemes()
    table = Table(title="A training step of two tasks, B16 T40 E64 H64, Adam included")
    for heading in ("sharing", "ms", "times hard sharing's"):
        table.add_column(heading, justify="left" if heading == "sharing" else "right")
    for name, timed in by_scheme.items():
        table.add_row(name, f"{timed['p50']:.2f}", f"{timed['ratio']:.2f}")
    console.print(table)
    if arguments.json:
        results.write(results.stamped(rows=rows, schemes=by_scheme), arguments.json)


if __name__ == "__main__":
    main()
