"""Instructions from what is read of a token to its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pymtl.embeddings import CharacterCNN, CharacterLSTM, TokenFeatures
from pymtl.lowering.checks import refuse
from pymtl.lowering.program import Buffer, Program
from pymtl.lowering.recurrent import lower_recurrent

MOST_CHARACTERS = 1024  # of a token that is given as a string


def lower_embedding(program: Program, embedding: nn.Module | None, size: int, sizes: Mapping[str, int]) -> Buffer:
    """The features of each token, ``size`` of them; ``sizes`` of the fields that are numbers already."""
    identities = [name for name, module in getattr(embedding, "fields", {}).items() if type(module) is nn.Identity]
    for name in sizes:
        if name not in identities:
            raise KeyError(f"sizes: expected fields that are numbers already, {identities}, got {name!r}")
    if embedding is None:
        return program.numbers("features", size)
    if type(embedding) is not TokenFeatures:
        return _field(program, embedding, "words", "embedding", size)
    known = {name: _size_of(module) for name, module in embedding.fields.items()}
    known |= {name: sizes[name] for name in known if known[name] is None and name in sizes}
    missing = [name for name, own in known.items() if own is None]
    if len(missing) > 1:
        raise ValueError(f"sizes: expected how many numbers a token has of {', '.join(missing)}, got no such sizes")
    if missing:
        known[missing[0]] = size - sum(own for own in known.values() if own is not None)
    if sum(known.values()) != size or min(known.values()) < 1:
        raise ValueError(f"embedding: expected {size} features of a token in all, as the encoder reads, got {known}")
    parts = [
        _field(program, module, name, f"embedding.fields.{name}", known[name])
        for name, module in embedding.fields.items()
    ]
    return program.beside(parts)


def _size_of(module: nn.Module) -> int | None:
    return getattr(module, "embedding_dim", getattr(module, "out_features", None))


def _field(program: Program, module: nn.Module, field: str, at: str, size: int) -> Buffer:
    lower = _FIELDS.get(type(module))
    if lower is None:
        raise refuse(module, at, "an nn.Embedding, a CharacterLSTM, a CharacterCNN or an nn.Identity")
    weight = getattr(module, "weight", None)
    own = _size_of(module) if weight is None else weight.shape[1]
    if own is not None and own != size:
        raise ValueError(f"{at}: expected {size} features of a token, got {own}")
    return lower(program, module, field, at, size)


def _embedding(program: Program, module: nn.Embedding, field: str, at: str, size: int) -> Buffer:
    program.input(field, "ids", count=module.num_embeddings)
    return program.emit("gather", [field], "tokens", size, table=program.tensor(f"{at}.weight", module.weight))


def _identity(program: Program, module: nn.Identity, field: str, at: str, size: int) -> Buffer:
    return program.numbers(field, size)


def _characters(program: Program, field: str, count: int) -> None:
    """Declares a field of characters; of tokens that are given as strings they are those of the words."""
    other = next((each["name"] for each in program.inputs if each["kind"] == "characters"), None)
    if other is not None:
        raise ValueError(f"embedding: expected one field of characters in a file, got {other!r} and {field!r}")
    words = next((each["name"] for each in program.inputs if each["name"] == "words" and each["kind"] == "ids"), None)
    facts = {} if words is None else {"of": words}
    program.input(field, "characters", count=count, max_length=MOST_CHARACTERS, **facts)


def _character_lstm(program: Program, module: CharacterLSTM, field: str, at: str, size: int) -> Buffer:
    _characters(program, field, module.embedding.num_embeddings)
    table = program.tensor(f"{at}.embedding.weight", module.embedding.weight)
    width = module.embedding.embedding_dim
    read = program.emit("gather", [field], "characters", width, table=table, characters=True)
    states = lower_recurrent(program, module.encoder, read, f"{at}.encoder")
    return program.pool(states, "last", [False, True])


def _character_cnn(program: Program, module: CharacterCNN, field: str, at: str, size: int) -> Buffer:
    _characters(program, field, module.embedding.num_embeddings)
    if bool(module.embedding.weight[0].any()):
        raise ValueError(
            f"{at}.embedding: expected zeros in the row of what is no character, as padding_idx=0 leaves them, got "
            "other numbers: a word's features would depend on how far it is padded"
        )
    convolutions = list(module.convolutions)
    # As the kernel takes them: for each width, for each place in its window, a row for each filter.
    weight = torch.cat([convolution.weight.permute(2, 0, 1).flatten(0, 1) for convolution in convolutions])
    bias = torch.cat([convolution.bias for convolution in convolutions])
    return program.emit(
        "character_cnn",
        [field],
        "tokens",
        size,
        table=program.tensor(f"{at}.embedding.weight", module.embedding.weight),
        weight=program.tensor(f"{at}.convolutions.weight", weight),
        bias=program.tensor(f"{at}.convolutions.bias", bias),
        widths=[convolution.kernel_size[0] for convolution in convolutions],
        filters=convolutions[0].out_channels,
    )


_FIELDS: dict[type[nn.Module], Callable[..., Buffer]] = {
    nn.Embedding: _embedding,
    nn.Identity: _identity,
    CharacterLSTM: _character_lstm,
    CharacterCNN: _character_cnn,
}
