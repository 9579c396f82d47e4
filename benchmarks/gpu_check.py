"""What a GPU says about this library, in nine minutes: whether it computes right, how fast, and what bounds it.

    PYTHONPATH=$PWD python benchmarks/gpu_check.py --out DIR [--steps NAME,...] [--library NAME=DIR]...

For a machine with a GPU and a torch with CUDA. It takes this library from the source tree if PYTHONPATH names that:
`make gpu-check GPU_PYTHON=...` builds it there on a machine without a GPU, and the tree is then copied. Nothing is
downloaded, and nothing compiled but by torch.compile's own tests. Each step runs in processes of its own, with a limit
of time; what fails, hangs or crashes costs the rest nothing, and every result is in DIR as soon as it is there:

    rows.jsonl                a line for each result    report.txt    tables of them
    tests.xml, compiled.xml   pytest's results          log.txt       what pytest and gpu.py print
    gpu.json                  the grids of gpu.py       profile.txt   Nsight Compute and compute-sanitizer
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl.benchmark import gpu
from pymtl.benchmark.guarded import guarded
from pymtl.benchmark.machine import facts
from pymtl.ops.library import why_no_cuda

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


# What the device is.


def device_rows(part: str) -> Iterator[Row]:
    """Facts, hidden-size limits, how a call is shared out, the device's limits."""
    like = {dtype: torch.empty(0, device=gpu.DEVICE, dtype=dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)}
    if part == "facts":
        yield {
            "facts": facts(),
            "library": loaded_library(),
            "device": gpu.device_facts(),
            "nvidia-smi": output_of("nvidia-smi", "-q", "-d", "CLOCK"),
        }
    if part == "hidden sizes":
        yield {str(dtype): torch.ops.pymtl.rnn_hidden_size_limit(tensor) for dtype, tensor in like.items()}
    if part == "choices":
        for dtype, size, backward in itertools.product(like, (64, 128, 256, 384, 512, 768, 1024), (False, True)):
            for batch in (1, 64, 512):
                lines = torch.ops.pymtl.rnn_choices(like[dtype], 2, batch, size, dtype == FLOAT32, backward)
                chosen = [line.removesuffix(" *") for line in lines.splitlines() if line.endswith("*")]
                yield {"dtype": str(dtype), "H": size, "B": batch, "backward": backward, "chosen": chosen, "all": lines}
    if part.startswith("limits"):
        yield asdict(gpu.limits(0.1, small="small" in part))


