"""``pymtl info``: what is installed, and what this machine runs."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(parsers: Any) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        "info",
        help="versions, instruction sets and build",
        description="Print the versions, the instruction sets the kernels were compiled for, those this CPU has, and "
        "the one in use. The environment variable PYMTL_ISA forces one; PYMTL_CUDA=0 leaves a GPU to torch's own "
        "kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from pymtl.benchmark.machine import facts

    found = facts()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(len(name) for name in found)
    for name, value in found.items():
        print(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return 0
