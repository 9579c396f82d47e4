"""The model and its loss, by this library or in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from pymtl import reference
from pymtl.crf import CRF
from pymtl.heads import CRFHead
from pymtl.joint_loss import JointLoss, JointLossResult
from pymtl.serving.answers import NO_LABEL
from pymtl.training import building
from pymtl.training.batches import Batch
from pymtl.training.config import Config
from pymtl.training.errors import ConfigError
from pymtl.training.kinds import KINDS
from pymtl.training.reference_model import MultiTaskModel as ReferenceModel
from pymtl.training.vocabulary import Vocabulary

BACKENDS = ("pymtl", "reference", "reference-padded")
REFERENCE_KINDS = tuple(name for name, kind in KINDS.items() if kind.has_reference)


class ModelWithLoss(nn.Module):
    """A model with its loss, over batches.

    Args:
        name: ``"pymtl"``; ``"reference"``, nn.LSTM on packed sequences; or ``"reference-padded"``, nn.LSTM on
            the padded batch as it is, of use only to compare times.
        config, vocabulary: what the model is made for. The parameters have the same names and, from the same
            seed, the same values in every backend.

    Raises:
        ConfigError: plain PyTorch is asked for what it has no counterpart of here; see :func:`has_reference`.
    """

    def __init__(self, name: str, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.name = name
        self.tasks = {dataset: config.main_tasks_of(dataset) for dataset in config.sets}
        weights = {task: settings.weight for task, settings in config.tasks.items()}
        self.model: nn.Module
        if name == "pymtl":
            self.model = building.model_of(config, vocabulary)
        else:
            if not has_reference(config):
                raise ConfigError(
                    f"backend {name!r}: expected sharing = 'hard', balancing = 'ew', plain dropout, no character LSTM, "
                    f"heads of {', '.join(REFERENCE_KINDS)} on the states alone"
                )
            model = config.model
            embedding, size = building.embedding_of(config, vocabulary)
            encoder = nn.LSTM(
                size,
                model.hidden_size,
                model.num_layers,
                batch_first=True,
                bidirectional=model.bidirectional,
                dropout=model.dropout if model.num_layers > 1 else 0.0,
            )
            heads = building.heads_of(config, vocabulary, embedding)
            self.model = ReferenceModel(embedding, encoder, heads, model.dropout, packed=name == "reference")
        losses = {task: head.loss for task, head in self.model.heads.items()}
        self.joint = JointLoss(weights, losses, building.balancing_of(config))

    @property
    def crfs(self) -> dict[str, CRF]:
        """Of the tasks whose tags are decoded together."""
        return {task: head.crf for task, head in self.model.heads.items() if isinstance(head, CRFHead)}

    def logits(self, batch: Batch, dataset: str = "") -> Mapping[str, Tensor]:
        """Of every task of the data set that is not auxiliary, padded."""
        tasks = self.tasks[dataset]
        if not tasks:
            return {}
        # Plain PyTorch copies nothing.
        further = {"sources": batch.sources} if batch.sources else {}
        return self.model(batch.inputs(), batch.lengths, tasks, **further)

    def loss(
        self,
        batch: Batch,
        scales: Mapping[str, float] | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> JointLossResult:
        """The joint loss of the tasks that have labels in the batch.

        Args:
            batch: of one data set.
            scales, mean: as for :meth:`pymtl.JointLoss.forward`.
        """
        if self.name == "pymtl":
            inputs, targets, sources = batch.packed()
            logits = self.model(inputs, None, list(targets), targets, sources)
            return self.joint(logits, targets, scales, mean)
        return self._reference_loss(batch)

    forward = loss  # what a wrapper for several processes calls

    def _reference_loss(self, batch: Batch) -> JointLossResult:
        logits = self.model(batch.inputs(), batch.lengths, list(batch.targets), batch.targets)
        per_task = {task: self._of_task(task, logits[task], target, batch) for task, target in batch.targets.items()}
        total = sum(self.joint.loss_weights[task] * value for task, value in per_task.items())
        return JointLossResult(total, per_task, {}, (), {})

    def _of_task(self, task: str, logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
        loss = self.joint.losses[task]
        if task in self.crfs:
            emissions, tags = (
                pack_padded_sequence(padded, batch.lengths, batch_first=True, enforce_sorted=False)
                for padded in (logits, target)
            )
            return loss.of_packed(emissions.data, emissions.batch_sizes, tags.data, reference)
        rows = target.flatten() if loss.kind == "cross_entropy" else target
        weight = None if loss.weight is None else logits.new_tensor(loss.weight)
        return reference.joint_loss(
            [logits.flatten(0, -2)], [rows], [loss.kind], [weight], [NO_LABEL], [loss.label_smoothing]
        )[0]


def has_reference(config: Config) -> bool:
    """Whether plain PyTorch has the same model here: hard sharing, simple heads, the plain sum of losses."""
    simple = all(
        task.rules.has_reference and not task.skip and task.after is None and not task.copy
        for task in config.tasks.values()
    )
    plain = (config.characters is None or config.characters.kind == "cnn") and not config.model.variational
    return simple and plain and config.sharing.kind == "hard" and config.balancing.kind == "ew" and not config.datasets
