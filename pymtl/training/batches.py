"""From records to batches, and the order batches come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from pymtl import ops
from pymtl.decoder import packed_targets
from pymtl.serving.answers import NO_LABEL
from pymtl.serving.encoding import Encoder
from pymtl.serving.records import Record
from pymtl.training.config import Config, TaskConfig, TrainingConfig
from pymtl.training.kinds.base import missing_like
from pymtl.training.vocabulary import Vocabulary


@dataclass(frozen=True)
class Batch:
    """A padded batch of one data set.

    ``tokens`` int64 [B, T], 0 at padding; ``lengths`` int64 [B]; ``targets`` for each task as
    :class:`pymtl.JointLoss` takes them; ``indices`` the records it was made of; ``fields`` the tokens' further fields,
    [B, T] or [B, T, F]; ``of_tokens`` the tasks whose targets are laid out as the tokens, ``generated`` those whose
    targets a decoder reads. Of tasks whose answers may copy tokens ``sources``, int64 [B, T], says which label each
    token is, and ``copied`` the tokens of each text that are none, in the order of the ids behind the labels'.
    """

    tokens: Tensor
    lengths: Tensor
    targets: dict[str, Tensor]
    indices: list[int]
    fields: dict[str, Tensor] = field(default_factory=dict)
    of_tokens: frozenset[str] = frozenset()
    generated: frozenset[str] = frozenset()
    words: bool = True
    sources: dict[str, Tensor] = field(default_factory=dict)
    copied: dict[str, list[list[str]]] = field(default_factory=dict)

    def inputs(self) -> Tensor | dict[str, Tensor]:
        """What the model reads, padded."""
        if not self.fields:
            return self.tokens
        return {"words": self.tokens, **self.fields} if self.words else self.fields

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the lengths stay on the CPU, where nobody has to wait for them."""
        fields = {name: each.to(device) for name, each in self.fields.items()}
        targets = {name: each.to(device) for name, each in self.targets.items()}
        sources = {name: each.to(device) for name, each in self.sources.items()}
        return replace(self, tokens=self.tokens.to(device), fields=fields, targets=targets, sources=sources)

    def packed(self) -> tuple[Any, dict[str, Tensor | PackedSequence], dict[str, PackedSequence]]:
        """Inputs, targets and sources without padding; the targets of whole sentences stay as they are."""
        order = ops.packing_order(self.lengths, self.tokens.shape[1], self.tokens.device)

        def pack(padded: Tensor) -> PackedSequence:
            return PackedSequence(ops.pack(padded, order, batch_first=True), *order)

        inputs = self.inputs()
        packed = pack(inputs) if isinstance(inputs, Tensor) else {name: pack(f) for name, f in inputs.items()}
        targets: dict[str, Tensor | PackedSequence] = {}
        for name, target in self.targets.items():
            if name in self.generated:
                targets[name] = packed_targets(target, NO_LABEL)
            else:
                targets[name] = pack(target) if name in self.of_tokens else target
        return packed, targets, self.packed_sources()

    def packed_sources(self) -> dict[str, PackedSequence]:
        """Of the tasks whose answers may copy tokens."""
        if not self.sources:
            return {}
        order = ops.packing_order(self.lengths, self.tokens.shape[1], self.tokens.device)
        return {
            name: PackedSequence(ops.pack(each, order, batch_first=True), *order) for name, each in self.sources.items()
        }


class _Encoded(NamedTuple):
    """A record as tensors: ``tokens`` [T], ``fields`` [T, ...], ``targets`` of the tasks it has labels of."""

    record: Record  # kept, so that no other record comes to its identity
    tokens: Tensor
    fields: dict[str, Tensor]
    targets: dict[str, Tensor]
    sources: dict[str, Tensor]  # [T]
    copied: dict[str, list[str]]


