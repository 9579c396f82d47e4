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
    """Seconds that all cores together were busy since boot, those of them for this process, and the time."""

    busy: float
    own: float
    now: float

    @staticmethod
    def take(proc: Path = Path("/proc")) -> Sample | None:
        """None where the system does not count."""
        try:
            first = (proc / "stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, first[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return Sample(busy, own.user + own.system, time.monotonic())

    def others_until(self, later: Sample) -> float:
        """How many cores other processes kept busy from here on."""
        return max(0.0, (later.busy - self.busy) - (later.own - self.own)) / (later.now - self.now)


AT_START = Sample.take()  # this module is the first that the command line imports


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
    """The cores that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # there is no such thing on macOS
        cores = os.cpu_count() or 1
    return max(1, math.floor(min(cores, quota())))


def free(before: Sample | None = AT_START) -> tuple[int, float]:
    """The cores that this process can count on, at least one, and how many others keep busy."""
    cores = allowed()
    if before is None:
        return cores, 0.0
    time.sleep(max(0.0, before.now + LEAST_SECONDS - time.monotonic()))
    others = before.others_until(Sample.take())
    # Cores that others use little are counted whole. Of a machine with more cores than are allowed, others may have the
    # rest.
    idle = (os.cpu_count() or 1) - others
    return max(1, min(cores, math.floor(idle + 0.5))), others
