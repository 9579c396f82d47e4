"""The modules that a configuration asks for."""

from __future__ import annotations

import inspect

from torch import nn

from pymtl.balancing import METHODS, Balancing
from pymtl.embeddings import CharacterCNN, CharacterLSTM, TokenFeatures
from pymtl.heads import (
    Head,
)
from pymtl.models import MultiTaskModel
from pymtl.recurrent.lstm import LSTM
from pymtl.sharing import SCHEMES, Sharing
from pymtl.training.config import Config
from pymtl.training.vectors import read_vectors
from pymtl.training.vocabulary import Vocabulary


def model_of(config: Config, vocabulary: Vocabulary) -> MultiTaskModel:
    """The model, its weights drawn by torch's generator."""
    embedding, size = embedding_of(config, vocabulary)
    encoder = encoder_of(config, size)
    heads = heads_of(config, vocabulary, embedding)
    return MultiTaskModel(embedding, encoder, heads, config.model.dropout, config.model.variational)


def embedding_of(config: Config, vocabulary: Vocabulary) -> tuple[nn.Module, int]:
    """From a batch's inputs to features, and their number."""
    model = config.model
    fields: dict[str, nn.Module] = {}
    size = 0
    if model.words:
        words = fields["words"] = nn.Embedding(len(vocabulary.tokens), model.embedding_dim, padding_idx=0)
        # Of length about 1: torch's own are so long that words seen once hardly move away from where they began.
        nn.init.normal_(words.weight, std=model.embedding_dim**-0.5)
        words.weight.data[0] = 0
        size += model.embedding_dim
    if config.characters is not None:
        made = CharacterCNN if config.characters.kind == "cnn" else CharacterLSTM
        count = len(vocabulary.characters)
        fields["characters"] = made(
            count, config.characters.embedding_dim, config.characters.size, dropout=model.dropout
        )
        size += fields["characters"].out_features
    for name, info in config.fields.items():
        if info.kind == "category":
            count = len(vocabulary.categories[name])
            fields[name] = nn.Embedding(count, info.embedding_dim, padding_idx=0)
            size += info.embedding_dim
        else:
            fields[name] = nn.Identity()
            size += info.size
    if model.words and len(fields) == 1:
        return fields["words"], size
    return TokenFeatures(fields), size


def word_embedding(embedding: nn.Module) -> nn.Embedding:
    """The words' own, within what :func:`embedding_of` made."""
    return embedding.fields["words"] if isinstance(embedding, TokenFeatures) else embedding


def load_vectors(model: MultiTaskModel, config: Config, vocabulary: Vocabulary) -> tuple[int, int]:
    """Fills the word embedding from the configured file; returns how many words it has vectors of, and how many words
    of the file could not be read.

    Raises:
        FileNotFoundError, DataError: as :func:`pymtl.training.vectors.read_vectors`.
    """
    words = word_embedding(model.embedding)
    path = config.path(config.model.vectors)
    vectors, found, skipped = read_vectors(path, vocabulary.tokens, words.embedding_dim)
    words.weight.data[found] = vectors[found]
    return int(found.sum()), skipped


def encoder_of(config: Config, input_size: int) -> LSTM | Sharing:
    model = config.model
    if config.sharing.kind == "hard":
        return LSTM(
            input_size,
            model.hidden_size,
            model.num_layers,
            batch_first=True,
            bidirectional=model.bidirectional,
            dropout=model.dropout if model.num_layers > 1 else 0.0,
        )
    scheme = SCHEMES[config.sharing.kind]
    sizes = (input_size, model.hidden_size, model.num_layers, model.bidirectional, model.dropout)
    return scheme(list(config.tasks), *sizes, **config.sharing.options)


def balancing_of(config: Config) -> Balancing | None:
    """The method, or None for the plain sum."""
    if config.balancing.kind == "ew":
        return None
    method = METHODS[config.balancing.kind]
    options = dict(config.balancing.options)
    if "regression" in inspect.signature(method).parameters:
        options.setdefault("regression", [name for name, task in config.tasks.items() if task.rules.has_squared_error])
    return method(list(config.tasks), **options)


def heads_of(config: Config, vocabulary: Vocabulary, embedding: nn.Module) -> dict[str, Head]:
    words = word_embedding(embedding) if config.model.words else None
    return {name: task.rules.head(task, vocabulary.learned(name), words) for name, task in config.tasks.items()}
