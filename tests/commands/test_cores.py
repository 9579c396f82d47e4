"""How many cores a command counts on."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch

from pymtl.__main__ import main
from pymtl.commands import cores
from pymtl.commands.cores import Sample

TICKS = os.sysconf("SC_CLK_TCK")


def proc(folder, stat="", cgroup=""):
    (folder / "self").mkdir(parents=True, exist_ok=True)
    (folder / "stat").write_text(stat)
    (folder / "self" / "cgroup").write_text(cgroup)
    return folder


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "quota", lambda: math.inf)


STAT = """cpu  9999 0 0 0 0 0 0 0 0 0
cpu0 100 20 30 9999 888 7 3 40 11 12
cpu1 1000 0 0 0 0 0 0 0 0 0
cpu2 50 0 0 9999 0 0 0 0 0 0
intr 1 2 3
"""


def test_a_sample_counts_what_is_busy_of_the_cores_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    sample = Sample.take(proc(tmp_path, STAT))
    assert sample.busy == pytest.approx((200 + 50) / TICKS)
    assert sample.own == pytest.approx(sum(os.times()[:4]), abs=1.0)


def test_others_are_what_is_busy_without_this_process():
    before = Sample(100.0, 10.0, 5.0)
    assert before.others_until(Sample(103.0, 11.0, 7.0)) == pytest.approx(1.0)
    assert before.others_until(Sample(100.5, 11.0, 7.0)) == 0.0


@pytest.mark.parametrize(
    "stat", ["cpu0 1 2 3\n", "cpu0 a b c d e f g h\n", "cpux 1 2 3 4 5 6 7 8\ncpuy 1 2 3 4 5 6 7 8\n"]
)
def test_what_is_no_count_is_none(stat, tmp_path):
    assert Sample.take(proc(tmp_path, "cpu 1 2 3 4 5 6 7 8\n" + stat)) is None


def test_without_counters_nothing_is_busy(tmp_path, monkeypatch, four_cores):
    assert Sample.take(tmp_path / "nowhere") is None
    monkeypatch.setattr(cores, "_began", None)
    assert cores.free() == (4, 0.0)


GROUPS = {
    "none": ("0::/a/b\n", {}, math.inf),
    "no file of groups": ("", {}, math.inf),
    "unlimited": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, math.inf),
    "own": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
    "a group above": ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    "a container's": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "out of the container": ("0::/../../x\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "of the first version": (
        "5:cpu,cpuacct:/a\n4:memory:/m\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        3.0,
    ),
    "unlimited of the first version": (
        "5:cpu,cpuacct:/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        math.inf,
    ),
}


@pytest.mark.parametrize(("cgroup", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_a_quota_is_the_smallest_of_the_groups(cgroup, files, expected, tmp_path):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores.quota(proc(tmp_path / "proc", cgroup=cgroup), tmp_path / "cgroup") == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.5, 1), (2.0, 2), (64.0, 4), (math.inf, 4)])
def test_a_part_of_a_core_is_none(quota, expected, monkeypatch, four_cores):
    monkeypatch.setattr(cores, "quota", lambda: quota)
    assert cores.allowed() == expected


@pytest.mark.parametrize(
    ("others", "expected"), [(0.0, 4), (0.4, 4), (0.6, 3), (1.0, 3), (1.4, 3), (2.1, 2), (3.9, 1), (9.0, 1)]
)
def test_cores_that_others_use_little_count(others, expected, monkeypatch, four_cores):
    monkeypatch.setattr(cores, "_began", Sample(0.0, 0.0, time.monotonic() - 1))
    monkeypatch.setattr(Sample, "others_until", lambda self, later: others)
    assert cores.free() == (expected, others)


@pytest.fixture
def shared(monkeypatch, threads):
    """A machine of two cores, one of which another process keeps busy."""
    monkeypatch.setattr(cores, "free", lambda: (1, 1.0))
    monkeypatch.setattr(cores, "allowed", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads(2)


def threads_of(*options):
    """The threads that a command runs on: it fails at once, since there is no such run."""
    assert main(["evaluate", "no/such/run", "--data", "nowhere", *options]) == 1
    return torch.get_num_threads()


def test_a_command_leaves_others_their_cores_and_says_so(shared, capsys):
    assert threads_of() == 1
    assert "CPU: 1 of 2 threads, since others keep 1.0 cores busy (--threads decides)" in capsys.readouterr().err


def test_whoever_names_a_number_gets_it(shared, monkeypatch, capsys):
    assert threads_of("--threads", "2") == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_of() == 2
    assert "CPU:" not in capsys.readouterr().err


def test_a_quota_is_named(shared, monkeypatch, capsys):
    monkeypatch.setattr(cores, "allowed", lambda: 1)
    assert threads_of() == 1
    assert "CPU: 1 of 2 threads, since that is what it may use (--threads decides)" in capsys.readouterr().err


@pytest.mark.skipif(Sample.take() is None, reason="the system does not count what is busy")
def test_a_real_neighbour_is_seen():
    before = Sample.take()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            time.sleep(1.0)
            assert before.others_until(Sample.take()) > 0.4
        finally:
            neighbour.kill()
