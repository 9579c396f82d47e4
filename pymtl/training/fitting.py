"""A run from its beginning, or from where it stopped, to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pymtl.training import building
from pymtl.training.config import Config, MethodConfig
from pymtl.training.data import Sets
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.metrics import best_epoch, passed_over, predict, uncertainties
from pymtl.training.model_card import model_card
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.plots import training_curves
from pymtl.training.run import Run, data_files
from pymtl.training.survey import survey
from pymtl.training.trainer import Progress, Trainer, test_scores
from pymtl.training.vocabulary import Vocabulary
from pymtl.training.warm_start import freeze, warm_start


class Screen(Progress, Protocol):
    """Where a person sees how far training is, and what else there is to say."""

    best: float  # the best selection score so far

    def say(self, *lines: str) -> None: ...

    def passed_over(self, kept: int, better: Mapping[str, tuple[int, float, float]]) -> None:
        """What :func:`pymtl.training.metrics.passed_over` found of the kept epoch."""
        ...


@dataclass(frozen=True)
class Fitting:
    """What to train, and where.

    ``backend_name`` is as ``--backend``; ``device`` is "cpu" or "cuda".
    """

    run: Run
    config: Config
    vocabulary: Vocabulary
    backend_name: str
    device: str = "cpu"

    def fit(self, sets: Sets, resume: bool, screen: Screen) -> dict[str, float] | None:
        """Trains (or resumes) the run to its end and returns its scores on the test sets, if there are some.

        Args:
            sets: to train on, to validate and to test.
            resume: go on from the run's last state.
            screen: where to show it.

        Raises:
            ConfigError: the model cannot be built.
        """
        torch.manual_seed(self.config.seed)
        try:
            model_with_loss = ModelWithLoss(self.backend_name, self.config, self.vocabulary)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from None
        lines = self._given_weights(model_with_loss, resume)
        trainer = Trainer(
            self.run,
            self.config,
            self.vocabulary,
            model_with_loss,
            sets.train,
            sets.valid,
            screen,
            self.device,
            sets.unlabelled,
        )
        main = trainer.accelerator.is_main_process
        if resume:
            trainer.resume()
            if main:
                self.run.forget_results()
            screen.best = max((epoch["selection"] for epoch in trainer.epochs), default=screen.best)
        elif main:
            # An earlier run goes only when this one can begin.
            self.run.create(self.config, self.vocabulary, self.backend_name)
            self.run.write_manifest(
                {
                    "data": data_files(self.config),
                    "records": sum(map(len, sets.train.values())),
                    "threads": torch.get_num_threads(),
                }
            )
        if main:
            screen.say(*survey(sets, self.vocabulary), self._described(trainer, model_with_loss, sets), *lines)
        before = len(trainer.epochs)
        self._to_the_end(trainer, screen)
        if not main:
            return None
        screen.say(self._how_it_ended(trainer, before))
        chosen = best_epoch(trainer.epochs)
        screen.passed_over(chosen["epoch"], passed_over(trainer.epochs))
        self.run.save_figure("curves.png", training_curves(trainer.epochs))
        best, _, _ = self.run.load_model()
        best.to(trainer.accelerator.device)
        scores = None
        if sets.test:
            scores = test_scores(best, sets.test, self.config, self.vocabulary)
            self.run.write_json("test.json", scores)
        validated = predict(best, trainer.valid_batches, sets.valid, self.config, self.vocabulary)
        self.run.write_manifest(
            {
                "epoch": chosen["epoch"],
                "scores": {"validation": chosen["valid"], "test": scores or {}},
                "uncertainty": uncertainties(*validated, self.config),
            }
        )
        self.run.write_text("README.md", model_card(self.run, self.config, self.vocabulary))
        return scores

    def _how_it_ended(self, trainer: Trainer, before: int) -> str:
        """Why training is over, in words."""
        done, asked = len(trainer.epochs), self.config.training.epochs
        by = self.config.training.select_by
        best = f"best by {by}: epoch {best_epoch(trainer.epochs)['epoch']}"
        if done == before and done < asked:
            patience = self.config.training.patience
            return (
                f"nothing left to train: the run stopped early after epoch {done}, {patience} without a better "
                f"validation score ({best}); more with a larger training.patience"
            )
        if done == before:
            return f"nothing left to train: the run has its {done} epochs ({best}); more with training.epochs"
        if done < asked:
            patience = self.config.training.patience
            return f"stopped early after epoch {done}: {patience} without a better validation score ({best})"
        return f"trained all {done} epochs ({best})"

    def _given_weights(self, model_with_loss: ModelWithLoss, resume: bool) -> list[str]:
        """Takes word vectors and another run's weights, as the configuration asks; what was taken, in words."""
        config, lines = self.config, []
        if config.model.vectors is not None:
            count, skipped = building.load_vectors(model_with_loss.model, config, self.vocabulary)
            known = len(self.vocabulary.tokens)
            lines.append(f"{count:,} of {known:,} tokens have vectors in {config.model.vectors}")
            if skipped:
                lines.append(f"{config.model.vectors}: {skipped:,} words were skipped, whose bytes are not UTF-8")
            if config.model.freeze_vectors:
                building.word_embedding(model_with_loss.model.embedding).weight.requires_grad_(False)
        if config.warm_start is not None and resume:
            freeze(model_with_loss.model, config)
        elif config.warm_start is not None:
            taken = warm_start(model_with_loss.model, config, self.vocabulary)
            state = "frozen" if config.warm_start.freeze else "to be trained on"
            lines.append(f"{len(taken)} parameters taken from {config.warm_start.run}, {state}")
        return lines

    def _described(self, trainer: Trainer, model_with_loss: ModelWithLoss, sets: Sets) -> str:
        parameters = sum(p.numel() for p in model_with_loss.model.parameters())
        counts = [sum(map(len, records.values())) for records in (sets.train, sets.valid)]
        processes = trainer.accelerator.num_processes
        there = trainer.accelerator.device
        where = f"{torch.get_num_threads()} threads" if there.type == "cpu" else torch.cuda.get_device_name(there)
        joined = f", sharing {self.config.sharing.kind}, balancing {self.config.balancing.kind}"
        return (
            f"{self.run.folder.name}: {counts[0]:,} sentences to train on, {counts[1]:,} to validate, "
            f"{len(self.vocabulary.tokens):,} tokens, {parameters:,} parameters, {where}"
            f"{f', {processes} processes' if processes > 1 else ''}, backend {self.backend_name}"
            f"{joined if len(self.config.tasks) > 1 else ''}"
        )

    def _to_the_end(self, trainer: Trainer, screen: Screen) -> None:
        # Adam's moments of words that do not occur decay to subnormal numbers, which are slow to compute with.
        torch.set_flush_denormal(True)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            done = len(trainer.epochs)
            saved = f"--resume goes on; {self.run.folder} holds the best so far" if done else "nothing is saved yet"
            saved = "--resume goes on within the first" if not done and self.run.exists() else saved
            screen.say(f"\ninterrupted after {done} epochs: {saved}")
            raise
        finally:
            torch.set_flush_denormal(False)
            trainer.close()


