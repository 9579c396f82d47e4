"""The subcommands of ``pymtl``, one module each: ``add_parser`` describes it, ``run`` does it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def add_machine(parser: argparse.ArgumentParser, verb: str = "run") -> None:
    """The options that say where a command computes; :func:`use_machine` heeds them."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=f"where to {verb} (default: cpu)")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: of the cores that are free)",
    )


def add_weights(parser: argparse.ArgumentParser, description: str) -> None:
    """The option that says what recurrent layers keep their matrices in; :func:`weights_of` reads it."""
    parser.add_argument("--weights", choices=("bfloat16", "int8"), help=description)


FROZEN_WEIGHTS = (
    "keep the matrices of recurrent layers in 8-bit integers, which is faster and a little less exact, or in bfloat16 "
    "(default: float32)"
)


def weights_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """As :func:`pymtl.freeze` takes it."""
    import torch

    return None if arguments.weights is None else getattr(torch, arguments.weights)


def use_machine(arguments: argparse.Namespace, before: int | None = None) -> None:
    """Sets torch up as the options say.

    Args:
        before: the threads of a run that goes on: on another number its results would differ in their last digits.

    Raises:
        pymtl.training.errors.ConfigError: there is no GPU, and one is asked for.
    """
    import torch

    from pymtl.training.errors import ConfigError

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no GPU, or this torch has no CUDA")
    threads = arguments.threads or before
    if threads is not None:
        torch.set_num_threads(threads)
    elif arguments.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _share_cores()


def _share_cores() -> None:
    """Takes fewer threads than torch would, where other processes or a quota leave it fewer cores."""
    import torch

    from pymtl.commands import cores

    wanted = torch.get_num_threads()
    count, others = cores.free()
    if count < wanted:
        why = f"others keep {others:.1f} cores busy" if cores.allowed() >= wanted else "that is what it may use"
        print(f"CPU: {count} of {wanted} threads, since {why} (--threads decides)", file=sys.stderr)
        torch.set_num_threads(count)


def seconds(text: str) -> float:
    """An argument that must be a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def picture(text: str) -> Path:
    """An argument that must name a PNG file."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a file that ends in .png, got {text!r}")
    return Path(text)


def wide_console(width: int = 124) -> Any:
    """A rich console whose tables are never cut: at least ``width`` columns, whatever the terminal or file says."""
    from rich.console import Console

    console = Console()
    return console if console.width >= width else Console(width=width)
