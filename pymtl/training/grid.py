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

    def settings_of(self, task: str) -> dict[str, str]:
        """Those of its settings that the task has too when it is trained by itself."""
        return {key: value for key, value in self.settings.items() if _concerns(key, task)}


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

    A task by itself is trained with each combination of the settings that say something of it alone, as
    ``model.hidden_size``, and with none of those that say how tasks are joined, as ``sharing``: what a variant is
    compared with has its settings otherwise.

    Args:
        path: the configuration.
        over: ``key=a,b,c`` each, a key as in ``--set``; of ``tasks`` a value is the names of some, as ``a+b``.
        overrides: settings of all variants.
        single_task: whether to add each task alone that is not auxiliary.
        data: the folder that paths are relative to, if not the configuration's own.
        tune: as ``over``, of settings that do not say how tasks are joined.

    Raises:
        ConfigError: an entry of ``over`` or ``tune`` has no values or the key of another one, or a variant's settings
            do not fit.
        FileNotFoundError: a file of data is missing.
    """
    base = configuration.read(path)
    for override in overrides:
        configuration.set_value(base, override)
    base.setdefault("folder", str((data or path.parent).resolve()))
    axes = [_axis("--over", entry) for entry in over]
    tunings = [_axis("--tune", entry) for entry in tune]
    keys = [axis[0][0] for axis in (*axes, *tunings)]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(
                f"{key}: expected all its values in one --over or --tune, got the key {keys.count(key)} times"
            )
    for axis in tunings:
        if _joins(axis[0][0]):
            raise ConfigError(f"--tune {axis[0][0]}: expected a setting that a task by itself has too: take --over")
    tuned = [dict(combination) for combination in itertools.product(*tunings)]
    grid: list[Variant] = []
    singles: dict[str, None] = {}
    for combination in itertools.product(*axes):
        name = " ".join(value for _, value in combination) or path.stem
        raw = _with(base, dict(combination))
        singles |= dict.fromkeys(configuration.parse(raw, f"{path}, {name}").main_tasks)
        grid += [Variant(name, _with(raw, each), None, dict(combination), each) for each in tuned]
    for task in singles if single_task else ():
        own = [axis for axis in axes if _concerns(axis[0][0], task)]
        for combination in itertools.product(*own):
            name = " ".join([f"{task} alone", *(value for _, value in combination)])
            alone = _alone(task, _with(base, dict(combination)))
            grid += [Variant(name, _with(alone, each), task, dict(combination), each) for each in tuned]
    schemes = set()
    for variant in grid:
        config = configuration.parse(variant.raw, f"{path}, {variant.label}")
        _check(config)
        if len(config.main_tasks) > 1:
            schemes.add(config.sharing.kind)
        # What the configuration leaves open is written down: a later version may choose otherwise.
        for key, method in (("sharing", config.sharing), ("balancing", config.balancing)):
            if variant.raw.get(key, configuration.AUTO) == configuration.AUTO:
                variant.raw[key] = method.kind
    if len(schemes) > 1 and not any(key.startswith("sharing") for key in keys):
        raise ConfigError(
            "--over balancing: some of these methods take sharing = 'hard' alone, the others would have another beside "
            "them: add --set sharing=hard"
        )
    folders = [run_folder(Path(), variant, 0) for variant in grid]
    for variant, folder in zip(grid, folders):
        if folders.count(folder) > 1:
            raise ConfigError(f"--over: expected variants all different, got {variant.label!r} twice (or all but)")
    return grid


def run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / re.sub(r"[^\w.=+-]+", "_", variant.label) / f"seed{int(variant.raw.get('seed', 0)) + seed}"


def _joins(key: str) -> bool:
    """Whether a setting says how tasks are joined, of which a task by itself has nothing."""
    first, *others = key.split(".")
    of_a_task = first == "tasks" and (not others or others[-1] in ("weight", "after", "auxiliary"))
    of_side_tasks = key == "training.unlabelled_ratio" or others[-1:] == ["unlabelled"]
    chosen = key in ("training.select_by", "training.baseline")
    return first in ("sharing", "balancing") or of_a_task or of_side_tasks or chosen


def _concerns(key: str, task: str) -> bool:
    """Whether a setting says something of a task by itself."""
    first, *others = key.split(".")
    return not _joins(key) and (first != "tasks" or others[0] == task)


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
    """A copy with these settings; of tasks that a value of ``tasks`` leaves out they say nothing."""
    changed = copy.deepcopy(raw)
    for key, value in settings.items():
        first, *others = key.split(".")
        if key != "tasks" and (first != "tasks" or others[0] in changed.get("tasks", {})):
            configuration.set_value(changed, f"{key}={value}")
    if "tasks" in settings:
        changed = _of_tasks(changed, [name.strip() for name in settings["tasks"].split("+")])
    return changed


def _of_tasks(raw: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A configuration with these tasks alone, and without what it says of others."""
    tasks = raw.get("tasks", {})
    for name in names:
        if name not in tasks:
            raise ConfigError(f"tasks: expected some of {', '.join(tasks)} with + between them, got {name!r}")
    kept = {name: dict(tasks[name]) for name in tasks if name in names}
    for task in kept.values():
        if task.get("after") not in kept:
            task.pop("after", None)
    changed = {**raw, "tasks": kept}
    itself = {task.get("dataset") for task in kept.values() if _labels_itself(task)}
    if raw.get("datasets"):
        used = {task.get("dataset") for task in kept.values()}
        changed["datasets"] = {
            name: _without_unlabelled(each, name in itself) for name, each in raw["datasets"].items() if name in used
        }
    elif "data" in raw:
        changed["data"] = _without_unlabelled(raw["data"], None in itself)
    dropped = [name for name in tasks if name not in kept]
    if "parts" in raw.get("warm_start", {}):
        other = tuple(f"heads.{name}" for name in dropped)
        within = tuple(f"{module}." for module in other)
        own = [part for part in raw["warm_start"]["parts"] if part not in other and not part.startswith(within)]
        changed["warm_start"] = {**raw["warm_start"], "parts": own}
        if not own:
            del changed["warm_start"]
    training = dict(raw.get("training", {}))
    if str(training.get("select_by", "")).partition("/")[0] in dropped:
        del training["select_by"]
    if "baseline" in training:
        scores = training["baseline"].items()
        training["baseline"] = {name: value for name, value in scores if name.partition("/")[0] not in dropped}
    return {**changed, "training": training} if "training" in raw else changed


def _labels_itself(task: Mapping[str, Any]) -> bool:
    kind = KINDS.get(task.get("kind", ""))
    return kind is not None and kind.labels_itself


def _without_unlabelled(data: dict[str, Any], needed: bool) -> dict[str, Any]:
    return data if needed else {key: value for key, value in data.items() if key != "unlabelled"}


def _alone(task: str, base: dict[str, Any]) -> dict[str, Any]:
    raw = _of_tasks(copy.deepcopy(base), [task])
    raw["tasks"][task] |= {"weight": 1.0, "auxiliary": False}
    raw["sharing"] = "hard"
    raw.pop("balancing", None)
    raw.setdefault("training", {})["select_by"] = "mean"
    raw["training"].pop("baseline", None)
    return raw


def _check(config: configuration.Config) -> None:
    check_optimizer(config.training, "compare")
    for data in config.sets.values():
        for name in (data.train, data.valid, data.test, data.unlabelled):
            if name is not None and not config.path(name).exists():
                raise FileNotFoundError(f"{config.path(name)}: there is no such file")