def loaded_library() -> str:
    """Where the CUDA kernels of this process come from."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next((line.split()[-1] for line in lines if line.endswith("/libpymtl_cuda.so")), "none")


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]}: not installed"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


# Whether each kernel computes right.


@dataclass(frozen=True)
class Smoke:
    """A call that one kernel takes. ``kernel``: a name that ``rnn_choices`` gives, or "per step"."""

    kernel: str
    dtype: torch.dtype
    hidden_size: int
    batch: int
    ragged: bool = False
    kind: str = "LSTM"
    steps: int = 12

    def __str__(self) -> str:
        form = "ragged" if self.ragged else "dense"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel}, {name} {self.kind} H{self.hidden_size} B{self.batch} T{self.steps} {form}"


def smoke_cases(small: bool) -> list[Smoke]:
    cases = []
    halves = itertools.cycle(((BFLOAT16, False), (FLOAT16, True)))
    for units, blocks in [*((64, n) for n in (1, 2, 3, 5, 8)), (32, 12), (32, 16), *((48, n) for n in (11, 13, 16))]:
        for rows in (8, 16) if units != 48 else (8,):
            for _ in range(2):
                dtype, ragged = next(halves)
                size = units * blocks - 3 * ragged
                cases.append(Smoke(f"cluster of {blocks}x{units}, rows {rows}", dtype, size, rows + 3, ragged))
    for blocks, rows in itertools.product((4, 17, 64), (8, 16, 32, 64)):
        dtype, ragged = next(halves)
        cases.append(Smoke(f"group of {blocks}x16, rows {rows}", dtype, 16 * blocks - 3 * ragged, rows + 3, ragged))
    for blocks, (rows, ragged) in itertools.product((1, 2, 3, 5, 8, 11, 13, 16), ((1, 0), (2, 1), (4, 0), (8, 1))):
        size = 32 * blocks - 3 * ragged
        cases.append(Smoke(f"cluster of {blocks}x32, rows {rows}", FLOAT32, size, rows + 1, bool(ragged)))
    for blocks, (rows, ragged) in itertools.product((1, 3, 8, 16), ((8, 0), (16, 1), (32, 1))):
        size = 32 * blocks - 3 * ragged
        cases.append(Smoke(f"cluster of {blocks}x32, rows {rows}, tf32", FLOAT32, size, rows + 3, bool(ragged)))
    for kind, dtype in itertools.product(("GRU", "RNN"), (FLOAT32, BFLOAT16)):
        cases.append(Smoke("per step", dtype, 100, 9, True, kind))
    cases += [Smoke("per step", torch.float64, 100, 9, True), Smoke("per step", BFLOAT16, 1500, 9, True)]
    if small:
        few = [case for case in cases if case.hidden_size <= 64 and case.dtype in (FLOAT32, FLOAT16)]
        cases = [replace(case, batch=3, steps=3) for case in few if "tf32" not in case.kernel][::2]
    return cases


def profile_cases(small: bool) -> list[Smoke]:
    """What is looked at by Nsight Compute: enough steps that starting does not count."""
    kernels = ("cluster of 4x64, rows 8", "cluster of 16x32, rows 8", "cluster of 8x64, rows 8")
    cases = [Smoke(name, BFLOAT16, size, 8, steps=200) for name, size in zip(kernels, (256, 512, 512))]
    cases.append(Smoke("cluster of 8x32, rows 8", FLOAT32, 256, 8, steps=200))
    return smoke_cases(small)[:1] if small else cases


@dataclass
class Prepared:
    """Modules of the same weights, and a batch."""

    ours: nn.Module
    theirs: nn.Module
    exact: nn.Module  # in float64 on the CPU
    x: Tensor
    lengths: Tensor | None  # on the CPU
    given: dict[str, Tensor]  # our arguments besides x

    def our_gradients(self) -> dict[str, Tensor]:
        return gradients(self.ours, self.x, self.x.dtype, lambda module, leaf: module(leaf, **self.given))


def prepared(case: Smoke) -> Prepared | str:
    """What a case needs, with the kernel forced; or why this device does not run it."""
    torch.manual_seed(0)
    tf32 = case.kernel.endswith("tf32")
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    like = torch.empty(0, device=gpu.DEVICE, dtype=case.dtype)
    torch.ops.pymtl.rnn_force_choice(like, "")
    if case.kernel != "per step":
        for backward in (False, True):
            lines = torch.ops.pymtl.rnn_choices(like, 2, case.batch, case.hidden_size, tf32, backward)
            if case.kernel not in [line.split(":")[0] for line in lines.splitlines()]:
                return "this device runs no such blocks at the same time"
        torch.ops.pymtl.rnn_force_choice(like, case.kernel)
    exact = getattr(nn, case.kind)(64, case.hidden_size, bidirectional=True, dtype=torch.float64)
    theirs = getattr(nn, case.kind)(64, case.hidden_size, bidirectional=True, device=gpu.DEVICE, dtype=case.dtype)
    theirs.load_state_dict(exact.state_dict())
    exact.load_state_dict(theirs.state_dict())  # the rounded weights
    x = torch.randn(case.steps, case.batch, 64).to(like.device, case.dtype)
    if not case.ragged:
        return Prepared(pymtl.convert(theirs), theirs, exact, x, None, {})
    lengths = torch.randint(1, case.steps + 1, (case.batch,))
    lengths[-1] = case.steps
    # Lengths on the GPU are what the per-step kernels are for.
    place = like.device if case.kernel == "per step" else "cpu"
    return Prepared(pymtl.convert(theirs), theirs, exact, x, lengths, {"lengths": lengths.to(place)})


def smoke_rows(case: Smoke) -> Iterator[Row]:
    """Results and gradients beside float64's on the CPU: errors as shares of the bound, twice torch's own and 4 eps."""
    given = prepared(case)
    if isinstance(given, str):
        yield {"absent": given}
        return
    call = by_packing(given.lengths)
    found, again = given.our_gradients(), given.our_gradients()
    exact = gradients(given.exact, given.x.cpu().double(), case.dtype, call)
    expected = gradients(given.theirs, given.x, case.dtype, call)
    # Torch's libraries may multiply small matrices exactly even where TF32 is allowed.
    eps = 2.0**-10 if case.kernel.endswith("tf32") else torch.finfo(case.dtype).eps
    shares = {}
    for name, value in found.items():
        bound = 2 * (expected[name] - exact[name]).abs().max() + 4 * eps * exact[name].abs().max()
        shares[name] = float((value - exact[name]).abs().max() / bound)
    worst = max(shares, key=lambda name: shares[name] if shares[name] == shares[name] else math.inf)
    repeats = all(torch.equal(value, again[name]) for name, value in found.items())
    yield {"right": shares[worst] <= 1 and repeats, "share of bound": shares[worst], "of": worst, "repeats": repeats}


def by_packing(lengths: Tensor | None) -> Callable[[nn.Module, Tensor], Any]:
    def call(module: nn.Module, x: Tensor) -> Any:
        if lengths is None:
            return module(x)
        output, last = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return nn.utils.rnn.pad_packed_sequence(output)[0], last

    return call


def gradients(
    module: nn.Module, x: Tensor, dtype: torch.dtype, call: Callable[[nn.Module, Tensor], Any]
) -> dict[str, Tensor]:
    """Results and gradients, in double on the CPU; from seeds of that dtype."""
    leaf = x.detach().requires_grad_()
    output, last = call(module, leaf)
    states = last if isinstance(last, tuple) else (last,)
    results = {"output": output, **{f"state {i}": state for i, state in enumerate(states)}}
    leaves = {"input": leaf, **dict(module.named_parameters())}
    draw = torch.Generator().manual_seed(1)
    seeds = [torch.randn(value.shape, generator=draw).to(dtype).to(value) for value in results.values()]
    for name, gradient in zip(leaves, torch.autograd.grad(list(results.values()), list(leaves.values()), seeds)):
        results[f"gradient of {name}"] = gradient
    return {name: value.detach().cpu().double() for name, value in results.items()}


# How fast each way of sharing out a call is, and how fast the best one beside cuDNN.


def ways_of(small: bool) -> list[gpu.Case]:
    sizes = (64, 128, 256, 384, 512, 768, 1024)
    cases = [gpu.Case(64, 512, size, size, BFLOAT16) for size in sizes]
    cases += [gpu.Case(64, 512, size, size, FLOAT32, tf32=tf32) for tf32 in (False, True) for size in sizes[:-2]]
    if small:
        cases = [gpu.Case(2, 5, 3, 20, dtype) for dtype in (FLOAT16, FLOAT32)]
    return cases


def ways_rows(case: gpu.Case) -> Iterator[Row]:
    """Microseconds of a step and of starting for every way there is, of one wave and of 64 sequences."""
    like = torch.empty(0, device=gpu.DEVICE, dtype=case.dtype)
    shape = (like, case.directions, case.batch, case.hidden_size, case.tf32)
    forward, backward = (
        [line.split(":")[0] for line in torch.ops.pymtl.rnn_choices(*shape, direction).splitlines()]
        for direction in (False, True)
    )
    for name in (name for name in forward if name in backward and name.endswith("tf32") == case.tf32):
        rows = int(name.split("rows ")[1].split(",")[0])
        for batch in dict.fromkeys((rows, case.batch)):
            steps = (max(1, case.steps // 8), case.steps)
            try:
                torch.ops.pymtl.rnn_force_choice(like, name)
                yield {"way": name, "B": batch, **way_times(replace(case, batch=batch), steps)}
            finally:
                torch.ops.pymtl.rnn_force_choice(like, "")


def way_times(case: gpu.Case, steps: tuple[int, int]) -> Row:
    pair = [gpu.Contenders(replace(case, steps=each)) for each in steps]
    row: Row = {}
    with gpu.fp32_precision(case):
        for mode in ("forward", "forward+backward"):
            with torch.set_grad_enabled(mode != "forward"):
                calls = [gpu.recorded(contenders.call(contenders.ours, mode)) for contenders in pair]
                times = [gpu.timed_in_turns({"pymtl": call}, 0.02)["pymtl"]["p50"] for call in calls]
            row[mode] = gpu.line(steps, (times[0], times[1]))
        row["kernels"] = gpu.kernel_times(pair[-1].call(pair[-1].ours, "forward+backward"))
    return row


def slope_cases(small: bool) -> list[gpu.Case]:
    cases = [gpu.Case(batch, 1024, size, size) for size in (256, 512) for batch in (1, 8, 32, 64)]
    cases += [gpu.Case(batch, 1024, size, size, FLOAT16) for size in (256, 512) for batch in (8, 64)]
    cases += [
        gpu.Case(batch, 1024, size, size, FLOAT32, tf32=tf32)
        for tf32 in (True, False)
        for size in (256, 512)
        for batch in (1, 8, 32)
    ]
    cases += [gpu.Case(batch, 1024, 1024, 1024) for batch in (1, 8, 32, 64)]
    cases.append(gpu.Case(16, 1024, 768, 768, FLOAT16, directions=1))
    return list(dict.fromkeys(case.small() for case in cases if case.dtype != BFLOAT16)) if small else cases


def slope_rows(case: gpu.Case) -> Iterator[Row]:
    return gpu.slopes(case, (max(1, case.steps // 16), case.steps), 0.05)


# Other programs, with a limit of time each.


def finished(command: list[str], log: Path, seconds: float, **environment: str) -> Row:
    """Runs a program and appends what it prints. Before its time is over it is asked to stop, then made to."""
    patience = min(15.0, seconds / 3)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
            )
        except FileNotFoundError:
            return {"error": f"{command[0]}: not installed"}
        for sent, left in ((None, seconds - patience), (signal.SIGINT, patience), (signal.SIGKILL, 5.0)):
            if sent is not None:
                os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(left)
                break
    row = {"exit code": process.returncode, "seconds": round(time.monotonic() - started, 1)}
    return row if sent is None else row | {"error": f"did not end within {seconds - patience:.0f} s"}


def test_rows(out: Path, seconds: float) -> Iterator[tuple[str, Row]]:
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/cuda/test_*.py"))
    files.remove("tests/cuda/test_on_host.py")
    until = time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=60", "--timeout-method=thread"]  # ends the process; xdist begins another
    # Compiling takes the longest and says the least.
    for keywords, path, share in (("not compiled", out / "tests.xml", 0.7), ("compiled", out / "compiled.xml", 1.0)):
        path.unlink(missing_ok=True)
        more = ["-k", keywords, f"--junitxml={path}", *files]
        left = share * (until - time.monotonic())
        row = finished([*command, *more], out / "log.txt", left, OMP_NUM_THREADS="2")  # of six processes, with xdist
        yield f"pytest -k '{keywords}'", row | outcomes(path)


def outcomes(path: Path) -> Row:
    """The counts of a JUnit file, and the failures in a line each."""
    if not path.exists():
        return {"error": "no results"}
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {(fault.get('message') or '').strip()[:300]}"
        for case in suite.iter("testcase")
        for fault in (*case.findall("failure"), *case.findall("error"))
    ]
    if counts["tests"] == 0:
        return counts | {"error": "no test was found"}
    if counts["skipped"] == counts["tests"]:
        return counts | {"error": "every test was skipped"}
    return counts | {"failed": failed}


def grid_rows(out: Path, seconds: float, small: bool) -> Iterator[tuple[str, Row]]:
    limit = f"--limit={0.6 * seconds:.0f}"
    command = [sys.executable, "benchmarks/gpu.py", "--seconds=0.05", limit, f"--json={out / 'gpu.json'}"]
    yield "grids", finished([*command, "--small"] if small else command, out / "log.txt", seconds)


def profile_rows(out: Path, seconds: float, small: bool) -> Iterator[tuple[str, Row]]:
    """Nsight Compute over some kernels, forward and backward, then compute-sanitizer over a smoke case of each kind."""
    until = time.monotonic() + seconds
    here = [sys.executable, str(Path(__file__)), "--out", str(out), "--here"]
    profiled = "|".join(str(case) for case in profile_cases(small))
    ncu = ["ncu", "--set", "full", "--kernel-name", "regex:^(forward|backward)$", "--clock-control", "none"]
    yield "ncu", finished([*ncu, *here, profiled], out / "profile.txt", 0.4 * seconds)
    checked = "|".join(str(case) for case in smoke_cases(small)[:: 4 if small else 20])
    for share, tool in ((1 / 3, "memcheck"), (1 / 2, "racecheck"), (1.0, "synccheck")):
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=pymtl", "--error-exitcode", "99"]
        left = share * (until - time.monotonic())
        yield tool, finished([*command, *here, checked], out / "profile.txt", left)


# Steps, in the order of what they tell.


def in_processes(measure: Callable[[Any], Iterator[Row]], cases: Callable[[bool], list[Any]], each: float) -> Any:
    """A step whose cases are measured in a process of their own."""

    def rows(out: Path, seconds: float, small: bool) -> Iterator[tuple[str, Row]]:
        for case, row in guarded(measure, cases(small), each, time.monotonic() + seconds):
            yield str(case), row

    return rows


def device_parts(small: bool) -> list[str]:
    return ["facts", "hidden sizes", "choices", "limits, small" if small else "limits"]


@dataclass(frozen=True)
class Step:
    seconds: float  # of 530, if all steps are run
    what: str
    rows: Callable[..., Iterator[tuple[str, Row]]]


STEPS = {
    "device": Step(40, "versions, clocks, limits", in_processes(device_rows, device_parts, 40)),
    "smoke": Step(80, "each kernel beside float64", in_processes(smoke_rows, smoke_cases, 20)),
    "slopes": Step(100, "us a step beside cuDNN's", in_processes(slope_rows, slope_cases, 25)),
    "ways": Step(60, "us a step of every way to share out a call", in_processes(ways_rows, ways_of, 30)),
    "tests": Step(130, "pytest -m cuda", lambda out, seconds, small: test_rows(out, seconds)),
    "grids": Step(60, "the grids of gpu.py", grid_rows),
    "profile": Step(60, "Nsight Compute and compute-sanitizer", profile_rows),
}
OF_A_LIBRARY = Step(25, "us a step, of some shapes", in_processes(slope_rows, lambda small: slope_cases(small)[:8], 25))
LEAST_SECONDS = 5.0  # with which a step is begun


def table_of(step: str, rows: list[Row]) -> Table:
    table = Table(title=f"{step}: {STEPS[step].what}")
    table.add_column("case")
    table.add_column("result", overflow="fold")
    if step == "smoke":
        kinds = {"right": 0, "wrong": 0, "absent": 0}
        for row in rows:
            kinds["absent" if "absent" in row else "right" if row.get("right") is True else "wrong"] += 1
        table.add_row("", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        rows = [row for row in rows if row.get("right") is not True]
    for row in rows:
        content = {name: value for name, value in row.items() if name not in ("step", "case", "library", "all")}
        if step == "slopes" and "pymtl" in content:
            ours, theirs, ratios = (content[name] for name in ("pymtl", "nn.LSTM", "ratios"))
            text = f"{content['mode']} by {content['kernels']}: {ours['us_per_step']:.2f} us a step, "
            text += f"start {ours['start_us']:.0f}; nn.LSTM "
            text += (
                f"{theirs['us_per_step']:.2f}, {theirs['start_us']:.0f}; x {ratios[0]:.2f} short, {ratios[1]:.2f} long"
            )
        elif step == "ways" and "way" in content:
            text = f"{content['way']}, B {content['B']}: " + "; ".join(
                f"{mode} {content[mode][0]:.2f} us, start {content[mode][1]:.0f}"
                for mode in ("forward", "forward+backward")
            )
        else:
            text = json.dumps(content)
        # As Text, since rich takes brackets of messages for markup.
        table.add_row(Text(f"{row['case']}{' ' + row['library'] if row.get('library') else ''}"), Text(text))
    return table


def run(out: Path, names: list[str], libraries: dict[str, str], small: bool, seconds: float) -> int:
    """Runs the steps, then some slopes with each other library; 0 if nothing was wrong."""
    until = time.monotonic() + seconds
    planned = [(name, STEPS[name], "") for name in names]
    planned += [("slopes", OF_A_LIBRARY, library) for library in libraries]
    wrong = 0
    console = Console(markup=False)
    with (out / "rows.jsonl").open("a", encoding="utf-8") as file, (out / "report.txt").open("a") as report:
        for position, (name, step, library) in enumerate(planned):
            # What a step leaves over is the later ones'.
            weights = [later.seconds for _, later, _ in planned[position:]]
            left = (until - time.monotonic()) * weights[0] / sum(weights)
            console.print(f"{name} {library}: {step.what}, at most {left:.0f} s")
            rows: list[Row] = []
            for case, row in results_of(step, out, left, small, libraries.get(library, "")):
                rows.append({"step": name, "library": library, "case": case, **row})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
            failed = [row for row in rows if "error" in row or row.get("right") is False or row.get("exit code", 0)]
            wrong += len(failed)
            console.print(f"  {len(rows)} results, {len(failed)} failures")
            Console(file=report, width=200).print(table_of(name, rows))
            report.flush()
    return 1 if wrong else 0


def results_of(step: Step, out: Path, seconds: float, small: bool, folder: str) -> Iterator[tuple[str, Row]]:
    """A step's rows; an error of the step itself is one."""
    if seconds < LEAST_SECONDS:
        yield "", {"error": "not begun: no time left"}
        return
    if folder and not Path(folder, "libpymtl_cuda.so").is_file():
        yield "", {"error": f"there is no libpymtl_cuda.so in {folder}"}
        return
    try:
        with library_from(folder):
            yield from step.rows(out, seconds, small)
    except Exception as error:
        yield "", {"error": f"{type(error).__name__}: {error}"}


