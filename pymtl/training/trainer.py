"""The training loop."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pymtl.training.backends import Backend
from pymtl.training.config import Config
from pymtl.training.data import Batch, Encoder, Record, Vocabulary, buckets
from pymtl.training.errors import RunError
from pymtl.training.metrics import evaluate, selection_score
from pymtl.training.run import Run
from pymtl.training.step import Step

EVALUATION_BATCH = 64


class Progress(Protocol):
    """Who watches a training run."""

    def steps(self, epoch: int, total: int) -> Iterator[int]:
        """Yields 0 to ``total`` - 1 while showing how far the epoch is."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Called with the line that goes into metrics.jsonl, after each epoch."""


@dataclass
class Trainer:
    """Trains one model on one configuration; :meth:`fit` may be interrupted after any epoch and resumed."""

    run: Run
    config: Config
    vocabulary: Vocabulary
    backend: Backend
    train: list[Record]
    valid: list[Record]
    progress: Progress
    epochs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.vocabulary, self.config)
        settings = self.config.training
        self.step = Step(self.backend, settings.learning_rate, settings.clip_norm)
        seen = Counter(token for record in self.train for token in record.tokens)
        counts = torch.tensor([float(seen[token]) for token in self.vocabulary.tokens])
        self.rarity = settings.rare_word_dropout / (settings.rare_word_dropout + counts).clamp(min=1e-30)
        self.valid_batches = [
            self.encoder.batch(self.valid, indices) for indices in buckets(self.valid, EVALUATION_BATCH, None)
        ]

    def fit(self) -> None:
        """Trains until the last epoch or until validation has not improved for ``patience`` epochs.

        After each epoch the run folder holds the best weights so far and a state to resume from. Epochs are
        seeded one by one, so a resumed run continues as the uninterrupted one would have.
        """
        settings = self.config.training
        while len(self.epochs) < settings.epochs and self._epochs_without_improvement() < settings.patience:
            record = self._epoch(len(self.epochs) + 1)
            self.epochs.append(record)
            if self._best_epoch() == record["epoch"]:
                self.run.save_model(self.backend.model)
            self.run.save_state(self._state())
            self.run.write_metrics(self.epochs)
            self.progress.epoch(record)

    def resume(self) -> None:
        """Takes up the state of the last finished epoch.

        Raises:
            RunError: there is none, or it is damaged or of another model.
        """
        state = self.run.load_state()
        try:
            self.backend.model.load_state_dict(state["model"])
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.epochs = [{**epoch, "selection": float(epoch["selection"])} for epoch in state["epochs"]]
            if not all(isinstance(epoch[part], dict) for epoch in self.epochs for part in ("loss", "valid")):
                raise ValueError("its epochs lack losses or scores")
            if [epoch["epoch"] for epoch in self.epochs] != list(range(1, len(self.epochs) + 1)):
                raise ValueError("its epochs are not numbered from 1")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{self.run.path('state.pt')}: damaged or of another model: {error!r}") from None
        for group in self.step.optimizer.param_groups:
            group["lr"] = self.config.training.learning_rate
        self.run.write_config(self.config, self.backend.name)
        self.run.write_metrics(self.epochs)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.backend.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "epochs": self.epochs,
        }

    def _best_epoch(self) -> int:
        return max(self.epochs, key=lambda e: e["selection"])["epoch"]

    def _epochs_without_improvement(self) -> int:
        return len(self.epochs) - self._best_epoch() if self.epochs else 0

    def _epoch(self, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        torch.manual_seed(self.config.seed * 1_000_003 + number)
        batches = list(buckets(self.train, self.config.training.batch_size, generator))
        self.backend.model.train()
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for step in self.progress.steps(number, len(batches)):
            batch = self.encoder.batch(self.train, batches[step])
            total, per_task = self.step(self._drop_words(batch, generator))
            losses = {"total": total.item(), **{task: loss.item() for task, loss in per_task.items()}}
            if not math.isfinite(losses["total"]):
                raise RunError(
                    f"the loss is {losses['total']} in epoch {number}, step {step + 1}: training diverged; "
                    "try a smaller learning rate"
                )
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
        self.backend.model.eval()
        scores = evaluate(self.backend, self.valid_batches, self.valid, self.config, self.vocabulary)
        return {
            "epoch": number,
            "loss": {name: total / counts[name] for name, total in totals.items()},
            "valid": scores,
            "selection": selection_score(scores),
            "seconds": time.perf_counter() - started,
        }

    def _drop_words(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Replaces a share of the tokens by the unknown token, so that it is trained too; rare words more often
        (Kiperwasser & Goldberg 2016)."""
        settings = self.config.training
        if settings.word_dropout == 0 and settings.rare_word_dropout == 0:
            return batch
        kept = (1 - settings.word_dropout) * (1 - self.rarity[batch.tokens])
        dropped = torch.rand(batch.tokens.shape, generator=generator) >= kept
        tokens = torch.where(dropped & (batch.tokens != 0), torch.ones_like(batch.tokens), batch.tokens)
        return Batch(tokens, batch.lengths, batch.targets, batch.indices)


def test_scores(backend: Backend, records: list[Record], config: Config, vocabulary: Vocabulary) -> dict[str, float]:
    """The scores of a trained model on labelled records."""
    encoder = Encoder(vocabulary, config)
    batches = [encoder.batch(records, indices) for indices in buckets(records, EVALUATION_BATCH, None)]
    return evaluate(backend, batches, records, config, vocabulary)
