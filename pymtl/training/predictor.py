"""A trained model that answers: what :func:`pymtl.load` gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pymtl.generation import go_on, why_not_on
from pymtl.recurrent import Recurrent, freeze
from pymtl.serving.encoding import FIRST_TOKEN
from pymtl.serving.generation import Search
from pymtl.serving.predicting import Answer, Answering, Input
from pymtl.serving.records import Record, given_tokens
from pymtl.serving.tokenizing import went_on
from pymtl.training.batches import Batcher
from pymtl.training.config import Config
from pymtl.training.errors import ConfigError
from pymtl.training.exporting import Exported, is_exported
from pymtl.training.kinds.language_model import LanguageModel
from pymtl.training.metrics import decode
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary


def load(folder: str | Path, device: str | torch.device = "cpu", weights: torch.dtype | None = None) -> Predictor:
    """A trained model, to predict with.

    Args:
        folder: a run folder of ``pymtl train``, or what ``pymtl export`` wrote.
        device: where the model runs.
        weights: what recurrent layers keep their matrices in, as for :func:`pymtl.freeze`: ``torch.int8`` or
            ``torch.bfloat16``; None: float32. Of a run folder, on the CPU.

    Raises:
        pymtl.training.errors.ConfigError: ``weights`` is given for an exported program or a GPU, or a layer cannot be
            kept so.
        pymtl.training.errors.RunError: a file is missing or damaged, or written by a newer version.

    ::

        model = pymtl.load("runs/orders")
        answer = model.predict("bring me a large coffee now")
        answer["mood"], answer["mood/probability"]  # "rude", 0.98
    """
    return Predictor(Path(folder), device, weights=weights)


class Predictor(Answering):
    """A trained model, in eval mode and frozen; made by :func:`pymtl.load`. Several threads may use it at a time.

    Attributes:
        tasks: each task's settings, as the configuration has them.
        labels: each task's labels, in the order of its logits; of a task of numbers their means and standard
            deviations in training.
        vocabulary: the tokens that training has seen, and the labels.
        config: the whole configuration.
        weights: what recurrent layers keep their matrices in: "float32", "bfloat16" or "int8".
    """

    config: Config
    vocabulary: Vocabulary
    weights: str

    def __init__(
        self,
        folder: Path,
        device: str | torch.device = "cpu",
        data: Path | None = None,
        weights: torch.dtype | None = None,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device: expected cpu, since there is no GPU or torch has no CUDA, got {device}")
        self._trained: ModelWithLoss | Exported
        if is_exported(folder):
            if self.device.type != "cpu":
                raise ValueError(f"device: expected cpu for an exported program, got {self.device}")
            if weights is not None:
                raise ConfigError(
                    f"weights: expected none for an exported program, which has its own, got {weights}: export the run "
                    "again with --weights"
                )
            self._trained = Exported(folder, data)
            self.config, self.vocabulary = self._trained.config, self._trained.vocabulary
        else:
            self._trained, self.config, self.vocabulary = Run(folder).load_model(data=data)
            self._trained.to(self.device)
            if self.device.type == "cpu":
                self._freeze(weights)
            elif weights is not None:
                raise ConfigError(f"weights: expected none on a GPU, got {weights}")
        given = str(weights).removeprefix("torch.") if weights is not None else "float32"
        self.weights = Run(folder).read_manifest().get("weights", given)
        self._batcher = Batcher(self.vocabulary, self.config, remember=False)
        self._uncertainty = Run(folder).read_manifest().get("uncertainty", {})
        self._known = frozenset(self.vocabulary.tokens)

    def _freeze(self, weights: torch.dtype | None) -> None:
        if weights is not None and not any(isinstance(m, Recurrent) for m in self._trained.model.modules()):
            raise ConfigError(f"weights: expected a model with layers of this library to keep in {weights}, got none")
        try:
            freeze(self._trained.model, weights)
        except (RuntimeError, ValueError) as error:
            if weights is None:
                raise
            raise ConfigError(str(error)) from None

    def answer_batch(
        self,
        records: Sequence[Record],
        dataset: str,
        search: Search | None,
        distributions: bool,
        numbers: Sequence[int],
    ) -> list[Answer]:
        batch = self._batcher.batch(records, range(len(records))).to(self.device)
        with torch.inference_mode():
            logits = self._trained.logits(batch, dataset)
            crfs = self._trained.crfs
            return decode(logits, batch, self.config, self.vocabulary, crfs, search, distributions, numbers)

    def go_on(
        self,
        inputs: Sequence[Input],
        count: int,
        search: Search | None = None,
        batch_size: int = 64,
        first: int = 1,
    ) -> list[Answer]:
        """How the run's language model goes on with some texts, ``count`` tokens each; fewer where the search lets no
        further token come.

        Args:
            inputs: a list as for :meth:`predict`.
            count: tokens of each continuation.
            search: how they are looked for, or drawn; None: the likeliest each time. Its ``max_length`` is not read.
            batch_size: texts at a time. The answers do not depend on it.
            first: the number of the first input, for errors and for the draws.

        Returns:
            A dictionary for each input: ``tokens``, as for :meth:`predict`; ``continuations``, ``nbest`` lists of
            tokens, the best first; ``probabilities`` and ``scores``, a number for each continuation, of which a search
            sorts by the score; and ``texts``, each the input followed by a continuation. All are empty for an input
            without a token.

        Raises:
            ConfigError: there is no language model that can go on with a text.
            TypeError: the inputs are no list, one is of another type, ``search`` is no :class:`pymtl.Search`, or a
                number is not whole.
            ValueError: a number is below 1, or the search has a coverage penalty.
            pymtl.training.errors.DataError: a record lacks a field, or one does not fit.
        """
        task = self._language_model()
        dataset = self.tasks[task].dataset or ""
        if isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs: expected a list of texts or records, got {type(inputs).__name__}")
        for name, number in (("count", count), ("batch_size", batch_size)):
            if type(number) is not int:
                raise TypeError(f"{name}: expected a whole number, got {number!r}")
            if number < 1:
                raise ValueError(f"{name}: expected a number above 0, got {number}")
        if not isinstance(search, Search | None):
            raise TypeError(f"search: expected a Search, as pymtl.Search(beam_size=5), got {type(search).__name__}")
        settings = replace(search or Search(), max_length=count)
        if settings.coverage_penalty > 0:
            raise ValueError("search: expected no coverage_penalty: a language model attends to nothing")
        records = [self.record_or_none(given, f"input {first + i}", dataset) for i, given in enumerate(inputs)]
        own = self.config.sets[dataset]
        answers: list[Answer] = [
            {
                "tokens": [] if record is None else given_tokens(record, own),
                "continuations": [],
                "probabilities": [],
                "scores": [],
                "texts": [],
            }
            for record in records
        ]
        known = [i for i, record in enumerate(records) if record is not None]
        model = self._trained.model
        for start in range(0, len(known), batch_size):
            part = known[start : start + batch_size]
            batch = self._batcher.batch(records, part).to(self.device)
            parts = (model.embedding, model.encoder, model.heads[task])
            numbers = [first + i for i in part]
            found = go_on(*parts, batch.tokens, batch.lengths, settings, count, range(FIRST_TOKEN), numbers)
            for i, every in zip(part, found):
                answer, source = answers[i], records[i].source
                answer["continuations"] = [[self.vocabulary.tokens[t] for t in each.tokens] for each in every]
                answer["probabilities"] = [math.exp(each.log_probability) for each in every]
                answer["scores"] = [each.score for each in every]
                text = source if isinstance(source, str) else went_on("", answer["tokens"], own.splits_by)
                answer["texts"] = [went_on(text, tokens, own.splits_by) for tokens in answer["continuations"]]
        return answers

    def _language_model(self) -> str:
        """The task that goes on with texts.

        Raises:
            ConfigError: there is none, or it cannot.
        """
        if isinstance(self._trained, Exported):
            raise ConfigError("expected a run folder to go on with a text, got an exported program")
        tasks = [name for name, task in self.tasks.items() if isinstance(task.rules, LanguageModel)]
        if len(tasks) != 1:
            kinds = ", ".join(f"{name} ({task.kind})" for name, task in self.tasks.items())
            raise ConfigError(
                f"expected a run with one task of kind 'language_model' to go on with a text, got {kinds}"
            )
        if self.labels.get(tasks[0]):
            raise ConfigError(f"expected a language model of tokens to go on with a text, got {tasks[0]!r} of suffixes")
        why = why_not_on(self._trained.model.embedding, self._trained.model.encoder)
        if why is not None:
            raise ConfigError(f"expected, for {tasks[0]!r} to go on with a text, {why}")
        return tasks[0]

    def logits(self, inputs: Sequence[Input], dataset: str = "") -> dict[str, Tensor]:
        """The tasks' logits of some texts, all in one batch: [B, C], or [B, T, C] of each token, padded to the
        longest. Tasks whose answers are generated have none.

        Args:
            inputs: a list as for :meth:`predict`, each input of at least one token.
            dataset: the data set whose tasks are asked, where there are several.

        Raises:
            TypeError: the inputs are no list.
            pymtl.training.errors.DataError: there is none, or one has no token.
        """
        records = self.records_to_run(inputs, dataset)
        batch = self._batcher.batch(records, range(len(records))).to(self.device)
        with torch.inference_mode():
            found = self._trained.logits(batch, dataset)
        return {name: z for name, z in found.items() if isinstance(z, Tensor)}
