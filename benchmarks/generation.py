"""Answers that are generated, texts a second: ours, in torch and without it, beside a loop over nn.LSTMCell with the
same weights.

    python benchmarks/generation.py RUN [--batches N] [--json FILE]

RUN is a trained run of one task that generates, as examples/cmudict/cmudict.toml; what is timed are texts of its test
set, from token ids to the answers' ids, encoder included. pymtl_runtime answers from the run's file, by the search in
its Python, or by the likeliest id each time, which its library finds by itself. The loops are what one writes without
this library: nn.LSTM on packed texts, then nn.LSTMCell and attention by matrix products, for one text at a time with
its hypotheses in a batch; or for all texts' hypotheses in one batch, with this library's own search around it, so that
the layers alone differ. All contenders answer the same texts in turn, on as many threads as torch has; texts a second
are of median times, ratios medians of ratios. The last line says how long the matrix products of a batch take at the
measured peak of the cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pymtl_runtime
import torch
from rich.console import Console
from rich.table import Table

from pymtl.benchmark import results
from pymtl.benchmark.machine import peak_gflops
from pymtl.benchmark.timing import interleaved
from pymtl.commands import positive
from pymtl.generation import likeliest
from pymtl.recurrent import freeze
from pymtl.serving.generation import END, UNKNOWN, Banned, Scores, Search, search
from pymtl.training.batches import Batch, Batcher
from pymtl.training.data import read_test_sets
from pymtl.training.exporting import export_file
from pymtl.training.metrics import generated
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.reference_decoder import PlainMemory, Read
from pymtl.training.run import Run

SIZE = 64  # texts at a time
SEARCHES = {"greedy": Search(beam_size=1), "beam 5": Search(beam_size=5)}


@dataclass
class PlainSteps:
    """All hypotheses' steps in one batch of nn.LSTMCell, for :func:`pymtl.serving.generation.search`."""

    memory: PlainMemory

    def __post_init__(self) -> None:
        self.ends = True
        self.first = np.full(len(self.memory.read.valid), END)
        self.lengths = self.memory.read.valid.sum(1).numpy()
        self.cells = self.memory.decoder.cells()
        self.state = self.memory.first

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        read, rows, of = map(torch.from_numpy, (tokens, parents, sentences))
        state = tuple(each.index_select(1, rows) for each in self.state)
        own = Read(*(each.index_select(0, of) for each in self.memory.read))
        logits, self.state, _ = self.memory.decoder.step(self.cells, read, state, own)
        return Scores(*likeliest(logits, count, banned, [UNKNOWN]))


Work = list[Batch]  # a batch as one, and its texts one by one
Contender = Callable[[Work], list[list[int]]]


def without_torch(run: Run, task: str, settings: Search, max_length: int) -> dict[str, Contender]:
    """pymtl_runtime in its several ways."""
    found: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        for weights, name in ((None, "pymtl_runtime"), (torch.int8, "pymtl_runtime int8")):
            path = Path(folder, f"{weights}.pymtl")
            export_file(run, path, weights)
            session = pymtl_runtime.Model(path, torch.get_num_threads()).session()  # which keeps the file open

            def by_search(batch: Batch, session: pymtl_runtime.Session = session) -> list[list[int]]:
                session.run(*flat(batch), tasks=[task], by_steps=True)
                return [own[0].tokens for own in session.generate(task, settings, max_length, never=[UNKNOWN])]

            def likeliest_ids(batch: Batch, session: pymtl_runtime.Session = session) -> list[list[int]]:
                session.run(*flat(batch), tasks=[task])
                return [ids.tolist() for ids in session.answer(task).ids]

            ways = {name: by_search} | ({f"{name} by its library": likeliest_ids} if settings.beam_size == 1 else {})
            for way, answer in ways.items():
                found[f"{way}, {SIZE} texts at a time"] = lambda work, answer=answer: answer(work[0])
                found[f"{way}, one text at a time"] = lambda work, answer=answer: [answer(each)[0] for each in work[1:]]
    return found


def flat(batch: Batch) -> tuple[list[int], dict[str, np.ndarray]]:
    """Lengths, and the ids of all tokens, one text after the other."""
    lengths = batch.lengths.tolist()
    return lengths, {"words": np.concatenate([row[:length].numpy() for row, length in zip(batch.tokens, lengths)])}


