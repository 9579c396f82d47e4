"""Sequences out: a decoder that reads what it has written, and the encoder's states by attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops
from pymtl.attention import SCORES, Attended, Attention, Score
from pymtl.dropout import dropout
from pymtl.heads import Head, Reads
from pymtl.linear import linear
from pymtl.losses import CrossEntropy
from pymtl.ops.autograd import is_exporting
from pymtl.ops.late_errors import refuse_where
from pymtl.recurrent import GRU, LSTM
from pymtl.reference.attention import tokens_of
from pymtl.reference.pooling import sequences_of
from pymtl.serving.generation import END, UNKNOWN
from pymtl.states import States

CELLS = {"lstm": LSTM, "gru": GRU}
NO_PROBABILITY = 1e-12  # added to probabilities whose logarithm is taken
State = tuple[Tensor, ...]  # h, and of an LSTM c: [L, B, H] each


class Copied(NamedTuple):
    """What each packed token of the input is among a decoder's classes, ``classes`` int64 [N]; how many classes each
    sequence has, its own unknown tokens included, ``counts`` int64 [B] in the packed order; and ``every``, the numbers
    of all classes of the batch, from 0 on."""

    classes: Tensor
    counts: Tensor
    every: Tensor

    @property
    def count(self) -> int:
        return self.every.shape[0]


Step = Callable[[Tensor, State, Attended, Tensor, Copied | None], tuple[Tensor, State, Tensor]]


@dataclass(frozen=True)
class Memory:
    """What a decoder answers from: what :class:`pymtl.MultiTaskModel` gives in the place of logits where it is not told
    the targets.

    ``step``: :meth:`DecoderHead.step` of the decoder; ``attended``: the encoder's states, packed; ``initial``: the
    decoder's first states [L, B, H], in the packed order; ``places``: of each sentence of the batch, its place in that
    order, int64 [B]; ``copied``: what a decoder that copies has to know, else None.
    """

    step: Step
    attended: Attended
    initial: State
    places: Tensor
    copied: Copied | None = None

    def lengths(self) -> Tensor:
        """Of the sentences, in the batch's order, int64 [B] on the CPU."""
        sizes = self.attended.batch_sizes
        return (sizes.unsqueeze(0) > self.places.cpu().unsqueeze(1)).sum(1)


