"""The configuration of a run: TOML in, checked dataclasses out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pymtl._native import version
from pymtl.balancing import METHODS
from pymtl.custom import is_module_name
from pymtl.serving.tokenizing import Tokenizer
from pymtl.sharing import SCHEMES
from pymtl.training.errors import ConfigError
from pymtl.training.kinds import KINDS, Kind
from pymtl.training.parsing import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".conll", ".xlsx")  # of what is no configuration
KindName = Literal[tuple(KINDS)]
OF_SHARED_STATES = ("gradnorm", "gradient_aggregation")  # balancing by the gradients of states that all tasks share
AUTO = "auto"


@dataclass(frozen=True)
class DataConfig:
    """Data files, plain or .gz, relative to the configuration's folder."""

    train: str  # the file to train on
    valid: str | None = None  # the file to validate on; without one, some of the training records are held out
    test: str | None = None  # the file that is scored when training is over
    # Further texts to train on, for tasks that need no labels: a file whose labels, if it has some, are not read
    unlabelled: str | None = None
    # How the files are read; "auto" goes by what their names end in
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "conll"] = "auto"
    # The fields of CoNLL's columns, from the first; "" of an unused one
    columns: list[str] = dataclasses.field(default_factory=list)
    tokens: str = "tokens"  # the field of the text, a string or a list of tokens; "text" where there is only that
    # What splits a text that is a string: "words" at spaces and punctuation, "whitespace" at spaces, "characters" into
    # single characters, without spaces; "auto" takes "whitespace" where tags of its words stand beside it, else "words"
    tokenizer: Literal["auto", "words", "whitespace", "characters"] = "auto"
    lowercase: bool = False  # whether the model reads all letters as small ones
    holdout: float = 0.1  # the share held out without a file to validate on, as many of each label as of all
    holdout_field: str | None = None  # hold out by this field instead: the records
    holdout_values: list[str] = dataclasses.field(default_factory=list)  # that have one of these values in it
    limit: int = 0  # how many of the training records are trained on, drawn by the seed; 0: all

    @property
    def splits_by(self) -> Tokenizer:
        """The tokenizer; of a run from before there was a choice, spaces."""
        return "whitespace" if self.tokenizer == "auto" else self.tokenizer


def _own_options() -> list[type]:
    """Every kind's options, but those that another's derive from."""
    every = dict.fromkeys(kind.Options for kind in KINDS.values())
    return [one for one in every if not any(one is not other and issubclass(other, one) for other in every)]


@dataclass(frozen=True)
class TaskConfig(*_own_options()):
    """One task: a field of the records, a head, and the weight of its loss; and the options of its kind."""

    kind: KindName  # what is predicted; see the guide to kinds
    dataset: str | None = None  # the data set it belongs to, where there are several
    field: str | None = None  # the field of the label; without it the one that is called like the task
    weight: float = 1.0  # of its loss in the joint loss
    skip: bool = False  # the head reads the embedded tokens too
    after: str | None = None  # another task of classes or tags, whose answer the head reads too
    # Trained for what it teaches the encoder alone: it is not scored, not asked and not exported
    auxiliary: bool = False

    @property
    def rules(self) -> Kind:
        """What its kind says of it."""
        return KINDS[self.kind]

    @classmethod
    def keys_for(cls, raw: dict[str, Any]) -> list[str]:
        """The keys of every task, and those of the section's kind."""
        kinds = [KINDS[name] for name in KINDS if name == raw.get("kind")] or KINDS.values()
        options = (f.name for kind in kinds for f in dataclasses.fields(kind.Options))
        return list(dict.fromkeys([*cls.__annotations__, *options]))


@dataclass(frozen=True)
class FieldConfig:
    """A further field of each token."""

    kind: Literal["category", "numbers"]  # a name, which is embedded, or numbers as they are
    field: str | None = None  # the field of the records; without it the one that is called like the section
    embedding_dim: int = 16  # of a category
    size: int = 1  # how many numbers a token has


