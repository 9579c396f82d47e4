"""A grid of variants of one configuration, each trained with several seeds."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymtl.training import config as configuration
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.metrics import delta, primary
from pymtl.training.optimizers import check_optimizer
from pymtl.training.run import Run


@dataclass(frozen=True)
class Variant:
    """A configuration in the grid: its name, the settings that make it, and whether it is a task by itself."""

    name: str
    raw: dict[str, Any]
    single: str | None = None


def variants(
    path: Path, over: Sequence[str], overrides: Sequence[str], single_task: bool, data: Path | None = None
) -> list[Variant]:
    """The grid: every combination of the values in ``over``, and each task by itself.

    Args:
        path: the configuration.
        over: ``key=a,b,c`` each, a key as in ``--set``.
        overrides: settings of all variants.
        single_task: whether to add each task alone, under the same settings otherwise.
        data: the folder that paths are relative to, if not the configuration's own.

    Raises:
        ConfigError: an entry of ``over`` has no values, or a variant's settings do not fit.
        FileNotFoundError: a file of data is missing.
    """
    base = configuration.read(path)
    for override in overrides:
        configuration.set_value(base, override)
    base.setdefault("folder", str((data or path.parent).resolve()))
    axes = []
    for entry in over:
        key, equals, values = entry.partition("=")
        if not equals or not all(_split(values)):
            raise ConfigError(f"--over {entry}: expected key=value,value,...")
        axes.append([(key, value) for value in _split(values)])
    grid = []
    for combination in itertools.product(*axes):
        raw = copy.deepcopy(base)
        for key, value in combination:
            configuration.set_value(raw, f"{key}={value}")
        name = " ".join(value for _, value in combination) or path.stem
        _check(configuration.parse(raw, f"{path}, {name}"))
        grid.append(Variant(name, raw))
    if single_task:
        grid += [_alone(task, base, path) for task in configuration.parse(base, str(path)).tasks]
    folders = [run_folder(Path(), variant, 0) for variant in grid]
    for variant, folder in zip(grid, folders):
        if folders.count(folder) > 1:
            raise ConfigError(f"--over: expected variants all different, got {variant.name!r} twice (or all but)")
    return grid


def _check(config: configuration.Config) -> None:
    check_optimizer(config.training, "compare")
    for data in config.sets.values():
        for name in (data.train, data.valid, data.test):
            if name is not None and not config.path(name).exists():
                raise FileNotFoundError(f"{config.path(name)}: there is no such file")


def _split(values: str) -> list[str]:
    """At commas, but for those within brackets or quotes."""
    parts, depth, quoted = [""], 0, False
    for character in values:
        quoted ^= character == '"'
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _alone(task: str, base: dict[str, Any], path: Path) -> Variant:
    raw = copy.deepcopy(base)
    raw["tasks"] = {task: raw["tasks"][task]}
    raw["tasks"][task].pop("after", None)
    raw["tasks"][task]["weight"] = 1.0
    if raw.get("datasets"):
        raw["datasets"] = {raw["tasks"][task]["dataset"]: raw["datasets"][raw["tasks"][task]["dataset"]]}
    raw["sharing"], raw["balancing"] = "hard", "ew"
    if "parts" in raw.get("warm_start", {}):
        other = tuple(f"heads.{name}" for name in base["tasks"] if name != task)
        own = [part for part in raw["warm_start"]["parts"] if part not in other and not part.startswith(_within(other))]
        raw["warm_start"]["parts"] = own
        if not own:
            del raw["warm_start"]
    raw.setdefault("training", {})["select_by"] = "mean"
    raw["training"].pop("baseline", None)
    configuration.parse(raw, f"{path}, {task} alone")
    return Variant(f"{task} alone", raw, task)


def _within(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)


def run_all(
    grid: Sequence[Variant], seeds: int, folder: Path, jobs: int, threads: int, device: str = "cpu"
) -> Iterator[tuple[int, int]]:
    """Trains what is not trained yet, ``jobs`` runs at a time, and yields how many are done and of how many.

    Every run is a process of its own in ``folder``; one that was interrupted is resumed.

    Raises:
        RunError: a run failed, or the folder holds another comparison; the message names the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = {variant.name: _settings(variant) for variant in grid}
    if (folder / "plan.json").exists():
        before = Run(folder).read_json("plan.json")
        if not isinstance(before, dict):
            raise RunError(f"{folder / 'plan.json'}: damaged")
        for name, raw in plan.items():
            if name in before and before[name] != raw:
                raise RunError(f"{folder}: holds another comparison, in which {name!r} has other settings")
        plan = {**before, **plan}
    Run(folder).write_json("plan.json", plan)
    work = [(variant, seed) for seed in range(seeds) for variant in grid]
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run_one, variant, seed, folder, threads, device) for variant, seed in work]
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


def _run_one(variant: Variant, seed: int, folder: Path, threads: int, device: str) -> None:
    where = run_folder(folder, variant, seed)
    if where.joinpath("test.json").exists():
        return
    where.mkdir(parents=True, exist_ok=True)
    raw = {**_settings(variant), "seed": int(variant.raw.get("seed", 0)) + seed}
    Run(where).write_json("plan.json", raw)
    command = [sys.executable, "-m", "pymtl", "train", str(where / "plan.json"), "--run", str(where)]
    command += ["--resume"] if where.joinpath("state.pt").exists() else ["--overwrite"]
    command += ["--threads", str(threads), "--device", device, "--data", variant.raw["folder"]]
    # Several processes beside one another: idle threads must not spin.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with open(where / "train.log", "ab") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status != 0 or not where.joinpath("test.json").exists():
        raise RunError(f"{variant.name}, seed {raw['seed']}: failed with status {status}: see {where / 'train.log'}")


def run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / re.sub(r"[^\w.=-]+", "_", variant.name) / f"seed{int(variant.raw.get('seed', 0)) + seed}"


def summary(grid: Sequence[Variant], seeds: int, folder: Path) -> dict[str, Any]:
    """Of each variant the mean and standard deviation over the seeds of every task's score, of the mean relative
    change ``delta`` from each task by itself (if the grid has those), and of a training step's milliseconds.

    Raises:
        RunError: a run is missing or damaged.
    """
    alone: dict[str, float] = {}
    rows = []
    for variant in sorted(grid, key=lambda v: v.single is None):
        runs = [Run(run_folder(folder, variant, seed)) for seed in range(seeds)]
        scores = [run.read_scores() for run in runs]
        names = [name for name in scores[0] if "/" in name and name.partition("/")[0] in primary(scores[0])]
        first = {name.partition("/")[0]: name for name in reversed(names)}
        row: dict[str, Any] = {"variant": variant.name, "single": variant.single, "scores": {}}
        for name in first.values():
            row["scores"][name] = _spread([score[name] for score in scores])
        # The last epoch's: the first one's has the caches to fill.
        row["step_ms"] = _spread([run.read_metrics()[-1]["step_ms"] for run in runs])
        if variant.single is not None:
            alone |= {name: value["mean"] for name, value in row["scores"].items()}
        else:
            changes = [delta(score, alone) for score in scores] if alone else []
            # A score of 0 is nothing to be relative to.
            row["delta"] = _spread(changes) if changes and all(map(math.isfinite, changes)) else None
        rows.append(row)
    if not any(row["scores"] for row in rows):
        raise RunError(f"{folder}: the test set has no label to score")
    rows.sort(key=lambda row: row["single"] is None)
    return {"seeds": seeds, "rows": rows}


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}
