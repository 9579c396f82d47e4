"""Connectionist temporal classification: a sequence's labels are known in order, but not their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl.losses import SequenceLoss
from pymtl.serving import ctc
from pymtl.serving.ctc import BLANK


@dataclass(frozen=True)
class CTCLoss(SequenceLoss):
    """torch's CTC loss (Graves et al. 2006, "Connectionist Temporal Classification"), class 0 the blank; the mean over
    the sequences of each one's loss over its number of labels.

    Targets are int64 [B, S], classes from 1 on, in the batch's order, filled up with ``ignore_index``; a sequence of
    nothing else has no label and contributes nothing, nor does one too short for its labels.

    Args:
        ignore_index: what fills up the targets.
        batch_first: padded logits are [B, T, C] rather than [T, B, C].
    """

    ignore_index: int = -100
    batch_first: bool = True
    kind: ClassVar[str] = "ctc"

    def __call__(self, logits: Tensor | PackedSequence, targets: Tensor | PackedSequence) -> Tensor:
        """The loss of packed logits [N, C], or of padded ones, all of whose steps count.

        Raises:
            IndexError: a label is out of range.
            TypeError, ValueError: the targets' layout does not fit.
        """
        if isinstance(targets, PackedSequence) or targets.is_floating_point() or targets.dim() != 2:
            raise TypeError("expected int64 labels [B, S]")
        padded, lengths = padded_logits(logits, self.batch_first)
        if padded.dtype in (torch.float16, torch.bfloat16):
            padded = padded.float()
        if targets.shape[0] != padded.shape[1]:
            raise ValueError(f"expected labels of {padded.shape[1]} sequences, got {targets.shape[0]}")
        present = targets != self.ignore_index
        if bool((present & ((targets < 1) | (targets >= padded.shape[2]))).any()):
            wrong = targets[present & ((targets < 1) | (targets >= padded.shape[2]))]
            raise IndexError(f"Target {int(wrong[0])} is out of bounds: expected 1 to {padded.shape[2] - 1}")
        counts = present.sum(1)
        if bool((present != (torch.arange(targets.shape[1], device=targets.device) < counts.unsqueeze(1))).any()):
            raise ValueError(f"expected labels first and {self.ignore_index} behind them")
        labelled = counts > 0
        if not bool(labelled.any()):
            return padded[:0].sum()  # nothing, but with a gradient of nothing
        return F.ctc_loss(
            padded[:, labelled].log_softmax(-1),
            targets[labelled].masked_fill(~present[labelled], BLANK),
            lengths.to(targets.device)[labelled],
            counts[labelled],
            blank=BLANK,
            zero_infinity=True,
        )


def padded_logits(logits: Tensor | PackedSequence, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    """[T, B, C] in the batch's order, and the lengths int64 [B]."""
    if isinstance(logits, PackedSequence):
        return pad_packed_sequence(logits)
    if logits.dim() != 3:
        raise ValueError(f"expected logits [B, T, C], got {logits.dim()}-D")
    by_step = logits.transpose(0, 1) if batch_first else logits
    return by_step, torch.full((by_step.shape[1],), by_step.shape[0], dtype=torch.int64)


def ctc_greedy(logits: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None) -> list[list[int]]:
    """The labels of the likeliest path of each sequence, repeats merged and blanks left out (Graves et al. 2006, "best
    path decoding").

    Args:
        logits: packed [N, C], or padded [B, T, C].
        lengths: of padded sequences; None if all are T long.
    """
    padded, known = padded_logits(logits)
    lengths = known if lengths is None else torch.as_tensor(lengths)
    paths = padded.argmax(-1)
    decoded = []
    for row, length in enumerate(lengths.tolist()):
        decoded.append(ctc.greedy(paths[:length, row].tolist()))
    return decoded


def ctc_beam(
    logits: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None, beam_size: int = 10
) -> list[tuple[list[int], float]]:
    """The likeliest labels of each sequence found by prefix beam search (Hannun et al. 2014, "First-Pass Large
    Vocabulary Continuous Speech Recognition", algorithm 1, without a language model), and the logarithm of their
    probability, over the paths the beam has kept.

    Args:
        logits, lengths: as for :func:`ctc_greedy`.
        beam_size: prefixes kept at each step.

    Raises:
        ValueError: ``beam_size`` is below 1.
    """
    padded, known = padded_logits(logits)
    lengths = known if lengths is None else torch.as_tensor(lengths)
    scores = padded.detach().double().log_softmax(-1)
    return [ctc.beam(scores[:length, row].tolist(), beam_size) for row, length in enumerate(lengths.tolist())]