@dataclass(frozen=True)
class CharactersConfig:
    """Words as their characters."""

    kind: Literal["cnn", "lstm"] = "cnn"  # what reads a word's characters
    embedding_dim: int = 30  # of a character
    size: int = 50  # filters of each width, or units of each direction
    max_length: int = 16  # further characters of a word are not read


@dataclass(frozen=True)
class ModelConfig:
    """Embedding and encoder."""

    words: bool = True  # whether tokens are embedded as words; false for further fields alone
    embedding_dim: int = 128  # of a word
    vectors: str | None = None  # a file of word vectors to begin with: word2vec's, GloVe's or fastText's
    freeze_vectors: bool = False  # whether these stay as they are
    hidden_size: int = 128  # units of the LSTM in each direction
    num_layers: int = 1  # of the LSTM
    bidirectional: bool = True  # whether the LSTM reads each text in both directions
    dropout: float = 0.5  # of the embedding and of the states that heads read
    variational: bool = False  # one dropout mask for all tokens of a sentence


@dataclass(frozen=True)
class MethodConfig:
    """A scheme or method by name, with its own options: ``"soft"``, or ``{kind = "soft", penalty = "trace_norm"}``."""

    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def from_plain(raw: Any, where: str, prefix: str) -> MethodConfig:
        if isinstance(raw, str):
            return MethodConfig(raw)
        if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
            raise ConfigError(f"{where}: {prefix.rstrip('.')}: expected a name or a section with a kind, got {raw!r}")
        return MethodConfig(raw["kind"], {key: value for key, value in raw.items() if key != "kind"})

    def as_plain(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options}


