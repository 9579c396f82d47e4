"""A grid of variants of one configuration, each trained with several seeds."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pymtl.training.config import parse
from pymtl.training.errors import RunError
from pymtl.training.grid import Variant, run_folder
from pymtl.training.metrics import best_epoch, delta, primary
from pymtl.training.run import Run, data_files

CONFIDENCE = 0.95  # of the intervals


def run_all(
    grid: Sequence[Variant], seeds: int, folder: Path, jobs: int, threads: int, device: str = "cpu"
) -> Iterator[tuple[int, int]]:
    """Trains what is not trained yet, ``jobs`` runs at a time, and yields how many are done and of how many.

    Every run is a process of its own in ``folder``; one that was interrupted is resumed.

    Raises:
        RunError: a run failed, or the folder holds another comparison; the message names the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = {variant.label: _settings(variant) for variant in grid}
    if (folder / "plan.json").exists():
        before = Run(folder).read_json("plan.json")
        if not isinstance(before, dict):
            raise RunError(f"{folder / 'plan.json'}: damaged")
        for name, raw in plan.items():
            if name in before and before[name] != raw:
                raise RunError(
                    f"{folder}: holds another comparison, in which {name!r} has other settings: pass another --out"
                )
        plan = {**before, **plan}
    Run(folder).write_json("plan.json", plan)
    work = [(variant, seed) for seed in range(seeds) for variant in grid]
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run_one, variant, seed, folder, jobs, threads, device) for variant, seed in work]
        done = 0
        yield done, len(work)
        try:
            for finished in as_completed(running):
                finished.result()
                done += 1
                yield done, len(work)
        finally:
            for waiting in running:
                waiting.cancel()


def _settings(variant: Variant) -> dict[str, Any]:
    """All but where the data lie, which may move."""
    return {key: value for key, value in variant.raw.items() if key != "folder"}


