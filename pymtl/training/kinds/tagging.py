"""A tag of each token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymtl.crf import CRF
from pymtl.heads import CRFHead, Head, TokenClassificationHead
from pymtl.training.kinds.base import NO_LABEL, Decoding, Kind, Requirement, Scored, SmoothingOptions
from pymtl.training.values import is_string


@dataclass(frozen=True, kw_only=True)
class TaggingOptions(SmoothingOptions):
    decoder: Literal["softmax", "crf"] = "softmax"  # each tag by itself, or the best sequence of tags
    bio: bool = False  # of a crf: no I-x but after B-x or I-x


class Tagging(Kind):
    """Span F1 where the tags are BIO, else the accuracy of tokens."""

    name = "tagging"
    Options = TaggingOptions
    scores = ("f1", "accuracy")
    of_tokens = True
    aligned = True
    is_discrete = True
    has_reference = True

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        crf = task.decoder == "crf"
        return [
            (not task.bio or crf, "bio", "decoder = 'crf' with it"),
            (not crf or task.label_smoothing == 0, "label_smoothing", "0 for a crf"),
        ]

    def of_cell(self, cell: str, task: Any) -> list[str]:
        return cell.split()

    def expects(self, label: Any, task: Any, length: int) -> tuple[bool, str]:
        fits = isinstance(label, list) and len(label) == length and all(map(self.is_element, label))
        return fits, f"a list of {length} strings (or null), one a token"

    def is_element(self, value: Any) -> bool:
        return value is None or is_string(value)

    def target(self, label: Any, ids: Mapping[str, int], tokens: Tensor, task: Any, config: Any) -> Tensor:
        return torch.tensor([ids.get(tag, NO_LABEL) for tag in label])

    def head(self, task: Any, labels: Sequence[str], words: nn.Embedding | None) -> Head:
        if task.decoder == "crf":
            return CRFHead(len(labels), labels if task.bio else None, reads=self.reads(task))
        return TokenClassificationHead(len(labels), self.cross_entropy(task), reads=self.reads(task))

    def crf(self, task: Any, labels: Sequence[str]) -> CRF | None:
        if task.decoder != "crf":
            return None
        return CRF(len(labels), labels if task.bio else None, batch_first=True)

    def decode(self, logits: Tensor, given: Decoding) -> list[list[str]]:
        tags = logits.argmax(-1) if given.crf is None else given.crf.decode(logits, given.lengths)[0]
        rows = zip(tags.tolist(), given.lengths.tolist())
        return [[given.labels[i] for i in row[:length]] for row, length in rows]

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        if is_bio(scored.labels):
            from seqeval.metrics import f1_score

            spans = [["O" if tag is None else tag for tag in tags] for tags in truth]
            found = [
                ["O" if tag is None else other for tag, other in zip(tags, others, strict=True)]
                for tags, others in zip(truth, guess, strict=True)
            ]
            return {"f1": float(f1_score(spans, found))}
        from sklearn import metrics as sk

        flat = [(a, b) for tags, others in zip(truth, guess) for a, b in zip(tags, others) if a is not None]
        return {"accuracy": float(sk.accuracy_score(*map(list, zip(*flat)))) if flat else 0.0}

    def describe(self, value: list[str], details: Mapping[str, Any], tokens: Sequence[str]) -> str:
        return mark_spans(tokens if any(tokens) else [str(i) for i in range(len(tokens))], value)


def is_bio(tags: Iterable[str]) -> bool:
    """Whether these are tags of spans: O, B-x and I-x, or B and I alone."""
    tags = set(tags)
    return all(tag in ("O", "B", "I") or tag.startswith(("B-", "I-")) for tag in tags) and not tags <= {"O"}


def mark_spans(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """The text with its BIO spans in brackets, ``play [some jazz | genre]``; other tags behind a slash each."""
    from seqeval.metrics.sequence_labeling import get_entities

    if not is_bio([*tags, "B"]):
        return " ".join(f"{token}/{tag}" for token, tag in zip(tokens, tags))
    words = list(tokens)
    for label, first, last in get_entities(list(tags)):
        words[first] = f"[{words[first]}"
        words[last] = f"{words[last]} | {label}]"
    return " ".join(words)
