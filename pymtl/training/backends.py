"""The same model and loss, by this library or in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pymtl import reference
from pymtl.heads import ClassificationHead, Head, MultiLabelHead, RegressionHead, TokenClassificationHead
from pymtl.joint_loss import CrossEntropy, JointLoss
from pymtl.lstm import LSTM
from pymtl.models import MultiTaskModel
from pymtl.reference.models import MultiTaskModel as ReferenceModel
from pymtl.training.config import Config
from pymtl.training.data import NO_LABEL, Batch, Vocabulary

BACKENDS = ("pymtl", "reference", "reference-padded")


class Backend:
    """A model with its loss, over batches.

    Args:
        name: ``"pymtl"``; ``"reference"``, nn.LSTM on packed sequences; or ``"reference-padded"``, nn.LSTM on
            the padded batch as it is, of use only to compare times.
        config, vocabulary: what the model is made for. The parameters have the same names and, from the same
            seed, the same values in every backend.
    """

    def __init__(self, name: str, config: Config, vocabulary: Vocabulary) -> None:
        self.name = name
        model = config.model
        embedding = nn.Embedding(len(vocabulary.tokens), model.embedding_dim, padding_idx=0)
        encoder = (LSTM if name == "pymtl" else nn.LSTM)(
            model.embedding_dim,
            model.hidden_size,
            model.num_layers,
            batch_first=True,
            bidirectional=model.bidirectional,
            dropout=model.dropout if model.num_layers > 1 else 0.0,
        )
        heads = _heads(config, vocabulary)
        self.model: nn.Module
        if name == "pymtl":
            self.model = MultiTaskModel(embedding, encoder, heads, model.dropout)
        else:
            self.model = ReferenceModel(embedding, encoder, heads, model.dropout, packed=name == "reference")
        self.weights = {task: settings.weight for task, settings in config.tasks.items()}
        self.losses = {task: head.loss for task, head in heads.items()}
        self._joint = JointLoss(self.weights, self.losses)

    def logits(self, batch: Batch) -> Mapping[str, Tensor]:
        """Of every task, padded."""
        return self.model(batch.tokens, batch.lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss, and each task's."""
        if self.name == "pymtl":
            tokens, targets = batch.packed()
            result = self._joint(self.model(tokens), targets)
            return result.total, result.per_task
        logits = self.logits(batch)
        tasks = list(batch.targets)
        values = reference.joint_loss(
            [logits[task].flatten(0, -2) for task in tasks],
            [self._target_rows(task, batch.targets[task]) for task in tasks],
            [self.losses[task].kind for task in tasks],
            [None] * len(tasks),
            [NO_LABEL] * len(tasks),
            [self.losses[task].label_smoothing for task in tasks],
        )
        return torch.dot(values, values.new_tensor([self.weights[task] for task in tasks])), dict(zip(tasks, values))

    def _target_rows(self, task: str, target: Tensor) -> Tensor:
        return target.flatten() if self.losses[task].kind == "cross_entropy" else target


def _heads(config: Config, vocabulary: Vocabulary) -> dict[str, Head]:
    heads: dict[str, Head] = {}
    for name, task in config.tasks.items():
        loss = CrossEntropy(ignore_index=NO_LABEL, label_smoothing=task.label_smoothing)
        if task.kind == "classification":
            heads[name] = ClassificationHead(len(vocabulary.labels[name]), task.pooling, loss)
        elif task.kind == "tagging":
            heads[name] = TokenClassificationHead(len(vocabulary.labels[name]), loss)
        elif task.kind == "multilabel":
            heads[name] = MultiLabelHead(len(vocabulary.labels[name]), task.pooling)
        else:
            heads[name] = RegressionHead(1, task.pooling)
    return heads
