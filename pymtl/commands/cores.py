"""How many cores a command can count on: those it may use, less those that other processes keep busy.

Torch takes a thread for every core. If one of them finds its core taken, all others wait at the end of every parallel
region, spinning; a training step then takes several times as long as it takes on one thread.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

LEAST_SECONDS = 0.2  # that a sample spans: the kernel counts in hundredths


class Sample(NamedTuple):
    """Seconds that the cores which this process may use were busy since boot, those of them for this process and what
    it started, and the time."""

    busy: float
    own: float
    now: float

    @staticmethod
    def take(proc: Path = Path("/proc")) -> Sample | None:
        """None where the system does not count."""
        own = os.times()
        try:
            rows = [line.split() for line in (proc / "stat").read_text().splitlines() if line.startswith("cpu")]
            counted = {int(row[0][3:]): [int(count) for count in row[1:9]] for row in rows[1:]}
            busy = sum(
                user + nice + system + irq + softirq + steal
                for core, (user, nice, system, _, _, irq, softirq, steal) in counted.items()
                if core in usable()
            )
        except (OSError, ValueError):
            return None
        return Sample(busy / os.sysconf("SC_CLK_TCK"), sum(own[:4]), time.monotonic())

    def others_until(self, later: Sample) -> float:
        """How many cores other processes kept busy from here on."""
        return max(0.0, (later.busy - self.busy) - (later.own - self.own)) / (later.now - self.now)


_began: Sample | None = None


def begin() -> None:
    """The command line begins: what others do is looked at from here on."""
    global _began
    _began = Sample.take()


def usable() -> set[int]:
    """The cores that the system lets this process run on."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # there is no such thing on macOS
        return set(range(os.cpu_count() or 1))


def quota(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The cores that this process's control groups allow it; infinity without a limit."""
    found = math.inf
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, files = root, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, files = root / controllers, ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        # Inside a container the path may lead out of what it sees.
        folder = base if ".." in path else base / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                given, period = " ".join((group / name).read_text().strip() for name in files).split()
            except (OSError, ValueError):
                given, period = "max", "1"
            if given not in ("max", "-1"):
                found = min(found, int(given) / int(period))
            if group == base:
                break
    return found


def allowed() -> int:
    """The cores that this process may use: a part of one is none, but one there is."""
    return max(1, math.floor(min(len(usable()), quota())))


def free() -> tuple[int, float]:
    """The cores that this process can count on, at least one, and how many of its cores others keep busy."""
    cores = allowed()
    if _began is None:
        return cores, 0.0
    time.sleep(max(0.0, _began.now + LEAST_SECONDS - time.monotonic()))
    later = Sample.take()
    others = 0.0 if later is None else _began.others_until(later)
    # Those that others use little are counted whole.
    return max(1, min(cores, math.floor(len(usable()) - others + 0.5))), others
