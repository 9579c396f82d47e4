"""Instructions of the heads: from a task's states to its logits, or a step of its decoder, and how answers follow."""

from __future__ import annotations

from typing import Any

from pymtl.decoder import DecoderHead
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
from pymtl.lowering.recurrent import lower_recurrent
from pymtl.lowering.sharing import States
from pymtl.serving.answers import SOURCES
from pymtl.serving.generation import MAX_LENGTH

MOST_SOURCES = 1 << 20  # what a token is among the ids of a task that copies is below it
_DECODERS = {
    ClassificationHead: "classes",
    TokenClassificationHead: "classes",
    CRFHead: "crf",
    CTCHead: "ctc",
    OrdinalHead: "ordinal",
    MultiLabelHead: "labels",
    RegressionHead: "numbers",
    LanguageModelHead: "none",
    DecoderHead: "generation",
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
    features, parts = _features(program, head, states, embedded, before, at)
    weight, bias = head.projection()
    return program.linear(features, at, weight, bias, parts=parts)


def _features(
    program: Program, head: Head, states: States, embedded: Buffer, before: Buffer | None, at: str
) -> tuple[Buffer, int]:
    """What a head reads of each row of its own, and in how many parts a product with it is summed."""
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
    plain = head.pooling is None and len(parts) == 1
    return program.beside(parts), states.parts if plain else 1


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


def lower_step(
    program: Program, head: DecoderHead, task: str, states: States, embedded: Buffer, before: Buffer | None
) -> dict[str, Any]:
    """One step of a decoder's hypotheses, as the file says it; and in the program what it reads. Arguments as for
    :func:`lower_head`."""
    at = f"heads.{task}"
    values, _ = _features(program, head, states, embedded, before, at)
    reader = head.reader
    keys = values
    if reader.score != "dot":
        keys = program.linear(values, f"{at}.key", reader.key.weight, reader.key.bias)
    first = program.linear(states.pooled(program, "last"), f"{at}.begin", head.begin.weight, head.begin.bias)
    size, layers = head.hidden_size, head.num_layers
    h = program.activation(program.columns([(first, 0, layers * size)]), "tanh")
    kinds = [h] if head.cell == "gru" else [h, program.columns([(first, layers * size, layers * size)])]
    state = program.columns([(kind, layer * size, size) for layer in range(layers) for kind in kinds])

    step = program.step()
    table = step.tensor(f"{at}.embedding", head.embedding.weight)
    read = step.emit("gather", ["token"], "tokens", head.embedding_dim, table=table)
    written = lower_recurrent(step, head.recurrence, read, f"{at}.recurrence")
    query, score = written, None
    if reader.score == "additive":
        query = step.linear(written, f"{at}.query", reader.query.weight)
        score = step.tensor(f"{at}.score", reader.weight)
    context = step.emit(
        "attend", [query, "keys", "values"], "tokens", values.width, heads=reader.num_heads, score=score
    )
    both = step.linear(step.beside([written, context]), f"{at}.combine", head.combine.weight, head.combine.bias)
    weight, bias = head.projection()
    logits = step.linear(step.activation(both, "tanh"), at, weight, bias)
    found = {
        "count": head.out_features,
        "state": state.name,
        "memories": {"keys": keys.name, "values": values.name},
        "instructions": step.instructions,
        "logits": logits.name,
    }
    if head.copy:
        sources = SOURCES.format(task)
        program.input(sources, "ids", count=MOST_SOURCES)
        features = step.beside([written, context, read])
        gate = step.linear(features, f"{at}.switch", head.switch.weight, head.switch.bias)
        found["copy"] = {"sources": sources, "gate": gate.name, "unknown": head.unknown}
    return found


def decoder_of(program: Program, head: Head, task: str) -> dict[str, Any]:
    """How the file says what the logits mean."""
    found: dict[str, Any] = {"decoder": _DECODERS[type(head)]}
    if isinstance(head, CRFHead):
        names = ("start", "end", "transitions")
        found |= {name: program.tensor(f"heads.{task}.crf.{name}", t) for name, t in zip(names, head.crf.scores())}
    elif isinstance(head, RegressionHead):
        found |= {"mean": list(head.mean), "std": list(head.std), "log": head.log}
    elif isinstance(head, DecoderHead):
        found |= {"max_length": MAX_LENGTH, "never": []}
    return found


def count_ids(head: Head) -> int:
    """How many classes, tags or labels a task's answers have; 0 of numbers and of logits alone."""
    if _DECODERS[type(head)] in ("none", "numbers"):
        return 0
    return head.out_features + (1 if isinstance(head, OrdinalHead) else 0)
