"""That models learn what they are asked, from data as people have them."""

import csv
import random

import pytest

import pymtl
from pymtl.__main__ import main
from pymtl.training.run import Run

TOML = """
seed = 1
[data]
train = "train.csv"
test = "test.csv"
tokens = "text"
[tasks.mood]
kind = "classification"
[tasks.value]
kind = "regression"
[model]
embedding_dim = 16
hidden_size = 16
dropout = 0.1
[training]
epochs = 8
patience = 8
batch_size = 8
learning_rate = 0.01
"""


def write(path, count, seed, value):
    rng = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "mood", "value"])
        for _ in range(count):
            polite = rng.random() < 0.5
            thing = f"{rng.choice(['small', 'large'])} {rng.choice(['tea', 'coffee', 'juice'])}"
            text = f"Please bring me a {thing}." if polite else f"Bring me a {thing}, now!"
            rows.writerow([text, "polite" if polite else "rude", value(polite, rng.gauss(0, 1))])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda polite, noise: 20 + 3 * polite + 0.3 * noise, id="degrees"),
        pytest.param(lambda polite, noise: 250_000 + 60_000 * polite + 6_000 * noise, id="prices"),
        pytest.param(lambda polite, noise: 1e-6 * polite + 1e-7 * noise, id="tiny"),
        pytest.param(lambda polite, noise: -3e12 - 1e9 * polite + 1e8 * noise, id="far from zero"),
    ],
)
def test_a_number_in_any_unit_is_learnt_beside_a_class(tmp_path, value):
    write(tmp_path / "train.csv", 160, 0, value)
    write(tmp_path / "test.csv", 60, 1, value)
    (tmp_path / "c.toml").write_text(TOML)
    assert main(["train", str(tmp_path / "c.toml"), "--run", str(tmp_path / "run")]) == 0
    scores = Run(tmp_path / "run").read_scores()
    assert scores["value/r2"] > 0.8
    assert scores["mood/accuracy"] == 1.0


def test_an_unbounded_score_does_not_hide_the_others(tmp_path):
    """A number that has nothing to do with the text: its R² is far below zero, and the class decides all the same."""
    write(tmp_path / "train.csv", 120, 0, lambda polite, noise: noise**9)
    write(tmp_path / "test.csv", 60, 1, lambda polite, noise: noise)
    (tmp_path / "c.toml").write_text(TOML.replace('test = "test.csv"', 'valid = "test.csv"'))
    assert main(["train", str(tmp_path / "c.toml"), "--run", str(tmp_path / "run")]) == 0
    epochs = Run(tmp_path / "run").read_metrics()
    best = max(epochs, key=lambda epoch: epoch["selection"])
    assert any(epoch["valid"]["value/r2"] < -1 for epoch in epochs)
    assert best["valid"]["mood/accuracy"] == 1.0
    assert all(epoch["selection"] >= -1 for epoch in epochs)


def test_a_class_that_weighs_more_is_answered_more(tmp_path):
    rng = random.Random(0)
    with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "mood"])
        rows.writerows([rng.choice("abcd"), "rare" if i % 10 == 0 else "usual"] for i in range(100))
    toml = TOML.replace('test = "test.csv"', "").partition("[tasks.value]")
    (tmp_path / "c.toml").write_text(toml[0] + "[model]" + toml[2].partition("[model]")[2])
    answers = {}
    for weights in ("none", "balanced", "{rare = 100.0}"):
        command = ["train", str(tmp_path / "c.toml"), "--run", str(tmp_path / "run"), "--overwrite"]
        command += ["--set", "training.select_by=mood/macro_f1", "--set", f"tasks.mood.class_weights={weights}"]
        assert main(command) == 0
        (answer,) = pymtl.load(tmp_path / "run").predict(["b"])
        answers[weights] = answer["mood/probabilities"]["rare"]
    assert answers["none"] + 0.1 < answers["balanced"] < answers["{rare = 100.0}"]
