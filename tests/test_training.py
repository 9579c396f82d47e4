"""Metrics, backends, the trainer and its run folder, on a made-up data set that is learnt in seconds."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.training import config as configuration
from pymtl.training.backends import Backend
from pymtl.training.batches import Encoder
from pymtl.training.data import Record, read_records
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.metrics import decode, evaluate, score, selection_score
from pymtl.training.run import Run
from pymtl.training.step import Step
from pymtl.training.trainer import test_scores as scores_of
from pymtl.training.vocabulary import Vocabulary

# Metrics


def config_of(**kinds):
    raw = {"data": {"train": "a", "valid": "b"}, "tasks": {name: {"kind": kind} for name, kind in kinds.items()}}
    return configuration.parse(raw, "test")


def scores(kind, truth, guess):
    """Of one task, t."""
    records = [Record(["w"] * (len(label) if kind == "tagging" and label else 1), {"t": label}) for label in truth]
    return score(records, [{"t": label} for label in guess], config_of(t=kind))


def test_accuracy_of_classes_leaves_out_records_without_a_label():
    result = scores("classification", ["x", "y", None, "x", "x"], ["x", "x", "y", "x", "y"])
    assert result["t/accuracy"] == 2 / 4


@pytest.mark.parametrize(
    ("truth", "guess", "f1"),
    [
        ([["B-a", "I-a", "O"]], [["B-a", "I-a", "O"]], 1.0),
        ([["B-a", "I-a", "O"]], [["B-a", "O", "O"]], 0.0),  # the span's end is wrong
        ([["B-a", "I-a", "O"]], [["B-b", "I-b", "O"]], 0.0),  # its type is wrong
        ([["B-a", "O", "B-b"]], [["B-a", "O", "O"]], 2 / 3),  # precision 1, recall 1/2
        ([["B-a", "O", "O"]], [["B-a", "O", "B-b"]], 2 / 3),
        ([["B-a", "I-a", "O", "B-b"], ["B-a", "O"]], [["B-a", "I-a", "B-b", "O"], ["B-a", "B-b"]], 4 / 7),
        ([["B-a", "O"], None], [["B-a", "O"], ["B-b"]], 1.0),
    ],
)
def test_span_f1_counts_whole_spans(truth, guess, f1):
    assert scores("tagging", truth, guess)["t/f1"] == pytest.approx(f1)


@pytest.mark.filterwarnings("error")
def test_span_f1_without_any_predicted_span_is_zero_and_quiet():
    assert scores("tagging", [["B-a", "O"]], [["O", "O"]])["t/f1"] == 0.0


@pytest.mark.parametrize("other", ["NOUN", "O"])
def test_tags_that_are_no_spans_are_scored_by_token(other):
    truth, guess = [["O", other, "O"], [other], None], [["O", "O", "O"], [other], ["O"]]
    assert scores("tagging", truth, guess)["t/accuracy"] == (3 / 4 if other == "NOUN" else 1.0)


@pytest.mark.parametrize(
    ("truth", "guess", "f1"),
    [
        ([["p", "q"], ["p"], []], [["p"], ["p", "q"], []], 2 / 3),  # tp 2, fp 1, fn 1
        ([["p"], None, ["q"]], [["p"], ["q"], []], 2 / 3),
        ([["p"], ["p"], [], []], [["p"], [], [], []], 2 / 3),  # a single label
        ([[], []], [["p"], []], 0.0),
        ([["p"]], [[]], 0.0),
        ([["p"]], [["p"]], 1.0),
        ([["p", "q"]], [["p", "q"]], 1.0),
        ([["p", "q"]], [["q"]], 2 / 3),
    ],
)
def test_micro_f1_of_multiple_labels_counts_every_label(truth, guess, f1):
    assert scores("multilabel", truth, guess)["t/f1"] == pytest.approx(f1)


def test_micro_f1_where_neither_truth_nor_prediction_has_a_label_is_a_number():
    assert 0.0 <= scores("multilabel", [[], []], [[], []])["t/f1"] <= 1.0


def test_r2_of_numbers():
    # Residuals 1, 0, 1 about truths of variance sum 8: 1 - 2/8.
    assert scores("regression", [1, 3, None, 5], [2.0, 3.0, 9.0, 4.0])["t/r2"] == pytest.approx(0.75)


def test_r2_of_a_single_number_leaves_a_finite_selection_score():
    assert all(math.isfinite(value) for value in scores("regression", [1], [2.0]).values())


def test_exact_match_wants_every_class_and_tag_right():
    config = config_of(i="classification", s="tagging", n="regression")
    truth = [("x", ["O"]), ("x", ["B-a"]), ("y", ["O"]), (None, ["B-a"])]
    guess = [("x", ["O"]), ("x", ["O"]), ("x", ["O"]), ("x", ["B-a"])]
    records = [Record(["w"], {"i": i, "s": s, "n": float(k)}) for k, (i, s) in enumerate(truth)]
    predictions = [{"i": i, "s": s, "n": 0.0} for i, s in guess]
    assert score(records, predictions, config)["exact_match"] == 2 / 4


def test_exact_match_leaves_out_records_without_any_label():
    result = scores("classification", ["x", None, None, "y"], ["x", "x", "x", "x"])
    assert result["exact_match"] == 1 / 2


def test_the_selection_score_is_the_mean_of_the_tasks_own_scores():
    assert selection_score({"a/f1": 0.5, "b/accuracy": 1.0, "exact_match": 0.1}) == 0.75


def test_logits_are_decoded_into_the_form_of_the_records():
    config = config_of(i="classification", s="tagging", m="multilabel", n="regression")
    vocabulary = Vocabulary(["<pad>", "<unk>"], {"i": ["x", "y"], "s": ["B-a", "O"], "m": ["p", "q"]})
    logits = {
        "i": torch.tensor([[0.0, math.log(3.0)], [5.0, -5.0]]),
        "s": torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]),
        "m": torch.tensor([[1.0, -1.0], [0.5, 0.5]]),
        "n": torch.tensor([[0.25], [-2.0]]),
    }
    batch = Encoder(vocabulary, config).batch([Record(["w", "w"], {}), Record(["w"], {})], [0, 1])
    first, second = decode(logits, batch, config, vocabulary)
    assert first.pop("i/probability") == pytest.approx(0.75)
    assert first == {"i": "y", "s": ["B-a", "O"], "m": ["p"], "n": 0.25}
    assert second.pop("i/probability") == pytest.approx(1.0, abs=1e-4)
    assert second == {"i": "x", "s": ["O"], "m": ["p", "q"], "n": -2.0}


# Backends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the toy data."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def config(folder):
    return toy.load(folder)


@pytest.fixture
def all_kinds(folder):
    return toy.load(folder, "model.dropout=0.0", toml=toy.TOML + toy.ALL_KINDS)


def test_backends_start_from_the_same_weights_under_the_same_names(all_kinds):
    train = read_records(all_kinds.path("train.jsonl"), all_kinds)
    vocabulary = Vocabulary.of(train, all_kinds)
    states = []
    for name in ("pymtl", "reference", "reference-padded"):
        torch.manual_seed(5)
        states.append(Backend(name, all_kinds, vocabulary).model.state_dict())
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
    for name, p in ours.backend.model.state_dict().items():
        torch.testing.assert_close(p, theirs.backend.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_backends_agree_on_batches_with_missing_labels(all_kinds):
    train = read_records(all_kinds.path("train.jsonl"), all_kinds)
    vocabulary = Vocabulary.of(train, all_kinds)
    for k, name in enumerate(all_kinds.tasks):
        for record in train[k : 2 * k + 3]:
            record.labels[name] = None

    batch = Encoder(vocabulary, all_kinds).batch(train, range(12))
    losses = []
    for name in ("pymtl", "reference"):
        torch.manual_seed(5)
        total, per_task, *_ = Backend(name, all_kinds, vocabulary).loss(batch)
        losses.append({"total": total.item(), **{task: loss.item() for task, loss in per_task.items()}})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert set(losses[0]) == {"total", *all_kinds.tasks}


# Training


def test_training_lowers_the_loss_and_learns_the_task(config, tmp_path):
    result = toy.fitted(replace(config, training=replace(config.training, epochs=8)), tmp_path)
    losses = [epoch["loss"]["total"] for epoch in result.epochs]
    assert losses[-1] < 0.2 * losses[0]
    assert result.epochs[-1]["valid"]["intent/accuracy"] >= 0.9
    assert result.epochs[-1]["valid"]["slots/f1"] >= 0.9
    assert result.progress.records == result.epochs


def test_one_model_learns_all_four_kinds_of_task(all_kinds, tmp_path):
    result = toy.fitted(replace(all_kinds, training=replace(all_kinds.training, epochs=10)), tmp_path)
    valid = result.epochs[-1]["valid"]
    correlations = {"politeness/r2", "politeness/pearson", "politeness/spearman"}
    assert set(valid) == {"intent/accuracy", "intent/macro_f1", "slots/f1", "topics/f1", "exact_match"} | correlations
    assert min(value for name, value in valid.items()) >= 0.8
    assert set(result.epochs[-1]["loss"]) == {"total", "intent", "slots", "topics", "politeness"}


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(config, tmp_path):
    first, again = (toy.fitted(config, tmp_path / name) for name in ("first", "again"))
    assert_same_bits(first.backend.model.state_dict(), again.backend.model.state_dict())
    assert toy.timeless(first.epochs) == toy.timeless(again.epochs)
    other = toy.fitted(replace(config, seed=4), tmp_path / "other")
    assert toy.timeless(first.epochs) != toy.timeless(other.epochs)


@pytest.mark.parametrize("backend", ["pymtl", "reference"])
def test_an_interrupted_and_resumed_run_ends_bit_for_bit_as_the_uninterrupted(config, tmp_path, backend):
    whole = toy.fitted(config, tmp_path / "whole", backend)
    interrupted = toy.trainer(config, tmp_path / "resumed", backend, stop_in=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit()
    assert len(Run(tmp_path / "resumed").read_metrics()) == 2
    resumed = toy.trainer(config, tmp_path / "resumed", backend, resume=True)
    resumed.fit()
    assert_same_bits(whole.backend.model.state_dict(), resumed.backend.model.state_dict())
    metrics = [toy.timeless(Run(tmp_path / name).read_metrics()) for name in ("whole", "resumed")]
    assert metrics[0] == metrics[1]
    best = [Run(tmp_path / name).load_backend()[0].model.state_dict() for name in ("whole", "resumed")]
    assert_same_bits(*best)


def test_a_finished_run_is_resumed_for_more_epochs(config, tmp_path):
    longer = replace(config, training=replace(config.training, epochs=6))
    whole = toy.fitted(longer, tmp_path / "whole")
    toy.fitted(config, tmp_path / "resumed")
    resumed = toy.trainer(longer, tmp_path / "resumed", resume=True)
    resumed.fit()
    assert toy.timeless(resumed.epochs) == toy.timeless(whole.epochs)
    assert_same_bits(whole.backend.model.state_dict(), resumed.backend.model.state_dict())


def test_a_resumed_run_lists_every_epoch_even_where_the_last_line_was_not_written(config, tmp_path):
    whole = toy.fitted(config, tmp_path)
    Run(tmp_path).write_metrics(whole.epochs[:-1])
    toy.trainer(config, tmp_path, resume=True).fit()
    assert Run(tmp_path).read_metrics() == whole.epochs


def test_a_state_whose_epochs_are_something_else_is_a_run_error(config, tmp_path):
    whole = toy.fitted(config, tmp_path)
    whole.run.save_state({**whole.run.load_state(), "epochs": [{}]})
    with pytest.raises(RunError, match=r"state\.pt"):
        toy.trainer(config, tmp_path, resume=True).fit()


def with_scores(monkeypatch, values):
    """Lets the validation of epoch k score ``values[k]``."""
    remaining = iter(values)
    monkeypatch.setattr("pymtl.training.trainer.evaluate", lambda *_: {"intent/accuracy": next(remaining)})


def test_training_stops_after_patience_epochs_without_a_better_score(config, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.5, 0.5, 0.4, 0.9])
    config = replace(config, training=replace(config.training, epochs=9, patience=2))
    assert [epoch["epoch"] for epoch in toy.fitted(config, tmp_path).epochs] == [1, 2, 3, 4]


def test_the_weights_of_the_best_epoch_are_kept_the_first_of_equals(config, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.5, 0.4, 0.5])
    result = toy.trainer(config, tmp_path)
    weights = []
    result.progress.epoch = lambda _: weights.append(
        {name: p.clone() for name, p in result.backend.model.state_dict().items()}
    )
    result.fit()
    best, _, _ = Run(tmp_path).load_backend()
    assert_same_bits(best.model.state_dict(), weights[1])
    assert not torch.equal(weights[1]["embedding.weight"], weights[3]["embedding.weight"])


def test_word_dropout_replaces_tokens_but_no_padding(config, tmp_path):
    result = toy.trainer(replace(config, training=replace(config.training, word_dropout=0.5)), tmp_path)
    batch = result.encoder.batch(result.train[""], range(40))
    dropped = result._drop_words(batch, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.tokens == 0, batch.tokens == 0)
    changed = (dropped.tokens != batch.tokens)[batch.tokens != 0]
    assert (dropped.tokens[dropped.tokens != batch.tokens] == 1).all()
    assert 0.3 < changed.float().mean() < 0.7


def test_rare_words_are_dropped_more_often(config, tmp_path):
    settings = replace(config.training, word_dropout=0.0, rare_word_dropout=3.0)
    result = toy.trainer(replace(config, training=settings), tmp_path)
    tokens = [token for record in result.train[""] for token in record.tokens]
    batch = result.encoder.batch(result.train[""], range(len(result.train[""])))
    generator = torch.Generator().manual_seed(0)
    rounds = 200
    dropped = sum((result._drop_words(batch, generator).tokens != batch.tokens).double() for _ in range(rounds))
    for word in ("please", "sushi"):
        count = tokens.count(word)
        share = dropped[batch.tokens == result.vocabulary.tokens.index(word)].mean() / rounds
        expected = 3 / (3 + count)
        # Five standard deviations of a share of this many.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / (rounds * count)) ** 0.5


def test_a_task_labelled_in_few_records_trains(folder, tmp_path):
    config = toy.load(folder, "training.epochs=2", toml=toy.TOML + toy.ALL_KINDS)
    records = [dict(record) for record in toy.requests(60)]
    for record in records[3:]:
        record["slots"] = record["score"] = None
    toy.write_lines(tmp_path / "few.jsonl", records)
    config = replace(config, data=replace(config.data, train=str(tmp_path / "few.jsonl")))
    result = toy.fitted(config, tmp_path / "run")
    assert all(math.isfinite(value) for epoch in result.epochs for value in epoch["loss"].values())


def test_scores_do_not_depend_on_the_order_of_the_records(config, tmp_path):
    result = toy.fitted(replace(config, training=replace(config.training, epochs=2)), tmp_path)
    result.backend.model.eval()
    arguments = (config, result.vocabulary)
    assert scores_of(result.backend, result.valid, *arguments) == pytest.approx(
        scores_of(result.backend, {"": result.valid[""][::-1]}, *arguments)
    )
    assert scores_of(result.backend, result.valid, *arguments) == pytest.approx(result.epochs[-1]["valid"])


# The run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    where = tmp_path_factory.mktemp("finished")
    return toy.fitted(toy.load(where / "data", "training.epochs=2"), where / "run")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    for path in finished.run.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return Run(tmp_path)


def test_a_run_folder_holds_what_was_trained(finished, run):
    config, vocabulary, backend = run.load()
    assert (config, vocabulary, backend) == (finished.config, finished.vocabulary, "pymtl")
    assert [epoch["epoch"] for epoch in run.read_metrics()] == [1, 2]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "state.pt",
        "vocabulary.json",
    ]


@pytest.mark.parametrize("name", ["pymtl", "reference"])
def test_either_backend_loads_the_trained_weights(finished, run, name):
    backend, config, vocabulary = run.load_backend(name)
    assert not backend.model.training
    loaded = scores_of(backend, finished.valid, config, vocabulary)
    best = max(finished.epochs, key=lambda epoch: epoch["selection"])
    assert loaded == pytest.approx(best["valid"])


def load_everything(run):
    run.load_backend()
    run.load_state()
    run.read_metrics()


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 3],
    "garbage": lambda content: b"\x00\xff garbage",
    "flipped": lambda content: content[:20] + bytes(b ^ 0xFF for b in content[20:60]) + content[60:],
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *product(["config.json", "vocabulary.json", "model.safetensors", "state.pt"], DAMAGE),
        *product(["metrics.jsonl"], ["cut", "garbage", "flipped"]),
    ],
)
def test_a_damaged_file_is_a_run_error_with_its_path(run, name, damage):
    path = run.path(name)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(RunError) as error:
        load_everything(run)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors", "state.pt"])
def test_a_missing_file_is_a_run_error_with_its_path(run, name):
    run.path(name).unlink()
    with pytest.raises(RunError) as error:
        load_everything(run)
    assert str(run.path(name)) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.json", []),
        ("config.json", {"backend": "pymtl"}),
        ("config.json", {"data": {"train": "a", "valid": "b"}, "tasks": {}, "backend": "pymtl"}),
        ("vocabulary.json", []),
        ("vocabulary.json", {"tokens": [], "labels": {}}),
        ("vocabulary.json", {"tokens": ["<pad>", "<unk>", "a"], "labels": {}}),
        ("vocabulary.json", {"tokens": ["<pad>", "<unk>"], "labels": {"intent": ["x"], "slots": None}}),
    ],
)
def test_json_of_another_form_is_a_run_error_with_its_path(run, name, value):
    run.write_json(name, value)
    with pytest.raises(RunError) as error:
        load_everything(run)
    assert str(run.path(name)) in str(error.value)


def test_an_unknown_backend_in_the_run_is_a_run_error(run):
    run.write_json("config.json", {**run.read_json("config.json"), "backend": "keras"})
    with pytest.raises(RunError, match="keras"):
        load_everything(run)


def test_a_model_of_another_size_is_a_run_error(run, tmp_path):
    config = run.read_json("config.json")
    config["model"]["hidden_size"] = 9
    run.write_json("config.json", config)
    with pytest.raises(RunError, match=r"model\.safetensors: damaged or of another model"):
        run.load_backend()


@pytest.mark.parametrize("state", [{}, [], {"model": {}, "optimizer": {}, "epochs": []}, 3])
def test_a_state_of_something_else_is_a_run_error(finished, run, state):
    torch.save(state, run.path("state.pt"))
    fresh = toy.trainer(finished.config, run.folder / "fresh")
    fresh.run = run
    with pytest.raises(RunError, match=r"state\.pt: damaged or of another model"):
        fresh.resume()


WRITERS = {
    "model.safetensors": ("pymtl.training.run.save_file", lambda run: run.save_model(run.load_backend()[0].model)),
    "state.pt": ("torch.save", lambda run: run.save_state({"model": {}})),
    "metrics.jsonl": ("pathlib.Path.write_text", lambda run: run.write_metrics([{"epoch": 1}])),
    "vocabulary.json": ("pathlib.Path.write_text", lambda run: run.write_json("vocabulary.json", {})),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failure_while_writing_leaves_the_old_file_and_no_draft(run, name, monkeypatch):
    target, write = WRITERS[name]
    before = run.path(name).read_bytes()
    names = sorted(path.name for path in run.folder.iterdir())

    def fail(*arguments, **_):
        draft = next(a for a in arguments if hasattr(a, "suffix"))
        assert draft.suffixes[-2:-1] == [".part"]
        draft.write_bytes(before[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="No space left"):
        write(run)
    assert run.path(name).read_bytes() == before
    assert sorted(path.name for path in run.folder.iterdir()) == names


def test_a_new_run_drops_the_files_of_an_earlier_one(finished, run):
    run.path("curves.png").write_bytes(b"old")
    run.create(finished.config, finished.vocabulary, "reference")
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "vocabulary.json"]
    assert run.load()[2] == "reference"
    with pytest.raises(RunError, match="has an epoch finished"):
        run.load_backend()


def test_metrics_are_one_json_object_an_epoch(run):
    lines = run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        epoch = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert set(epoch) == {"epoch", "loss", "valid", "selection", "seconds", "step_ms"}


def test_evaluation_puts_predictions_back_in_the_order_of_the_records(finished):
    backend, config, vocabulary = finished.run.load_backend()
    valid = finished.valid[""]
    shuffled = [finished.encoder.batch(valid, [i]) for i in reversed(range(len(valid)))]
    whole = [finished.encoder.batch(valid, range(len(valid)))]
    arguments = (finished.valid, config, vocabulary)
    assert evaluate(backend, {"": shuffled}, *arguments) == evaluate(backend, {"": whole}, *arguments)


# The step


def stepping(config, norm=1.0):
    """A step of a new model, and the batches it may take."""
    torch.manual_seed(0)
    train = read_records(config.path(config.data.train), config)
    vocabulary = Vocabulary.of(train, config)
    encoder = Encoder(vocabulary, config)
    settings = replace(config.training, learning_rate=0.01, clip_norm=norm)
    return Step(Backend("pymtl", config, vocabulary), settings), encoder.batch(train, range(8))


@pytest.mark.parametrize("norm", [0.01, 1.0, 100.0])
def test_a_step_clips_as_torch_does(config, norm):
    gradients = []
    for clip in (Step.clip, lambda step: torch.nn.utils.clip_grad_norm_(step.backend.model.parameters(), norm)):
        step, batch = stepping(config, norm)
        step.backend.loss(batch).total.backward()
        clip(step)
        gradients.append({name: p.grad for name, p in step.backend.model.named_parameters()})
    assert_same_bits(*gradients)


def test_a_gradient_that_is_not_finite_is_not_hidden(config):
    step, _ = stepping(config)
    for parameter in step.backend.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step.clip()
    assert all(p.grad.isnan().all() for p in step.backend.model.parameters())


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_json("test.json", {"a": 1.0})

    def full(*_):
        raise RuntimeError("unexpected pos 29824 vs 29716")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(RunError, match=r"state.pt: cannot be written: unexpected pos"):
        run.save_state({})
    assert run.read_scores() == {"a": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["test.json"]


@pytest.mark.parametrize("content", ['{"a": "x"}', "[1]", "5"])
def test_scores_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(RunError, match=r"test.json: damaged"):
        Run(tmp_path).read_scores()


# Conditional random fields


@pytest.fixture
def crf(folder):
    return toy.load(folder, "tasks.slots.decoder=crf", "tasks.slots.bio=true", "model.dropout=0.0")


def test_a_crf_trains_alike_in_both_backends(crf, tmp_path):
    ours, plain = (toy.fitted(crf, tmp_path / name, name) for name in ("pymtl", "reference"))
    for a, b in zip(ours.epochs, plain.epochs):
        for task in a["loss"]:
            assert math.isclose(a["loss"][task], b["loss"][task], rel_tol=1e-3)


def test_a_crf_learns_and_its_tags_are_decoded_together(crf, tmp_path):
    config = replace(crf, training=replace(crf.training, epochs=12))
    trained = toy.fitted(config, tmp_path)
    assert trained.epochs[-1]["valid"]["slots/f1"] > 0.9
    backend, config, vocabulary = Run(tmp_path).load_backend()
    assert set(backend.crfs) == {"slots"}
    batch = trained.encoder.batch(trained.valid[""], range(4))
    with torch.no_grad():
        logits = backend.logits(batch)
        # Emissions alone would start inside of a span.
        inside = vocabulary.labels["slots"].index("I-food")
        logits["slots"][:, 0, inside] += 30.0
        tags = decode(logits, batch, config, vocabulary, backend.crfs)[0]["slots"]
    assert not tags[0].startswith("I-")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.intent.decoder=crf"], "tasks.intent.decoder: expected a crf for tagging only"),
        (["tasks.slots.bio=true"], "tasks.slots.bio: expected decoder = 'crf' with it"),
        (["tasks.slots.decoder=crf", "tasks.slots.label_smoothing=0.1"], "label_smoothing: expected 0 for a crf"),
        (["tasks.slots.decoder=viterbi"], "decoder"),
    ],
)
def test_settings_that_do_not_fit_a_crf_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        toy.load(folder, *overrides)


def test_tensorboard_gets_every_epoch(config, tmp_path):
    settings = replace(config.training, tensorboard=True, epochs=3)
    result = toy.fitted(replace(config, training=settings), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for part in ("loss", "valid"):
        for name in result.epochs[0][part]:
            values = [(event.step, event.value) for event in events.Scalars(f"{part}/{name}")]
            assert values == [(epoch["epoch"], pytest.approx(epoch[part][name], rel=1e-6)) for epoch in result.epochs]


@pytest.mark.parametrize("option", ["weight_decay", "l1"])
def test_regularisation_keeps_weights_small(config, tmp_path, option):
    sizes = []
    for value in (0.0, 0.01):
        settings = replace(config.training, **{option: value}, epochs=2)
        result = toy.fitted(replace(config, training=settings), tmp_path / f"{value}")
        sizes.append(sum(p.detach().abs().sum() for p in result.backend.model.encoder.parameters()))
    assert sizes[1] < 0.95 * sizes[0]


def test_the_learning_rate_follows_its_schedule(config, tmp_path):
    settings = replace(config.training, epochs=2, schedule="linear", warmup=0.25)
    result = toy.trainer(replace(config, training=settings), tmp_path)
    rates = []
    step = result.step.optimizer.step
    result.step.optimizer.step = lambda: (rates.append(result.step.optimizer.param_groups[0]["lr"]), step())
    result.fit()
    rising, total = round(0.25 * len(rates)), len(rates)
    assert rates[:rising] == pytest.approx([0.02 * (i + 1) / rising for i in range(rising)])
    assert rates[rising:] == pytest.approx([0.02 * (1 - i / (total - rising)) for i in range(total - rising)])


def test_accumulated_batches_give_the_mean_of_their_gradients(config):
    config = replace(config, model=replace(config.model, dropout=0.0))
    step, batch = stepping(config, norm=1e6)
    train = read_records(config.path(config.data.train), config)
    other = Encoder(Vocabulary.of(train, config), config).batch(train, range(8, 19))
    alone = []
    for part in (batch, other):
        step.optimizer.zero_grad()
        step.backend.loss(part).total.backward()
        alone.append({name: p.grad.clone() for name, p in step.backend.model.named_parameters()})
    step.optimizer.step = lambda: None
    step([batch, other])
    for name, p in step.backend.model.named_parameters():
        torch.testing.assert_close(p.grad, (alone[0][name] + alone[1][name]) / 2)


def test_kappa_follows_the_order_of_the_labels():
    raw = {"kind": "ordinal", "order": ["low", "medium", "high"]}
    config = configuration.parse({"data": {"train": "a", "valid": "b"}, "tasks": {"t": raw}}, "test")
    truth, guess = ["low", "medium", "high", "low"], ["low", "high", "high", "medium"]
    records = [Record(["w"], {"t": label}) for label in truth]
    result = score(records, [{"t": label} for label in guess], config)
    # Quadratic weights: observed disagreement 1 + 1, expected sum of (i - j)^2 over the outer product of counts / 4.
    expected = sum((i - j) ** 2 * a * b / 4 for i, a in enumerate([2, 1, 1]) for j, b in enumerate([1, 1, 2]))
    assert result["t/kappa"] == pytest.approx(1 - 2 / expected)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.select_by=exact_match", "tasks={score={kind='regression'}}"], "a task of classes or tags"),
        (
            ["training.select_by=delta", "training.baseline={intent=0.5}"],
            "baseline: expected names as task/score",
        ),
        (["training.optimizer_options={lr=0.5}"], "training.learning_rate instead of lr"),
        (["training.optimizer=Rprop", "training.weight_decay=0.1"], "training.optimizer: .*weight_decay"),
        (["training.optimizer_options={betas=[0.9]}"], "training.optimizer: "),
        (["balancing={kind='famo',least='a'}"], "balancing: least: expected float, got 'a'"),
        (["balancing=gradnorm", "sharing=soft"], "sharing: expected hard with balancing by gradnorm"),
        (["balancing=gradient_aggregation", "tasks.intent.skip=true"], "heads that read states alone"),
        (["tasks.intent.after=slots", "tasks.slots.after=intent"], "no circle of tasks"),
        (["tasks.intent.weight=inf"], "tasks.intent.weight"),
        (["warm_start={run='x',parts=['']}"], "warm_start.parts: expected names of modules"),
    ],
)
def test_settings_that_do_not_go_together_are_named(folder, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        toy.load(folder, *overrides)


def test_a_score_that_validation_never_has_is_named(config, tmp_path):
    settings = replace(config.training, select_by="delta", baseline={"intent/fluency": 0.5})
    with pytest.raises(ConfigError, match=r"select_by: expected what validation scores, intent/accuracy.*fluency"):
        toy.fitted(replace(config, training=settings), tmp_path)


def test_partly_tagged_sentences_train_alike_in_both_backends(folder, tmp_path):
    lines = toy.requests(60)
    for line in lines[::3]:
        line["slots"] = [None, *line["slots"][1:]]
    toy.write_lines(tmp_path / "partly.jsonl", lines)
    config = toy.load(folder, "tasks.slots.decoder=crf", "model.dropout=0.0", f"data.train={tmp_path / 'partly.jsonl'}")
    ours, plain = (toy.fitted(config, tmp_path / name, name) for name in ("pymtl", "reference"))
    for a, b in zip(ours.epochs, plain.epochs):
        assert a["loss"]["slots"] == pytest.approx(b["loss"]["slots"], rel=1e-3)
