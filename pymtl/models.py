"""One encoder, several heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops, reference
from pymtl.heads import CRFHead, Head
from pymtl.joint_loss import Loss
from pymtl.lstm import LSTM
from pymtl.ops.autograd import transforming, wants_gradient
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
            head.materialize(features, like=encoder.weight_hh_l0)
            if isinstance(head, CRFHead):
                head.crf.batch_first = encoder.batch_first
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
        groups: dict[str | None, list[Head]] = {}
        for head in self.heads.values():
            groups.setdefault(head.pooling, []).append(head)
        if isinstance(tokens, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            order = ops.PackingOrder(tokens.batch_sizes, tokens.sorted_indices, tokens.unsorted_indices)
            logits = self._logits(tokens.data, order, groups)
        else:
            dims = 2 if self.embedding is not None else 3
            if tokens.dim() != dims:
                raise ValueError(f"tokens: expected a {dims}-D padded batch, got {tokens.dim()}-D")
            batch_first = self.encoder.batch_first
            batch, steps = tokens.shape[:2] if batch_first else (tokens.shape[1], tokens.shape[0])
            if steps == 0:
                raise RuntimeError("tokens: expected sequence length to be larger than 0")
            if lengths is None:
                lengths = torch.full((batch,), steps, dtype=torch.int64, device="cpu")
            order = ops.packing_order(as_lengths(lengths, batch), steps)
            logits = self._logits(ops.pack(tokens, order, batch_first=batch_first), order, groups)
            if None in logits:
                logits[None] = ops.unpack(logits[None], order, batch_first=batch_first)
        parts = {pooling: iter(_split(logits[pooling], heads)) for pooling, heads in groups.items()}
        by_task = {task: next(parts[head.pooling]) for task, head in self.heads.items()}
        if isinstance(tokens, PackedSequence):
            for task, head in self.heads.items():
                if head.pooling is None:
                    by_task[task] = PackedSequence(by_task[task], *tokens[1:])
        return by_task

    def _logits(
        self, data: Tensor, order: ops.PackingOrder, groups: Mapping[str | None, list[Head]]
    ) -> dict[str | None, Tensor]:
        """Of the heads of each pooling side by side: [N, C] packed for None, else [B, C] in the batch's order."""
        if self.embedding is not None:
            data = self.embedding(data)
        data = self._drop(data)
        take = self.encoder.kernels_take(data)
        functions = ops if take else reference
        logits: dict[str | None, Tensor] = {}
        if take and not self._needs_states(data):
            weight, bias = _stacked(groups.get(None, []))
            result = self.encoder.forward_heads(
                data, order.batch_sizes, weight, bias, mean="mean" in groups, max="max" in groups
            )
            if None in groups:
                logits[None] = result.logits
            h_n, pooled = result.h_n, {"mean": result.mean, "max": result.max}
        else:
            packed, (h_n, _) = self.encoder(PackedSequence(data, order.batch_sizes))
            states = self._drop(packed.data)
            directions = 2 if self.encoder.bidirectional else 1
            if None in groups:
                logits[None] = _project(functions.heads, states, groups[None], directions)
            reverse = [False, True][:directions]
            pooled = {
                kind: functions.pool(states, order.batch_sizes, kind, reverse=reverse)
                for kind in ("mean", "max")
                if kind in groups
            }
            if "last" in groups:
                h_n = self._drop(h_n[-directions:])
        for kind, heads in groups.items():
            if kind is not None:
                features = h_n.transpose(0, 1).flatten(1) if kind == "last" else pooled[kind]
                of_sorted = _project(functions.heads, features, heads, 1)
                unsorted = order.unsorted_indices
                logits[kind] = of_sorted if unsorted is None else of_sorted.index_select(0, unsorted)
        return logits

    def _needs_states(self, data: Tensor) -> bool:
        """Whether the states are needed themselves: for a derivative, to drop some, or by a module's own code."""
        return (
            (self.training and self.dropout > 0)
            or wants_gradient(data, *self.parameters())
            or transforming()
            or _is_custom(self.encoder, LSTM)
            or any(_is_custom(head, Head) for head in self.heads.values())
        )

    def _drop(self, tensor: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return tensor
        if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
            return ops.dropout(tensor, self.dropout)
        return F.dropout(tensor, self.dropout)


def _is_custom(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether calling the module does more than ``base`` does: a forward of its own, or hooks."""
    # Pruning and the older weight normalisation compute a module's weight in such a hook.
    return (
        type(module).forward is not base.forward
        or "forward" in vars(module)
        or bool(module._forward_pre_hooks or module._forward_hooks)
        or bool(module._backward_pre_hooks or module._backward_hooks)
    )


def _project(function: Callable[..., Tensor], features: Tensor, heads: Sequence[Head], parts: int) -> Tensor:
    """All heads at once; one by one, as modules, where one does more."""
    if any(_is_custom(head, Head) for head in heads):
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
