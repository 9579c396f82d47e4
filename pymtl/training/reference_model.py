"""The multi-task model as one writes it without this library."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pymtl import embeddings
from pymtl.decoder import DecoderHead
from pymtl.heads import CRFHead, Head
from pymtl.reference.pooling import attention
from pymtl.training.reference_decoder import Decoder, PlainMemory


class CharacterCNN(embeddings.CharacterCNN):
    """:class:`pymtl.CharacterCNN` by torch's convolutions."""

    @staticmethod
    def like(other: embeddings.CharacterCNN) -> CharacterCNN:
        """With the parameters of ``other``."""
        plain = copy.copy(other)
        plain.__class__ = CharacterCNN
        return plain

    def _takes_kernels(self, embedded: Tensor) -> bool:
        return False


class MultiTaskModel(nn.Module):
    """:class:`pymtl.MultiTaskModel` on nn.LSTM, pack_padded_sequence and F.linear.

    The parameters have the same names, so either model loads the other's ``state_dict``. Padded batches, batch
    first, only.

    Args:
        embedding, heads, dropout: as for pymtl.MultiTaskModel; of several fields, the embedding gets their rows,
            padding among them. A CharacterCNN in it is replaced by torch's convolutions.
        encoder: an nn.LSTM, nn.GRU or nn.RNN with ``batch_first=True``.
        packed: run the encoder on a PackedSequence; otherwise on the padded batch as it is, whose padding then
            changes the results of a backward direction: only the time it takes is of interest.
    """

    def __init__(
        self,
        embedding: nn.Module,
        encoder: nn.RNNBase,
        heads: Mapping[str, Head],
        dropout: float = 0.0,
        packed: bool = True,
    ) -> None:
        super().__init__()
        for parent in list(embedding.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, embeddings.CharacterCNN):
                    parent.add_module(name, CharacterCNN.like(module))
        self.embedding = embedding
        self.encoder = encoder
        self.dropout = dropout
        self.packed = packed
        self.heads = nn.ModuleDict(heads)
        for head in heads.values():
            head.materialize((2 if encoder.bidirectional else 1) * encoder.hidden_size)
            if isinstance(head, CRFHead):
                head.crf.batch_first = True
        for task, head in self.heads.items():
            if isinstance(head, DecoderHead):
                self.heads[task] = Decoder(head, packed)

    def forward(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        lengths: Tensor,
        tasks: Sequence[str] | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor | PlainMemory]:
        first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
        if isinstance(inputs, Tensor):
            embedded = self.embedding(inputs)
        else:
            rows = {name: field.flatten(0, 1) for name, field in inputs.items()}
            embedded = self.embedding(rows).unflatten(0, first.shape[:2])
        embedded = F.dropout(embedded, self.dropout, self.training)
        if self.packed:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            output, state = self.encoder(packed)
            states, _ = pad_packed_sequence(output, batch_first=True, total_length=first.shape[1])
        else:
            states, state = self.encoder(embedded)
        h_n = state[0] if isinstance(state, tuple) else state
        whole, states = states, F.dropout(states, self.dropout, self.training)
        directions = 2 if self.encoder.bidirectional else 1
        features = {
            None: states,
            "last": F.dropout(h_n[-directions:].transpose(0, 1).flatten(1), self.dropout, self.training),
        }
        lengths = lengths.to(first.device)
        valid = (torch.arange(first.shape[1], device=first.device) < lengths.unsqueeze(1)).unsqueeze(-1)
        if any(head.pooling == "mean" for head in self.heads.values()):
            features["mean"] = torch.where(valid, states, 0.0).sum(1) / lengths.unsqueeze(1)
        if any(head.pooling == "max" for head in self.heads.values()):
            maximum = torch.where(valid, whole, -torch.inf).amax(1)
            features["max"] = F.dropout(maximum, self.dropout, self.training)
        logits = {}
        for task in self.heads if tasks is None else tasks:
            head = self.heads[task]
            if isinstance(head, Decoder):
                target = None if targets is None else targets.get(task)
                if target is None:
                    read = head.read(states, lengths)
                    logits[task] = PlainMemory(head, read, head.first(features["last"]))
                else:
                    logits[task] = head(states, lengths, features["last"], target)
                continue
            if head.attention is None:
                own = features[head.pooling]
            else:
                own = attention(states, valid.squeeze(-1), head.attention.weight, head.attention.query)
            logits[task] = F.linear(own, head.weight, head.bias)
        return logits
