"""A trained model to deploy: as a program of torch.export with what it takes to use it, or as one file.

The folder holds ``program.pt2`` (from token ids and lengths to every task's logits, any batch and length),
``config.json``, ``vocabulary.json``, and ``crfs.safetensors`` where tags are decoded together. Of a task whose answers
are generated ``program.pt2`` gives what its decoder reads, and ``steps.NAME.pt2`` is one step of its hypotheses. The
programs need torch and the ops of this library, none of its modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl.crf import CRF
from pymtl.decoder import DecoderHead, Memory, copied_from
from pymtl.exported_decoder import export_step, memory_of
from pymtl.lowering import limit_answers, lower, name_ids, write
from pymtl.models import MultiTaskModel
from pymtl.recurrent import Recurrent
from pymtl.serving.encoding import UNKNOWN
from pymtl.serving.generation import UNKNOWN as UNKNOWN_ID
from pymtl.serving.records import Record
from pymtl.serving.settings import plain
from pymtl.training.batches import Batch, Batcher
from pymtl.training.config import Config
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.run import EXPORTED, STEPS, Run
from pymtl.training.vocabulary import Vocabulary

PROGRAM, CRFS = EXPORTED
EXPORTED_FACTS = ("data", "records", "epoch", "scores", "uncertainty")  # of a run's manifest, which its export has too


class _Program(nn.Module):
    """The model asked for some of its tasks."""

    def __init__(self, model: MultiTaskModel, tasks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.tasks = tasks

    def forward(self, inputs: Tensor | dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        return self.model(inputs, lengths, self.tasks)


def export(run: Run, folder: Path, weights: torch.dtype | None = None) -> None:
    """Writes a run's best model to a folder of its own.

    Args:
        weights: torch.int8 or torch.bfloat16: what the program keeps the matrices of recurrent layers in, as
            :func:`pymtl.freeze` does. None: float32.

    Raises:
        ConfigError: the run was trained with a backend that is no model of this library, or one of its layers cannot
            be kept in ``weights``.
        RunError: the run is missing or damaged, or a file cannot be written.
    """
    trained, config, vocabulary = run.load_model()
    if trained.name != "pymtl":
        raise ConfigError(f"{run.folder}: expected a model of this library, got the backend {trained.name!r}")
    if weights is not None:
        for layer in [module for module in trained.model.modules() if isinstance(module, Recurrent)]:
            try:
                layer._pymtl_make_portable(weights)
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"{run.folder}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    heads = {name: trained.model.heads[name] for name in config.main_tasks}
    written = {name: export_step(head) for name, head in heads.items() if isinstance(head, DecoderHead)}
    batch = Batcher(vocabulary, config).batch([_example(config, 7), _example(config, 4)], [0, 1])
    batch_dim, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    inputs = batch.inputs()
    sizes: Any = {0: batch_dim, 1: steps}
    sizes = sizes if isinstance(inputs, Tensor) else dict.fromkeys(inputs, sizes)
    with torch.no_grad():
        program = torch.export.export(
            _Program(trained.model, list(config.main_tasks)),
            (inputs, batch.lengths),
            dynamic_shapes=(sizes, {0: batch_dim}),
            strict=False,
        )
    _drop_unused(program)
    target = Run(folder)
    target.write_file(PROGRAM, lambda path: torch.export.save(program, path))
    for before in target.steps():  # of an earlier export
        before.unlink()
    for task, step in written.items():
        target.write_file(STEPS.format(task), lambda path, step=step: torch.export.save(step, path))
    facts = {key: value for key, value in run.read_manifest().items() if key in EXPORTED_FACTS}
    target.path("run.json").unlink(missing_ok=True)  # of an earlier export
    target.write_manifest(facts | ({} if weights is None else {"weights": str(weights).removeprefix("torch.")}))
    target.write_config(config, trained.name)
    target.write_json("vocabulary.json", vocabulary.as_dict())
    crfs = {
        f"{task}.{name}": p.detach()
        for task, crf in trained.crfs.items()
        if task in config.main_tasks
        for name, p in crf.named_parameters()
    }
    if crfs:
        target.write_file(CRFS, lambda path: save_file(crfs, path))
    else:
        target.path(CRFS).unlink(missing_ok=True)  # of an earlier export


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Empties the parameters that the program does not read, as those of auxiliary tasks."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    for node, parameter in program.graph_signature.inputs_to_parameters.items():
        if node not in used:
            program.state_dict[parameter] = nn.Parameter(torch.empty(0), requires_grad=False)


def _example(config: Config, length: int) -> Record:
    """A record of unknown tokens, to trace the model with."""
    fields = {
        name: ["?"] * length if info.kind == "category" else [[0.0] * info.size for _ in range(length)]
        for name, info in config.fields.items()
    }
    return Record(["?"] * length, {}, fields)


def export_file(run: Run, path: Path, weights: torch.dtype | None = None) -> None:
    """Writes a run's best model to one file, for runtimes without torch.

    Args:
        weights: as for :func:`export`.

    Raises:
        ConfigError: the run was trained with a backend that is no model of this library, or a layer cannot be kept in
            ``weights``.
        RunError: the run is missing or damaged, or the file cannot be written.
    """
    trained, config, vocabulary = run.load_model()
    if trained.name != "pymtl":
        raise ConfigError(f"{run.folder}: expected a model of this library, got the backend {trained.name!r}")
    sizes = {name: info.size for name, info in config.fields.items() if info.kind == "numbers"}
    try:
        program = lower(trained.model, list(config.main_tasks), weights, sizes)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{run.folder}: {error}") from None
    names = {"words": vocabulary.tokens, "characters": vocabulary.characters, **vocabulary.categories}
    for field in program.inputs:
        if field["name"] in names:
            name_ids(field, names[field["name"]], names[field["name"]].index(UNKNOWN))
        if field["kind"] == "characters":
            field["max_length"] = config.characters.max_length
    for task in program.tasks:
        rules, labels = config.tasks[task["name"]].rules, vocabulary.labels.get(task["name"], [])
        if task["decoder"] not in ("none", "numbers"):
            task["labels"] = list(map(rules.label_name, labels))
        if rules.generates:
            limit_answers(task, config.tasks[task["name"]].max_length, [UNKNOWN_ID])
    manifest = run.read_manifest()
    description = {
        "settings": plain(config),
        "labels": {name: labels for name, labels in vocabulary.labels.items() if name in config.main_tasks},
        "weights": "float32" if weights is None else str(weights).removeprefix("torch."),
        **{key: manifest[key] for key in EXPORTED_FACTS if key in manifest},
    }
    try:
        write(program, path, description)
    except ValueError as error:
        raise ConfigError(f"{run.folder}: {error}") from None
    except OSError as error:
        raise RunError(str(error)) from None


class Exported:
    """What :func:`export` wrote, to predict with: in a trained model's place.

    Raises:
        RunError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, data: Path | None = None) -> None:
        run = Run(folder)
        self.config, self.vocabulary, _ = run.load(data)
        try:
            self.program = torch.export.load(run.path(PROGRAM)).module()
            self._steps = {
                name: torch.export.load(run.path(STEPS.format(name))).module()
                for name, task in self.config.main_tasks.items()
                if task.rules.generates
            }
            weights = load_file(run.path(CRFS)) if run.path(CRFS).exists() else {}
        except Exception as error:
            # torch.export.load raises whatever the archive and the unpickler stumble over.
            raise RunError(f"{folder}: damaged: {error}") from None
        self.crfs = _crfs(self.config, self.vocabulary, weights, folder)
        self.tasks = {dataset: self.config.main_tasks_of(dataset) for dataset in self.config.sets}

    def logits(self, batch: Batch, dataset: str = "") -> Mapping[str, Tensor | Memory]:
        """Of every task of the data set, padded; of a decoder what it answers from."""
        found = self.program(batch.inputs(), batch.lengths)
        sources = batch.packed_sources()
        return {
            task: found[task] if task in found else self._memory(task, found, sources.get(task))
            for task in self.tasks[dataset]
        }

    def _memory(self, task: str, found: Mapping[str, Tensor], sources: PackedSequence | None) -> Memory:
        copied = None
        if sources is not None:
            copied = copied_from(sources.data, found[f"{task}/batch_sizes"], len(self.vocabulary.labels[task]))
        return memory_of(task, found, self._steps[task], copied)


def is_exported(folder: Path) -> bool:
    return (folder / PROGRAM).exists()


def _crfs(config: Config, vocabulary: Vocabulary, weights: Mapping[str, Tensor], folder: Path) -> dict[str, CRF]:
    crfs = {}
    for name, task in config.main_tasks.items():
        crf = task.rules.crf(task, vocabulary.labels.get(name, []))
        if crf is not None:
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            try:
                crf.load_state_dict(own)
            except (RuntimeError, SafetensorError) as error:
                raise RunError(f"{folder / CRFS}: damaged or of another model: {error}") from None
            crfs[name] = crf.requires_grad_(False)
    return crfs