def vocabulary_to_resume(run: Run, config: Config, backend_name: str) -> Vocabulary:
    """The vocabulary of the run to resume.

    Raises:
        RunError: it is of another configuration or backend.
    """
    saved, vocabulary, trained_with = run.load()
    if not run.read_manifest():
        raise RunError(
            f"{run.folder}: begun by a version that split texts and held records out in other ways: it can be asked "
            "and evaluated, not resumed"
        )
    if trained_with != backend_name:
        raise RunError(f"{run.folder}: was trained with --backend {trained_with}, not {backend_name}")

    before, now = run.read_manifest().get("data"), data_files(config)
    if before is not None and before != now:
        changed = [file["file"] for part, file in now.items() if before.get(part) != file]
        raise RunError(f"{run.folder}: was trained on other data: {', '.join(changed) or 'other files'} changed since")

    def fixed(c: Config) -> dict[str, Any]:
        changeable = ("epochs", "patience", "learning_rate", "checkpoint_steps", "tensorboard", "clip_norm")
        training = {f"training.{name}": value for name, value in vars(c.training).items() if name not in changeable}
        # Where the data lie may change, what they are may not.
        rest = {name: value for name, value in vars(c).items() if name not in ("training", "folder")}
        return rest | training | {"the tasks' order": list(c.tasks)}

    if fixed(saved) != fixed(config):
        now, then = fixed(config), fixed(saved)
        differing = [
            f"{name} ({then[name].kind!r}, now {now[name].kind!r})" if isinstance(now[name], MethodConfig) else name
            for name in now
            if then[name] != now[name]
        ]
        raise RunError(f"{run.folder}: was trained with another configuration: {', '.join(differing)}")
    return vocabulary
