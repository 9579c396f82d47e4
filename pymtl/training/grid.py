"""Variants of one configuration: what a comparison trains."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymtl.training import config as configuration
from pymtl.training.errors import ConfigError
from pymtl.training.kinds import KINDS
from pymtl.training.optimizers import check_optimizer

Axis = list[tuple[str, str]]  # a key and a value, for each value


@dataclass(frozen=True)
class Variant:
    """A configuration in the grid.

    ``settings`` of ``--over`` make it, by key; ``tuned``, of ``--tune``, tell it from others of the same name, of which
    the best in validation counts; ``single`` is the task that it trains by itself.
    """

    name: str
    raw: dict[str, Any]
    single: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name among all that are trained."""
        return " ".join([self.name, *self.tuned.values()])

    @property
    def alone_settings(self) -> dict[str, str]:
        """Those of its settings that a task trained by itself can have too."""
        return {key: value for key, value in self.settings.items() if not _joins(key)}


def variants(
    path: Path,
    over: Sequence[str],
    overrides: Sequence[str],
    single_task: bool,
    data: Path | None = None,
    tune: Sequence[str] = (),
) -> list[Variant]:
    """The grid: every combination of the values in ``over``, and each task by itself, with every combination of those
    in ``tune``.

    A task by itself is trained with each combination of the settings that do not say how tasks are joined (``sharing``,
    ``balancing``, ``tasks``): what a variant is compared with has its settings otherwise.

    Args:
        path: the configuration.
        over: ``key=a,b,c`` each, a key as in ``--set``; of ``tasks`` a value is the names of some, as ``a+b``.
        overrides: settings of all variants.
        single_task: whether to add each task alone that is not auxiliary.
        data: the folder that paths are relative to, if not the configuration's own.
        tune: as ``over``.

    Raises:
        ConfigError: an entry of ``over`` or ``tune`` has no values, or a variant's settings do not fit.
        FileNotFoundError: a file of data is missing.
    """
    base = configuration.read(path)
    for override in overrides:
        configuration.set_value(base, override)
    base.setdefault("folder", str((data or path.parent).resolve()))
    axes = [_axis("--over", entry) for entry in over]
    tuned = [dict(combination) for combination in itertools.product(*(_axis("--tune", entry) for entry in tune))]
    for key in {key for each in tuned for key in each}:
        if _joins(key):
            raise ConfigError(f"--tune {key}: expected a setting that tasks alone have too: compare it with --over")
    grid = []
    for combination in itertools.product(*axes):
        name = " ".join(value for _, value in combination) or path.stem
        raw = _with(base, dict(combination))
        grid += [Variant(name, _with(raw, each), None, dict(combination), each) for each in tuned]
    if single_task:
        apart = [axis for axis in axes if not _joins(axis[0][0])]
        for combination in itertools.product(*apart):
            raw = _with(base, dict(combination))
            for task in configuration.parse(raw, str(path)).main_tasks:
                name = " ".join([f"{task} alone", *(value for _, value in combination)])
                alone = _alone(task, raw)
                grid += [Variant(name, _with(alone, each), task, dict(combination), each) for each in tuned]
    for variant in grid:
        _check(configuration.parse(variant.raw, f"{path}, {variant.label}"))
    folders = [run_folder(Path(), variant, 0) for variant in grid]
    for variant, folder in zip(grid, folders):
        if folders.count(folder) > 1:
            raise ConfigError(f"--over: expected variants all different, got {variant.label!r} twice (or all but)")
    return grid


def run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / re.sub(r"[^\w.=+-]+", "_", variant.label) / f"seed{int(variant.raw.get('seed', 0)) + seed}"


def _joins(key: str) -> bool:
    """Whether a setting says how tasks are joined, of which a task by itself has nothing."""
    return key.partition(".")[0] in ("sharing", "balancing", "tasks")


def _axis(option: str, entry: str) -> Axis:
    key, equals, values = entry.partition("=")
    if not equals or not all(_split(values)):
        raise ConfigError(f"{option} {entry}: expected key=value,value,...")
    return [(key.strip(), value) for value in _split(values)]


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


def _with(raw: dict[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """A copy with these settings."""
    changed = copy.deepcopy(raw)
    for key, value in settings.items():
        if key == "tasks":
            changed = _of_tasks(changed, [name.strip() for name in value.split("+")])
        else:
            configuration.set_value(changed, f"{key}={value}")
    return changed


def _of_tasks(raw: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A configuration with these tasks alone, and with the data that they need."""
    tasks = raw.get("tasks", {})
    for name in names:
        if name not in tasks:
            raise ConfigError(f"tasks: expected some of {', '.join(tasks)} with + between them, got {name!r}")
    kept = {name: tasks[name] for name in tasks if name in names}
    changed = {**raw, "tasks": kept}
    itself = {task.get("dataset") for task in kept.values() if _labels_itself(task)}
    if raw.get("datasets"):
        used = {task.get("dataset") for task in kept.values()}
        changed["datasets"] = {
            name: _without_unlabelled(each, name in itself) for name, each in raw["datasets"].items() if name in used
        }
    elif "data" in raw:
        changed["data"] = _without_unlabelled(raw["data"], None in itself)
    return changed


def _labels_itself(task: Mapping[str, Any]) -> bool:
    kind = KINDS.get(task.get("kind", ""))
    return kind is not None and kind.labels_itself


def _without_unlabelled(data: dict[str, Any], needed: bool) -> dict[str, Any]:
    return data if needed else {key: value for key, value in data.items() if key != "unlabelled"}


def _alone(task: str, base: dict[str, Any]) -> dict[str, Any]:
    raw = _of_tasks(copy.deepcopy(base), [task])
    raw["tasks"][task].pop("after", None)
    raw["tasks"][task]["weight"] = 1.0
    raw["sharing"] = "hard"
    raw.pop("balancing", None)
    if "parts" in raw.get("warm_start", {}):
        other = tuple(f"heads.{name}" for name in base["tasks"] if name != task)
        within = tuple(f"{module}." for module in other)
        own = [part for part in raw["warm_start"]["parts"] if part not in other and not part.startswith(within)]
        raw["warm_start"]["parts"] = own
        if not own:
            del raw["warm_start"]
    raw.setdefault("training", {})["select_by"] = "mean"
    raw["training"].pop("baseline", None)
    return raw


def _check(config: configuration.Config) -> None:
    check_optimizer(config.training, "compare")
    for data in config.sets.values():
        for name in (data.train, data.valid, data.test, data.unlabelled):
            if name is not None and not config.path(name).exists():
                raise FileNotFoundError(f"{config.path(name)}: there is no such file")
