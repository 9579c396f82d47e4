"""The tasks' output layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import init

from pymtl import ops, reference
from pymtl.crf import CRF, CRFLoss
from pymtl.ctc import CTCLoss
from pymtl.custom import runs_own_code
from pymtl.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError, OrdinalLoss
from pymtl.pooling import AttentionPooling
from pymtl.serving.tags import Scheme
from pymtl.states import States

Pooling = Literal["last", "mean", "max", "attention"] | AttentionPooling
POOLINGS = ("last", "mean", "max", "attention")


@dataclass(frozen=True)
class Reads:
    """What a head reads beside the states.

    Args:
        skip: the embedded tokens too, ``o_t = g(W_ho h_t + W_xo x_t)``: a connection from the input to the head past
            the recurrence (Graves 2013, "Generating Sequences With Recurrent Neural Networks", section 2). A head of
            sequences reads their maximum if it pools by ``"max"``, else their mean.
        after: another task of classes or tags. The head also reads an embedding of that task's class probabilities:
            label embedding, as in hierarchical models (Hashimoto et al. 2017, "A Joint Many-Task Model", equation 4). A
            head of tokens reads the embedding of the same token or of its sequence, a head of sequences the mean over
            its tokens.
        label_embedding_dim: the size of that.

    Raises:
        ValueError: the size is below 1.
    """

    skip: bool = False
    after: str | None = None
    label_embedding_dim: int = 32

    def __post_init__(self) -> None:
        if self.label_embedding_dim < 1:
            raise ValueError(f"label_embedding_dim: expected a number above 0, got {self.label_embedding_dim}")


class Head(nn.Module):
    """A linear output layer over an encoder's states: of each token, or pooled over each sequence.

    The base of the heads below. ``weight`` [C, F] and ``bias`` [C] are initialised as in
    :class:`torch.nn.Linear`; they take their size F when a :class:`pymtl.MultiTaskModel` takes the head, or
    from ``in_features``.

    Args:
        out_features: C, the width of this head's output.
        pooling: how a sequence's states become one: ``"last"`` (each direction's own final state), ``"mean"``
            or ``"max"`` over its tokens, ``"attention"`` or an :class:`AttentionPooling`; None for a head of tokens.
        loss: the loss this head is trained with.
        in_features: F, the encoder's features; None to learn them from the model.
        reads: what else it reads.
    """

    def __init__(
        self,
        out_features: int,
        pooling: Pooling | None,
        loss: Loss,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(out_features, int) or out_features < 1:
            raise ValueError(f"{type(self).__name__}: expected a number of outputs above 0, got {out_features!r}")
        if pooling is not None and not isinstance(pooling, AttentionPooling) and pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
        if loss.weight is not None and len(loss.weight) != out_features:
            raise ValueError(f"loss.weight: expected {out_features} numbers, got {len(loss.weight)}")
        self.out_features = out_features
        self.attention = pooling if isinstance(pooling, AttentionPooling) else None
        if pooling == "attention":
            self.attention = AttentionPooling()
        self.pooling = "attention" if self.attention is not None else pooling
        self.loss = loss
        self.reads = reads or Reads()
        self.weight = nn.UninitializedParameter()
        self.bias = nn.UninitializedParameter()
        if self.reads.after is not None:
            self.label_embedding = nn.UninitializedParameter()
        if in_features is not None:
            if self.reads != Reads():
                raise ValueError("in_features: expected none for a head that reads more, whose sizes the model knows")
            self.materialize(in_features)

    def materialize(
        self, in_features: int, like: Tensor | None = None, input_size: int = 0, before: Head | None = None
    ) -> None:
        """Gives the parameters their size. Called once, by the model; later calls check the size.

        Args:
            in_features: of the encoder's states.
            like: the dtype and device of the parameters; torch's defaults if None.
            input_size: of the embedded tokens, if the head reads them.
            before: the head this one reads after.

        Raises:
            ValueError: the parameters have another size already.
        """
        kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
        if self.attention is not None:
            self.attention.materialize(in_features, like)
        if self.reads.skip:
            in_features += input_size
        if self.reads.after is not None:
            in_features += self.reads.label_embedding_dim
            self.label_embedding_of_tokens = before.pooling is None
            if isinstance(self.label_embedding, nn.UninitializedParameter):
                self.label_embedding.materialize((before.out_features, self.reads.label_embedding_dim), **kind)
                init.normal_(self.label_embedding, std=self.reads.label_embedding_dim**-0.5)
        if isinstance(self.bias, nn.UninitializedParameter):
            self.materialize_output(in_features, kind)
            self.reset_parameters()
        elif self.in_features != in_features:
            raise ValueError(
                f"{type(self).__name__}: expected an encoder of {self.in_features} features, got {in_features}"
            )

    @property
    def in_features(self) -> int:
        """F, once it is known: of what :meth:`features` gives."""
        return self.weight.shape[1]

    def materialize_output(self, in_features: int, kind: dict[str, object]) -> None:
        """Gives weight and bias their size."""
        self.weight.materialize((self.out_features, in_features), **kind)
        self.bias.materialize((self.out_features,), **kind)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as :class:`torch.nn.Linear` does."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.bias, -bound, bound)

    @property
    def is_plain(self) -> bool:
        """Whether the head is only a linear map of the states, or of the features that the encoder pools from them.
        Such heads are projected together."""
        return self.reads == Reads() and self.attention is None and not runs_own_code(self, Head)

    def projection(self) -> tuple[Tensor, Tensor]:
        """The weight [C, F] and bias [C] of the linear map."""
        return self.weight, self.bias

    def features(self, states: States, embedded: States, before: Tensor | None = None) -> Tensor:
        """What :meth:`forward` takes: [N, F] of tokens or [B, F] of sequences, in the packed order.

        Args:
            states: the task's.
            embedded: the embedded tokens [N, E], and what is pooled from them.
            before: the logits of the task this one reads after, packed [N, C'] or [B, C'].
        """
        if self.pooling is None:
            parts = [states.tokens]
        elif self.attention is not None:
            parts = [self.attention(states)]
        else:
            parts = [states.pooled(self.pooling)]
        if self.reads.skip:
            pooling = "max" if self.pooling == "max" else "mean"
            parts.append(embedded.tokens if self.pooling is None else embedded.pooled(pooling))
        if self.reads.after is not None:
            parts.append(self._label_features(states, before))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _label_features(self, states: States, before: Tensor) -> Tensor:
        embedded = before.softmax(-1) @ self.label_embedding
        if self.pooling is None:
            return embedded if self.label_embedding_of_tokens else embedded[states.rows()]
        if self.label_embedding_of_tokens:
            return States.of(embedded, states.batch_sizes, 1, batch=states.batch).pooled("mean")
        return embedded

    def forward(self, features: Tensor) -> Tensor:
        """[N, F] to [N, C]. A :class:`pymtl.MultiTaskModel` projects all heads at once instead, where it can."""
        if ops.has_kernels(features, bfloat16=True, cuda=True):
            return ops.heads(features, *self.projection())
        return reference.heads(features, *self.projection())

    def extra_repr(self) -> str:
        return f"{self.out_features}, pooling={self.pooling!r}, loss={self.loss}"


class ClassificationHead(Head):
    """One of ``num_classes`` classes for each sequence. Logits [B, C], targets int64 [B]."""

    def __init__(
        self,
        num_classes: int,
        pooling: Pooling = "last",
        loss: CrossEntropy | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(num_classes, pooling, loss or CrossEntropy(), in_features, reads)


class TokenClassificationHead(Head):
    """One of ``num_classes`` classes for each token. Logits [B, T, C], targets int64 [B, T]."""

    def __init__(
        self,
        num_classes: int,
        loss: CrossEntropy | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(num_classes, None, loss or CrossEntropy(), in_features, reads)


class CRFHead(Head):
    """Tags of the tokens whose order counts: a :class:`pymtl.CRF` on the projected states.

    Logits are the emissions [B, T, C] (or packed), targets int64 [B, T] (or packed); ``crf.decode`` gives the tags.
    In a :class:`pymtl.MultiTaskModel` padded logits are laid out as the encoder's, and ``crf.batch_first`` follows.

    Args:
        num_classes: C.
        labels: the tags' names, to bind paths to their scheme; None not to.
        scheme: of the labels, as for :class:`pymtl.CRF`.
    """

    def __init__(
        self,
        num_classes: int,
        labels: Sequence[str] | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
        scheme: Scheme = "bio",
    ) -> None:
        crf = CRF(num_classes, labels, scheme=scheme)
        super().__init__(num_classes, None, CRFLoss(crf), in_features, reads)
        self.crf = crf

    def materialize_output(self, in_features: int, kind: dict[str, object]) -> None:
        super().materialize_output(in_features, kind)
        self.crf.to(**kind)


class RegressionHead(Head):
    """``num_targets`` numbers for each sequence. Predictions [B, C], targets of the same shape, or [B] of one.

    Numbers far from 0 and 1 are learnt slowly or not at all, and their squared errors drown the other tasks' losses. So
    let the model predict standardised ones: give the training targets' means and standard deviations, the loss
    :meth:`standardized` targets, and read predictions by :meth:`values`::

        head = pymtl.RegressionHead(mean=[21.4], std=[3.1])
        targets = {"temperature": head.standardized(degrees)}  # for the loss
        degrees = head.values(logits["temperature"])           # what is predicted

    Args:
        num_targets: C.
        pooling, in_features, reads: as for :class:`Head`.
        mean, std: C numbers each; None: 0 and 1.
        log: whether the logarithms of the numbers are what is standardised, and ``mean`` and ``std`` are of them: for
            numbers above 0 of very different sizes, as prices.

    Raises:
        ValueError: there are not C numbers, or one is not finite, or a standard deviation is not above 0.
    """

    def __init__(
        self,
        num_targets: int = 1,
        pooling: Pooling = "last",
        in_features: int | None = None,
        reads: Reads | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        log: bool = False,
    ) -> None:
        super().__init__(num_targets, pooling, MeanSquaredError(), in_features, reads)
        self.log = log
        # Not buffers: a model in bfloat16 would round them to three digits.
        self.mean = tuple(map(float, mean)) if mean is not None else (0.0,) * num_targets
        self.std = tuple(map(float, std)) if std is not None else (1.0,) * num_targets
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != num_targets or not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name}: expected {num_targets} finite numbers, got {list(numbers)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {list(self.std)}")

    def standardized(self, targets: Tensor) -> Tensor:
        """``(targets - mean) / std``, float32, of targets [..., C], or of one target [...]; NaN stays NaN. With ``log``
        the logarithms of the targets; NaN of those that are not above 0."""
        mean, std = self._scale(targets)
        numbers = targets.double()
        if self.log:
            numbers = torch.where(numbers > 0, numbers.log(), torch.nan)
        return ((numbers - mean) / std).float()

    def values(self, predictions: Tensor) -> Tensor:
        """``mean + std * predictions``, float64, of the head's predictions [..., C]: in the units of the targets. With
        ``log`` the exponential of it."""
        mean, std = self._scale(predictions)
        numbers = mean + std * predictions.double()
        return numbers.exp() if self.log else numbers

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(n, dtype=torch.float64, device=like.device) for n in (self.mean, self.std))
        if len(self.mean) > 1 and (like.dim() == 0 or like.shape[-1] != len(self.mean)):
            raise ValueError(f"expected {len(self.mean)} numbers in the last dimension, got {list(like.shape)}")
        return mean, std


class MultiLabelHead(Head):
    """Any of ``num_labels`` labels for each sequence. Logits [B, C], targets 0 or 1 (or between) [B, C]."""

    def __init__(
        self,
        num_labels: int,
        pooling: Pooling = "last",
        loss: BinaryCrossEntropy | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(num_labels, pooling, loss or BinaryCrossEntropy(), in_features, reads)


class OrdinalHead(Head):
    """One of ``num_classes`` ordered classes for each sequence: a score with a threshold between neighbouring classes
    (CORAL, Cao, Mirjalili & Raschka 2020). Logits [B, C-1] of "above class 0", "above class 1", ...; targets int64 [B].

    The class is the number of logits above 0, :meth:`classes`.
    """

    def __init__(
        self,
        num_classes: int,
        pooling: Pooling = "last",
        loss: OrdinalLoss | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes: expected a number above 1, got {num_classes!r}")
        super().__init__(num_classes - 1, pooling, loss or OrdinalLoss(), in_features, reads)

    def materialize_output(self, in_features: int, kind: dict[str, object]) -> None:
        self.weight.materialize((1, in_features), **kind)
        self.bias.materialize((self.out_features,), **kind)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            # As if all classes were equally likely.
            above = torch.arange(self.out_features, 0, -1, dtype=self.bias.dtype) / (self.out_features + 1)
            self.bias.copy_(torch.logit(above))

    def projection(self) -> tuple[Tensor, Tensor]:
        return self.weight.expand(self.out_features, -1), self.bias

    @staticmethod
    def classes(logits: Tensor) -> Tensor:
        """int64 [...], of logits [..., C-1]."""
        return (logits > 0).sum(-1)


class CTCHead(Head):
    """Labels of a sequence without their places: :class:`CTCLoss` on each token's logits [B, T, C], class 0 the blank.

    Targets are int64 [B, S] as the loss says; :func:`pymtl.ctc_greedy` and :func:`pymtl.ctc_beam` decode.

    Args:
        num_classes: C, the labels and the blank.
    """

    def __init__(
        self,
        num_classes: int,
        loss: CTCLoss | None = None,
        in_features: int | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(num_classes, None, loss or CTCLoss(), in_features, reads)
