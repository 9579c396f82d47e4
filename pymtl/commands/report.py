"""``pymtl report``: a trained model's scores, its speed beside plain PyTorch, and how equal the two are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pymtl.commands import FROZEN_WEIGHTS, add_machine, add_weights, positive, use_machine, weights_of, wide_console

NAMES = {
    "pymtl": "pymtl",
    "reference": "plain PyTorch, packed",
    "reference-padded": "plain PyTorch, padded",
}


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "report",
        help="scores of a trained model, and its speed beside plain PyTorch",
        description="Evaluate a trained model on its test set (see pymtl evaluate) and print, on the same batches, the "
        "time of a training step (loss, backward, clipping and Adam included) and of an inference batch, beside the "
        "same model on nn.LSTM where there is one. 'padded' runs nn.LSTM over padding, which changes its results; it "
        "is shown for its time.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train")
    parser.add_argument("--batches", type=positive, default=200, metavar="N", help="batches to time (default: 200)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data, if the run was moved")
    add_weights(parser, FROZEN_WEIGHTS)
    add_machine(parser, "time")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from pymtl.commands.evaluate import show
    from pymtl.training.data import read_all
    from pymtl.training.evaluation import evaluate
    from pymtl.training.predictor import Predictor
    from pymtl.training.run import Run
    from pymtl.training.speed import compare

    use_machine(arguments)
    console = wide_console()
    run = Run(arguments.run_folder)
    trained, config, vocabulary = run.load_model(data=arguments.data)
    sets = read_all(config)
    if sets.test:
        predictor = Predictor(arguments.run_folder, arguments.device, arguments.data, weights_of(arguments))
        kept = f", weights in {arguments.weights}" if arguments.weights else ""
        show(console, evaluate(predictor, sets.test)[0], predictor, f"Test set{kept}")
    with console.status("timing ..."):
        test = sets.test or sets.valid
        result = compare(
            trained, config, vocabulary, sets.train, test, arguments.batches, arguments.device, weights_of(arguments)
        )
    counts = result["bucketed"]["batches"]
    table = Table(
        title=f"Time of a batch of {config.training.batch_size} sentences: medians of {counts['training']} training "
        f"steps and of {counts['inference']} inference batches"
    )
    table.add_column("")
    for part in ("training step", "inference"):
        table.add_column(f"{part} ms", justify="right")
        table.add_column("pymtl is faster by", justify="right")
    for kind, title in (("bucketed", "of similar length, as trained"), ("shuffled", "of any length")):
        table.add_row(f"[bold]{title}[/]")
        for name in result[kind]["inference"]:
            label = NAMES.get(name, name)
            cells = []
            for part in ("training", "inference"):
                row = result[kind][part].get(name)  # there is no training with frozen weights
                if row is None:
                    cells += ["", ""]
                    continue
                cells += [f"{row['p50']:.2f}", "" if name.startswith("pymtl") else f"{row['ratio']:.2f} x"]
            table.add_row(label, *cells)
        table.add_section()
    console.print(table)
    if "parity" in result:
        parity = result["parity"]
        console.print(
            f"largest difference from plain PyTorch with the same weights, relative to the largest value: "
            f"logits {parity['logits']:.1e}, gradients {parity['gradients']:.1e}; of gradients from float64: "
            f"pymtl {parity['gradients from float64']:.1e}, plain PyTorch {parity['plain gradients from float64']:.1e}"
        )
    else:
        console.print(
            "this model has no counterpart in plain PyTorch here, beside which it could be timed: those have "
            "sharing = 'hard', balancing = 'ew' and heads that read the states alone",
            markup=False,
        )
    run.write_json("report.json", result)
    return 0
