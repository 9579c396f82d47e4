"""The backends start, score and train alike, conditional random fields too."""

import math
from dataclasses import replace

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.training.batches import Batcher
from pymtl.training.data import read_records
from pymtl.training.errors import ConfigError
from pymtl.training.metrics import decode
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the toy data."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def all_kinds(folder):
    return toy.load(folder, "model.dropout=0.0", toml=toy.TOML + toy.ALL_KINDS)


def test_backends_start_from_the_same_weights_under_the_same_names(all_kinds):
    train = read_records(all_kinds.path("train.jsonl"), all_kinds)
    vocabulary = Vocabulary.of(train, all_kinds)
    states = []
    for name in ("pymtl", "reference", "reference-padded"):
        torch.manual_seed(5)
        states.append(ModelWithLoss(name, all_kinds, vocabulary).model.state_dict())
    assert list(states[0]) == list(states[1]) == list(states[2])
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])


ATTENTION = ("tasks.intent.pooling=attention", "tasks.intent.attention_heads=2")


@pytest.mark.parametrize("more", [(), ("characters.size=4",), ATTENTION], ids=["words", "characters", "attention"])
def test_backends_train_alike_without_dropout(folder, tmp_path, more):
    config = toy.load(folder, "model.dropout=0.0", "training.epochs=2", *more, toml=toy.TOML + toy.ALL_KINDS)
    ours, theirs = (toy.fitted(config, tmp_path / name, name) for name in ("pymtl", "reference"))
    for a, b in zip(ours.epochs, theirs.epochs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["valid"] == pytest.approx(b["valid"], abs=1e-3)
    for name, p in ours.model_with_loss.model.state_dict().items():
        torch.testing.assert_close(p, theirs.model_with_loss.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_backends_agree_on_batches_with_missing_labels(all_kinds):
    train = read_records(all_kinds.path("train.jsonl"), all_kinds)
    vocabulary = Vocabulary.of(train, all_kinds)
    for k, name in enumerate(all_kinds.tasks):
        for record in train[k : 2 * k + 3]:
            record.labels[name] = None

    batch = Batcher(vocabulary, all_kinds).batch(train, range(12))
    losses = []
    for name in ("pymtl", "reference"):
        torch.manual_seed(5)
        total, per_task, *_ = ModelWithLoss(name, all_kinds, vocabulary).loss(batch)
        losses.append({"total": total.item(), **{task: loss.item() for task, loss in per_task.items()}})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert set(losses[0]) == {"total", *all_kinds.tasks}


# Conditional random fields


@pytest.fixture
def crf(folder):
    return toy.load(folder, "tasks.slots.decoder=crf", "tasks.slots.bio=true", "model.dropout=0.0")


def test_a_crf_trains_alike_in_both_backends(crf, tmp_path):
    ours, plain = (toy.fitted(crf, tmp_path / name, name) for name in ("pymtl", "reference"))
    for a, b in zip(ours.epochs, plain.epochs, strict=True):
        for task in a["loss"]:
            assert math.isclose(a["loss"][task], b["loss"][task], rel_tol=1e-3)


def test_a_crf_learns_and_its_tags_are_decoded_together(crf, tmp_path):
    config = replace(crf, training=replace(crf.training, epochs=12))
    result = toy.fitted(config, tmp_path)
    assert result.epochs[-1]["valid"]["slots/f1"] > 0.9
    trained, config, vocabulary = Run(tmp_path).load_model()
    assert set(trained.crfs) == {"slots"}
    batch = result.batcher.batch(result.valid[""], range(4))
    with torch.no_grad():
        logits = trained.logits(batch)
        # Emissions alone would start inside of a span.
        inside = vocabulary.labels["slots"].index("I-food")
        logits["slots"][:, 0, inside] += 30.0
        tags = decode(logits, batch, config, vocabulary, trained.crfs)[0]["slots"]
    assert not tags[0].startswith("I-")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tasks.intent.decoder=crf"],
            "tasks.intent.decoder: expected none with kind = 'classification'",
        ),
        (["tasks.slots.bio=true"], "tasks.slots.bio: expected decoder = 'crf' with it"),
        (["tasks.slots.decoder=crf", "tasks.slots.label_smoothing=0.1"], "label_smoothing: expected 0 for a crf"),
        (["tasks.slots.decoder=viterbi"], "decoder"),
    ],
)
def test_settings_that_do_not_fit_a_crf_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        toy.load(folder, *overrides)


def test_partly_tagged_sentences_train_alike_in_both_backends(folder, tmp_path):
    lines = toy.requests(60)
    for line in lines[::3]:
        line["slots"] = [None, *line["slots"][1:]]
    toy.write_lines(tmp_path / "partly.jsonl", lines)
    config = toy.load(folder, "tasks.slots.decoder=crf", "model.dropout=0.0", f"data.train={tmp_path / 'partly.jsonl'}")
    ours, plain = (toy.fitted(config, tmp_path / name, name) for name in ("pymtl", "reference"))
    for a, b in zip(ours.epochs, plain.epochs, strict=True):
        assert a["loss"]["slots"] == pytest.approx(b["loss"]["slots"], rel=1e-3)
