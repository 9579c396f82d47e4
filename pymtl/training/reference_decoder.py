"""A decoder with attention, and the search for its answers, as one writes them without this library."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pymtl.decoder import DecoderHead, State
from pymtl.recurrent import revert
from pymtl.serving.generation import END, NO_COVERAGE, Hypothesis, Search
from pymtl.training.errors import ConfigError

_OF_A_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

# From the tokens that M hypotheses read, and the state of each, to logits [M, C] of the next tokens, the states behind
# them, and how much was read of each token of the sentence [M, T].
Step = Callable[[list[int], list[Any]], tuple[Tensor, list[Any], Tensor | None]]


class Read(NamedTuple):
    """The encoder's states, padded, as attention reads them: ``keys`` [B, T, D], ``values`` [B, T, F], and which are no
    padding, ``valid`` [B, T]."""

    keys: Tensor
    values: Tensor
    valid: Tensor


class Decoder(nn.Module):
    """What a :class:`pymtl.DecoderHead` computes, with copies of its parameters: nn.LSTM or nn.GRU, and attention on
    padded targets; step by step, nn.LSTMCell or nn.GRUCell. The parameters have the same names.

    Args:
        head: whose parameters are taken; materialised.
        packed: run the recurrence on a PackedSequence; otherwise on the padded targets.
    """

    pooling = None

    def __init__(self, head: DecoderHead, packed: bool = True) -> None:
        super().__init__()
        plain = copy.deepcopy(head)
        self.embedding, self.recurrence = plain.embedding, revert(plain.recurrence)
        self.begin, self.reader, self.combine = plain.begin, plain.reader, plain.combine
        if not head.tied:
            self.weight = plain.weight
        self.bias = plain.bias
        self.tied, self.packed, self.dropout, self.loss = head.tied, packed, head.dropout, head.loss

    def read(self, states: Tensor, lengths: Tensor) -> Read:
        """Of the encoder's padded states [B, T, F]."""
        valid = torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)
        keys = states if self.reader.score == "dot" else self.reader.key(states)
        return Read(keys, states, valid)

    def first(self, last: Tensor) -> State:
        """The states [L, B, H] before the first token, from the encoder's final ones [B, F]."""
        layers, size = self.recurrence.num_layers, self.recurrence.hidden_size
        h, *c = self.begin(last).view(len(last), -1, layers, size).permute(1, 2, 0, 3).contiguous()
        return (torch.tanh(h), *c)

    def forward(self, states: Tensor, lengths: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, S, C] of each target token, from those before it.

        Args:
            states: of the encoder, padded, [B, T, F].
            lengths: of the sentences, int64 [B].
            last: the encoder's final states [B, F].
            targets: int64 [B, S], filled up with the loss's ``ignore_index``.
        """
        before = torch.cat([targets.new_full((len(targets), 1), END), targets[:, :-1].clamp(min=END)], dim=1)
        embedded = F.dropout(self.embedding(before), self.dropout, self.training)
        state = self.first(last)
        hx = state if len(state) > 1 else state[0]
        if self.packed:
            sizes = (targets != self.loss.ignore_index).sum(1).clamp(min=1).cpu()
            inputs = pack_padded_sequence(embedded, sizes, batch_first=True, enforce_sorted=False)
            output, _ = self.recurrence(inputs, hx)
            hidden, _ = pad_packed_sequence(output, batch_first=True, total_length=targets.shape[1])
        else:
            hidden, _ = self.recurrence(embedded.transpose(0, 1), hx)
            hidden = hidden.transpose(0, 1)
        return self._output(hidden, self.read(states, lengths))[0]

    def cells(self) -> list[nn.LSTMCell | nn.GRUCell]:
        """Of each layer."""
        made = nn.LSTMCell if isinstance(self.recurrence, nn.LSTM) else nn.GRUCell
        found = []
        for layer in range(self.recurrence.num_layers):
            weights = {name: getattr(self.recurrence, f"{name}_l{layer}") for name in _OF_A_CELL}
            cell = made(weights["weight_ih"].shape[1], self.recurrence.hidden_size)
            for name, weight in weights.items():
                setattr(cell, name, weight)
            found.append(cell)
        return found

    def step(self, cells: list[nn.LSTMCell | nn.GRUCell], tokens: Tensor, state: State, read: Read) -> tuple:
        """One step of M hypotheses, whose sentences ``read`` has one for each.

        Returns:
            Logits [M, C], the states after the step, and the weights of attention [M, J, T].
        """
        x = self.embedding(tokens)
        layers = []
        for layer, cell in enumerate(cells):
            own = tuple(each[layer] for each in state)
            after = cell(x, own if len(own) > 1 else own[0])
            layers.append(after if isinstance(after, tuple) else (after,))
            x = layers[-1][0]
        logits, weights = self._output(x.unsqueeze(1), read)
        return logits[:, 0], tuple(torch.stack(each) for each in zip(*layers)), weights[:, :, 0]

    def _output(self, hidden: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """Of the decoder's states [B, S, H]."""
        heads = self.reader.num_heads
        query = self.reader.query(hidden) if self.reader.score == "additive" else hidden
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, read.keys, read.values))
        if self.reader.score == "additive":
            mixed = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2))
            scores = (mixed * self.reader.weight.view(heads, 1, 1, -1)).sum(-1)
        else:
            scores = q @ k.transpose(2, 3)
        weights = scores.masked_fill(~read.valid[:, None, None], -torch.inf).softmax(-1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        features = torch.tanh(self.combine(torch.cat([hidden, context], dim=-1)))
        weight = self.embedding.weight if self.tied else self.weight
        return F.linear(F.dropout(features, self.dropout, self.training), weight, self.bias), weights


@dataclass(frozen=True)
class PlainMemory:
    """What a :class:`Decoder` answers from: in the place of :class:`pymtl.decoder.Memory`."""

    decoder: Decoder
    read: Read
    first: State

    def generate(
        self,
        settings: Search,
        max_length: int,
        attention: bool = False,
        never: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        """As :func:`pymtl.generation.generate`, one sentence after the other; no samples.

        Raises:
            ConfigError: the settings ask for samples.
        """
        if settings.sample:
            raise ConfigError("sample: expected a search of a model in plain PyTorch, which draws no samples")
        cells = self.decoder.cells()
        return [self._of(i, cells, settings, max_length, attention, never) for i in range(len(self.read.valid))]

    def _of(
        self, i: int, cells: list, settings: Search, max_length: int, attention: bool, never: Sequence[int]
    ) -> list[Hypothesis]:
        length = int(self.read.valid[i].sum())
        read = Read(*(each[i : i + 1, :length] for each in self.read))
        asked = attention or settings.coverage_penalty > 0

        def step(tokens: list[int], states: list[State]) -> tuple[Tensor, list[State], Tensor | None]:
            state = tuple(torch.cat(each, dim=1) for each in zip(*states))
            own = Read(*(each.expand(len(tokens), -1, *each.shape[2:]) for each in read))
            inputs = torch.tensor(tokens, device=state[0].device)
            logits, after, weights = self.decoder.step(cells, inputs, state, own)
            split = list(zip(*(each.split(1, dim=1) for each in after)))
            return logits, split, weights.mean(1) if asked else None

        first = tuple(state[:, i : i + 1] for state in self.first)
        with torch.no_grad():
            return beam_search(step, first, settings, settings.max_length or max_length, never=never)


def beam_search(
    step: Step, state: Any, settings: Search, max_length: int, first: int = END, never: Sequence[int] = ()
) -> list[Hypothesis]:
    """The ``nbest`` sequences of one sentence, the best first.

    Args:
        step, state: the model, and the state before the first token.
        settings: not of sampling.
        max_length: tokens at most.
        first: what is read first.
        never: tokens that are not to come.
    """
    settings = settings.with_beam()
    size = settings.beam_size
    live: list[tuple[list[int], float, Any, list[Tensor]]] = [([], 0.0, state, [])]
    found: list[Hypothesis] = []
    cut: list[Hypothesis] = []  # those that did not end
    for length in range(1, max_length + 2):
        candidates = []
        logits, states, weights = step([each[0][-1] if each[0] else first for each in live], [each[2] for each in live])
        every = logits.double().log_softmax(-1).tolist()
        ended: set[tuple[int, ...]] = set()
        for row, (tokens, total, _, read) in enumerate(live):
            scores, after = every[row], states[row]
            for token in {*never, *_repeated(tokens, settings.no_repeat_ngram)}:
                scores[token] = -math.inf
            if max(scores) == -math.inf and length <= max_length:
                cut.append(_hypothesis(tokens, total, read, False, settings))
            own = [*read, weights[row]] if weights is not None else []
            candidates += [(total + score, tokens, token, after, own) for token, score in enumerate(scores)]
        candidates = [each for each in candidates if each[0] > -math.inf]
        best = sorted(candidates, key=lambda each: -each[0])[: 2 * size]
        for total, tokens, token, _, read in best[:size]:
            if token == END:
                ended.add(tuple(tokens))
                found.append(_hypothesis(tokens, total, read, True, settings))
        found = sorted(found, key=lambda own: -own.score)[:size]
        if length > max_length:
            rest = [each for each in live if tuple(each[0]) not in ended]
            cut += [_hypothesis(tokens, total, read, False, settings) for tokens, total, _, read in rest]
            break
        live = [([*tokens, t], total, after, read) for total, tokens, t, after, read in best if t != END][:size]
        reachable = max((total for _, total, _, _ in live), default=-math.inf)
        if not live or (len(found) == size and _score(reachable, length, settings) <= found[-1].score):
            break
    return [*found, *sorted(cut, key=lambda own: -len(own.tokens))][: settings.nbest]


def _score(log_probability: float, length: int, settings: Search) -> float:
    return log_probability * math.exp(-settings.length_penalty * math.log((5 + length) / 6))


def _hypothesis(tokens: list[int], total: float, read: list[Tensor], ended: bool, settings: Search) -> Hypothesis:
    score = _score(total, max(len(tokens) + ended, 1), settings)
    if read and settings.coverage_penalty > 0:
        covered = torch.stack(read).double().sum(0).clamp(NO_COVERAGE, 1.0)
        score += settings.coverage_penalty * float(covered.log().sum())
    attention = torch.stack(read).double().cpu().numpy() if read else None
    return Hypothesis(tokens, total, score, ended, attention)


def _repeated(tokens: list[int], n: int) -> list[int]:
    """Those with which n tokens would come a second time."""
    if n == 0 or len(tokens) < n:
        return []
    end = tuple(tokens[len(tokens) - n + 1 :])
    return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n - 1]) == end]
