"""Conditional random fields over the tags of a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops, reference
from pymtl.losses import SequenceLoss
from pymtl.ops.dtypes import has_cuda
from pymtl.ops.late_errors import refuse_where
from pymtl.packing import as_lengths, same_packing
from pymtl.reference.pooling import sequences_of
from pymtl.serving import tags as schemes


class CRF(nn.Module):
    """A linear-chain conditional random field (Lafferty, McCallum & Pereira 2001) on the scores of C tags.

    A path of tags y has the score ``start_transitions[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1},
    y_t] + end_transitions[y_T]`` and the probability softmax of it over all paths. Training's log-likelihoods and
    their gradients, and decoding, are kernels over packed sequences.

    Args:
        num_tags: C.
        labels: the C tags' names. If given, paths keep to the scheme of these tags: by ``"bio"``, ``I-x`` follows
            ``B-x`` or ``I-x`` alone.
        batch_first: padded input and output are [B, T, ...] rather than [T, B, ...].
        scheme: ``"bio"``, ``"iobes"``, ``"bilou"`` or ``"iob1"``, see :mod:`pymtl.serving.tags`. Read only with
            ``labels``.

    Parameters: ``start_transitions`` [C], ``end_transitions`` [C] and ``transitions`` [C, C], from and to; drawn
    uniformly from -0.1 to 0.1.

    Raises:
        ValueError: ``num_tags`` is below 1; there is not one label for each tag; one is not of the scheme (by ``"bio"``
            any other passes for ``O``); or none may stand alone, so that a sentence of one token has no path.
    """

    def __init__(
        self,
        num_tags: int,
        labels: Sequence[str] | None = None,
        batch_first: bool = False,
        scheme: schemes.Scheme = "bio",
    ) -> None:
        super().__init__()
        if not isinstance(num_tags, int) or num_tags < 1:
            raise ValueError(f"num_tags: expected a number above 0, got {num_tags!r}")
        if labels is not None and len(labels) != num_tags:
            raise ValueError(f"labels: expected {num_tags} names, got {len(labels)}")
        if scheme not in schemes.SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(schemes.SCHEMES)}, got {scheme!r}")
        if labels is not None:
            wrong = [label for label in labels if not schemes.belongs_to(label, scheme)]
            if wrong and scheme != "bio":  # by bio any other tag passes for O
                raise ValueError(f"labels: expected tags of the scheme {scheme}, got {wrong[0]!r}")
            # Else a sentence of one token would have no path.
            if not any(schemes.first_fault([label], scheme) is None for label in labels):
                raise ValueError(f"labels: expected O or a span of one token among the tags of {scheme}, got neither")
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.labels = None if labels is None else list(labels)
        self.scheme = scheme
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        # Follows from the labels alone, so it is not in the state_dict; computed once for each device that needs it.
        self._forbidden: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scores of starts [C], ends [C] and transitions [C, C]; -inf where the labels forbid one."""
        start_transitions, end_transitions, transitions = map(
            _single, (self.start_transitions, self.end_transitions, self.transitions)
        )
        if self.labels is None:
            return start_transitions, end_transitions, transitions
        device = self.transitions.device
        if device not in self._forbidden:
            with torch.inference_mode(False):  # training reads them too, and may come after
                self._forbidden[device] = _forbidden(self.labels, self.scheme, device)
        start, end, steps = self._forbidden[device]
        return (
            start_transitions.masked_fill(start, -torch.inf),
            end_transitions.masked_fill(end, -torch.inf),
            transitions.masked_fill(steps, -torch.inf),
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
            lengths: of padded sequences; None if all are T long. With emissions on a GPU they may be on that GPU too,
                so that the call does not wait for them: they are then clamped to 0 and T rather than checked, and a
                sequence of length 0 gives 0.

        Returns:
            [B] in the batch's order.

        Raises:
            IndexError: a tag is out of range; on a GPU, which nobody waits for, the result is NaN instead.
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
        packed, order = self.packed(emissions, lengths)
        if isinstance(emissions, PackedSequence) != isinstance(tags, PackedSequence):
            raise TypeError(
                f"tags: expected a {type(emissions).__name__} like the emissions, got a {type(tags).__name__}"
            )
        if isinstance(tags, PackedSequence):
            if not same_packing(emissions, tags):
                raise ValueError(
                    "tags: expected the packing of the emissions: the order or the lengths of sequences differ"
                )
            flat = tags.data
        else:
            if tags.shape != emissions.shape[:2]:
                raise ValueError(f"tags: expected shape {list(emissions.shape[:2])}, got {list(tags.shape)}")
            flat = ops.pack(tags, order, batch_first=self.batch_first)
        return self.functions(packed).crf(packed, order.batch_sizes, flat, *self.scores()), order

    def forward(
        self,
        emissions: Tensor | PackedSequence,
        tags: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The negative log-likelihood of all tags over the number of tokens: a loss.

        Arguments and errors as for :meth:`log_likelihood`.
        """
        values, order = self._log_likelihood(emissions, tags, lengths)
        return _over_tokens(values, order.batch_sizes)

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
        packed, order = self.packed(emissions, lengths)
        tags, scores = self.functions(packed).crf_decode(packed, order.batch_sizes, *self.scores())
        if order.unsorted_indices is not None:
            scores = scores.index_select(0, order.unsorted_indices)
        if isinstance(emissions, PackedSequence):
            return PackedSequence(tags, *emissions[1:]), scores
        return ops.unpack(tags, order, batch_first=self.batch_first), scores

    def log_partition(
        self, emissions: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """log sum exp of the scores of all paths [B], in the batch's order: :meth:`decode`'s ``scores`` minus it are
        log-probabilities. Arguments as for :meth:`log_likelihood`."""
        packed, order = self.packed(emissions, lengths)
        sums = self.functions(packed).crf(packed, order.batch_sizes, None, *self.scores())
        return sums if order.unsorted_indices is None else sums.index_select(0, order.unsorted_indices)

    def marginals(
        self, emissions: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor | PackedSequence:
        """The probability of each tag at each token, over all paths: the gradient of the logarithm of their sum with
        respect to the emissions (Eisner 2016, "Inside-Outside and Forward-Backward Algorithms Are Just Backprop").

        Args:
            emissions, lengths: as for :meth:`log_likelihood`. No gradient flows through the result.

        Returns:
            Padded (0 at padding) or packed like the emissions, in float32 at least.
        """
        # Emissions of inference mode cannot be differentiated; copies made outside of it can.
        with torch.inference_mode(False), torch.enable_grad():
            packed, order = self.packed(emissions, lengths)
            packed = packed.detach().clone().requires_grad_()
            with torch.no_grad():
                scores = [each.clone() for each in self.scores()]
            sums = self.functions(packed).crf(packed, order.batch_sizes.clone(), None, *scores)
            (found,) = torch.autograd.grad(sums.sum(), packed)
        if isinstance(emissions, PackedSequence):
            return PackedSequence(found, *emissions[1:])
        return ops.unpack(found, order, batch_first=self.batch_first)

    def packed(
        self, emissions: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, ops.PackingOrder]:
        """Emissions as [N, C], and their order."""
        if isinstance(emissions, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            return _single(emissions.data), ops.PackingOrder(*emissions[1:])
        if emissions.dim() != 3:
            raise ValueError(f"emissions: expected a 3-D padded batch, got {emissions.dim()}-D")
        batch, steps = emissions.shape[:2] if self.batch_first else (emissions.shape[1], emissions.shape[0])
        if lengths is None:
            lengths = torch.full((batch,), steps, dtype=torch.int64)
        lengths = as_lengths(lengths, batch, emissions.device)
        if not has_cuda(emissions):
            lengths = lengths.cpu()
        order = ops.packing_order(lengths, steps, emissions.device)
        return _single(ops.pack(emissions, order, batch_first=self.batch_first)), order

    def functions(self, emissions: Tensor) -> object:
        """:mod:`pymtl.ops` where the kernels take such emissions, else :mod:`pymtl.reference`."""
        if emissions.dim() != 2 or emissions.shape[1] != self.num_tags:
            raise RuntimeError(f"emissions: expected {self.num_tags} scores a token, got {list(emissions.shape)}")
        if not emissions.is_floating_point():
            raise RuntimeError(f"emissions: expected floating-point scores, got {emissions.dtype}")
        return ops if ops.has_kernels(emissions, cuda=True) else reference

    def extra_repr(self) -> str:
        return f"{self.num_tags}, batch_first={self.batch_first}" + (
            "" if self.labels is None else f", {self.scheme.upper()}"
        )


def _over_tokens(values: Tensor, batch_sizes: Tensor) -> Tensor:
    """The negative sum over the number of tokens, or over 1."""
    tokens = batch_sizes.sum()
    if has_cuda(tokens):
        return -values.sum() / tokens.clamp(min=1)
    return values.sum() * (-1 / max(int(tokens), 1))


def _single(scores: Tensor) -> Tensor:
    """Sums over all paths are taken in float32 at least."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


@dataclass(frozen=True, eq=False)
class CRFLoss(SequenceLoss):
    """The negative log-likelihood of a :class:`CRF` over the number of tokens, for :class:`pymtl.JointLoss`.

    Args:
        crf: its parameters belong to the head.
        ignore_index: the tag that means there is no label. It stands at padding. A sentence whose tokens all have it
            contributes nothing. In a packed batch some tokens of a sentence may have it: the likelihood is then that of
            all paths through the given tags (Tsuboi et al. 2008, "Training Conditional Random Fields Using Incomplete
            Annotations", equation 3).
    """

    crf: CRF
    ignore_index: int = -100
    kind: ClassVar[str] = "crf"

    def __call__(self, emissions: Tensor | PackedSequence, tags: Tensor | PackedSequence) -> Tensor:
        """The loss. A padded sentence has as many tokens as tags, which stand at its beginning.

        Padded sentences on a GPU raise the errors about values late: the loss is NaN, and a later
        :class:`pymtl.JointLoss` or :func:`pymtl.ops.raise_late_errors` raises the error. Packed sentences on a GPU make
        the call wait for it, to find the tokens without a tag.

        Raises:
            TypeError: one of emissions and tags is padded and the other packed, or the tags are not int64.
            ValueError: their sizes differ; or a padded sentence has a token without a tag before one with a tag.
            IndexError: a tag is out of range.
        """
        data, order, flat = self._packed(emissions, tags)
        if not isinstance(tags, PackedSequence) and has_cuda(tags):
            # The only rows without a tag are behind the last token, or of a sentence that is refused late.
            flat = flat.masked_fill(flat == self.ignore_index, -1)
            values = self.crf.functions(data).crf(data, order.batch_sizes, flat, *self.crf.scores())
            return _over_tokens(values, order.batch_sizes)
        return self.of_packed(data, order.batch_sizes, flat, self.crf.functions(data))

    def of_packed(self, data: Tensor, batch_sizes: Tensor, flat: Tensor, functions: Any) -> Tensor:
        """The loss of emissions [N, C] and tags [N], by :mod:`pymtl.ops` or :mod:`pymtl.reference`."""
        missing = flat == self.ignore_index
        if bool(missing.any()):
            # Sentences without any tag go, whatever they hold; the order of the others stays.
            of_token = sequences_of(batch_sizes, len(flat)).to(flat.device, non_blocking=True)
            batch = int(batch_sizes[0])
            counts = torch.zeros(batch, dtype=torch.int64, device=flat.device).index_add(0, of_token, (~missing).long())
            kept = (counts > 0)[of_token]
            step = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
            batch_sizes = torch.bincount(step[kept.cpu()], minlength=len(batch_sizes))
            data, flat, missing = data[kept], flat[kept], missing[kept]
        if len(flat) == 0:
            return data.sum()  # nothing, but with a gradient of nothing
        scores = self.crf.scores()
        if not bool(missing.any()):
            return functions.crf(data, batch_sizes, flat, *scores).sum() * (-1 / len(flat))
        others = (flat.unsqueeze(1) != torch.arange(self.crf.num_tags, device=flat.device)) & ~missing.unsqueeze(1)
        through = functions.crf(data.masked_fill(others, -torch.inf), batch_sizes, None, *scores)
        whole = functions.crf(data, batch_sizes, None, *scores)
        return (whole - through).sum() / (~missing).sum()

    def _packed(
        self, emissions: Tensor | PackedSequence, tags: Tensor | PackedSequence
    ) -> tuple[Tensor, ops.PackingOrder, Tensor]:
        """Emissions [N, C], their order, and tags [N]."""
        if isinstance(emissions, PackedSequence) != isinstance(tags, PackedSequence):
            raise TypeError(f"expected a {type(emissions).__name__} like the logits, got a {type(tags).__name__}")
        if isinstance(emissions, PackedSequence):
            if not same_packing(emissions, tags):
                raise ValueError("expected the packing of the logits: the order or the lengths of sequences differ")
            data, order = self.crf.packed(emissions, None)
            self._check_classes(tags.data)
            return data, order, tags.data
        if emissions.dim() != 3 or tags.shape != emissions.shape[:-1]:
            raise ValueError(
                f"expected tags {list(emissions.shape[:-1])} for logits [B, T, C], got {list(tags.shape)} "
                f"for {list(emissions.shape)}"
            )
        self._check_classes(tags)
        labelled = (tags if self.crf.batch_first else tags.t()) != self.ignore_index
        counts = labelled.sum(1)
        sentences = torch.arange(len(counts), device=tags.device)
        partly = (labelled != (torch.arange(labelled.shape[1], device=tags.device) < counts.unsqueeze(1))).any(1)
        refuse_where(
            partly,
            sentences,
            lambda got: (
                f"expected tags of all tokens of a padded sentence or of none, got some for sentence {got}: its length "
                "cannot be told from them. Pack logits and tags (pymtl.pack, or a packed input), where tags may be "
                "missing"
            ),
            ValueError,
        )
        data, order = self.crf.packed(emissions, counts if has_cuda(tags) else counts.clamp(min=1).cpu())
        return data, order, ops.pack(tags, order, batch_first=self.crf.batch_first)

    def _check_classes(self, tags: Tensor) -> None:
        if tags.dtype != torch.int64:
            raise TypeError(f"expected int64 tags, got {tags.dtype}")
        wrong = (tags != self.ignore_index) & ((tags < 0) | (tags >= self.crf.num_tags))
        last = self.crf.num_tags - 1
        refuse_where(wrong, tags, lambda got: f"expected tags from 0 to {last}, got {got}", IndexError)


def _forbidden(labels: Sequence[str], scheme: schemes.Scheme, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a path may not start at a tag [C], not end at it [C], and not step from one to another [C, C]."""
    start = [not schemes.may_follow(None, label, scheme) for label in labels]
    end = [not schemes.may_follow(label, None, scheme) for label in labels]
    steps = [[not schemes.may_follow(before, after, scheme) for after in labels] for before in labels]
    return tuple(torch.tensor(each, device=device) for each in (start, end, steps))
