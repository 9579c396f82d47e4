"""The configuration of a run: TOML in, checked dataclasses out."""

from __future__ import annotations

import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from pymtl.training.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["classification", "tagging", "regression", "multilabel"]


@dataclass(frozen=True)
class DataConfig:
    """JSON-lines files (plain or .gz), relative to the configuration's folder."""

    train: str
    valid: str
    test: str | None = None
    tokens: str = "tokens"  # the field that holds a record's tokens
    lowercase: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """One task: a field of the records, a head, and the weight of its loss."""

    kind: Kind
    field: str | None = None  # the record's field; the task's name if None
    pooling: Literal["last", "mean", "max"] = "last"  # not for tagging
    weight: float = 1.0
    label_smoothing: float = 0.0  # not for a crf
    decoder: Literal["softmax", "crf"] = "softmax"  # of tagging: each tag by itself, or the best sequence of tags
    bio: bool = False  # of a crf: no I-x but after B-x or I-x


@dataclass(frozen=True)
class ModelConfig:
    """Embedding and encoder."""

    embedding_dim: int = 128
    hidden_size: int = 128
    num_layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.5


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation: Adam (Kingma & Ba 2015) on length-bucketed batches."""

    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    word_dropout: float = 0.0  # the share of training tokens replaced by the unknown token
    rare_word_dropout: float = 0.0  # a: besides, a/(a + n) of the tokens of a word seen n times
    clip_norm: float = 5.0
    min_count: int = 1  # rarer training tokens are unknown
    patience: int = 5  # epochs without a better validation score before stopping


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    tasks: dict[str, TaskConfig]
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0
    folder: str = "."  # what data paths are relative to: the configuration file's own folder

    def path(self, name: str) -> Path:
        """The full path of a data file."""
        return Path(self.folder, name)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a TOML configuration.

    Args:
        path: the file.
        overrides: ``section.key=value`` settings that win over the file's; a value is TOML, or a bare string.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is no TOML, or a key or value does not fit.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides or []:
        _override(raw, override)
    raw.setdefault("folder", str(path.parent.resolve()))
    return parse(raw, str(path))


def parse(raw: dict[str, Any], where: str) -> Config:
    """Checks plain dictionaries, as TOML and JSON give them.

    Raises:
        ConfigError: a key is unknown or missing, or a value does not fit; the message names it.
    """
    config = _build(Config, raw, where, "")
    if not config.tasks:
        raise ConfigError(f"{where}: tasks: expected at least one task, got none")
    for name, task in config.tasks.items():
        at = f"{where}: tasks.{name}"
        _require(_is_task_name(name), at, "another name: this one is reserved or has a dot", name)
        _require(0 <= task.label_smoothing <= 1, f"{at}.label_smoothing", "a number from 0 to 1", task.label_smoothing)
        _require(task.weight >= 0, f"{at}.weight", "a number of at least 0", task.weight)
        crf = task.decoder == "crf"
        _require(not crf or task.kind == "tagging", f"{at}.decoder", "a crf for tagging only", task.decoder)
        _require(not task.bio or crf, f"{at}.bio", "decoder = 'crf' with it", task.bio)
        _require(not crf or task.label_smoothing == 0, f"{at}.label_smoothing", "0 for a crf", task.label_smoothing)
    _require(0 <= config.seed < 2**31, f"{where}: seed", "a number from 0 to 2147483647", config.seed)
    for key in ("embedding_dim", "hidden_size", "num_layers"):
        value = getattr(config.model, key)
        _require(value >= 1, f"{where}: model.{key}", "a number above 0", value)
    _require(
        0 <= config.model.dropout < 1, f"{where}: model.dropout", "a number from 0 to below 1", config.model.dropout
    )
    for key in ("epochs", "batch_size", "min_count", "patience"):
        value = getattr(config.training, key)
        _require(value >= 1, f"{where}: training.{key}", "a number above 0", value)
    for key in ("learning_rate", "clip_norm"):
        value = getattr(config.training, key)
        _require(value > 0, f"{where}: training.{key}", "a number above 0", value)
    rare = config.training.rare_word_dropout
    _require(0 <= rare < float("inf"), f"{where}: training.rare_word_dropout", "a number of at least 0", rare)
    word_dropout = config.training.word_dropout
    _require(0 <= word_dropout < 1, f"{where}: training.word_dropout", "a number from 0 to below 1", word_dropout)
    return config


def _require(fits: bool, where: str, expected: str, actual: object) -> None:
    if not fits:
        raise ConfigError(f"{where}: expected {expected}, got {actual!r}")


def _is_task_name(name: str) -> bool:
    """Whether a module can have this name, and no other line of the metrics or predictions has it."""
    taken = hasattr(nn.ModuleDict, name) or name in ("total", "tokens", "exact_match", "training")
    return bool(name) and not taken and "." not in name and "/" not in name


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    raw[last] = value


def _build(cls: type, raw: Any, where: str, prefix: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a section, got {raw!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {prefix + key!r}, expected one of {', '.join(known)}")
    values = {}
    for name, info in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], where, prefix + name)
        elif info.default is MISSING and info.default_factory is MISSING:
            raise ConfigError(f"{where}: missing key {prefix + name!r}")
    return cls(**values)


def _value(hint: Any, raw: Any, where: str, key: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, raw, where, key + ".")
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            raise ConfigError(f"{where}: {key}: expected a section, got {raw!r}")
        return {name: _value(get_args(hint)[1], value, where, f"{key}.{name}") for name, value in raw.items()}
    if get_origin(hint) is Literal:
        if raw not in get_args(hint):
            raise ConfigError(f"{where}: {key}: expected one of {', '.join(get_args(hint))}, got {raw!r}")
        return raw
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, allowed) or (isinstance(raw, bool) and bool not in allowed):
        names = " or ".join("nothing" if a is type(None) else a.__name__ for a in allowed)
        raise ConfigError(f"{where}: {key}: expected {names}, got {raw!r}")
    return raw
