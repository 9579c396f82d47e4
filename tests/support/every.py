"""A data set with every kind of task and input, made up like :mod:`toy`, and its configuration."""

import random

import toy

EVERY = """
seed = 3

[data]
train = "train.jsonl"
holdout = 0.2
test = "test.jsonl"

[tasks.intent]
kind = "classification"
pooling = "attention"
attention_heads = 2

[tasks.slots]
kind = "tagging"
decoder = "crf"
after = "intent"

[tasks.topics]
kind = "multilabel"
pooling = "max"

[tasks.scores]
kind = "regression"
num_targets = 2
pooling = "mean"

[tasks.politeness]
kind = "ordinal"
field = "score"
skip = true
pooling = "mean"

[tasks.level]
kind = "ordinal"
order = ["low", "middle", "high"]

[tasks.words]
kind = "language_model"
num_tokens = 9
tied = true

[tasks.sounds]
kind = "ctc"

[tasks.spoken]
kind = "generation"
field = "sounds"
decoder_size = 12
decoder_embedding_dim = 6
after = "intent"

[fields.case]
kind = "category"
embedding_dim = 3

[fields.signal]
kind = "numbers"
size = 2

[characters]
kind = "lstm"
embedding_dim = 5
size = 4

[model]
embedding_dim = 8
hidden_size = 12
dropout = 0.1

[training]
epochs = 4
batch_size = 8
learning_rate = 0.02
"""


def records(count, seed):
    rng = random.Random(seed)
    found = []
    for record in toy.requests(count, seed):
        tokens = record["tokens"]
        record["scores"] = [record["score"], len(tokens)]
        record["level"] = ["low", "middle", "high"][record["score"]]
        record["case"] = [0 if token == "please" else 1 for token in tokens]
        record["signal"] = [[float(token == "please"), rng.random()] for token in tokens]
        record["sounds"] = [token[0] for token in tokens[: 1 + len(tokens) // 3]]
        found.append(record)
    found[1]["slots"] = [None, *found[1]["slots"][1:]]
    found[2] |= dict.fromkeys(("slots", "topics", "scores", "score", "level", "sounds"))
    return found


def write(folder, toml=EVERY):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 60, 0), ("test", 20, 2)):
        toy.write_lines(folder / f"{name}.jsonl", records(count, seed))
    path = folder / "every.toml"
    path.write_text(toml, encoding="utf-8")
    return path