@contextlib.contextmanager
def library_from(folder: str) -> Iterator[None]:
    """Processes started here load libpymtl_cuda.so from that folder, if one is named."""
    before = os.environ.get("LD_LIBRARY_PATH")
    if folder:
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [folder, before]))
    try:
        yield
    finally:
        if folder and before is None:
            del os.environ["LD_LIBRARY_PATH"]
        elif folder:
            os.environ["LD_LIBRARY_PATH"] = before


def run_here(names: list[str]) -> int:
    """Runs our part of smoke cases in this process, one after the other, as under a profiler."""
    known = [case for small in (False, True) for case in (*smoke_cases(small), *profile_cases(small))]
    cases = {str(case): case for case in known}
    for name in names:
        given = prepared(cases[name])
        if isinstance(given, str):
            print(f"{name}: {given}")
            continue
        given.our_gradients()
        print(f"{name}: ran")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = "\n".join(f"  {name:<8} {step.seconds:>4.0f}  {step.what}" for name, step in STEPS.items())
    parser.epilog = f"steps, and their shares of the time, of which each takes what it needs:\n{steps}"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="NAME,...", help="default: all, in this order")
    parser.add_argument(
        "--library",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="in the end some slopes with the libpymtl_cuda.so of that folder; may be repeated",
    )
    parser.add_argument("--seconds", type=float, default=530.0, help="for all of it (default: 530)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, only to see whether all of it runs")
    parser.add_argument("--here", metavar="CASE|...", help="smoke cases in this process, as under a profiler; no steps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU, or this torch has no CUDA")
    if not gpu.has_cuda(torch.empty(0, device=gpu.DEVICE)):
        # Else torch would be timed beside itself.
        parser.error(f"no CUDA kernels of pymtl are loaded for this GPU: {why_no_cuda or 'it is older than sm_80'}")
    if arguments.here is not None:
        return run_here(arguments.here.split("|"))
    names = arguments.steps.split(",")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        parser.error(f"--steps: expected names among {', '.join(STEPS)}, got {', '.join(unknown)}")
    wrong = [text for text in arguments.library if "=" not in text]
    if wrong:
        parser.error(f"--library: expected NAME=DIR, got {', '.join(wrong)}")
    libraries = dict(text.split("=", 1) for text in arguments.library)
    for folder in libraries.values():
        if not Path(folder, "libpymtl_cuda.so").is_file():
            print(f"--library: there is no libpymtl_cuda.so in {folder}; all else is run", file=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return run(arguments.out.resolve(), names, libraries, arguments.small, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
