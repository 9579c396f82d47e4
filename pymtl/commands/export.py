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
  pymtl export runs/snips snips.pymtl            one file for pymtl_runtime and C, without torch
  pymtl export runs/snips snips.onnx             the same for ONNX Runtime
"""


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "export",
        help="a trained model to deploy: a program of torch.export, or one file for runtimes without torch",
        description="Write a run's best model to deploy it. OUT.pymtl is one file that holds all of it, for "
        "pymtl_runtime in Python and pymtl.h in C, which need no torch. OUT.onnx is one file of standard operators, "
        "for ONNX Runtime. Any other OUT is a folder with a torch.export program for batches and sentences of any "
        "size, its configuration, vocabulary and labels: 'pymtl predict' loads it as it loads a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder of pymtl train")
    parser.add_argument("out", type=Path, metavar="OUT", help="file or folder to write")
    add_weights(
        parser,
        "keep the matrices of recurrent layers in 8-bit integers, or in bfloat16; not with OUT.onnx (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export has written there")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from pymtl.lowering import SUFFIXES
    from pymtl.training.errors import RunError
    from pymtl.training.exporting import PROGRAM, export, export_file, is_exported
    from pymtl.training.run import Run

    run, out, weights = Run(arguments.run_folder), arguments.out, weights_of(arguments)
    if out.suffix.lower() in SUFFIXES:
        if out.exists() and not arguments.overwrite:
            raise RunError(f"{out}: is there already: name another file, or pass --overwrite")
        export_file(run, out, weights)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        return 0
    target = Run(out)
    earlier = is_exported(out)
    if (target.exists() or target.foreign_file() is not None) and not (arguments.overwrite and earlier):
        found, more = ("an export", ", or pass --overwrite") if earlier else ("something else", "")
        raise RunError(f"{out}: holds {found} already: name another folder{more}")
    export(run, out, weights)
    programs = [target.path(PROGRAM), *target.steps()]
    sizes = ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in programs)
    print(f"{out}: {sizes}, config.json, vocabulary.json")
    return 0
