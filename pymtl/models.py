"""One encoder, several heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops, reference
from pymtl.heads import POOLINGS, Head
from pymtl.joint_loss import Loss
from pymtl.lstm import LSTM
from pymtl.ops.autograd import wants_gradient
from pymtl.packing import as_lengths

Input = Tensor | PackedSequence
Output = dict[str, Tensor | PackedSequence]


class MultiTaskModel(nn.Module):
    """Hard parameter sharing (Caruana 1997): an embedding and an LSTM encoder shared by all tasks' heads.

    Everything runs on packed tokens: the embedding, the encoder, the heads and, given PackedSequence targets,
    the loss never see padding. The token heads' weights are stacked into one projection; where no gradient is
    wanted it is part of the last layer's walk over time.

    Args:
        embedding: from token ids to [..., E] features, applied to packed ids [N]; None if the input holds
            features already.
        encoder: a :class:`pymtl.LSTM`; its ``batch_first`` says how padded input and output are laid out.
        heads: a head for each task.
        dropout: applied to the embedded tokens and to the encoder's states, in training.

    Raises:
        TypeError: the encoder is not a pymtl.LSTM or a head not a :class:`pymtl.Head`.
        ValueError: there is no head, a name is not fit for a module, or ``dropout`` is not from 0 to 1.
    """

    def __init__(
        self,
        embedding: nn.Module | None,
        encoder: LSTM,
        heads: Mapping[str, Head],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, LSTM):
            raise TypeError(f"encoder: expected a pymtl.LSTM (see pymtl.convert), got {type(encoder).__name__}")
        if not heads:
            raise ValueError("heads: expected at least one head, got none")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout}")
        self.embedding = embedding
        self.encoder = encoder
        self.dropout = float(dropout)
        self.heads = nn.ModuleDict()
        directions = 2 if encoder.bidirectional else 1
        features = directions * (encoder.proj_size or encoder.hidden_size)
        for task, head in heads.items():
            if not isinstance(head, Head):
                raise TypeError(f"heads[{task!r}]: expected a pymtl head, got {type(head).__name__}")
            if "." in task or not task or hasattr(nn.ModuleDict, task):
                raise ValueError(f"heads: expected a task name fit for a module, got {task!r}")
            head.materialize(features)
            self.heads[task] = head

    @property
    def losses(self) -> dict[str, Loss]:
        """The loss of each head, for :class:`pymtl.JointLoss`."""
        return {task: head.loss for task, head in self.heads.items()}

    def forward(self, tokens: Input, lengths: Tensor | Sequence[int] | None = None) -> Output:
        """The logits of every task.

        Args:
            tokens: token ids [B, T] ([T, B] without ``batch_first``), or features [B, T, E] if there is no
                embedding; or a PackedSequence of either.
            lengths: of the sequences, in any order: int64 [B] on the CPU or integers from 1 to T; None if
                all are T long.

        Returns:
            For each task, [B, C] for a head of sequences; for a head of tokens [B, T, C] ([T, B, C] without
            ``batch_first``), zero at padding, or a PackedSequence [N, C] if ``tokens`` is one.

        Raises:
            ValueError: the rank of ``tokens`` does not fit, or ``lengths`` comes with a PackedSequence.
            RuntimeError: a size, dtype or device does not fit.
        """
        if isinstance(tokens, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            order = ops.PackingOrder(tokens.batch_sizes, tokens.sorted_indices, tokens.unsorted_indices)
            token_logits, sentence_logits = self._logits(tokens.data, order)
            whole = None if token_logits is None else PackedSequence(token_logits, *tokens[1:])
        else:
            dims = 2 if self.embedding is not None else 3
            if tokens.dim() != dims:
                raise ValueError(f"tokens: expected a {dims}-D padded batch, got {tokens.dim()}-D")
            batch_first = self.encoder.batch_first
            batch, steps = tokens.shape[:2] if batch_first else (tokens.shape[1], tokens.shape[0])
            if lengths is None:
                lengths = torch.full((batch,), steps, dtype=torch.int64)
            order = ops.packing_order(as_lengths(lengths, batch), steps)
            token_logits, sentence_logits = self._logits(ops.pack(tokens, order, batch_first=batch_first), order)
            whole = None if token_logits is None else ops.unpack(token_logits, order, batch_first=batch_first)
        return self._by_task(whole, sentence_logits, order.unsorted_indices)

    def _logits(self, data: Tensor, order: ops.PackingOrder) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Of all token heads side by side, [N, C] or None, and of the heads of each pooling, [B, C], as packed."""
        if self.embedding is not None:
            data = self.embedding(data)
        data = self._drop(data)
        token_heads = self._heads_pooled(None)
        wanted = {kind: self._heads_pooled(kind) for kind in POOLINGS}
        take = self.encoder.kernels_take(data)
        if take and not self._needs_states(data):
            weight, bias = _stacked(token_heads)
            result = self.encoder.forward_heads(
                data, order.batch_sizes, weight, bias, mean=bool(wanted["mean"]), max=bool(wanted["max"])
            )
            token_logits, h_n = result.logits, result.h_n
            pooled = {"mean": result.mean, "max": result.max}
        else:
            packed, (h_n, _) = self.encoder(PackedSequence(data, order.batch_sizes))
            states = self._drop(packed.data)
            functions = ops if take else reference
            directions = 2 if self.encoder.bidirectional else 1
            token_logits = _project(functions.heads, states, token_heads, directions) if token_heads else None
            h_n = self._drop(h_n[-directions:])
            reverse = [False, True][:directions]
            pooled = {
                kind: functions.pool(states, order.batch_sizes, kind, reverse=reverse)
                for kind in ("mean", "max")
                if wanted[kind]
            }
        pooled["last"] = h_n.transpose(0, 1).flatten(1)
        project = ops.heads if take else reference.heads
        sentence_logits = {kind: _project(project, pooled[kind], heads, 1) for kind, heads in wanted.items() if heads}
        return (token_logits if token_heads else None), sentence_logits

    def _needs_states(self, data: Tensor) -> bool:
        """Whether the encoder's states are needed themselves: for a backward pass, to drop some, or by a hook."""
        return (
            (self.training and self.dropout > 0)
            or wants_gradient(data, *self.parameters())
            or _has_hooks(self.encoder)
            or any(_has_hooks(head) for head in self.heads.values())
        )

    def _drop(self, tensor: Tensor) -> Tensor:
        return F.dropout(tensor, self.dropout) if self.training and self.dropout > 0 else tensor

    def _heads_pooled(self, pooling: str | None) -> list[Head]:
        return [head for head in self.heads.values() if head.pooling == pooling]

    def _by_task(
        self, whole: Tensor | PackedSequence | None, sentence_logits: dict[str, Tensor], unsorted: Tensor | None
    ) -> Output:
        parts: dict[str | None, list] = {}
        for kind, logits in sentence_logits.items():
            ordered = logits if unsorted is None else logits.index_select(0, unsorted)
            parts[kind] = _split(ordered, self._heads_pooled(kind))
        if isinstance(whole, PackedSequence):
            pieces = _split(whole.data, self._heads_pooled(None))
            parts[None] = [PackedSequence(piece, *whole[1:]) for piece in pieces]
        elif whole is not None:
            parts[None] = _split(whole, self._heads_pooled(None))
        iterators = {kind: iter(pieces) for kind, pieces in parts.items()}
        return {task: next(iterators[head.pooling]) for task, head in self.heads.items()}


def _has_hooks(module: nn.Module) -> bool:
    # Pruning and the older weight normalisation compute a module's weight in such a hook.
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_hooks)


def _project(function: Callable[..., Tensor], features: Tensor, heads: Sequence[Head], parts: int) -> Tensor:
    """All heads at once; one by one, as modules, where one has a hook."""
    if any(_has_hooks(head) for head in heads):
        return torch.cat([head(features) for head in heads], dim=-1)
    return function(features, *_stacked(heads), parts=parts)


def _stacked(heads: Sequence[Head]) -> tuple[Tensor | None, Tensor | None]:
    if not heads:
        return None, None
    if len(heads) == 1:
        return heads[0].weight, heads[0].bias
    return torch.cat([h.weight for h in heads]), torch.cat([h.bias for h in heads])


def _split(logits: Tensor, heads: Sequence[Head]) -> list[Tensor]:
    return list(logits.split([h.out_features for h in heads], dim=-1)) if len(heads) > 1 else [logits]
