"""Encoders side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops
from pymtl.custom import runs_own_code
from pymtl.recurrent.lstm import LSTM
from pymtl.states import States


class ParallelStates(NamedTuple):
    """``tokens`` [N, K, F], and ``last`` [B, K, F], each direction's own final state."""

    tokens: Tensor
    last: Tensor


class ParallelLSTM(nn.Module):
    """K LSTMs of the same sizes over one batch: each layer is a single call of K*D recurrences.

    The results, and the gradients, are the same bits as those of each LSTM alone.

    Args:
        encoders: :class:`pymtl.LSTM` by name, of one ``input_size``, ``hidden_size``, ``num_layers``, ``bias``,
            ``dropout`` and ``bidirectional``.

    Raises:
        TypeError: one is no pymtl.LSTM.
        ValueError: there is none, they differ, or one has ``reverse=True``.
    """

    def __init__(self, encoders: Mapping[str, LSTM]) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("encoders: expected at least one, got none")
        first = next(iter(encoders.values()))
        for name, encoder in encoders.items():
            if not isinstance(encoder, LSTM):
                raise TypeError(f"encoders[{name!r}]: expected a pymtl.LSTM, got {type(encoder).__name__}")
            if encoder._pymtl_variants.reverse:
                raise ValueError(f"encoders[{name!r}]: expected one that reads from the first token, got reverse=True")
            if _architecture(encoder) != _architecture(first):
                raise ValueError(
                    f"encoders[{name!r}]: expected the sizes of the first, {_architecture(first)}, "
                    f"got {_architecture(encoder)}"
                )
        self.encoders = nn.ModuleDict(encoders)
        self.directions = 2 if first.bidirectional else 1

    def forward(self, data: Tensor, batch_sizes: Tensor, names: Sequence[str] | None = None) -> ParallelStates:
        """Runs some of the encoders.

        Args:
            data: [N, I] for all of them, or [N, K, I], each its own.
            batch_sizes: int64 [T] on the CPU, as in PackedSequence.
            names: of the K encoders to run; all by default.
        """
        encoders = [self.encoders[name] for name in (self.encoders if names is None else names)]
        if data.dim() == 3 and data.shape[1] != len(encoders):
            raise RuntimeError(f"data: expected {len(encoders)} inputs, one for each encoder, got {data.shape[1]}")
        if any(_runs_alone(encoder, data) for encoder in encoders):
            return self._one_by_one(encoders, data, batch_sizes)
        inputs = 1 if data.dim() == 2 else len(encoders)
        data = data.flatten(1)
        first = encoders[0]
        for layer in range(first.num_layers):
            if layer > 0 and first.dropout > 0:
                data = F.dropout(data, first.dropout, first.training)
            each = [encoder.layer_weights(layer) for encoder in encoders]
            lists = ([item for group in groups for item in group] for groups in zip(*(w[:5] for w in each)))
            weights = ops.RNNWeights(*lists, first.mode)
            data, h_n, _ = ops.rnn(data, batch_sizes, weights, inputs=inputs)
            inputs = len(encoders)
        count, batch = len(encoders), h_n.shape[1]
        tokens = data.view(data.shape[0], count, data.shape[1] // count)
        last = h_n.view(count, self.directions, batch, first.hidden_size).permute(2, 0, 1, 3).flatten(2)
        return ParallelStates(tokens, last)

    def states(self, data: Tensor, batch_sizes: Tensor, names: Sequence[str] | None = None) -> dict[str, States]:
        """:meth:`forward`, as the states of each encoder by its name."""
        names = list(self.encoders if names is None else names)
        tokens, last = self(data, batch_sizes, names)
        return {
            name: States.of(own, batch_sizes, self.directions, final)
            for name, own, final in zip(names, tokens.unbind(1), last.unbind(1))
        }

    def _one_by_one(self, encoders: list[LSTM], data: Tensor, batch_sizes: Tensor) -> ParallelStates:
        """Calls one encoder after the other: for encoders with code of their own, and for data that no kernel takes."""
        tokens, last = [], []
        for encoder, own in zip(encoders, [data] * len(encoders) if data.dim() == 2 else data.unbind(1)):
            output, (h_n, _) = encoder(PackedSequence(own, batch_sizes))
            tokens.append(output.data)
            last.append(h_n[-self.directions :].transpose(0, 1).flatten(1))
        return ParallelStates(torch.stack(tokens, 1), torch.stack(last, 1))


def _runs_alone(encoder: LSTM, data: Tensor) -> bool:
    """Whether the encoder has to run by itself: the call for all of them takes no options, no code of its own and no
    weights in fewer bits."""
    varied = encoder._pymtl_variants.act(training=True)
    return varied or runs_own_code(encoder, LSTM) or not encoder.kernels_take(data) or encoder._pymtl_runs_narrow(data)


def _architecture(encoder: LSTM) -> dict[str, object]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "dropout", "bidirectional", "proj_size")
    return {name: getattr(encoder, name) for name in names}
