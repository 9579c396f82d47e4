"""A run's folder: every file written whole or not at all.

- ``run.json``: the format of this folder, versions, the date, the data files' names and hashes, scores
- ``config.json``: the configuration, resolved
- ``vocabulary.json``: tokens and labels
- ``README.md``: a model card
- ``model.safetensors``: the weights of the best epoch
- ``state.pt``: what training needs to go on after its last finished epoch
- ``metrics.jsonl``: one line an epoch
- ``test.json``: the scores of the best epoch on the test set
- ``curves.png``: loss and scores over the epochs
- ``report.json``: speed, by ``pymtl report``
- ``evaluation/``: what ``pymtl evaluate`` wrote
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pymtl._native import version
from pymtl.training.config import Config, parse
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.model_with_loss import BACKENDS, ModelWithLoss
from pymtl.training.vocabulary import Vocabulary
from pymtl.writing import write_whole

EXPORTED = ("program.pt2", "crfs.safetensors")  # what exporting a run to a folder leaves there besides
STEPS = "steps.{}.pt2"  # and for each decoder
FORMAT = 1  # of the folder; raised when an older version could not read what is written any more
EVALUATIONS = "evaluation"  # the folder of what evaluations of the run wrote, a folder for each data file
WRITTEN = (
    *("run.json", "model.safetensors", "state.pt", "metrics.jsonl", "test.json", "curves.png", "report.json"),
    "README.md",
)


def data_files(config: Config) -> dict[str, dict[str, Any]]:
    """Name, size and SHA-256 of each data file."""
    found = {}
    for dataset, data in config.sets.items():
        for part in ("train", "valid", "test", "unlabelled"):
            name = getattr(data, part)
            if name is not None:
                with open(config.path(name), "rb") as file:
                    digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
                    if digest is None:  # Python 3.10
                        digest = hashlib.sha256()
                        while block := file.read(1 << 20):
                            digest.update(block)
                    size = file.tell()
                key = f"{dataset}/{part}" if dataset else part
                found[key] = {"file": Path(name).name, "bytes": size, "sha256": digest.hexdigest()}
    return found


class Run:
    """Reads and writes a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def steps(self) -> list[Path]:
        """The exported steps of decoders that are there."""
        return sorted(self.folder.glob(STEPS.format("*")))

    def exists(self) -> bool:
        """Whether the folder holds a run of which an epoch has finished, or an exported program."""
        return any(self.path(name).exists() for name in ("state.pt", *EXPORTED))

    def foreign_file(self) -> Path | None:
        """A file or folder in the place of one of a run's, in a folder that is not of a run."""
        if self.path("run.json").exists() or (
            self.path("config.json").exists() and self.path("vocabulary.json").exists()
        ):
            return None
        names = ("config.json", "vocabulary.json", *WRITTEN, *EXPORTED, EVALUATIONS)
        return next((self.path(name) for name in names if self.path(name).exists()), None)

    def create(self, config: Config, vocabulary: Vocabulary, backend: str) -> None:
        """Begins a new run; the files of an earlier one go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (*map(self.path, (*WRITTEN, *EXPORTED)), *self.steps()):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path(EVALUATIONS), ignore_errors=True)
        self.write_manifest({})
        self.write_json("vocabulary.json", vocabulary.as_dict())
        self.write_config(config, backend)

    def write_config(self, config: Config, backend: str) -> None:
        self.write_json("config.json", {**config.as_dict(), "folder": self._relative(config), "backend": backend})

    def _relative(self, config: Config) -> str | None:
        """The data's folder as it is found from this one. None where no short way leads there: the path would tell of
        the machine it was trained on, and be of no use on another."""
        if config.folder is None:
            return None
        ours, theirs = self.folder.resolve(), Path(config.folder).resolve()
        common = Path(os.path.commonpath([ours, theirs]))
        here = Path.cwd()
        near = len(common.parts) > 2 or common == here or here in common.parents
        return os.path.relpath(theirs, ours) if near else None

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Writes ``run.json``: the given facts, what was written there before, and by which versions and when."""
        before = self.read_json("run.json") if self.path("run.json").exists() else {}
        stamp = {
            "format": FORMAT,
            "pymtl": version,
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.write_json("run.json", {**stamp, **{k: v for k, v in before.items() if k not in stamp}, **facts})

    def forget_results(self) -> None:
        """Drops what is said of a model that training goes on with."""
        if self.path("run.json").exists():
            facts = {k: v for k, v in self.read_manifest().items() if k not in ("epoch", "scores", "uncertainty")}
            self.write_json("run.json", facts)
        for name in ("test.json", "README.md"):
            self.path(name).unlink(missing_ok=True)

    def read_manifest(self) -> dict[str, Any]:
        """What ``run.json`` says; nothing of a run from before there was one.

        Raises:
            RunError: it is damaged, or of a newer version.
        """
        if not self.path("run.json").exists():
            return {}
        manifest = self.read_json("run.json")
        if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
            raise RunError(f"{self.path('run.json')}: damaged: expected a format")
        if manifest["format"] > FORMAT:
            raise RunError(
                f"{self.folder}: written by a newer pymtl ({manifest.get('pymtl')}, format {manifest['format']}); "
                f"{version} reads format {FORMAT}: upgrade with pip install --upgrade pymtl"
            )
        return manifest

    def load(self, data: Path | None = None) -> tuple[Config, Vocabulary, str]:
        """The configuration, vocabulary and backend's name.

        Args:
            data: the folder that data files are relative to, where it is not found from this one.

        Raises:
            RunError: a file is missing or damaged, or of a newer version.
        """
        self.read_manifest()
        raw = self.read_json("config.json")
        backend = raw.pop("backend", "pymtl") if isinstance(raw, dict) else ""
        if isinstance(raw, dict):  # what was so in runs from before it was written down
            raw = {"sharing": "hard", "balancing": "ew", **raw}
            if isinstance(raw["sharing"], dict) and raw["sharing"].get("kind") == "shared_private":
                raw["sharing"] = {"shared_only": [], **raw["sharing"]}
        try:
            config = parse(raw, str(self.path("config.json")))
        except ConfigError as error:
            raise RunError(str(error)) from None
        folder = data if data is not None or config.folder is None else self.folder / config.folder
        if data is None and folder is not None and not any((folder / d.train).exists() for d in config.sets.values()):
            folder = None  # one of the two was moved
        config = dataclasses.replace(config, folder=None if folder is None else str(folder.resolve()))
        if backend not in BACKENDS:
            raise RunError(f"{self.path('config.json')}: expected a backend of {', '.join(BACKENDS)}, got {backend!r}")
        vocabulary = Vocabulary.from_dict(self.read_json("vocabulary.json"), config, str(self.path("vocabulary.json")))
        return config, vocabulary, backend

    def load_model(self, name: str | None = None, data: Path | None = None) -> tuple[ModelWithLoss, Config, Vocabulary]:
        """The trained model, in eval mode; with another backend than it was trained with if ``name`` says so. ``data``
        is as for :meth:`load`.

        Raises:
            RunError: a file is missing or damaged, or does not fit the others.
        """
        config, vocabulary, trained_with = self.load(data)
        try:
            model_with_loss = ModelWithLoss(name or trained_with, config, vocabulary)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise RunError(f"{self.folder}: damaged: {error}") from None
        path = self.path("model.safetensors")
        if self.path(EXPORTED[0]).exists():
            raise RunError(f"{self.folder}: is an exported program: name the run that it was made from")
        if not path.exists():
            raise RunError(f"{path}: there is no such file: has an epoch finished?")
        try:
            model_with_loss.model.load_state_dict(load_file(path))
        except PermissionError as error:
            raise RunError(f"{path}: this user may not read it: {error}") from None
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
        except NotADirectoryError:
            ours = self.folder.suffix.lower() == ".pymtl"
            asked = f"python -m pymtl_runtime predict {self.folder}"
            out = f": {asked} answers from it (docs/deployment.md says where that package is)" if ours else ""
            raise RunError(f"{self.folder}: is a file, expected the folder of a run{out}") from None
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
        """Writes a file whole or not at all."""
        try:
            write_whole(self.path(name), write)
        except (SafetensorError, RuntimeError) as error:  # their way to say that the disk is full
            raise RunError(f"{self.path(name)}: cannot be written: {error}") from None