def _run_one(variant: Variant, seed: int, folder: Path, jobs: int, threads: int, device: str) -> None:
    where = run_folder(folder, variant, seed)
    raw = {**_settings(variant), "seed": int(variant.raw.get("seed", 0)) + seed}
    if where.joinpath("plan.json").exists() and Run(where).read_json("plan.json") != raw:
        raise RunError(f"{where}: holds a run of another comparison, with other settings than {variant.label!r}")
    if where.joinpath("test.json").exists():
        before, now = Run(where).read_manifest().get("data"), data_files(parse(variant.raw, variant.label))
        if before is not None and before != now:
            changed = [file["file"] for part, file in now.items() if before.get(part) != file]
            raise RunError(
                f"{where}: was trained on other data: {', '.join(changed)} changed since: pass another --out"
            )
        return
    where.mkdir(parents=True, exist_ok=True)
    Run(where).write_json("plan.json", raw)
    command = [sys.executable, "-m", "pymtl", "train", str(where / "plan.json"), "--run", str(where)]
    # A run that goes on keeps its number of threads.
    command += ["--resume"] if where.joinpath("state.pt").exists() else ["--overwrite", "--threads", str(threads)]
    command += ["--device", device, "--data", variant.raw["folder"]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if jobs > 1:
        # Idle threads of one run would spin on cores that another needs. A run alone is faster if they do.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    with open(where / "train.log", "ab") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status != 0 or not where.joinpath("test.json").exists():
        said = (where / "train.log").read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise RunError(
            f"{variant.label}, seed {raw['seed']}: failed with status {status}: {said} (see {where / 'train.log'})"
        )


def summary(grid: Sequence[Variant], seeds: int, folder: Path) -> dict[str, Any]:
    """What the runs of a grid say.

    Returns:
        ``seeds``, and ``rows``, one for each variant, tasks by themselves first:

        - ``variant``, ``single``, ``settings``: as the grid has them; ``tuned``: of the tuned ones those whose
          ``selection``, the mean over the seeds of the best validation score, is best; ``records`` that are trained on
        - ``scores``: of each task's first score the mean and standard deviation over the seeds
        - ``changes``: of each of those the ``mean`` difference from the task by itself with the same seed, and the
          interval from ``low`` to ``high`` that holds it with 95 % confidence (Student's t; None where one seed, or
          differences all alike, do not tell)
        - ``alone``: the ``scores`` of each task by itself, of those that the variant has
        - ``delta``: the mean relative change from each task by itself; None where nothing is to be relative to
        - ``step_ms`` of a step, ``seconds`` of a run: mean and standard deviation

    Raises:
        RunError: a run is missing or damaged, or nothing can be scored.
    """
    tries: dict[tuple[str, str | None], list[Variant]] = defaultdict(list)
    for variant in sorted(grid, key=lambda v: v.single is None):
        tries[variant.name, variant.single].append(variant)
    rows, alone = [], []
    for same in tries.values():
        row, scores = max((_row(variant, seeds, folder) for variant in same), key=lambda found: found[0]["selection"])
        if row["single"] is not None:
            alone.append((row, scores))
        else:
            rivals = [each for each in alone if each[0]["settings"] == same[0].settings_of(each[0]["single"])]
            row |= _beside_alone(scores, [own for _, own in rivals])
            found = {name: value for rival, _ in rivals for name, value in rival["scores"].items()}
            row["alone"] = {name: found[name] for name in row["scores"] if name in found}
        rows.append(row)
    if not any(row["scores"] for row in rows):
        raise RunError(f"{folder}: the test set has no label to score")
    return {"seeds": seeds, "rows": rows}


def _row(variant: Variant, seeds: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What one variant reached, and its scores of each seed."""
    runs = [Run(run_folder(folder, variant, seed)) for seed in range(seeds)]
    scores = [run.read_scores() for run in runs]
    epochs = [run.read_metrics() for run in runs]
    if not all(epochs):
        raise RunError(f"{folder}: a run of {variant.label!r} lacks its metrics.jsonl")
    names = [name for name in scores[0] if "/" in name and name.partition("/")[0] in primary(scores[0])]
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.partition("/")[0], name)
    row = {
        "variant": variant.name,
        "single": variant.single,
        "settings": dict(variant.settings),
        "tuned": dict(variant.tuned),
        "records": runs[0].read_manifest().get("records"),
        "selection": statistics.fmean(best_epoch(own)["selection"] for own in epochs),
        "scores": {name: _spread([score[name] for score in scores]) for name in first.values()},
        # The last epoch's: the first one's has the caches to fill.
        "step_ms": _spread([own[-1]["step_ms"] for own in epochs]),
        "seconds": _spread([sum(epoch["seconds"] for epoch in own) for own in epochs]),
    }
    return row, [{name: score[name] for name in first.values()} for score in scores]


def _beside_alone(
    scores: Sequence[Mapping[str, float]], alone: Sequence[Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """``delta`` and ``changes`` of a variant's scores of each seed, from those of each task by itself."""
    changes = {
        name: _interval([own[name] - other[name] for own, other in zip(scores, of_task)])
        for of_task in alone
        for name in of_task[0]
        if name in scores[0]
    }
    base = {name: statistics.fmean(own[name] for own in of_task) for of_task in alone for name in of_task[0]}
    relative = [delta(score, base) for score in scores] if base else []
    # A score of 0 is nothing to be relative to.
    finite = bool(relative) and all(map(math.isfinite, relative))
    return {"changes": changes, "delta": _spread(relative) if finite else None}


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of differences, and the interval that holds it."""
    found: dict[str, float | None] = {"mean": statistics.fmean(values), "low": None, "high": None}
    if len(values) > 1 and all(map(math.isfinite, values)):
        if max(values) - min(values) < 1e-12:  # no spread but rounding, which tells of coarse scores and no confidence
            return found
        from scipy import stats

        interval = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
        found |= {"low": float(interval.low), "high": float(interval.high)}
    return found