class DecoderHead(Head):
    """A sequence for each sequence: one token after the other from a recurrent decoder that attends to the encoder's
    states (Bahdanau et al. 2015; Luong et al. 2015, "Effective Approaches to Attention-based Neural Machine
    Translation").

    Of the target's tokens y, the encoder's states s_t and final states s::

        h_0 = tanh(W_0 s + b_0)                        of each layer; c_0 = W_1 s + b_1
        h_i = LSTM(E y_{i-1}, h_{i-1})
        c_i = sum_t a_it s_t                           a_i: Attention(h_i, s)
        p(y_i) = softmax(W_o tanh(W_c [h_i; c_i] + b_c) + b_o)

    What attention reads does not enter the next step (no input feeding), so in training the whole target is one call
    of the recurrence on packed tokens, and attention follows.

    With ``copy`` a token may be copied from the input (See et al. 2017, "Get To The Point: Summarization with
    Pointer-Generator Networks", equations 8 and 9): with x_i = E y_{i-1}::

        g_i = sigmoid(W_g [h_i; c_i; x_i] + b_g)
        P(w) = g_i p(y_i = w) + (1 - g_i) sum of a_it over the tokens t that are w

    A token of the input that is no class gets one of its own behind the others, C for the first such token of its
    sequence, C + 1 for the next. ``sources`` of the model say what each token is, and logits are ``log P``, as wide as
    the batch needs.

    Class 0 ends a sequence, and is read before its first token. Targets are int64 [B, S], filled up with
    ``ignore_index``, and each ends in class 0; a sequence of nothing but ``ignore_index`` has no label. A
    :class:`pymtl.MultiTaskModel` takes them as ``targets`` and gives logits [B, S, C] of the next token at each;
    without them it gives a :class:`Memory` to generate from, see :meth:`pymtl.MultiTaskModel.generate`.

    Args:
        num_classes: C, the tokens and the end.
        hidden_size, num_layers, cell: H and the layers of the decoder, ``"lstm"`` or ``"gru"``.
        embedding_dim: of the target's tokens.
        attention, attention_heads: as ``score`` and ``num_heads`` of :class:`pymtl.Attention`.
        tied: whether W_o is the embedding E (Press & Wolf 2017); W_c then gives as many features as E has.
        dropout: in training, of the embedded tokens, between layers, and of what W_o reads.
        copy: whether tokens may be copied from the input.
        unknown: with ``copy``, the class that is read in the place of a token that is none.
        loss, reads: as for :class:`Head`.

    Raises:
        TypeError: the loss is none of classes.
        ValueError: a name or number does not fit.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_size: int = 256,
        num_layers: int = 1,
        embedding_dim: int = 128,
        cell: Literal["lstm", "gru"] = "lstm",
        attention: Score = "general",
        attention_heads: int = 1,
        tied: bool = False,
        dropout: float = 0.0,
        copy: bool = False,
        unknown: int = UNKNOWN,
        loss: CrossEntropy | None = None,
        reads: Reads | None = None,
    ) -> None:
        super().__init__(num_classes, None, loss or CrossEntropy(), None, reads)
        if not isinstance(self.loss, CrossEntropy):
            raise TypeError(f"loss: expected a pymtl.CrossEntropy, got {type(self.loss).__name__}")
        if 0 <= self.loss.ignore_index < num_classes:
            raise ValueError(f"loss.ignore_index: expected none of the {num_classes} classes, got {loss.ignore_index}")
        if copy and (self.loss.label_smoothing > 0 or self.loss.weight is not None):
            raise ValueError("loss: expected neither label_smoothing nor weight with copy, whose classes vary")
        if copy and not 0 <= unknown < num_classes:
            raise ValueError(f"unknown: expected one of {num_classes} classes, got {unknown}")
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {tuple(CELLS)}, got {cell!r}")
        if attention not in SCORES:
            raise ValueError(f"attention: expected one of {SCORES}, got {attention!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout}")
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "embedding_dim": embedding_dim}
        for name, value in (sizes | {"attention_heads": attention_heads}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        self.hidden_size, self.num_layers, self.embedding_dim = hidden_size, num_layers, embedding_dim
        self.cell, self.score, self.attention_heads, self.tied = cell, attention, attention_heads, tied
        self.dropout = float(dropout)
        self.copy, self.unknown = copy, unknown
        if tied:
            del self.weight

    def materialize(
        self, in_features: int, like: Tensor | None = None, input_size: int = 0, before: Head | None = None
    ) -> None:
        self._states_size = in_features
        super().materialize(in_features, like, input_size, before)

    def materialize_output(self, in_features: int, kind: dict[str, object]) -> None:
        size, output = self.hidden_size, self.embedding_dim if self.tied else self.hidden_size
        if self.score == "dot" and size != in_features:
            raise ValueError(
                f"attention: expected 'general' or 'additive' for a decoder of {size} units and states of "
                f"{in_features} features, got 'dot', which takes states of one size"
            )
        for number in (size, in_features):
            if number % self.attention_heads != 0:
                raise ValueError(f"attention_heads: expected a divisor of {number}, got {self.attention_heads}")
        between = self.dropout if self.num_layers > 1 else 0.0
        self.embedding = nn.Embedding(self.out_features, self.embedding_dim, **kind)
        self.recurrence = CELLS[self.cell](self.embedding_dim, size, self.num_layers, dropout=between, **kind)
        states = self.num_layers * size * (2 if self.cell == "lstm" else 1)
        self.begin = nn.Linear(self._states_size, states, **kind)
        self.reader = Attention(size, in_features, self.score, self.attention_heads, **kind)
        self.combine = nn.Linear(size + in_features, output, **kind)
        if self.copy:
            self.switch = nn.Linear(size + in_features + self.embedding_dim, 1, **kind)
        if not self.tied:
            self.weight.materialize((self.out_features, output), **kind)
        self.bias.materialize((self.out_features,), **kind)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.embedding_dim**-0.5)
        nn.init.zeros_(self.bias)
        if not self.tied:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    @property
    def in_features(self) -> int:
        return self.combine.in_features - self.hidden_size

    def packed(self, targets: Tensor | PackedSequence) -> PackedSequence:
        """Targets, checked, packed by their own lengths.

        Raises:
            IndexError: one is no class. On a GPU a later loss raises it.
            TypeError: they are not int64, [B, S] or packed.
            ValueError: ``ignore_index`` stands before a class; or a sequence does not end in class 0, or has it before
                its end. On a GPU a later loss raises this.
        """
        ignored = self.loss.ignore_index
        packed = targets if isinstance(targets, PackedSequence) else packed_targets(targets, ignored)
        tokens = packed.data
        if tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise TypeError(f"expected int64 tokens [N], packed, got {tokens.dim()}-D {tokens.dtype}")
        # With copy there are as many classes as the batch needs, which the loss knows.
        above = tokens >= self.out_features if not self.copy else tokens != tokens
        wrong = (tokens != ignored) & ((tokens < 0) | above)
        refuse_where(wrong, tokens, lambda got: f"Target {got} is out of bounds", IndexError)
        is_last = torch.ones_like(tokens, dtype=torch.bool)
        is_last[followed(packed)] = False
        wrong = ((tokens == END) != is_last) & (tokens != ignored)
        refuse_where(wrong, tokens, _misplaced_end, ValueError)
        return packed

    def projection(self) -> tuple[Tensor, Tensor]:
        return self.embedding.weight if self.tied else self.weight, self.bias

    def memory(
        self,
        states: States,
        embedded: States,
        before: Tensor | None,
        places: Tensor | None,
        sources: Tensor | None = None,
    ) -> Memory:
        """What answers are made from.

        Args:
            states, embedded, before: as for :meth:`features`.
            places: of each sentence of the batch, its place in the packed order; None if that is the batch's.
            sources: with ``copy``, what each packed token is among the classes, int64 [N].

        Raises:
            TypeError, ValueError: ``sources`` are missing, or none of such a head.
        """
        copied = self._copied(sources, states.batch_sizes)
        attended = self.reader.attended(self.features(states, embedded, before), states.batch_sizes)
        kinds = 2 if self.cell == "lstm" else 1
        first = linear(states.pooled("last"), self.begin).view(states.batch, kinds, self.num_layers, self.hidden_size)
        h, *c = first.permute(1, 2, 0, 3).contiguous().unbind()  # [L, B, H] each
        if places is None:
            places = torch.arange(states.batch, device=first.device)
        return Memory(self.step, attended, (torch.tanh(h), *c), places, copied)

    def _copied(self, sources: Tensor | None, batch_sizes: Tensor) -> Copied | None:
        if not self.copy or is_exporting():  # a program gives what does not depend on them
            return None
        if sources is None:
            raise ValueError("sources: expected what each token is among the classes, for a head that copies")
        if sources.dtype != torch.int64 or sources.dim() != 1:
            raise TypeError(f"sources: expected one int64 a token, got {sources.dim()}-D {sources.dtype}")
        if sources.numel() > 0 and int(sources.min()) < 0:
            raise ValueError(f"sources: expected classes, got {int(sources.min())}")
        return copied_from(sources, batch_sizes, self.out_features)

    def forward(self, memory: Memory, targets: PackedSequence) -> Tensor:
        """Logits [M, C] of each target token, packed as ``targets``, from those before it."""
        sizes = targets.batch_sizes
        count = targets.data.shape[0]
        if count == 0:
            return self.bias.new_zeros(0, self.out_features if memory.copied is None else memory.copied.count)
        rows = sequences_of(sizes, count).to(memory.places.device, non_blocking=True)
        places = memory.places if targets.sorted_indices is None else memory.places[targets.sorted_indices]
        places = places[: int(sizes[0])]
        inputs = self._dropped(self.embedding(self._known(read_before(targets))))
        state = tuple(each.index_select(1, places) for each in memory.initial)
        states, _ = self.recurrence(PackedSequence(inputs, sizes), state if self.cell == "lstm" else state[0])
        return self._output(states.data, inputs, memory.attended, places[rows], memory.copied)[0]

    def step(
        self, tokens: Tensor, state: State, attended: Attended, places: Tensor, copied: Copied | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """One step of M hypotheses.

        Args:
            tokens: what each reads, int64 [M].
            state: each one's, [L, M, H].
            attended, copied: the sentences, of :class:`Memory`.
            places: of each, its sentence's place in the packed order, int64 [M].

        Returns:
            Logits [M, C], the states after the step, and the weights of attention [M, J, T]. With ``copied`` there are
            as many logits as the batch has classes; those of other sequences' unknown tokens are -inf.
        """
        inputs = self.embedding(self._known(tokens))
        states, after = self.recurrence(inputs.unsqueeze(0), state if self.cell == "lstm" else state[0])
        logits, weights = self._output(states[0], inputs, attended, places, copied)
        if copied is not None:
            logits = logits.masked_fill(copied.every >= copied.counts[places].unsqueeze(1), -torch.inf)
        return logits, after if self.cell == "lstm" else (after,), weights

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens as they are read: what is no class is unknown. (Without copying a loss refuses it, on a GPU later.)"""
        return torch.where(tokens < self.out_features, tokens, self.unknown if self.copy else END)

    def _dropped(self, tensor: Tensor) -> Tensor:
        return dropout(tensor, self.dropout if self.training else 0.0)

    def _output(
        self, states: Tensor, inputs: Tensor, attended: Attended, places: Tensor, copied: Copied | None
    ) -> tuple[Tensor, Tensor]:
        context, weights = self.reader(states, attended, places)
        both = torch.cat([states, context], dim=1)
        logits = super().forward(self._dropped(torch.tanh(linear(both, self.combine))))
        if copied is not None:
            gate = torch.sigmoid(linear(torch.cat([both, inputs], dim=1), self.switch))
            logits = self._with_copies(logits, gate, weights, attended, places, copied)
        return logits, weights

    def _with_copies(
        self, logits: Tensor, gate: Tensor, weights: Tensor, attended: Attended, places: Tensor, copied: Copied
    ) -> Tensor:
        """``log P`` [M, C + copied tokens that are no class]."""
        tokens, valid = tokens_of(places, attended.batch_sizes)
        classes = torch.where(valid, copied.classes[tokens], 0)
        written = nn.functional.pad(gate * logits.softmax(-1), (0, copied.count - self.out_features))
        shares = (1 - gate) * weights.mean(1).to(gate.dtype)
        # Not the logarithm of 0, whose derivative is none.
        return torch.log(written.scatter_add(1, classes, shares) + NO_PROBABILITY)

    def extra_repr(self) -> str:
        return f"{self.out_features}, cell={self.cell!r}, tied={self.tied}, loss={self.loss}"


