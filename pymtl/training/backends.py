"""The same model and loss, by this library or in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from pymtl import reference
from pymtl.heads import ClassificationHead, CRFHead, Head, MultiLabelHead, RegressionHead, TokenClassificationHead
from pymtl.joint_loss import JointLoss
from pymtl.losses import CrossEntropy
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
        self.crfs = {task: head.crf for task, head in heads.items() if isinstance(head, CRFHead)}
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
        per_task = {
            task: self._reference_loss(task, logits[task], target, batch) for task, target in batch.targets.items()
        }
        return sum(self.weights[task] * value for task, value in per_task.items()), per_task

    def _reference_loss(self, task: str, logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
        loss = self.losses[task]
        if task in self.crfs:
            tagged = (target != NO_LABEL).any(1)
            emissions, tags = (
                pack_padded_sequence(padded[tagged], batch.lengths[tagged], batch_first=True, enforce_sorted=False)
                for padded in (logits, target)
            )
            scores = self.crfs[task].scores()
            return -reference.crf(emissions.data, emissions.batch_sizes, tags.data, *scores).sum() / len(tags.data)
        rows = target.flatten() if loss.kind == "cross_entropy" else target
        return reference.joint_loss(
            [logits.flatten(0, -2)], [rows], [loss.kind], [None], [NO_LABEL], [loss.label_smoothing]
        )[0]


def _heads(config: Config, vocabulary: Vocabulary) -> dict[str, Head]:
    heads: dict[str, Head] = {}
    for name, task in config.tasks.items():
        loss = CrossEntropy(ignore_index=NO_LABEL, label_smoothing=task.label_smoothing)
        if task.kind == "classification":
            heads[name] = ClassificationHead(len(vocabulary.labels[name]), task.pooling, loss)
        elif task.kind == "tagging" and task.decoder == "crf":
            labels = vocabulary.labels[name]
            heads[name] = CRFHead(len(labels), labels if task.bio else None)
        elif task.kind == "tagging":
            heads[name] = TokenClassificationHead(len(vocabulary.labels[name]), loss)
        elif task.kind == "multilabel":
            heads[name] = MultiLabelHead(len(vocabulary.labels[name]), task.pooling)
        else:
            heads[name] = RegressionHead(1, task.pooling)
    return heads