class Batcher:
    """From records to batches, by a vocabulary.

    Args:
        vocabulary, config: of the run.
        remember: keep each record's tensors for the next time the record is in a batch.
    """

    def __init__(self, vocabulary: Vocabulary, config: Config, remember: bool = True) -> None:
        self.remember = remember
        self.config = config
        self.vocabulary = vocabulary
        self._encoder = Encoder(vocabulary, config, remember)
        self._encodings = {
            name: task.rules.encoding(vocabulary.labels.get(name, []), vocabulary.tokens)
            for name, task in config.tasks.items()
        }
        self._encoded: dict[int, _Encoded] = {}

    def batch(self, records: Sequence[Record], indices: Sequence[int]) -> Batch:
        """The batch of ``records[i]`` for i in ``indices``. A label the vocabulary lacks counts as missing."""
        chosen = [self._encode(records[i]) for i in indices]
        lengths = torch.tensor([len(encoded.tokens) for encoded in chosen])
        tokens = pad_sequence([encoded.tokens for encoded in chosen], batch_first=True)
        fields = {
            name: pad_sequence([encoded.fields[name] for encoded in chosen], batch_first=True)
            for name in chosen[0].fields
        }
        targets = {}
        for name, task in self.config.tasks.items():
            if any(name in encoded.targets for encoded in chosen):
                targets[name] = self._targets(name, task, chosen)
        rules = {name: self.config.tasks[name].rules for name in targets}
        of_tokens = frozenset(name for name, each in rules.items() if each.aligned)
        generated = frozenset(name for name, each in rules.items() if each.generates)
        sources = {
            name: pad_sequence([encoded.sources[name] for encoded in chosen], batch_first=True)
            for name in chosen[0].sources
        }
        copied = {name: [encoded.copied[name] for encoded in chosen] for name in sources}
        words = self.config.model.words
        every = (tokens, lengths, targets, list(indices), fields, of_tokens, generated, words, sources, copied)
        return Batch(*every)

    def _targets(self, name: str, task: TaskConfig, chosen: Sequence[_Encoded]) -> Tensor:
        known = next(encoded.targets[name] for encoded in chosen if name in encoded.targets)
        missing = missing_like(known)
        if task.rules.of_tokens or task.rules.generates:
            nothing = known.new_empty(0, *known.shape[1:])
            rows = pad_sequence([e.targets.get(name, nothing) for e in chosen], True, missing)
            steps = max(len(encoded.tokens) for encoded in chosen)
            short = steps - rows.shape[1] if task.rules.aligned else 0
            filler = rows.new_full((len(rows), short, *rows.shape[2:]), missing)
            return torch.cat([rows, filler], dim=1) if short > 0 else rows
        return torch.stack([encoded.targets.get(name, torch.full_like(known, missing)) for encoded in chosen])

    def _encode(self, record: Record) -> _Encoded:
        found = self._encoded.get(id(record))
        if found is None:
            found = self._encode_anew(record)
            if self.remember:
                self._encoded[id(record)] = found
        return found

    def _encode_anew(self, record: Record) -> _Encoded:
        tokens = torch.tensor(self._encoder.tokens(record))
        fields = {name: torch.from_numpy(values) for name, values in self._encoder.fields(record).items()}
        targets, sources, copied = {}, {}, {}
        for name, task in self.config.tasks.items():
            encoding = self._encodings[name]
            known = task.rules.sources(record.tokens, encoding, task)
            if known is not None:
                encoding = known
                sources[name] = torch.tensor([known[token] for token in record.tokens])
                copied[name] = list(known.maps[0])
            if record.labels.get(name) is not None:
                targets[name] = task.rules.target(record.labels[name], encoding, tokens, task, self.config)
        return _Encoded(record, tokens, fields, targets, sources, copied)


def buckets(records: Sequence[Record], batch_size: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """Indices of batches of records of similar length, in random order; by length alone without a generator."""
    if generator is None:
        by_length = sorted(range(len(records)), key=lambda i: len(records[i].tokens))
        yield from (by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size))
        return
    shuffled = torch.randperm(len(records), generator=generator).tolist()
    yield from _bucketed(shuffled, records, batch_size, generator)


