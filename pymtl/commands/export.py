"""``pymtl export``: a trained model to deploy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pymtl.commands import add_weights, weights_of

EXAMPLES = """examples:
  pymtl export runs/snips exported/snips
  pymtl predict exported/snips "play some jazz by miles davis"
  pymtl export runs/snips exported/small --weights int8
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "export",
        help="a trained model as a program of torch.export",
        description="Write a run's best model as a torch.export program for batches and sentences of any size, with "
        "its configuration, vocabulary and labels. 'pymtl predict' loads it as it loads a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    add_weights(
        parser,
        "keep the matrices of recurrent layers in 8-bit integers, or in bfloat16: a smaller program (default: float32)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from pymtl.training.errors import RunError
    from pymtl.training.exporting import PROGRAM, export
    from pymtl.training.run import Run

    target = Run(arguments.folder)
    if target.exists() or target.foreign_file() is not None:
        raise RunError(f"{arguments.folder}: holds something else: name another folder")
    export(Run(arguments.run_folder), arguments.folder, weights_of(arguments))
    size = target.path(PROGRAM).stat().st_size
    print(f"{arguments.folder}: {PROGRAM} ({size / 1e6:.1f} MB), config.json, vocabulary.json")
    return 0
