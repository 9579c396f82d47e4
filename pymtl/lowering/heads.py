"""Instructions of the heads: from a task's states to its logits, and how these are decoded."""

from __future__ import annotations

from typing import Any

from pymtl.heads import (
    ClassificationHead,
    CRFHead,
    CTCHead,
    Head,
    MultiLabelHead,
    OrdinalHead,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.language_model import LanguageModelHead
from pymtl.lowering.checks import refuse
from pymtl.lowering.program import Buffer, Program
from pymtl.lowering.sharing import States

_DECODERS = {
    ClassificationHead: "classes",
    TokenClassificationHead: "classes",
    CRFHead: "crf",
    CTCHead: "ctc",
    OrdinalHead: "ordinal",
    MultiLabelHead: "labels",
    RegressionHead: "numbers",
    LanguageModelHead: "none",
}


def lower_head(
    program: Program, head: Head, task: str, states: States, embedded: Buffer, before: Buffer | None
) -> Buffer:
    """The logits. ``embedded``: the tokens' features; ``before``: the logits of the task that this one reads after."""
    at = f"heads.{task}"
    if type(head) not in _DECODERS:
        raise refuse(head, at, "one of pymtl's heads")
    if isinstance(head, LanguageModelHead):
        return _language_model(program, head, states, at)
    if head.pooling is None:
        parts = [states.tokens]
    elif head.attention is not None:
        attention = head.attention
        hidden = program.activation(program.linear(states.tokens, f"{at}.attention", attention.weight), "tanh")
        scores = program.linear(hidden, f"{at}.attention.query", attention.query)
        parts = [program.emit("attention_pool", [states.tokens, scores], "sequences", states.tokens.width)]
    else:
        parts = [states.pooled(program, head.pooling)]
    if head.reads.skip:
        pooling = "max" if head.pooling == "max" else "mean"
        parts.append(embedded if head.pooling is None else program.pool(embedded, pooling, [False]))
    if before is not None:
        parts.append(_label_features(program, head, before, at))
    weight, bias = head.projection()
    plain = head.pooling is None and len(parts) == 1
    return program.linear(program.beside(parts), at, weight, bias, parts=states.parts if plain else 1)


def _label_features(program: Program, head: Head, before: Buffer, at: str) -> Buffer:
    """The embedding of the other task's class probabilities, of each of this head's rows."""
    embedded = program.linear(program.softmax(before), f"{at}.label_embedding", head.label_embedding.t())
    if head.pooling is None:
        if before.space == "tokens":
            return embedded
        return program.emit("spread", [embedded], "tokens", embedded.width)
    return program.pool(embedded, "mean", [False]) if before.space == "tokens" else embedded


def _language_model(program: Program, head: LanguageModelHead, states: States, at: str) -> Buffer:
    """The logits of each direction, side by side."""
    weight, bias = head.projection()
    width = states.tokens.width // head.directions
    found = []
    for d, hidden in enumerate(head.hidden):
        own = program.columns([(states.tokens, d * width, width)])
        read = program.activation(program.linear(own, f"{at}.hidden.{d}", hidden.weight, hidden.bias), "tanh")
        found.append(program.linear(read, at, weight, bias))
    return program.beside(found)


def decoder_of(program: Program, head: Head, task: str) -> dict[str, Any]:
    """How the file says what the logits mean."""
    found: dict[str, Any] = {"decoder": _DECODERS[type(head)]}
    if isinstance(head, CRFHead):
        names = ("start", "end", "transitions")
        found |= {name: program.tensor(f"heads.{task}.crf.{name}", t) for name, t in zip(names, head.crf.scores())}
    elif isinstance(head, RegressionHead):
        found |= {"mean": list(head.mean), "std": list(head.std), "log": head.log}
    return found


def count_ids(head: Head) -> int:
    """How many classes, tags or labels a task's answers have; 0 of numbers and of logits alone."""
    if _DECODERS[type(head)] in ("none", "numbers"):
        return 0
    return head.out_features + (1 if isinstance(head, OrdinalHead) else 0)
