"""Where the time of a training step of the demo goes, ours beside the same model in plain PyTorch.

    python benchmarks/training_step.py [--batches N] [--json FILE]
    python benchmarks/training_step.py --device cuda --config examples/ewt/ewt.toml --data path/to/ud_ewt
    python benchmarks/training_step.py --config examples/cmudict/cmudict.toml --set training.batch_size=32 --batches 60

The model is that of benchmarks/snips.toml with new weights: SNIPS, words alone, an intent and a slot head on one
bidirectional LSTM (E = H = 128, B = 16, dropout, clipping and Adam included); or that of another configuration.
Every contender trains on the same batches, in blocks of 20; times are medians in milliseconds. Clearing, clipping
and Adam are the same code for all and pass over the embedding, 11,420 x 128 numbers: they bound the ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pymtl.benchmark import results
from pymtl.commands import positive
from pymtl.training.batches import Batch, Batcher, buckets
from pymtl.training.config import Config, load
from pymtl.training.data import labelled, read_records
from pymtl.training.model_with_loss import BACKENDS, ModelWithLoss
from pymtl.training.speed import BLOCK, shuffled
from pymtl.training.step import Step
from pymtl.training.vocabulary import Vocabulary

SNIPS = Path(__file__).parent / "snips.toml"
PARTS = ("clear", "forward and loss", "backward", "clip", "Adam")


def now(device: torch.device) -> float:
    """Seconds, when all work asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Step, batch: Batch) -> list[float]:
    """Milliseconds of each part."""
    device = batch.tokens.device
    marks = [now(device)]
    step.optimizer.zero_grad()
    marks.append(now(device))
    total = step.model_with_loss.loss(batch).total
    marks.append(now(device))
    total.backward()
    marks.append(now(device))
    step.clip()
    marks.append(now(device))
    step.optimizer.step()
    marks.append(now(device))
    return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]


def measure(config: Config, vocabulary: Vocabulary, batches: list[Batch]) -> dict[str, dict[str, float]]:
    """The medians of each part, waited for one by one, and of whole steps in a row; and how many times as fast ours is
    (median over the blocks)."""
    torch.manual_seed(0)
    device = batches[0].tokens.device
    steps = {
        name: Step(ModelWithLoss(name, config, vocabulary).to(device), replace(config.training, ema_decay=0.0))
        for name in BACKENDS
    }
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    for step in steps.values():
        step.model_with_loss.train()
        for batch in batches[:5]:
            step([batch])
    wholes: dict[str, list[float]] = {name: [] for name in steps}
    for first in range(0, len(batches), BLOCK):
        block = batches[first : first + BLOCK]
        for name, step in steps.items():
            times[name] += [timed(step, batch) for batch in block]
            start = now(device)
            for batch in block:
                step([batch])
            wholes[name].append(1e3 * (now(device) - start) / len(block))
    return {
        name: dict(zip(PARTS, map(statistics.median, zip(*rows))))
        | {"step": statistics.median(wholes[name])}
        | {"ratio": statistics.median(a / b for a, b in zip(wholes[name], wholes["pymtl"]))}
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=positive, default=200, metavar="N", help="of each kind (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    parser.add_argument("--config", type=Path, default=SNIPS, metavar="TOML", help="of a model with plain heads")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of its data (default: the configuration's own)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    arguments = parser.parse_args()
    # What plain PyTorch has a counterpart of.
    config = load(arguments.config, ["sharing=hard", "balancing=ew", *arguments.set], arguments.data)
    device = torch.device(arguments.device)
    records = labelled(read_records(config.path(config.data.train), config), config.data.train, config.tasks)
    vocabulary = Vocabulary.of(records, config)
    batcher = Batcher(vocabulary, config)
    size = config.training.batch_size
    rows = {}
    for kind, order in (("of similar length, as trained", buckets), ("of any length", shuffled)):
        generator = torch.Generator().manual_seed(config.seed)
        chosen = zip(order(records, size, generator), range(arguments.batches))
        batches = [batcher.batch(records, indices).to(device) for indices, _ in chosen]
        rows[kind] = measure(config, vocabulary, batches)
    table = Table(title=f"A training step of {arguments.config.stem} on the {arguments.device}, ms")
    table.add_column("")
    for heading in (*PARTS, "step", "pymtl is faster by"):
        table.add_column(heading, justify="right")
    for kind, contenders in rows.items():
        table.add_row(f"[bold]{kind}[/]")
        for name, row in contenders.items():
            ratio = "" if name == "pymtl" else f"{row['ratio']:.2f} x"
            table.add_row(name, *(f"{row[part]:.2f}" for part in (*PARTS, "step")), ratio)
        table.add_section()
    Console(width=110).print(table)
    if arguments.json:
        about = {"device": arguments.device, "config": arguments.config.stem, "batch_size": size}
        results.write(results.stamped(**about, rows=rows), arguments.json)


if __name__ == "__main__":
    main()