def copied_from(sources: Tensor, batch_sizes: Tensor, num_classes: int) -> Copied:
    """What a decoder of so many classes has to know of packed sources, int64 [N]."""
    batch = int(batch_sizes[0]) if len(batch_sizes) > 0 else 0
    tokens, valid = tokens_of(torch.arange(batch, device=sources.device), batch_sizes)
    last = torch.where(valid, sources[tokens], 0).amax(1) if batch > 0 else sources.new_zeros(0)
    counts = (last + 1).clamp(min=num_classes)
    count = max(counts.tolist(), default=num_classes)
    return Copied(sources, counts, torch.arange(count, device=sources.device))


def read_before(targets: PackedSequence) -> Tensor:
    """What a decoder has read when it is to write each target token: the one before, or the end. Packed likewise."""
    before = followed(targets)
    # Where there is no label, there is only the end to read.
    tokens = targets.data.index_select(0, before).clamp(min=END)
    return torch.cat([tokens.new_full((len(targets.data) - len(before),), END), tokens])


def followed(targets: PackedSequence) -> Tensor:
    """The places of the tokens that another one follows, in the order of those others, int64 [N - B]."""
    sizes, count = targets.batch_sizes, targets.data.shape[0]
    first = int(sizes[0]) if len(sizes) > 0 else 0
    back = sizes[:-1].repeat_interleave(sizes[1:], output_size=count - first)
    return (torch.arange(first, count) - back).to(targets.data.device, non_blocking=True)


