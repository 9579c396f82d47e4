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
        "the one in use. The environment variable PYMTL_ISA forces one.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    facts = gather()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return 0


def gather() -> dict[str, Any]:
    """The facts, for this command and for the results of benchmarks."""
    import platform

    import torch

    import pymtl.ops.library  # noqa: F401  (shows that the op library loads)
    from pymtl import _native
    from pymtl.benchmark.machine import cpu_name

    return {
        "pymtl": _native.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction sets compiled": _native.compiled_isas(),
        "instruction sets available": _native.available_isas(),
        "instruction set in use": _native.active_isa(),
        "build": f"{_native.build_type}, {_native.compiler}",
        "cuda kernels": "none in this build",
    }
