"""A made-up data set of short requests that a tiny model learns, and runs that train on it."""

import contextlib
import io
import json
import random

import torch

from pymtl.__main__ import main
from pymtl.training import config as configuration
from pymtl.training.data import read_all
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.trainer import Trainer
from pymtl.training.vocabulary import Vocabulary

VERBS = {"play": "music", "book": "table", "watch": "film"}
THINGS = {
    ("jazz",): "genre",
    ("hard", "rock"): "genre",
    ("sushi",): "food",
    ("hot", "dogs"): "food",
}
TOML = """
seed = 3
sharing = "hard"
balancing = "ew"

[data]
train = "train.jsonl"
valid = "valid.jsonl"
test = "test.jsonl"

[tasks.intent]
kind = "classification"

[tasks.slots]
kind = "tagging"

[model]
embedding_dim = 8
hidden_size = 8
dropout = 0.1

[training]
epochs = 4
batch_size = 8
learning_rate = 0.02
word_dropout = 0.05
"""
ALL_KINDS = """
[tasks.topics]
kind = "multilabel"
pooling = "max"

[tasks.politeness]
kind = "regression"
field = "score"
pooling = "mean"
"""


def requests(count, seed=0):
    """Records of two to eight tokens; every label follows from the words."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        verb = rng.choice(sorted(VERBS))
        please = rng.randrange(3)
        tokens = ["please"] * please + [verb]
        tags = ["O"] * len(tokens)
        chosen = rng.sample(sorted(THINGS), rng.randrange(1, 3))
        for thing in chosen:
            tokens += thing
            tags += [f"{'I' if i else 'B'}-{THINGS[thing]}" for i in range(len(thing))]
        topics = sorted({THINGS[thing] for thing in chosen})
        records.append({"tokens": tokens, "intent": VERBS[verb], "slots": tags, "topics": topics, "score": please})
    return records


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_files(folder, toml=TOML):
    """The three data files and toy.toml; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 60, 0), ("valid", 20, 1), ("test", 20, 2)):
        write_lines(folder / f"{name}.jsonl", requests(count, seed))
    path = folder / "toy.toml"
    path.write_text(toml, encoding="utf-8")
    return path


def load(folder, *overrides, toml=TOML):
    """The configuration of freshly written files."""
    return configuration.load(write_files(folder, toml), list(overrides))


def read_sets(config):
    """The training and validation records of every data set."""
    sets = read_all(config)
    return sets.train, sets.valid


def quiet(*argv):
    """Runs a command that must succeed; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in argv]) == 0
    return printed.getvalue()


class Watcher:
    """A silent progress; presses Ctrl-C in the middle of epoch ``stop_in``."""

    def __init__(self, stop_in=None):
        self.stop_in = stop_in
        self.records = []

    def steps(self, epoch, total, first=0):
        for step in range(first, total):
            if epoch == self.stop_in and step == total // 2:
                raise KeyboardInterrupt
            yield step

    def epoch(self, record):
        self.records.append(record)


def trainer(config, folder, backend="pymtl", stop_in=None, resume=False, device="cpu"):
    """What ``pymtl train`` makes, ready to fit."""
    train, valid = read_sets(config)
    vocabulary = Vocabulary.of([record for records in train.values() for record in records], config)
    run = Run(folder)
    if not resume:
        run.create(config, vocabulary, backend)
    torch.manual_seed(config.seed)
    model = ModelWithLoss(backend, config, vocabulary)
    result = Trainer(run, config, vocabulary, model, train, valid, Watcher(stop_in), device)
    if resume:
        result.resume()
    return result


def fitted(config, folder, backend="pymtl", device="cpu"):
    result = trainer(config, folder, backend, device=device)
    result.fit()
    return result


def timeless(epochs):
    """The lines of metrics.jsonl without what differs from run to run."""
    return [{key: value for key, value in epoch.items() if key not in ("seconds", "step_ms")} for epoch in epochs]