def _misplaced_end(got: int) -> str:
    where = "before it" if got == END else "there"
    return f"expected class {END} at the end of each sequence and nowhere else, got {got} {where}"


def packed_targets(targets: Tensor, ignore_index: int = -100) -> PackedSequence:
    """Targets [B, S] of a :class:`DecoderHead`, filled up with ``ignore_index``, packed by their own lengths. A
    sequence without a label has one ``ignore_index``.

    Raises:
        TypeError: they are not int64 [B, S].
        ValueError: ``ignore_index`` stands before a class.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"expected int64 tokens [B, S], got a {type(targets).__name__}")
    if targets.dtype != torch.int64 or targets.dim() != 2:
        raise TypeError(f"expected int64 tokens [B, S], got {targets.dim()}-D {targets.dtype}")
    present = targets != ignore_index
    lengths = present.sum(1)
    inside = torch.arange(targets.shape[1], device=targets.device) < lengths.unsqueeze(1)
    if bool((present != inside).any()):
        raise ValueError(f"expected tokens first and {ignore_index} behind them")
    if targets.shape[1] == 0:
        targets = targets.new_full((targets.shape[0], 1), ignore_index)
    lengths = lengths.clamp(min=1).cpu()
    order = ops.packing_order(lengths, int(lengths.max()) if len(lengths) > 0 else 0, targets.device)
    return PackedSequence(ops.pack(targets[:, : order.batch_sizes.shape[0]], order, batch_first=True), *order)
