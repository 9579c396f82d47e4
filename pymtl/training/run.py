"""A run's folder: every file written whole or not at all.

- ``config.json``: the configuration, resolved
- ``vocabulary.json``: tokens and labels
- ``model.safetensors``: the weights of the best epoch
- ``state.pt``: what training needs to go on after its last finished epoch
- ``metrics.jsonl``: one line an epoch
- ``test.json``: the scores of the best epoch on the test set
- ``curves.png``: loss and scores over the epochs
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pymtl.training.config import Config, parse
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.model_with_loss import BACKENDS, ModelWithLoss
from pymtl.training.vocabulary import Vocabulary

EXPORTED = ("program.pt2", "crfs.safetensors")  # what exporting a run to a folder leaves there besides


class Run:
    """Reads and writes a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def exists(self) -> bool:
        """Whether the folder holds a run of which an epoch has finished, or an exported program."""
        return any(self.path(name).exists() for name in ("state.pt", *EXPORTED))

    def holds_other_files(self) -> bool:
        """Whether the folder has a config.json that is not of a run."""
        try:
            self.load()
        except RunError:
            return self.path("config.json").exists() and not self.path("vocabulary.json").exists()
        return False

    def create(self, config: Config, vocabulary: Vocabulary, backend: str) -> None:
        """Begins a new run; the files of an earlier one go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "state.pt", "metrics.jsonl", "test.json", "curves.png", "report.json"):
            self.path(name).unlink(missing_ok=True)
        for name in EXPORTED:
            self.path(name).unlink(missing_ok=True)
        self.write_json("vocabulary.json", vocabulary.as_dict())
        self.write_config(config, backend)

    def write_config(self, config: Config, backend: str) -> None:
        self.write_json("config.json", {**config.as_dict(), "backend": backend})

    def load(self) -> tuple[Config, Vocabulary, str]:
        """The configuration, vocabulary and backend's name.

        Raises:
            RunError: a file is missing or damaged.
        """
        raw = self.read_json("config.json")
        backend = raw.pop("backend", "pymtl") if isinstance(raw, dict) else ""
        try:
            config = parse(raw, str(self.path("config.json")))
        except ConfigError as error:
            raise RunError(str(error)) from None
        if backend not in BACKENDS:
            raise RunError(f"{self.path('config.json')}: expected a backend of {', '.join(BACKENDS)}, got {backend!r}")
        vocabulary = Vocabulary.from_dict(self.read_json("vocabulary.json"), config, str(self.path("vocabulary.json")))
        return config, vocabulary, backend

    def load_model(self, name: str | None = None) -> tuple[ModelWithLoss, Config, Vocabulary]:
        """The trained model, in eval mode; with another backend than it was trained with if ``name`` says so.

        Raises:
            RunError: a file is missing or damaged, or does not fit the others.
        """
        config, vocabulary, trained_with = self.load()
        model_with_loss = ModelWithLoss(name or trained_with, config, vocabulary)
        path = self.path("model.safetensors")
        if not path.exists():
            raise RunError(f"{path}: there is no such file: has an epoch finished?")
        try:
            model_with_loss.model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise RunError(f"{path}: damaged or of another model: {error}") from None
        model_with_loss.model.eval()
        return model_with_loss, config, vocabulary

    def save_model(self, model: torch.nn.Module) -> None:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        self.write_file("model.safetensors", lambda path: save_file(state, path))

    def save_state(self, state: dict[str, Any]) -> None:
        self.write_file("state.pt", lambda path: torch.save(state, path))

    def load_state(self) -> dict[str, Any]:
        """What :meth:`save_state` wrote. Raises RunError if it is missing or damaged."""
        path = self.path("state.pt")
        if not path.exists():
            raise RunError(f"{path}: there is no such file, nothing to resume")
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            # torch.load raises whatever its unpickler stumbles over.
            raise RunError(f"{path}: damaged, cannot resume from it: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def read_json(self, name: str) -> Any:
        """Raises RunError if the file is missing or not JSON."""
        path = self.path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{path}: there is no such file: is {self.folder} a run?") from None
        except ValueError as error:
            raise RunError(f"{path}: damaged: {error}") from None

    def read_scores(self) -> dict[str, float]:
        """Of the test set. Raises RunError if the file is missing or damaged."""
        scores = self.read_json("test.json")
        if not isinstance(scores, dict) or not all(isinstance(value, int | float) for value in scores.values()):
            raise RunError(f"{self.path('test.json')}: damaged: expected a number for each score")
        return scores

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        self.write_text("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def read_metrics(self) -> list[dict[str, Any]]:
        path = self.path("metrics.jsonl")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise RunError(f"{path}: damaged: {error}") from None

    def save_figure(self, name: str, figure: Any) -> None:
        self.write_file(name, lambda path: figure.savefig(path, format="png", dpi=120))

    def write_file(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file beside its place, flushes it to disk, and moves it there in one step."""
        target = self.path(name)
        draft = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
        try:
            write(draft)
            with open(draft, "rb") as written:
                os.fsync(written.fileno())
            os.replace(draft, target)
        except (SafetensorError, RuntimeError) as error:  # their way to say that the disk is full
            raise RunError(f"{target}: cannot be written: {error}") from None
        finally:
            draft.unlink(missing_ok=True)