def contenders_of(run: Run, settings: Search) -> tuple[str, dict[str, Contender]]:
    """Each answers a batch, given as one and as its texts one by one; and the name of ours."""
    ours, config, _ = run.load_model()
    plain, _, _ = run.load_model("reference")
    freeze(ours.model)
    (name, task), *_ = ((n, t) for n, t in config.main_tasks.items() if t.rules.generates)

    def logits(model: ModelWithLoss, batch: Batch) -> Any:
        return model.logits(replace(batch, targets={}))[name]

    def together(model: ModelWithLoss) -> Contender:
        return lambda work: [own[0].tokens for own in generated(logits(model, work[0]), task, settings)]

    def alone(model: ModelWithLoss) -> Contender:
        return lambda work: [generated(logits(model, each), task, settings)[0][0].tokens for each in work[1:]]

    def plain_together(work: Work) -> list[list[int]]:
        found = search(PlainSteps(logits(plain, work[0])), settings, task.max_length)
        return [own[0].tokens for own in found]

    mine = f"pymtl, {SIZE} texts at a time"
    return mine, {
        mine: together(ours),
        "pymtl, one text at a time": alone(ours),
        **without_torch(run, name, settings, task.max_length),
        f"nn.LSTMCell, {SIZE} texts at a time": plain_together,
        "nn.LSTMCell, one text at a time": alone(plain),
    }


def products(run: Run, work: list[Work]) -> dict[str, float]:
    """The matrix products of a greedy search through a batch: GFLOP, the measured peak of this machine in GFLOP/s, and
    the milliseconds that they take at it, which float32 cannot fall below."""
    ours, config, _ = run.load_model()
    (name, task), *_ = ((n, t) for n, t in config.main_tasks.items() if t.rules.generates)
    head, model = ours.model.heads[name], ours.model
    read = sum(_weights(module) for module in (model.encoder, head.reader))
    written = sum(_weights(module) for module in (head.recurrence, head.combine)) + head.projection()[0].numel()
    flop = 0
    for whole, *_ in work:
        found = generated(ours.logits(replace(whole, targets={}))[name], task, SEARCHES["greedy"])
        steps = sum(len(own[0].tokens) + own[0].ended for own in found)
        flop += 2 * (read * int(whole.lengths.sum()) + written * steps)
    gflop, peak = 1e-9 * flop / len(work), peak_gflops(torch.get_num_threads())
    return {"gflop": gflop, "peak_gflops": peak, "ms": 1e3 * gflop / peak}


def _weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run of a task that generates")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of its data, if the run was moved")
    parser.add_argument("--batches", type=positive, default=15, metavar="N", help="of 64 texts (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    run = Run(arguments.run_folder)
    config, vocabulary, _ = run.load(arguments.data)
    batcher = Batcher(vocabulary, config)
    records = next(iter(read_test_sets(config).values()))[: arguments.batches * SIZE]
    work = [
        [batcher.batch(records, part), *(batcher.batch(records, [i]) for i in part)]
        for part in (range(first, first + SIZE) for first in range(0, len(records) - SIZE + 1, SIZE))
    ]
    rows: dict[str, Any] = {}
    table = Table(
        title=f"Answers of {arguments.run_folder.resolve().name}, texts of {work[0][0].tokens.shape[1]} tokens"
    )
    for heading in ("", "texts a second", "pymtl, all together, is faster by", "same answers"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, settings in SEARCHES.items():
        mine, contenders = contenders_of(run, settings)
        with torch.inference_mode():
            expected = [contenders[mine](each) for each in work[:3]]
            timed = interleaved(contenders, work, mine)
            table.add_row(f"[bold]{kind}[/]")
            rows[kind] = {}
            for name, answer in contenders.items():
                pairs = [(a, b) for each, own in zip(work, expected) for a, b in zip(own, answer(each))]
                same = sum(a == b for a, b in pairs) / len(pairs)
                rate = 1e3 * SIZE / timed[name]["p50"]
                rows[kind][name] = {**timed[name], "texts a second": rate, "same answers": same}
                ratio = "" if name == mine else f"{timed[name]['ratio']:.2f} x"
                table.add_row(name, f"{rate:,.0f}", ratio, f"{100 * same:.1f} %")
            table.add_section()
    with torch.inference_mode():
        limit = products(run, work)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"greedy, {SIZE} texts: {limit['gflop']:.1f} GFLOP of matrix products, {limit['ms']:.1f} ms at the measured "
        f"peak of {limit['peak_gflops']:.0f} GFLOP/s"
    )
    if arguments.json:
        results.write(results.stamped(rows=rows, products=limit), arguments.json)


if __name__ == "__main__":
    main()
