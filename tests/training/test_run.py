"""The run folder: what it holds, and that damage to it is named."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import toy

from pymtl.training.errors import RunError
from pymtl.training.metrics import evaluate
from pymtl.training.run import Run
from pymtl.training.trainer import test_scores as scores_of


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
    assert config.folder is None  # the copy lies elsewhere, and the data are not found from it
    assert run.load(Path(finished.config.folder)) == (finished.config, finished.vocabulary, "pymtl")
    assert finished.run.load() == (finished.config, finished.vocabulary, "pymtl")
    assert (vocabulary, backend) == (finished.vocabulary, "pymtl")
    assert [epoch["epoch"] for epoch in run.read_metrics()] == [1, 2]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
        "state.pt",
        "vocabulary.json",
    ]


@pytest.mark.parametrize("name", ["pymtl", "reference"])
def test_either_backend_loads_the_trained_weights(finished, run, name):
    trained, config, vocabulary = run.load_model(name)
    assert not trained.model.training
    loaded = scores_of(trained, finished.valid, config, vocabulary)
    best = max(finished.epochs, key=lambda epoch: epoch["selection"])
    assert loaded == pytest.approx(best["valid"])


def load_everything(run):
    run.load_model()
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
        run.load_model()


@pytest.mark.parametrize("state", [{}, [], {"model": {}, "optimizer": {}, "epochs": []}, 3])
def test_a_state_of_something_else_is_a_run_error(finished, run, state):
    torch.save(state, run.path("state.pt"))
    fresh = toy.trainer(finished.config, run.folder / "fresh")
    fresh.run = run
    with pytest.raises(RunError, match=r"state\.pt: damaged or of another model"):
        fresh.resume()


WRITERS = {
    "model.safetensors": ("pymtl.training.run.save_file", lambda run: run.save_model(run.load_model()[0].model)),
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
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "run.json", "vocabulary.json"]
    assert run.load()[2] == "reference"
    with pytest.raises(RunError, match="has an epoch finished"):
        run.load_model()


@pytest.mark.parametrize("name", ["program.pt2", "crfs.safetensors"])
def test_a_folder_with_what_exporting_leaves_is_taken_and_a_new_run_drops_it(finished, tmp_path, name):
    (tmp_path / name).write_bytes(b"exported")
    run = Run(tmp_path)
    assert run.exists()
    run.create(finished.config, finished.vocabulary, "pymtl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json", "vocabulary.json"]


def test_metrics_are_one_json_object_an_epoch(run):
    lines = run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        epoch = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert set(epoch) == {"epoch", "loss", "valid", "selection", "seconds", "step_ms"}


def test_evaluation_puts_predictions_back_in_the_order_of_the_records(finished):
    trained, config, vocabulary = finished.run.load_model()
    valid = finished.valid[""]
    shuffled = [finished.batcher.batch(valid, [i]) for i in reversed(range(len(valid)))]
    whole = [finished.batcher.batch(valid, range(len(valid)))]
    arguments = (finished.valid, config, vocabulary)
    assert evaluate(trained, {"": shuffled}, *arguments) == evaluate(trained, {"": whole}, *arguments)


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
