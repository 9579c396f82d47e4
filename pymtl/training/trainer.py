"""The training loop, on Hugging Face accelerate."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from pymtl import ops
from pymtl.joint_loss import JointLossResult
from pymtl.serving.records import Record
from pymtl.training.batches import Batch, Batcher, buckets, schedule
from pymtl.training.config import OF_SHARED_STATES, Config
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.metrics import best_epoch, evaluate, selection_score
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.step import Step
from pymtl.training.vocabulary import Vocabulary

EVALUATION_BATCH = 64


class Progress(Protocol):
    """Who watches a training run."""

    def steps(self, epoch: int, total: int, first: int = 0) -> Iterator[int]:
        """Yields ``first`` to ``total`` - 1 while showing how far the epoch is."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Called with the line that goes into metrics.jsonl, after each epoch."""


@dataclass
class _Position:
    """Where in an epoch training is: what of the epoch must be known to go on exactly as if nothing had happened."""

    epoch: int
    generator: torch.Generator
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Trainer:
    """Trains one model on one configuration; :meth:`fit` may be interrupted at any moment and resumed.

    Started by ``accelerate launch`` it is one of several processes, which share each batch and do together what one
    would do alone. ``device`` is ``"cpu"``, or ``"cuda"`` for a GPU (one for each process).
    """

    run: Run
    config: Config
    vocabulary: Vocabulary
    model_with_loss: ModelWithLoss
    train: Mapping[str, list[Record]]  # of each data set
    valid: Mapping[str, list[Record]]
    progress: Progress
    device: str = "cpu"
    unlabelled: Mapping[str, list[Record]] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps_done: int = 0

    def __post_init__(self) -> None:
        settings = self.config.training
        self.batcher = Batcher(self.vocabulary, self.config)
        self._records = {name: [*own, *self.unlabelled.get(name, ())] for name, own in self.train.items()}
        self.accelerator = _accelerator(settings.precision, self.device)
        if self.accelerator.device.type != self.device:
            raise ConfigError(f"--device: expected {self.device}, accelerate was told to use {self.accelerator.device}")
        several = self.accelerator.num_processes > 1
        method = self.config.balancing.kind
        if several and method in OF_SHARED_STATES:
            raise ConfigError(f"balancing: expected another method than {method} with several processes")
        self.model_with_loss.to(self.accelerator.device)
        module = self.accelerator.prepare(self.model_with_loss) if several else self._autocast
        self.step = Step(
            self.model_with_loss,
            settings,
            _schedule_of(self.config, self._steps_an_epoch()),
            module,
            self.accelerator.backward,
            (lambda tensor: self.accelerator.reduce(tensor, "mean")) if several else None,
        )
        seen = Counter(token for records in self._records.values() for record in records for token in record.tokens)
        counts = torch.tensor([float(seen[token]) for token in self.vocabulary.tokens])
        self.rarity = settings.rare_word_dropout / (settings.rare_word_dropout + counts).clamp(min=1e-30)
        self.valid_batches = batches_of(self.batcher, self.valid)
        self._position: _Position | None = None

    def _autocast(self, *arguments: Any) -> JointLossResult:
        with self.accelerator.autocast():
            return self.model_with_loss(*arguments)

    def close(self) -> None:
        """Destroys the process group, after dropping what refers to it: if the group still exists when the interpreter
        exits, its threads abort the interpreter."""
        if self.accelerator.num_processes > 1:
            self.step.module = self.model_with_loss
            self.accelerator.free_memory()
            self.accelerator.end_training()

    def fit(self) -> None:
        """Trains until the last epoch or until validation has not improved for ``patience`` epochs.

        After each epoch the run folder holds the best weights so far and a state to resume from; within an epoch
        too, where ``checkpoint_steps`` says so. Epochs are seeded one by one, and a state holds the random numbers'
        state, so a resumed run continues bit for bit as the uninterrupted one would have, if it has as many threads; on
        a GPU as far as torch's own operations repeat their results.
        """
        settings = self.config.training
        while len(self.epochs) < settings.epochs and self._epochs_without_improvement() < settings.patience:
            record = self._epoch(self._position or self._begin(len(self.epochs) + 1))
            self._position = None
            self.epochs.append(record)
            if self.model_with_loss.joint.balancing is not None:
                self.model_with_loss.joint.balancing.after_epoch(record["loss"])
            main = self.accelerator.is_main_process
            if main and self._best_epoch() == record["epoch"]:
                with self._evaluated():
                    self.run.save_model(self.model_with_loss.model)
            self._save(None)
            if main:
                self.run.write_metrics(self.epochs)
                if settings.tensorboard:
                    self._write_scalars(record)
                self.progress.epoch(record)

    def resume(self) -> None:
        """Takes up the last state.

        Raises:
            RunError: there is none, or it is damaged or of another model.
        """
        state = self.run.load_state()
        try:
            self.model_with_loss.model.load_state_dict(state["model"])
            self.model_with_loss.joint.load_state_dict(state["joint"])
            self.step.optimizer.load_state_dict(state["optimizer"])
            if self.step.averaged is not None:
                self.step.averaged.load_state_dict(state["averaged"])
            self.epochs = [{**epoch, "selection": float(epoch["selection"])} for epoch in state["epochs"]]
            if not all(isinstance(epoch[part], dict) for epoch in self.epochs for part in ("loss", "valid")):
                raise ValueError("its epochs lack losses or scores")
            if [epoch["epoch"] for epoch in self.epochs] != list(range(1, len(self.epochs) + 1)):
                raise ValueError("its epochs are not numbered from 1")
            if state["position"] is not None:
                self._position = self._position_of(state["position"])
            self._reschedule(int(state["steps"]))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{self.run.path('state.pt')}: damaged or of another model: {error!r}") from None
        if self.accelerator.is_main_process:
            self.run.write_config(self.config, self.model_with_loss.name)
            self.run.write_metrics(self.epochs)

    def _write_scalars(self, record: dict[str, Any]) -> None:
        """One epoch for TensorBoard, in the run folder's ``tensorboard``."""
        from torch.utils.tensorboard import SummaryWriter

        # Opened for each epoch: of an epoch that is trained again after a crash, what was written before is purged.
        with SummaryWriter(str(self.run.path("tensorboard")), purge_step=record["epoch"]) as writer:
            for part in ("loss", "valid"):
                for name, value in record[part].items():
                    writer.add_scalar(f"{part}/{name}", value, record["epoch"])
            writer.add_scalar("learning_rate", self.step.optimizer.param_groups[0]["lr"], record["epoch"])

    def _reschedule(self, steps: int) -> None:
        """Sets the learning rate of this configuration after so many steps."""
        self.steps_done = steps
        scheduler = self.step.scheduler
        factor = 1.0 if scheduler is None else scheduler.lr_lambdas[0](steps)
        for group in self.step.optimizer.param_groups:
            group["initial_lr"] = self.config.training.learning_rate
            group["lr"] = self.config.training.learning_rate * factor
        if scheduler is not None:
            scheduler.last_epoch = steps
            scheduler.base_lrs = [self.config.training.learning_rate] * len(self.step.optimizer.param_groups)

    def _save(self, position: _Position | None) -> None:
        """Writes what :meth:`resume` reads."""
        device = self.accelerator.device
        of_all, of_gpus = [torch.get_rng_state()], [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        if self.accelerator.num_processes > 1:
            of_all, of_gpus = (
                [row.cpu() for own in states for row in self.accelerator.gather(own.to(device).unsqueeze(0))]
                for states in (of_all, of_gpus)
            )
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.model_with_loss.model.state_dict(),
            "joint": self.model_with_loss.joint.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "averaged": None if self.step.averaged is None else self.step.averaged.state_dict(),
            "epochs": self.epochs,
            "steps": self.steps_done,
            "position": None,
        }
        if position is not None:
            state["position"] = {
                **vars(position),
                "generator": position.generator.get_state(),
                "random": of_all,
                "random_of_gpus": of_gpus,
            }
        self.run.save_state(state)

    def _position_of(self, state: dict[str, Any]) -> _Position:
        values = dict(state)
        random, of_gpus = values.pop("random"), values.pop("random_of_gpus", [])
        generator = torch.Generator()
        generator.set_state(values.pop("generator"))
        if len(random) != self.accelerator.num_processes:
            raise ValueError(f"it is of {len(random)} processes, not of {self.accelerator.num_processes}")
        torch.set_rng_state(random[self.accelerator.process_index])
        if of_gpus and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(of_gpus[self.accelerator.process_index], self.accelerator.device)
        return _Position(generator=generator, **values)

    def _begin(self, epoch: int) -> _Position:
        seed = self.config.seed * 1_000_003 + epoch
        torch.manual_seed(seed + 7_919 * self.accelerator.process_index)
        return _Position(epoch, torch.Generator().manual_seed(seed))

    def _best_epoch(self) -> int:
        return best_epoch(self.epochs)["epoch"]

    def _epochs_without_improvement(self) -> int:
        return len(self.epochs) - self._best_epoch() if self.epochs else 0

    def _steps_an_epoch(self) -> int:
        batches = schedule(self.train, self.config.training, torch.Generator().manual_seed(0))
        return -(-len(batches) // self.config.training.accumulation)

    def _epoch(self, position: _Position) -> dict[str, Any]:
        settings = self.config.training
        started = time.perf_counter() - position.seconds
        # The plan is drawn from the epoch's seed alone, so that a resumed epoch has the same.
        planner = torch.Generator().manual_seed(self.config.seed * 1_000_003 + position.epoch + 500_000)
        batches = schedule(self.train, settings, planner, self.unlabelled)
        groups = [batches[i : i + settings.accumulation] for i in range(0, len(batches), settings.accumulation)]
        self.model_with_loss.train()
        for number in self.progress.steps(position.epoch, len(groups), position.step):
            parts = [self._part(dataset, indices, position.generator) for dataset, indices in groups[number]]
            batches_there = [batch.to(self.accelerator.device) for batch, _ in parts]
            results = self.step(batches_there, [scales for _, scales in parts])
            self._add(position, results, [scales for _, scales in parts])
            position.step += 1
            self.steps_done += 1
            if settings.checkpoint_steps and self.steps_done % settings.checkpoint_steps == 0:
                position.seconds = time.perf_counter() - started
                self._save(position)
        trained = time.perf_counter() - started
        self.model_with_loss.eval()
        with self._evaluated():
            scores = evaluate(self.model_with_loss, self.valid_batches, self.valid, self.config, self.vocabulary)
        selection = selection_score(scores, settings)
        if not math.isfinite(selection):
            asked = settings.baseline if settings.select_by == "delta" else settings.select_by
            raise ConfigError(
                f"training.select_by: expected what validation scores, {', '.join(scores)}, got {asked!r}"
            )
        return {
            "epoch": position.epoch,
            "loss": {name: total / position.counts[name] for name, total in position.totals.items()},
            "valid": scores,
            "selection": selection,
            "seconds": time.perf_counter() - started,
            "step_ms": 1e3 * trained / max(len(groups), 1),
        }

    def _part(
        self, dataset: str, indices: list[int], generator: torch.Generator
    ) -> tuple[Batch, dict[str, float] | None]:
        """This process's part of a batch, and the factors that make the parts' losses the whole batch's."""
        records = self._records[dataset]
        whole = self._drop_words(self.batcher.batch(records, indices), generator)
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1:
            return whole, None
        rows = list(range(len(indices)))[index::count]
        part = self.batcher.batch(records, [indices[row] for row in rows or [0]])
        tokens = whole.tokens[rows or [0]][:, : part.tokens.shape[1]]
        part = replace(part, tokens=tokens)
        # Every process computes a loss of every task, so that all wait for the same gradients.
        scales = {}
        for task in whole.targets:
            count_labels = self.config.tasks[task].rules.count_labels
            weight = self.model_with_loss.joint.losses[task].weight
            own = count_labels(part.targets[task], weight) if task in part.targets and rows else 0
            scales[task] = count * own / (count_labels(whole.targets[task], weight) or 1)
        return part, scales

    def _add(self, position: _Position, results: list[JointLossResult], scales: list[dict[str, float] | None]) -> None:
        """Adds the losses of a step to the epoch's."""
        for result, own in zip(results, scales):
            losses = {"total": result.total.detach(), **{t: loss.detach() for t, loss in result.per_task.items()}}
            if own is not None:
                losses = {name: value * own.get(name, 1.0) for name, value in losses.items()}
                names = ["total", *own]
                values = torch.stack([losses.get(name, result.total.new_zeros(())) for name in names])
                losses = dict(zip(names, self.accelerator.reduce(values, "mean").unbind()))
            numbers = torch.stack([value.double() for value in losses.values()]).tolist()  # a GPU is waited for once
            ops.raise_late_errors(wait=False)
            for name, number in zip(losses, numbers):
                if name == "total" and not math.isfinite(number):
                    raise RunError(
                        f"the loss is {number} in epoch {position.epoch}, step {position.step + 1}: training diverged; "
                        "try a smaller learning rate"
                    )
                position.totals[name] = position.totals.get(name, 0.0) + number
                position.counts[name] = position.counts.get(name, 0) + 1

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """The model with the weights that are judged and kept: averaged ones, where there are some."""
        trained = self.model_with_loss.model
        if self.step.averaged is not None:
            self.model_with_loss.model = self.step.averaged.module
            self.model_with_loss.model.eval()
        try:
            yield
        finally:
            self.model_with_loss.model = trained

    def _drop_words(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Replaces a share of the tokens by the unknown token, so that it is trained too; rare words more often
        (Kiperwasser & Goldberg 2016)."""
        settings = self.config.training
        if settings.word_dropout == 0 and settings.rare_word_dropout == 0:
            return batch
        kept = (1 - settings.word_dropout) * (1 - self.rarity[batch.tokens])
        dropped = torch.rand(batch.tokens.shape, generator=generator) >= kept
        tokens = torch.where(dropped & (batch.tokens != 0), torch.ones_like(batch.tokens), batch.tokens)
        return replace(batch, tokens=tokens)


def _accelerator(precision: str, device: str) -> Accelerator:
    mixed = "bf16" if precision == "bf16" else "no"
    known = AcceleratorState() if AcceleratorState._shared_state else None
    if known is not None and (known.mixed_precision != mixed or known.device.type != device):
        AcceleratorState._reset_state(reset_partial_state=known.device.type != device)  # of another training
    # A batch may lack labels of a task, whose head then has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed, kwargs_handlers=[unused])


def _schedule_of(config: Config, steps_an_epoch: int) -> Any:
    """The factor of the learning rate at each step, or None if it is always 1."""
    settings = config.training
    total = max(settings.epochs * steps_an_epoch, 1)
    rising = round(settings.warmup * total)
    if settings.schedule == "constant" and rising == 0:
        return None

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min((step - rising) / max(total - rising, 1), 1.0)
        if settings.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0

    return factor


def batches_of(batcher: Batcher, sets: Mapping[str, list[Record]]) -> dict[str, list[Batch]]:
    """All records of each data set in batches for evaluation, by length."""
    return {
        name: [batcher.batch(records, indices) for indices in buckets(records, EVALUATION_BATCH, None)]
        for name, records in sets.items()
    }


def test_scores(
    model_with_loss: ModelWithLoss, sets: Mapping[str, list[Record]], config: Config, vocabulary: Vocabulary
) -> dict[str, float]:
    """The scores of a trained model on labelled records of each data set."""
    batcher = Batcher(vocabulary, config)
    return evaluate(model_with_loss, batches_of(batcher, sets), sets, config, vocabulary)
