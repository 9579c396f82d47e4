"""Weights of another run to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pymtl.training.config import Config
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary


def warm_start(model: nn.Module, config: Config, vocabulary: Vocabulary) -> list[str]:
    """Copies the parts of the model that ``[warm_start]`` names from another run, and freezes them if it says so.

    Embeddings of tokens, characters and categories go by name: what the other run does not know keeps its own vector.
    All else has to fit in shape, and a head in its labels.

    Returns:
        The names of the parameters that were taken.

    Raises:
        ConfigError: a part is none of the model's, or does not fit.
        RunError: the other run is missing or damaged.
    """
    settings = config.warm_start
    run = Run(Path(config.path(settings.run)))
    other_config, other, _ = run.load()
    if not run.path("model.safetensors").exists():
        raise RunError(f"{run.path('model.safetensors')}: there is no such file: has an epoch finished?")
    try:
        weights = load_file(run.path("model.safetensors"))
    except (SafetensorError, OSError) as error:
        raise RunError(f"{run.path('model.safetensors')}: damaged: {error}") from None
    taken = []
    for part in settings.parts:
        try:
            _owner_of(model, part)
        except ConfigError as error:
            raise ConfigError(f"warm_start.parts: {error}") from None
        for task in config.tasks:
            whole = part == "heads" or part == f"heads.{task}" or part.startswith(f"heads.{task}.")
            if whole and other.labels.get(task) != vocabulary.labels.get(task):
                raise ConfigError(f"warm_start.parts: {part}: expected the labels of {run.folder}, got others")
    own = dict(model.named_parameters())
    for name in _parameters_of(model, settings.parts):
        source = _source(name, weights)
        if source is None:
            ours, theirs = config.sharing.kind, other_config.sharing.kind
            why = "" if ours == theirs else f": it has sharing = {theirs!r}, this configuration {ours!r}"
            raise ConfigError(f"warm_start.parts: {run.folder} has no {name}{why}")
        names = _names(name, vocabulary, config), _names(name, other, other_config)
        if all(names):
            _copy_rows(own[name], source, *names)
        elif own[name].shape == source.shape:
            own[name].data.copy_(source)
        else:
            raise ConfigError(
                f"warm_start.parts: {name}: expected shape {list(own[name].shape)}, got {list(source.shape)} "
                f"in {run.folder}"
            )
        if settings.freeze:
            own[name].requires_grad_(False)
        taken.append(name)
    return taken


def freeze(model: nn.Module, config: Config) -> None:
    """Freezes what :func:`warm_start` froze when the run began, which has its weights by now."""
    if config.warm_start.freeze:
        frozen = set(_parameters_of(model, config.warm_start.parts))
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)


def _source(name: str, weights: dict[str, Tensor]) -> Tensor | None:
    # A word embedding stands alone, or among other fields.
    alone, among = "embedding.weight", "embedding.fields.words.weight"
    for candidate in (name, {alone: among, among: alone}.get(name)):
        if candidate in weights:
            return weights[candidate]
    return None


def _names(parameter: str, vocabulary: Vocabulary, config: Config) -> list[str] | None:
    """What the rows of an embedding stand for; None of another parameter."""
    if parameter in ("embedding.weight", "embedding.fields.words.weight"):
        return vocabulary.tokens
    if parameter == "embedding.fields.characters.embedding.weight":
        return vocabulary.characters
    field = parameter.removeprefix("embedding.fields.").removesuffix(".weight")
    return vocabulary.categories.get(field)


def _copy_rows(own: nn.Parameter, source: Tensor, names: list[str], others: list[str]) -> None:
    if own.shape[1:] != source.shape[1:]:
        raise ConfigError(
            f"warm_start.parts: expected embeddings of {own.shape[1]} numbers, got {source.shape[1]} in the other run"
        )
    places = {name: place for place, name in enumerate(others)}
    known = [i for i, name in enumerate(names) if name in places]
    own.data[known] = source[[places[names[i]] for i in known]]


def _owner_of(model: nn.Module, part: str) -> nn.Module:
    """A module of the model by its dotted name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return model.get_submodule(part)
    except AttributeError as error:
        names = [name for name, _ in model.named_children()] + [f"heads.{task}" for task in model.heads]
        raise ConfigError(f"expected one of {', '.join(names)}, got {part!r}") from error


def _parameters_of(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """The names of the parameters of the given modules of the model."""
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{part}.") for part in parts)]