@dataclass(frozen=True)
class WarmStartConfig:
    """Weights from another run to begin with."""

    run: str  # its folder, relative to the configuration's
    # The modules that are taken, as "heads.slots"; without it "embedding" and "encoder"
    parts: list[str] = dataclasses.field(default_factory=lambda: ["embedding", "encoder"])
    freeze: bool = False  # whether they stay as they are


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation, on length-bucketed batches."""

    epochs: int = 20  # passes over the training records, at most
    batch_size: int = 16  # texts in a batch
    accumulation: int = 1  # batches whose gradients are added up before a step
    optimizer: str = "Adam"  # a class of torch.optim
    optimizer_options: dict[str, Any] = dataclasses.field(default_factory=dict)  # its further arguments
    learning_rate: float = 1e-3  # of the optimizer
    weight_decay: float = 0.0  # L2, as the optimizer applies it
    l1: float = 0.0  # weight of the sum of the encoder's and heads' absolute values
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # how the learning rate falls to 0, if it does
    warmup: float = 0.0  # the share of all steps in which the learning rate rises
    word_dropout: float = 0.0  # the share of training tokens replaced by the unknown token
    # a: a word that is seen n times in training is read as the unknown token in a / (a + n) of its places besides
    rare_word_dropout: float = 0.0
    clip_norm: float = 5.0  # the largest norm of all gradients together; larger ones are scaled down to it
    ema_decay: float = 0.0  # of the weights' moving average, which is evaluated and kept; 0: the weights themselves
    min_count: int = 1  # tokens that are rarer in training are read as the unknown token
    patience: int = 5  # epochs without a better validation score before stopping
    # The validation score that the best epoch has: "mean" of the tasks' first scores (each entering as -1 at least), a
    # task's first ("mood"), any ("mood/macro_f1"), "exact_match", or "delta", the mean relative change from baseline
    select_by: str = "mean"
    # Validation scores that "delta" is relative to, as {"mood/accuracy" = 0.9}
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)
    # How data sets take turns: each batch once, one after the other, at random, or at random by their sizes
    sampling: Literal["proportional", "round_robin", "uniform", "temperature"] = "proportional"
    temperature: float = 2.0  # T of sampling = "temperature", where a data set of n records is drawn with p ~ n^(1/T)
    epoch_cap: int = 0  # how many records of a data set an epoch sees at most; 0: all
    epoch_steps: int = 0  # steps of an epoch, which then begins its data anew or leaves some out; 0: all data once
    unlabelled_ratio: float = 1.0  # texts of the data's unlabelled file for each training record in a batch
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: products in bfloat16, weights in float32
    checkpoint_steps: int = 0  # steps between states to resume from; 0: one after each epoch
    tensorboard: bool = False  # whether losses and scores are written for TensorBoard too


@dataclass(frozen=True)
class Config:
    """A whole run."""

    tasks: dict[str, TaskConfig]
    data: DataConfig | None = None
    datasets: dict[str, DataConfig] = dataclasses.field(
        default_factory=dict
    )  # instead of data, where tasks have their own
    fields: dict[str, FieldConfig] = dataclasses.field(default_factory=dict)
    characters: CharactersConfig | None = None
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    # What the tasks share: a name, or a section. "auto": "shared_private"; "hard" of a single task that is not
    # auxiliary, or with gradnorm or gradient_aggregation
    sharing: MethodConfig = dataclasses.field(default_factory=lambda: MethodConfig(AUTO))
    # How the tasks' losses become one: a name, or a section. "auto": "equal_norm" of several tasks, "ew" of one
    balancing: MethodConfig = dataclasses.field(default_factory=lambda: MethodConfig(AUTO))
    warm_start: WarmStartConfig | None = None
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    seed: int = 0  # of all random numbers; the same seed repeats a training, on as many threads
    folder: str | None = "."  # what paths are relative to: the configuration file's own folder; None: not known
    pymtl: str | None = None  # the version it was written for: an older one refuses it as such

    @property
    def sets(self) -> dict[str, DataConfig]:
        """The data sets by name; a single one has none."""
        return {"": self.data} if self.data is not None else self.datasets

    def tasks_of(self, dataset: str) -> dict[str, TaskConfig]:
        """The tasks of a data set."""
        return {name: task for name, task in self.tasks.items() if (task.dataset or "") == dataset}

    @property
    def main_tasks(self) -> dict[str, TaskConfig]:
        """The tasks that are scored, asked and exported."""
        return {name: task for name, task in self.tasks.items() if not task.auxiliary}

    def main_tasks_of(self, dataset: str) -> tuple[str, ...]:
        """The names of those of a data set."""
        return tuple(name for name, task in self.tasks_of(dataset).items() if not task.auxiliary)

    @property
    def main_sets(self) -> list[str]:
        """The data sets that have such tasks."""
        return [name for name in self.sets if self.main_tasks_of(name)]

    def path(self, name: str) -> Path:
        """The full path of a file.

        Raises:
            ConfigError: the folder is not known, of a run that was moved.
        """
        if self.folder is None:
            raise ConfigError(f"{name}: the data's folder is not known from the run's: pass --data DIR")
        return Path(self.folder, name)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return {**asdict(self), "sharing": self.sharing.as_plain(), "balancing": self.balancing.as_plain()}


def load(path: Path, overrides: list[str] | None = None, folder: Path | None = None) -> Config:
    """Reads a TOML configuration.

    Args:
        path: the file.
        overrides: ``section.key=value`` settings that win over the file's; a value is TOML, or a bare string.
        folder: what paths are relative to, if not to the file's own folder.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is no TOML, or a key or value does not fit.
    """
    raw = read(path)
    for override in overrides or []:
        set_value(raw, override)
    raw.setdefault("folder", str((folder or path.parent).resolve()))
    config = parse(raw, str(path))
    # Optimisers are for training only, and their import costs more than all of the above.
    from pymtl.training.optimizers import check_optimizer

    check_optimizer(config.training, str(path))
    return config


def read(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file, or of a JSON file of the same form. Errors as for :func:`load`."""
    if Path(path.name.lower().removesuffix(".gz")).suffix in DATA_SUFFIXES:
        raise ConfigError(f"{path}: is a data file: pymtl init {shlex.quote(str(path))} writes a configuration for it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected sections, got {type(raw).__name__}")
        return raw
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}{_line_of(error, text)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _line_of(error: tomllib.TOMLDecodeError, text: str) -> str:
    """The line that an error names, and of a Python truth value how TOML writes it."""
    found = re.search(r"\(at line (\d+), column (\d+)\)$", str(error))
    if found is None:
        return ""
    line = text.split("\n")[int(found[1]) - 1]
    python = re.match("True|False", line[int(found[2]) - 1 :])
    shown = line.strip() if len(line.strip()) <= 80 else line.strip()[:79] + "…"
    return f": {shown}" + (f" (TOML writes {python[0].lower()})" if python else "")


def set_value(raw: dict[str, Any], override: str) -> None:
    """Sets ``section.key=value`` among plain values.

    Raises:
        ConfigError: it has no equals sign, or goes through a value as if that were a section.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        if section in ("sharing", "balancing") and isinstance(raw.get(section), str):
            raw[section] = {"kind": raw[section]}
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    raw[last] = value


def parse(raw: dict[str, Any], where: str) -> Config:
    """Checks plain dictionaries, as TOML and JSON give them.

    Raises:
        ConfigError: a key is unknown or missing, or a value does not fit; the message names it.
    """
    asked = raw.get("pymtl") if isinstance(raw, dict) else None
    if isinstance(asked, str) and _numbers(asked) > _numbers(version):
        raise ConfigError(f"{where}: written for pymtl {asked}, newer than this {version}: upgrade it")
    config = _with_methods(build(Config, raw, where, ""), where)
    if not config.main_tasks:
        got = "none" if not config.tasks else f"auxiliary ones alone: {', '.join(config.tasks)}"
        raise ConfigError(f"{where}: tasks: expected at least one task that is not auxiliary, got {got}")
    _check_data(config, where)
    for name, task in config.tasks.items():
        _check_task(name, task, config, f"{where}: tasks.{name}")
    _require(0 <= config.seed < 2**31, f"{where}: seed", "a number from 0 to 2147483647", config.seed)
    _check_model(config, where)
    _check_training(config, where)
    return config


def _with_methods(config: Config, where: str) -> Config:
    """The configuration with what "auto" means for its tasks. What an auxiliary task learns is to be shared."""
    shared = len(config.main_tasks) < 2 or config.balancing.kind in OF_SHARED_STATES
    balancing = "equal_norm" if len(config.tasks) > 1 else "ew"
    chosen = {"sharing": "hard" if shared else "shared_private", "balancing": balancing}
    for name, kind in chosen.items():
        method = getattr(config, name)
        if method.kind == AUTO:
            _require(not method.options, f"{where}: {name}", f"another kind than {AUTO!r} with options", method.options)
            config = dataclasses.replace(config, **{name: MethodConfig(kind)})
    auxiliary = [name for name, task in config.tasks.items() if task.auxiliary]
    if config.sharing.kind == "shared_private" and auxiliary:
        options = {"shared_only": auxiliary, **config.sharing.options}
        config = dataclasses.replace(config, sharing=MethodConfig("shared_private", options))
    return config


def _numbers(release: str) -> list[int]:
    """The numbers of a version, to compare."""
    return [int(part) for part in re.findall(r"\d+", release)[:3]]


def _check_data(config: Config, where: str) -> None:
    if (config.data is None) == (not config.datasets):
        raise ConfigError(f"{where}: expected either a section 'data' or sections 'datasets.NAME'")
    for name, data in config.sets.items():
        at = f"{where}: datasets.{name}" if name else f"{where}: data"
        _require(0 < data.holdout < 1, f"{at}.holdout", "a number between 0 and 1", data.holdout)
        by_field = data.holdout_field is not None
        if by_field != bool(data.holdout_values):
            raise ConfigError(f"{at}: expected holdout_field and holdout_values together")
        _require(data.valid is None or not by_field, f"{at}.holdout_field", "none beside valid", data.holdout_field)
        _require(data.limit >= 0, f"{at}.limit", "a number of at least 0", data.limit)
        own = config.tasks_of(name)
        if not own:
            raise ConfigError(f"{at}: expected a task with dataset = {name!r}, got none" if name else f"{at}: no task")
        if data.unlabelled is not None and not any(task.rules.labels_itself for task in own.values()):
            kinds = " or ".join(kind.name for kind in KINDS.values() if kind.labels_itself)
            raise ConfigError(f"{at}.unlabelled: expected a task that needs no labels ({kinds}) beside it, got none")
    for name, fields in config.fields.items():
        at = f"{where}: fields.{name}"
        _require(_is_name(name) and name not in ("words", "characters"), at, "another name", name)
        for key in ("embedding_dim", "size"):
            _require(getattr(fields, key) >= 1, f"{at}.{key}", "a number above 0", getattr(fields, key))


def _check_task(name: str, task: TaskConfig, config: Config, at: str) -> None:
    _require(is_task_name(name), at, "another name: this one is reserved or has a dot", name)
    expected = list(config.datasets) if config.data is None else [None]
    if task.dataset not in expected:
        names = ", ".join(config.datasets) or "none: there is one data set"
        raise ConfigError(f"{at}.dataset: expected one of {names}, got {task.dataset!r}")
    _require(0 <= task.weight < float("inf"), f"{at}.weight", "a number of at least 0", task.weight)
    default = TaskConfig(task.kind)
    for option in dataclasses.fields(TaskConfig):
        kinds = [kind.name for kind in KINDS.values() if kind.has_option(option.name)]
        value = getattr(task, option.name)
        fits = not kinds or task.kind in kinds or value == getattr(default, option.name)
        _require(
            fits, f"{at}.{option.name}", f"none with kind = {task.kind!r} (an option of {' and '.join(kinds)})", value
        )
    _require(0 <= task.label_smoothing <= 1, f"{at}.label_smoothing", "a number from 0 to 1", task.label_smoothing)
    _require(task.attention_heads >= 1, f"{at}.attention_heads", "a number above 0", task.attention_heads)
    pools = task.rules.has_option("pooling") and task.pooling != "attention"
    attention = task.attention_heads == 1 or not pools
    _require(attention, f"{at}.attention_heads", "pooling = 'attention' with it", task.attention_heads)
    if task.after is not None:
        _require(task.after in config.tasks and task.after != name, f"{at}.after", "another task", task.after)
        before = config.tasks[task.after]
        _require(before.rules.is_discrete, f"{at}.after", "a task of classes or tags", task.after)
        _require(before.dataset == task.dataset, f"{at}.after", "a task of the same data set", task.after)
    seen, after = {name}, task.after
    while after is not None:
        _require(after not in seen, f"{at}.after", "no circle of tasks", task.after)
        seen.add(after)
        after = config.tasks[after].after if after in config.tasks else None
    for fits, key, expected in task.rules.requirements(task, config):
        _require(fits, f"{at}.{key}", expected, getattr(task, key))


def _check_model(config: Config, where: str) -> None:
    model = config.model
    for key in ("embedding_dim", "hidden_size", "num_layers"):
        _require(getattr(model, key) >= 1, f"{where}: model.{key}", "a number above 0", getattr(model, key))
    _require(0 <= model.dropout < 1, f"{where}: model.dropout", "a number from 0 to below 1", model.dropout)
    if not model.words and not config.fields:
        raise ConfigError(f"{where}: model.words: expected words or further fields, got neither")
    _require(model.words or model.vectors is None, f"{where}: model.vectors", "words with it", model.vectors)
    _require(model.vectors is not None or not model.freeze_vectors, f"{where}: model.freeze_vectors", "vectors", True)
    if config.characters is not None:
        _require(model.words, f"{where}: characters", "words with them", "none")
        for key in ("embedding_dim", "size", "max_length"):
            value = getattr(config.characters, key)
            _require(value >= 1, f"{where}: characters.{key}", "a number above 0", value)
    if config.warm_start is not None:
        parts = config.warm_start.parts
        _require(bool(parts) and all(parts), f"{where}: warm_start.parts", "names of modules", parts)
    if config.balancing.kind in OF_SHARED_STATES:
        name = config.balancing.kind
        _require(
            config.sharing.kind == "hard", f"{where}: sharing", f"hard with balancing by {name}", config.sharing.kind
        )
        frozen = config.warm_start is not None and config.warm_start.freeze and "encoder" in config.warm_start.parts
        _require(not frozen, f"{where}: warm_start.freeze", f"an encoder to train with balancing by {name}", True)
        apart = all(not task.skip and not task.tied for task in config.tasks.values()) or name == "gradnorm"
        _require(apart, f"{where}: balancing", "heads that read states alone (no skip, not tied) with it", name)
    tasks = list(config.tasks)
    sizes = (1, 1, model.num_layers, model.bidirectional, model.dropout)
    try_method(f"{where}: sharing", SCHEMES, config.sharing, lambda cls, options: cls(tasks, *sizes, **options))
    try_method(f"{where}: balancing", METHODS, config.balancing, lambda cls, options: cls(tasks, **options))


def _check_training(config: Config, where: str) -> None:
    training = config.training
    for key in ("epochs", "batch_size", "min_count", "patience", "accumulation"):
        _require(getattr(training, key) >= 1, f"{where}: training.{key}", "a number above 0", getattr(training, key))
    for key in ("learning_rate", "clip_norm", "temperature"):
        _require(getattr(training, key) > 0, f"{where}: training.{key}", "a number above 0", getattr(training, key))
    at_least_0 = ("epoch_cap", "epoch_steps", "checkpoint_steps", "weight_decay", "l1", "rare_word_dropout")
    for key in (*at_least_0, "unlabelled_ratio"):
        value = getattr(training, key)
        _require(0 <= value < float("inf"), f"{where}: training.{key}", "a number of at least 0", value)
    for key in ("word_dropout", "warmup", "ema_decay"):
        value = getattr(training, key)
        _require(0 <= value < 1, f"{where}: training.{key}", "a number from 0 to below 1", value)
    scored = config.main_tasks
    exact = training.select_by != "exact_match" or any(task.rules.is_exact for task in scored.values())
    _require(exact, f"{where}: training.select_by", "a task of classes or tags with exact_match", training.select_by)
    known = [f"{name}/{score}" for name, task in scored.items() for score in task.rules.scores]
    choices = ("mean", "exact_match", "delta", *scored, *known)
    for name, value in training.baseline.items():
        _require(name in known, f"{where}: training.baseline", f"scores of {', '.join(known)}", name)
        _require(value != 0, f"{where}: training.baseline", f"another score of {name} to be relative to than", value)
    _require(training.select_by in choices, f"{where}: training.select_by", " or ".join(choices), training.select_by)
    relative = training.select_by != "delta" or bool(training.baseline)
    _require(relative, f"{where}: training.baseline", "scores for select_by = 'delta'", training.baseline)


def try_method(at: str, choices: dict[str, type], chosen: MethodConfig, make: Callable[[type, Any], object]) -> None:
    """Makes what is chosen, to see whether it can be made.

    Raises:
        ConfigError: it is none of the choices, or its options do not fit; the message names ``at``.
    """
    if chosen.kind not in choices:
        raise ConfigError(f"{at}: expected one of {', '.join(choices)}, got {chosen.kind!r}")
    known = inspect.signature(choices[chosen.kind]).parameters
    for key, value in chosen.options.items():
        types = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}
        expected = known[key].annotation if key in known else None
        expected = getattr(expected, "__name__", expected)
        wrong_bool = isinstance(value, bool) and expected in ("float", "int")
        if expected in types and (not isinstance(value, types[expected]) or wrong_bool):
            raise ConfigError(f"{at}: {key}: expected {expected}, got {value!r}")
    try:
        make(choices[chosen.kind], chosen.options)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Other people's code may stumble over an option without naming it.
        text = str(error).replace(f"{choices[chosen.kind].__name__}.__init__() got an", "").strip()
        given = ", ".join(f"{key} = {value!r}" for key, value in chosen.options.items())
        raise ConfigError(f"{at}: {text}" + (f" (given {given})" if given else "")) from None


def _require(fits: bool, where: str, expected: str, actual: object) -> None:
    if not fits:
        raise ConfigError(f"{where}: expected {expected}, got {actual!r}")


def _is_name(name: str) -> bool:
    """Whether a module can have this name."""
    return is_module_name(name) and "/" not in name


def is_task_name(name: str) -> bool:
    """Whether a module can have this name, and no other line of the metrics or predictions has it."""
    reserved = ("total", "tokens", "exact_match", "training", "mean", "delta", "shared", "unknown_tokens")
    return _is_name(name) and name not in reserved
