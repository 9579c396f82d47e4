"""The machine and the build a benchmark ran on: names, versions and limits."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pymtl import _native
from pymtl.ops.library import why_no_cuda  # also shows that the op library loads


def cpu_name() -> str:
    """The processor's model, as the operating system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_gflops(threads: int, dtype: str = "float32", runs: int = 10) -> float:
    """GFLOP/s of register-only multiply-adds on ``threads`` threads at once, under the instruction set in use.

    The best of ``runs``, each of some milliseconds.
    """
    return _of_all_threads(threads, lambda: _native.peak_gflops(dtype, runs))


def read_gigabytes(threads: int, size: int, runs: int = 10) -> float:
    """GB/s at which each of ``threads`` threads reads ``size`` bytes of its own again and again, together."""
    return _of_all_threads(threads, lambda: _native.read_gigabytes(size, runs))


def _of_all_threads(threads: int, measure: Callable[[], float]) -> float:
    if threads == 1:
        return measure()  # of the core that the caller's own calls run on
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: measure(), range(threads)))


def facts() -> dict[str, Any]:
    """The versions, the instruction sets and the build."""
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
        "cuda kernels": why_no_cuda or f"CUDA {_native.cuda_compiler}, loaded",
    }