def _bucketed(
    order: list[int], records: Sequence[Record], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    pool = 50 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        piece = sorted(order[start : start + pool], key=lambda i: len(records[i].tokens))
        batches += [piece[i : i + batch_size] for i in range(0, len(piece), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def schedule(
    sets: Mapping[str, Sequence[Record]],
    settings: TrainingConfig,
    generator: torch.Generator,
    unlabelled: Mapping[str, Sequence[Record]] | None = None,
) -> list[tuple[str, list[int]]]:
    """The batches of an epoch: each of one data set, and the indices of its records; those from the number of ``sets``'
    records on are of its ``unlabelled`` ones, ``unlabelled_ratio`` for each of the others.

    Every way of sampling takes as many batches as the data sets hold together (each at most ``epoch_cap`` records), or
    as ``epoch_steps`` asks for:

    - ``"proportional"``: each batch of each set once, in random order;
    - ``"round_robin"``: the sets take turns, shorter ones beginning anew;
    - ``"uniform"``, ``"temperature"``: each batch is of a set drawn with equal probability, or with ``p ~ n^(1/T)``.
    """

    def batches(name: str) -> Iterator[list[int]]:
        order = torch.randperm(len(sets[name]), generator=generator).tolist()
        order = order[: settings.epoch_cap] if settings.epoch_cap > 0 else order
        return _bucketed(order, sets[name], settings.batch_size, generator)

    def proportional() -> list[tuple[str, list[int]]]:
        every = [(name, indices) for name in sets for indices in batches(name)]
        if len(sets) == 1:
            return every
        return [every[i] for i in torch.randperm(len(every), generator=generator).tolist()]

    sizes = [min(len(records), settings.epoch_cap or len(records)) for records in sets.values()]
    steps = sum(-(-size // settings.batch_size) for size in sizes)
    steps = settings.epoch_steps * settings.accumulation or steps
    if settings.sampling == "proportional":
        chosen = proportional()
        while len(chosen) < steps:
            chosen += proportional()
        return _with_unlabelled(chosen[:steps], sets, unlabelled or {}, settings, generator)
    names = list(sets)
    if settings.sampling == "round_robin":
        turns = [i % len(names) for i in range(steps)]
    else:
        power = 0.0 if settings.sampling == "uniform" else 1 / settings.temperature
        weights = torch.tensor(sizes, dtype=torch.float64) ** power
        turns = torch.multinomial(weights, steps, replacement=True, generator=generator).tolist()
    supply = {name: batches(name) for name in names}
    chosen = []
    for turn in turns:
        name = names[turn]
        indices = next(supply[name], None)
        if indices is None:
            supply[name] = batches(name)
            indices = next(supply[name])
        chosen.append((name, indices))
    return _with_unlabelled(chosen, sets, unlabelled or {}, settings, generator)


def _with_unlabelled(
    chosen: list[tuple[str, list[int]]],
    sets: Mapping[str, Sequence[Record]],
    unlabelled: Mapping[str, Sequence[Record]],
    settings: TrainingConfig,
    generator: torch.Generator,
) -> list[tuple[str, list[int]]]:
    """The batches, and unlabelled records of the same data set in each: in random order, each once before one comes
    again."""

    def endless(name: str) -> Iterator[int]:
        while True:
            yield from (torch.randperm(len(unlabelled[name]), generator=generator) + len(sets[name])).tolist()

    supply = {name: endless(name) for name, records in unlabelled.items() if records}
    owed = dict.fromkeys(supply, 0.0)  # a batch takes whole texts, and the next one what is left
    found = []
    for name, indices in chosen:
        if name in supply:
            owed[name] += settings.unlabelled_ratio * len(indices)
            count = int(owed[name] + 1e-9)
            owed[name] -= count
            indices = [*indices, *islice(supply[name], count)]
        found.append((name, indices))
    return found
