"""benchmarks/gpu_check.py and gpu.py from end to end where there is no GPU, and the processes that they measure in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pymtl.benchmark import gpu
from pymtl.benchmark.guarded import guarded

TESTS = Path(__file__).parents[1]
LIBRARY = os.environ.get("PYMTL_CUDA_ON_HOST", "")


def misbehave(case):
    if case == "raises":
        raise ValueError("no such case")
    yield {"number": 1}
    if case == "crashes":
        os.abort()
    if case == "hangs":
        time.sleep(60)
    yield {"number": 2}


def test_a_case_that_fails_costs_no_other_and_keeps_the_rows_it_had():
    cases = ["works", "crashes", "hangs", "raises", "works"]
    found = list(guarded(misbehave, cases, seconds=5))
    both = [{"number": 1}, {"number": 2}]
    assert [row for case, row in found if case == "works"] == both * 2
    assert [row for case, row in found if case == "crashes"] == [
        {"number": 1},
        {"error": "the process ended with exit code -6"},
    ]
    assert [row for case, row in found if case == "hangs"] == [{"number": 1}, {"error": "did not end within 5 s"}]
    (row,) = [row for case, row in found if case == "raises"]
    assert row["error"].startswith("ValueError: no such case (misbehave, line ")


def test_no_case_is_begun_when_the_time_is_over():
    assert list(guarded(misbehave, ["works"], seconds=1, until=time.monotonic())) == [
        ("works", {"error": "not begun: no time left"})
    ]


def test_a_line_by_two_measurements():
    assert gpu.line((64, 1024), (1.064, 2.024)) == pytest.approx((1.0, 1000.0))


@pytest.fixture
def stand_in(tmp_path):
    """The environment of a machine with a GPU and NVIDIA's tools, which run the program they are given."""
    if not Path(LIBRARY).is_file():
        pytest.skip("make test-kernels builds the library")
    for name in ("ncu", "compute-sanitizer"):
        tool = tmp_path / name
        tool.write_text('#!/bin/sh\nuntil [ "${1##*/python*}" = "" ]; do shift; done\nexec "$@"\n')
        tool.chmod(0o755)
    path = os.pathsep.join([str(TESTS / "support" / "gpu_stand_in"), str(TESTS.parent)])
    return os.environ | {"PYTHONPATH": path, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def run(environment, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_check_of_a_gpu_runs_from_end_to_end(stand_in, tmp_path):
    out = tmp_path / "out"
    run(stand_in, "benchmarks/gpu_check.py", "--out", out, "--small", "--steps", "device,smoke,slopes,profile")
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert {row["step"] for row in rows} == {"device", "smoke", "slopes", "profile"}
    right = [row["right"] for row in rows if row["step"] == "smoke"]
    assert right == [True] * len(right)
    assert len(right) >= 6
    assert {row["case"] for row in rows if row["step"] == "profile"} == {"ncu", "memcheck", "racecheck", "synccheck"}
    assert (out / "profile.txt").read_text().count(": ran\n") >= 4
    assert f"{len(right)} right, 0 wrong" in (out / "report.txt").read_text()


def test_the_grids_leave_every_row_in_the_file(stand_in, tmp_path):
    file = tmp_path / "gpu.json"
    run(stand_in, "benchmarks/gpu.py", "--small", "--seconds", "0.001", "--grid", "cuDNN's best", "--json", file)
    result = json.loads(file.read_text())
    assert [row["mode"] for row in result["rows"]] == ["forward", "forward+backward"]
    assert [row["grid"] for row in result["summary"]] == ["cuDNN's best"] * 2
