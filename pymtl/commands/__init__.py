"""The subcommands of ``pymtl``, one module each: ``add_parser`` describes it, ``run`` does it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


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
