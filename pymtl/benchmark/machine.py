"""The machine a benchmark ran on: its name and its limits."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor

from pymtl import _native


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


def peak_gflops(threads: int, float64: bool = False) -> float:
    """GFLOP/s of register-only multiply-adds on ``threads`` threads at once, under the instruction set in use."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: _native.peak_gflops(float64), range(threads)))
