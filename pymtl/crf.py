"""Conditional random fields over the tags of a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import ops, reference
from pymtl.packing import as_lengths, same_packing


class CRF(nn.Module):
    """A linear-chain conditional random field (Lafferty, McCallum & Pereira 2001) on the scores of C tags.

    A path of tags y has the score ``start_transitions[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1},
    y_t] + end_transitions[y_T]`` and the probability softmax of it over all paths. Training's log-likelihoods and
    their gradients, and decoding, are kernels over packed sequences.

    Args:
        num_tags: C.
        labels: the C tags' names. If given, paths keep to the BIO scheme (Ramshaw & Marcus 1995): ``I-x`` follows
            ``B-x`` or ``I-x`` alone.
        batch_first: padded input and output are [B, T, ...] rather than [T, B, ...].

    Parameters: ``start_transitions`` [C], ``end_transitions`` [C] and ``transitions`` [C, C], from and to; drawn
    uniformly from -0.1 to 0.1.

    Raises:
        ValueError: ``num_tags`` is below 1, or there is not one label for each tag.
    """

    def __init__(self, num_tags: int, labels: Sequence[str] | None = None, batch_first: bool = False) -> None:
        super().__init__()
        if not isinstance(num_tags, int) or num_tags < 1:
            raise ValueError(f"num_tags: expected a number above 0, got {num_tags!r}")
        if labels is not None and len(labels) != num_tags:
            raise ValueError(f"labels: expected {num_tags} names, got {len(labels)}")
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.labels = None if labels is None else list(labels)
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        names = [""] * num_tags if labels is None else labels
        start = torch.tensor([name.startswith("I-") for name in names])
        steps = torch.tensor([[to.startswith("I-") and before[1:] != to[1:] for to in names] for before in names])
        # What the labels say, not what training found: it is no part of the state.
        self.register_buffer("_forbidden_start", start, persistent=False)
        self.register_buffer("_forbidden", steps, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scores of starts [C], ends [C] and transitions [C, C]; -inf where the labels forbid one."""
        if self.labels is None:
            return self.start_transitions, self.end_transitions, self.transitions
        return (
            self.start_transitions.masked_fill(self._forbidden_start, -torch.inf),
            self.end_transitions,
            self.transitions.masked_fill(self._forbidden, -torch.inf),
        )

    def log_likelihood(
        self,
        emissions: Tensor | PackedSequence,
        tags: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """log p(tags | emissions) of each sequence.

        Args:
            emissions: padded [T, B, C] ([B, T, C] if ``batch_first``), or a PackedSequence.
            tags: int64, padded [T, B] ([B, T]) or packed like the emissions; not read at padding.
            lengths: of padded sequences; None if all are T long.

        Returns:
            [B] in the batch's order.

        Raises:
            IndexError: a tag is out of range.
            TypeError, ValueError: the emissions' and the tags' layouts differ.
            RuntimeError: a size, dtype or device does not fit.
        """
        result, order = self._log_likelihood(emissions, tags, lengths)
        return result if order.unsorted_indices is None else result.index_select(0, order.unsorted_indices)

    def _log_likelihood(
        self,
        emissions: Tensor | PackedSequence,
        tags: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, ops.PackingOrder]:
        """In the packed order: for a sum over the batch any order will do."""
        packed, order = self._pack(emissions, lengths)
        if isinstance(emissions, PackedSequence) != isinstance(tags, PackedSequence):
            raise TypeError(
                f"tags: expected a {type(emissions).__name__} like the emissions, got a {type(tags).__name__}"
            )
        if isinstance(tags, PackedSequence):
            if not same_packing(emissions, tags):
                raise ValueError("tags: expected the packing of the emissions, got another order or lengths")
            flat = tags.data
        else:
            if tags.shape != emissions.shape[:2]:
                raise ValueError(f"tags: expected shape {list(emissions.shape[:2])}, got {list(tags.shape)}")
            flat = ops.pack(tags, order, batch_first=self.batch_first)
        return self._functions(packed).crf(packed, order.batch_sizes, flat, *self.scores()), order

    def forward(
        self,
        emissions: Tensor | PackedSequence,
        tags: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The negative log-likelihood of all tags over the number of tokens: a loss.

        Arguments and errors as for :meth:`log_likelihood`.
        """
        tokens = emissions.data.shape[0] if isinstance(emissions, PackedSequence) else emissions[..., 0].numel()
        if lengths is not None:
            tokens = int(torch.as_tensor(lengths).sum())
        return self._log_likelihood(emissions, tags, lengths)[0].sum() * (-1 / tokens)

    @torch.no_grad()
    def decode(
        self, emissions: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The best path of each sequence (Viterbi 1967) and its score.

        Args:
            emissions, lengths: as for :meth:`log_likelihood`.

        Returns:
            ``tags``, int64, padded (0 at padding) or packed like the emissions, and ``scores`` [B] in the
            batch's order.
        """
        packed, order = self._pack(emissions, lengths)
        tags, scores = self._functions(packed).crf_decode(packed, order.batch_sizes, *self.scores())
        if order.unsorted_indices is not None:
            scores = scores.index_select(0, order.unsorted_indices)
        if isinstance(emissions, PackedSequence):
            return PackedSequence(tags, *emissions[1:]), scores
        return ops.unpack(tags, order, batch_first=self.batch_first), scores

    def _pack(
        self, emissions: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, ops.PackingOrder]:
        if isinstance(emissions, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            return emissions.data, ops.PackingOrder(*emissions[1:])
        if emissions.dim() != 3:
            raise ValueError(f"emissions: expected a 3-D padded batch, got {emissions.dim()}-D")
        batch, steps = emissions.shape[:2] if self.batch_first else (emissions.shape[1], emissions.shape[0])
        if lengths is None:
            lengths = torch.full((batch,), steps, dtype=torch.int64)
        order = ops.packing_order(as_lengths(lengths, batch), steps)
        return ops.pack(emissions, order, batch_first=self.batch_first), order

    def _functions(self, emissions: Tensor) -> object:
        kernels = emissions.device.type == "cpu" and emissions.dtype in (torch.float32, torch.float64)
        return ops if kernels else reference

    def extra_repr(self) -> str:
        return f"{self.num_tags}, batch_first={self.batch_first}" + (", BIO" if self.labels is not None else "")


@dataclass(frozen=True, eq=False)
class CRFLoss:
    """The negative log-likelihood of a :class:`CRF` over the number of tokens, for :class:`pymtl.JointLoss`.

    Args:
        crf: its parameters belong to the head.
        ignore_index: the tag that means there is no label: at padding, or of every token of a sentence, which then
            contributes nothing.
    """

    crf: CRF
    ignore_index: int = -100
    weight: ClassVar[None] = None
    label_smoothing: ClassVar[float] = 0.0
    kind: ClassVar[str] = "crf"

    def __call__(self, emissions: Tensor | PackedSequence, tags: Tensor | PackedSequence) -> Tensor:
        """The loss; padded sentences are as long as they have tags.

        Raises:
            TypeError, ValueError: the layouts differ, or a sentence has tags for some of its tokens only.
            IndexError: a tag is out of range.
        """
        packed = isinstance(emissions, PackedSequence)
        if packed != isinstance(tags, PackedSequence):
            raise TypeError(f"expected a {type(emissions).__name__} like the logits, got a {type(tags).__name__}")
        if packed:
            if not same_packing(emissions, tags):
                raise ValueError("expected the packing of the logits, got another order or lengths")
            missing = tags.data == self.ignore_index
            if not bool(missing.any()):
                return self.crf(emissions, tags)
            rows, lengths = pad_packed_sequence(tags, batch_first=True, padding_value=self.ignore_index)
            known = tags._replace(data=tags.data.masked_fill(missing, 0))
        else:
            if tags.shape != emissions.shape[:-1]:
                raise ValueError(
                    f"expected shape {list(emissions.shape[:-1])} for logits of shape {list(emissions.shape)}, "
                    f"got {list(tags.shape)}"
                )
            rows = tags if self.crf.batch_first else tags.t()
            lengths = (rows != self.ignore_index).sum(1).clamp(min=1)
            known = tags.masked_fill(tags == self.ignore_index, 0)
        labelled = rows != self.ignore_index
        counts = labelled.sum(1)
        whole = torch.arange(rows.shape[1]) < torch.where(counts > 0, lengths, 0).unsqueeze(1)
        partly = (labelled != whole).any(1)
        if bool(partly.any()):
            raise ValueError(
                "expected tags of all tokens of a sentence or of none, "
                f"got some for sentence {int(partly.nonzero()[0])}"
            )
        values = self.crf.log_likelihood(emissions, known, None if packed else lengths)
        if not bool(counts.any()):
            return values.new_zeros(())
        return -torch.where(counts > 0, values, 0.0).sum() / counts.sum()
