"""Runs that are kept: they say what they are, may be moved, name no folder of the machine; newer ones are refused."""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
import toy
from rich.console import Console
from toy import quiet

import pymtl
from pymtl.__main__ import main
from pymtl.commands.train import _Screen
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.metrics import passed_over
from pymtl.training.run import Run

SMALL = ("--set", "training.epochs=2")
NO_PLAIN = """
[tasks.stars]
kind = "ordinal"
field = "score"
"""
TWO_SETS = """
[datasets.one]
train = "train.jsonl"
valid = "valid.jsonl"
[datasets.two]
train = "train.jsonl"
test = "test.jsonl"
[tasks.intent]
kind = "classification"
dataset = "one"
[tasks.slots]
kind = "tagging"
dataset = "two"
[model]
embedding_dim = 4
hidden_size = 4
[training]
epochs = 1
"""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, a run of all kinds of task, and its export."""
    folder = tmp_path_factory.mktemp("kept")
    path = toy.write_files(folder / "secret" / "data", toy.TOML + toy.ALL_KINDS)
    quiet("train", path, "--run", folder / "run", *SMALL)
    quiet("export", folder / "run", folder / "exported")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """The run in a place from which its data are not found."""
    return Run(shutil.copytree(trained / "run", tmp_path / "some" / "where" / "run"))


def edit(run, name, change):
    """Changes a JSON file of a run."""
    value = run.read_json(name)
    change(value)
    run.write_json(name, value)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# run.json


def test_a_run_says_which_versions_made_it_when_from_which_data_with_what_scores(trained):
    manifest = Run(trained / "run").read_json("run.json")
    assert manifest["format"] == 1
    assert manifest["pymtl"] == pymtl.__version__
    assert manifest["torch"] == torch.__version__
    age = datetime.now(timezone.utc) - datetime.fromisoformat(manifest["date"])
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(hours=1)
    assert set(manifest["data"]) == {"train", "valid", "test"}
    for part, said in manifest["data"].items():
        content = (trained / "secret" / "data" / f"{part}.jsonl").read_bytes()
        assert said == {
            "file": f"{part}.jsonl",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    epochs = Run(trained / "run").read_metrics()
    best = max(epochs, key=lambda epoch: epoch["selection"])
    assert manifest["epoch"] == best["epoch"]
    assert manifest["scores"] == {"validation": best["valid"], "test": Run(trained / "run").read_scores()}


def test_an_export_says_what_its_run_says(trained):
    run, exported = (Run(trained / name).read_json("run.json") for name in ("run", "exported"))
    assert run.pop("threads") > 0
    assert {**run, "date": None} == {**exported, "date": None}
    assert exported["date"] >= run["date"]


def test_data_sets_of_their_own_are_told_apart(tmp_path):
    path = toy.write_files(tmp_path / "data", TWO_SETS)
    quiet("train", path, "--run", tmp_path / "run")
    data = Run(tmp_path / "run").read_json("run.json")["data"]
    assert {part: said["file"] for part, said in data.items()} == {
        "one/train": "train.jsonl",
        "one/valid": "valid.jsonl",
        "two/train": "train.jsonl",
        "two/test": "test.jsonl",
    }


def test_a_run_without_a_test_set_has_a_card_and_scores_of_validation(tmp_path):
    path = toy.write_files(tmp_path / "data", toy.TOML.replace('test = "test.jsonl"', ""))
    quiet("train", path, "--run", tmp_path / "run", *SMALL)
    manifest = Run(tmp_path / "run").read_json("run.json")
    assert manifest["scores"]["test"] == {}
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| score | validation |" in card
    assert f"| intent/accuracy | {manifest['scores']['validation']['intent/accuracy']:.4f} |" in card


@pytest.mark.parametrize("name", ["README.md", "evaluation/notes.txt"])
def test_files_of_someone_else_in_the_folder_are_not_replaced(trained, tmp_path, name):
    mine = tmp_path / "project" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    status = main(["train", str(trained / "secret" / "data" / "toy.toml"), "--run", str(tmp_path / "project"), *SMALL])
    assert status in (0, 1)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_run_that_replaces_another_drops_its_evaluations_and_facts(trained, copy):
    path = trained / "secret" / "data" / "toy.toml"
    quiet("evaluate", copy.folder, "--data", path.parent)
    assert (copy.folder / "evaluation" / "test" / "errors.jsonl").exists()
    without = ("--set", "training.epochs=1", "--overwrite", "--set", "data.valid=test.jsonl")
    quiet("train", path, "--run", copy.folder, *without)
    assert not (copy.folder / "evaluation").exists()
    manifest = copy.read_json("run.json")
    assert manifest["epoch"] == 1
    assert manifest["data"]["valid"]["file"] == "test.jsonl"


# What a run does not tell


def tells(folder, *words):
    """The files that hold one of the words."""
    every = [(path, path.read_bytes()) for path in files_of(folder)]
    return [path.name for path, content in every if any(str(word).encode() in content for word in words)]


def test_no_file_of_a_run_or_an_export_names_the_folder_of_the_data(trained, tmp_path):
    for name in ("run", "exported"):
        there = shutil.copytree(trained / name, tmp_path / name)
        quiet("evaluate", there, "--data", trained / "secret" / "data")
        assert len(files_of(there)) > 6
        assert tells(there, trained, tmp_path) == []


def test_nothing_of_far_away_data_is_told(tmp_path, fails):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as far:
        path = toy.write_files(Path(far) / "hidden", toy.TOML)
        quiet("train", path, "--run", tmp_path / "run", *SMALL)
        quiet("export", tmp_path / "run", tmp_path / "exported")
        for name in ("run", "exported"):
            assert tells(tmp_path / name, far, Path(far).name) == []
            assert Run(tmp_path / name).read_json("config.json")["folder"] is None
            assert "pass --data DIR" in fails("evaluate", tmp_path / name)
        quiet("evaluate", tmp_path / "run", "--data", path.parent)
        quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=3", "--resume")
        assert tells(tmp_path / "run", far, Path(far).name) == []


def test_data_beside_the_run_are_found_when_both_move(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    printed = quiet("evaluate", tmp_path / "moved" / "run", "--out", tmp_path / "out")
    assert "test, 20 sentences" in printed


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_modes_of_files_follow_the_umask(tmp_path, mask, mode):
    path = toy.write_files(tmp_path / "data")
    before = os.umask(mask)
    try:
        quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=1")
        quiet("evaluate", tmp_path / "run")
        quiet("export", tmp_path / "run", tmp_path / "exported")
    finally:
        os.umask(before)
    written = files_of(tmp_path / "run") + files_of(tmp_path / "exported")
    assert {"model.safetensors", "state.pt", "program.pt2", "evaluation.png"} <= {path.name for path in written}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == dict.fromkeys(
        (path.name for path in written), oct(mode)
    )


# The model card


def test_the_card_of_a_run_has_its_tasks_data_and_scores(trained):
    card = (trained / "run" / "README.md").read_text(encoding="utf-8")
    manifest = Run(trained / "run").read_json("run.json")
    rows = card.splitlines()
    assert rows[0] == "---"
    assert "# run" in rows
    for row in (
        "| intent | classification | film, music, table |",
        "| slots | tagging | B-food, B-genre, I-food, I-genre, O |",
        "| topics | multilabel | food, genre |",
        "| politeness | regression |  |",
    ):
        assert row in rows
    assert f"trained with pymtl {pymtl.__version__} on torch {torch.__version__}, {manifest['date'][:10]}." in card
    for part, said in manifest["data"].items():
        assert f"| {part} | {said['file']} | {said['bytes']:,} | `{said['sha256'][:16]}…` |" in rows
    assert f"Of epoch {manifest['epoch']}, the best in validation." in rows
    for name, value in manifest["scores"]["validation"].items():
        cells = f" | {value:.4f} | {manifest['scores']['test'][name]:.4f} |"
        assert [row for row in rows if row.startswith(f"| {name}") and row.endswith(cells)]
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/this/folder", str(trained / "run"))
    exec(code, names := {})
    assert names["answer"]["tokens"] == ["a", "text"]


# Runs and configurations of newer versions


def newer(run):
    edit(run, "run.json", lambda manifest: manifest.update(format=2, pymtl="7.0"))


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "{run}", "play jazz"],
        ["evaluate", "{run}", "--data", "{data}"],
        ["evaluate", "{run}", "{data}/test.jsonl"],
        ["report", "{run}", "--data", "{data}"],
        ["export", "{run}", "{out}"],
        ["train", "{data}/toy.toml", "--run", "{run}", "--set", "training.epochs=3", "--resume"],
    ],
    ids=lambda argv: " ".join(word for word in argv if not word.startswith("{run")),
)
def test_a_run_of_a_newer_format_is_refused_as_newer(trained, copy, tmp_path, fails, argv):
    newer(copy)
    before = {path: path.read_bytes() for path in files_of(copy.folder)}
    places = {"run": copy.folder, "data": trained / "secret" / "data", "out": tmp_path / "out"}
    error = fails(*(word.format(**places) for word in argv))
    assert "written by a newer pymtl (7.0, format 2)" in error
    assert "upgrade" in error
    assert before == {path: path.read_bytes() for path in files_of(copy.folder)}


@pytest.mark.parametrize("name", ["run", "exported"])
def test_a_newer_folder_is_not_loaded(trained, tmp_path, name):
    there = Run(shutil.copytree(trained / name, tmp_path / name))
    newer(there)
    with pytest.raises(RunError, match="newer pymtl"):
        pymtl.load(there.folder)


def test_a_newer_run_is_said_to_be_newer_whatever_else_changed_in_it(copy):
    newer(copy)
    edit(copy, "config.json", lambda config: config.update(a_new_section={"key": 1}))
    copy.write_json("vocabulary.json", {"of": "another form"})
    with pytest.raises(RunError, match="newer pymtl"):
        pymtl.load(copy.folder)


def test_a_newer_run_is_no_warm_start(trained, copy, tmp_path, fails):
    newer(copy)
    path = trained / "secret" / "data" / "toy.toml"
    error = fails("train", path, "--run", tmp_path / "new", "--set", f"warm_start.run={copy.folder}", *SMALL)
    assert "newer pymtl" in error


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "1"}', '{"format": true}', "{", ""])
def test_a_damaged_manifest_is_named(copy, content):
    copy.path("run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        pymtl.load(copy.folder)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("asked", ["99.0", "99", "0.999.0"])
def test_a_configuration_for_a_newer_version_is_refused_as_newer(tmp_path, fails, command, asked):
    path = toy.write_files(tmp_path / "data", f'pymtl = "{asked}"\nnew_key = 1\n' + toy.TOML)
    place = ["--run" if command == "train" else "--out", tmp_path / "run"]
    error = fails(command, path, *place)
    assert f"written for pymtl {asked}, newer than this {pymtl.__version__}" in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_configuration_of_this_version_or_an_older_one_is_read(tmp_path):
    for asked in (pymtl.__version__, "0.0.1", "0"):
        config = toy.load(tmp_path / "data", toml=f'pymtl = "{asked}"\n' + toy.TOML)
        assert config.pymtl == asked
    with pytest.raises(ConfigError, match="pymtl"):
        toy.load(tmp_path / "data", toml="pymtl = 3\n" + toy.TOML)


# Runs of older versions


OLD_SETTINGS = {
    "data": ("format", "columns", "tokenizer", "holdout_field", "holdout_values", "lowercase"),
    "tasks": ("scheme", "constrained", "class_weights", "label_smoothing"),
    "training": ("rare_word_dropout", "select_by", "baseline"),
}


@pytest.fixture
def old(copy):
    """The run as a version without run.json would have left it."""
    copy.path("run.json").unlink()
    copy.path("README.md").unlink()

    def config(value):
        for key in OLD_SETTINGS["data"]:
            value["data"].pop(key, None)
        for task in value["tasks"].values():
            for key in OLD_SETTINGS["tasks"]:
                task.pop(key, None)
        for key in OLD_SETTINGS["training"]:
            value["training"].pop(key, None)
        value.pop("pymtl", None)

    def vocabulary(value):
        del value["counts"]
        del value["labels"]["politeness"]

    edit(copy, "config.json", config)
    edit(copy, "vocabulary.json", vocabulary)
    return copy


def test_an_old_run_answers_as_it_did(trained, old):
    texts = [record["tokens"] for record in toy.requests(10, 3)]
    (new, was) = (pymtl.load(folder).predict(texts) for folder in (trained / "run", old.folder))
    scale = pymtl.load(trained / "run").labels["politeness"][0]
    for one, other in zip(new, was):
        others = [{k: v for k, v in each.items() if not k.startswith("politeness")} for each in (one, other)]
        assert others[0] == others[1]
        assert other["politeness"] == pytest.approx((one["politeness"] - scale["mean"]) / scale["std"], abs=1e-5)


def test_an_old_run_splits_texts_at_spaces_as_it_did(old):
    assert pymtl.load(old.folder).predict("play jazz, please!")["tokens"] == ["play", "jazz,", "please!"]


def test_an_old_run_can_be_evaluated_reported_on_and_exported(trained, old, tmp_path):
    data = trained / "secret" / "data"
    quiet("evaluate", old.folder, "--data", data, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    scores = Run(trained / "run").read_scores()
    assert {name: value for name, value in found["scores"].items() if name != "politeness/r2"} == pytest.approx(
        {name: value for name, value in scores.items() if name != "politeness/r2"}, rel=1e-5
    )
    assert "Test set, 20 sentences" in quiet("report", old.folder, "--data", data, "--batches", 2)
    quiet("export", old.folder, tmp_path / "exported")
    texts = ["play jazz", "please book hot dogs"]
    (run, exported) = (pymtl.load(folder).predict(texts) for folder in (old.folder, tmp_path / "exported"))
    assert [answer["slots"] for answer in run] == [answer["slots"] for answer in exported]


def test_an_old_run_is_not_resumed_and_the_reason_is_said(trained, old, fails):
    before = {path: path.read_bytes() for path in files_of(old.folder)}
    path = trained / "secret" / "data" / "toy.toml"
    error = fails("train", path, "--run", old.folder, "--set", "training.epochs=3", "--resume")
    assert "begun by a version that split texts and held records out in other ways" in error
    assert "not resumed" in error
    assert before == {path: path.read_bytes() for path in files_of(old.folder)}


def test_an_old_run_stays_old_when_a_command_has_looked_at_it(trained, old, tmp_path):
    quiet("evaluate", old.folder, "--data", trained / "secret" / "data", "--out", tmp_path / "out")
    quiet("report", old.folder, "--data", trained / "secret" / "data", "--batches", 2)
    quiet("predict", old.folder, "play jazz")
    assert not old.path("run.json").exists()


def test_an_old_run_may_be_replaced(trained, old):
    path = trained / "secret" / "data" / "toy.toml"
    quiet("train", path, "--run", old.folder, "--set", "training.epochs=1", "--overwrite")
    assert old.read_json("run.json")["format"] == 1


# report and compare


def test_a_moved_run_is_reported_on_with_its_data(trained, copy, fails):
    assert "pass --data DIR" in fails("report", copy.folder, "--batches", 2)
    printed = quiet("report", copy.folder, "--data", trained / "secret" / "data", "--batches", 2)
    assert "Test set, 20 sentences" in printed
    assert "plain PyTorch, packed" in printed
    assert set(copy.read_json("report.json")) == {"bucketed", "shuffled", "parity"}
    assert tells(copy.folder, trained) == []


@pytest.mark.parametrize(
    "toml",
    [toy.TOML + NO_PLAIN, toy.TOML.replace('"hard"', '"mmoe"'), TWO_SETS],
    ids=["ordinal", "mmoe", "two data sets"],
)
def test_a_model_without_a_counterpart_in_plain_pytorch_is_timed_by_itself(tmp_path, toml):
    path = toy.write_files(tmp_path / "data", toml)
    quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=1")
    printed = quiet("report", tmp_path / "run", "--batches", 3)
    assert "this model has no counterpart in plain PyTorch here" in printed
    assert "plain PyTorch, packed" not in printed
    result = Run(tmp_path / "run").read_json("report.json")
    assert set(result) == {"bucketed", "shuffled"}
    for kind in result.values():
        assert set(kind["batches"].values()) <= {2, 3}
        for part in ("training", "inference"):
            assert set(kind[part]) == {"pymtl"}
            assert kind[part]["pymtl"]["p50"] > 0
            assert f"{kind[part]['pymtl']['p50']:.2f}" in printed


def test_an_export_is_no_run_to_report_on(trained, fails):
    error = fails("report", trained / "exported", "--batches", 2)
    assert "has an epoch finished" not in error  # it has
    assert "export" in error.replace(str(trained / "exported"), "")


def test_a_comparison_names_no_folder_of_the_machine_and_goes_on_with_moved_data(tmp_path):
    path = toy.write_files(tmp_path / "secret" / "data", toy.TOML)
    small = ("--set", "training.epochs=1", "--set", "model.hidden_size=4", "--threads", 1)
    argv = ("--over", "sharing=hard", "--seeds", 1, "--out", tmp_path / "out", *small)
    quiet("compare", path, *argv)
    plans = [each for each in files_of(tmp_path / "out") if each.name == "plan.json"]
    assert len(plans) == 2
    for plan in plans:
        assert "folder" not in plan.read_text(encoding="utf-8")
        assert str(tmp_path) not in plan.read_text(encoding="utf-8")
    assert tells(tmp_path / "out", tmp_path / "secret") == []
    shutil.move(tmp_path / "secret", tmp_path / "moved")
    quiet("compare", tmp_path / "moved" / "data" / "toy.toml", *argv)
    compared = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in compared["rows"]] == ["hard"]


# How training ended


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped early, its configuration and settings, and what was printed."""
    folder = tmp_path_factory.mktemp("stopped")
    path = toy.write_files(folder / "data")
    # Nothing is learnt: the first epoch stays the best.
    settings = ["training.patience=2", "training.epochs=9", "training.learning_rate=1e-30"]
    more = [word for setting in settings for word in ("--set", setting)]
    printed = quiet("train", path, "--run", folder / "run", *more)
    return path, folder / "run", more, printed


def test_training_that_stops_early_says_when_and_why(stopped):
    _, run, _, printed = stopped
    assert len(Run(run).read_metrics()) == 3
    assert "stopped early after epoch 3: 2 without a better validation score (best by mean: epoch 1)" in printed
    assert Run(run).read_json("run.json")["epoch"] == 1


def test_training_to_the_end_says_so(tmp_path):
    path = toy.write_files(tmp_path / "data")
    printed = quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=3")
    best = max(Run(tmp_path / "run").read_metrics(), key=lambda epoch: epoch["selection"])["epoch"]
    assert f"trained all 3 epochs (best by mean: epoch {best})" in printed


def of_epochs(*scores):
    return [
        {"epoch": i + 1, "selection": sum(each.values()) / len(each), "valid": each} for i, each in enumerate(scores)
    ]


def test_a_task_whose_best_epoch_is_passed_over_is_named():
    early = of_epochs(
        {"number/r2": 0.20, "tags/f1": 0.25, "tags/precision": 0.9},
        {"number/r2": 0.22, "tags/f1": 0.30, "tags/precision": 0.1},
        {"number/r2": 0.05, "tags/f1": 0.34, "tags/precision": 0.1},
    )
    for epoch in early:
        epoch["selection"] = (epoch["valid"]["number/r2"] + epoch["valid"]["tags/f1"]) / 2
    assert passed_over(early) == {"tags/f1": (3, 0.34, 0.30)}
    assert (
        passed_over(of_epochs({"a/accuracy": 0.50, "b/accuracy": 0.90}, {"a/accuracy": 0.60, "b/accuracy": 0.895}))
        == {}
    )
    alone = of_epochs({"tags/f1": 0.4, "tags/recall": 0.5}, {"tags/f1": 0.3, "tags/recall": 0.9})
    assert passed_over(alone) == {}  # kept by another of its scores
    unbounded = of_epochs({"words/perplexity": 9.0, "a/f1": 0.1}, {"words/perplexity": 5.0, "a/f1": 0.2})
    assert passed_over(unbounded) == {}
    lost = of_epochs({"a/f1": float("nan"), "b/f1": 0.1}, {"a/f1": 0.9, "b/f1": 0.1}, {"a/f1": 0.1, "b/f1": 0.95})
    for epoch, selection in zip(lost, (0.0, 0.5, 0.525)):
        epoch["selection"] = selection
    assert passed_over(lost) == {"a/f1": (2, 0.9, 0.1)}


def test_training_says_which_tasks_the_kept_epoch_costs(capsys):
    screen = _Screen(Console(width=80), None)
    screen.passed_over(2, {})
    assert capsys.readouterr().out == ""
    screen.passed_over(2, {"tags/f1": (3, 0.34, 0.3), "number/r2": (1, 0.25, 0.22)})
    printed = capsys.readouterr().out
    assert "epoch 2 is kept for all tasks: tags f1 was 34.00 % in epoch 3, 30.00 % in this one" in printed
    assert "number r2 was 0.250 in epoch 1, 0.220 in this one" in printed
    assert "smaller weight" in printed


def test_resuming_a_finished_run_says_that_nothing_is_left(trained, copy):
    path = trained / "secret" / "data" / "toy.toml"
    weights = copy.path("model.safetensors").read_bytes()
    manifest = copy.read_json("run.json")
    printed = quiet("train", path, "--run", copy.folder, *SMALL, "--resume")
    best = max(copy.read_metrics(), key=lambda epoch: epoch["selection"])["epoch"]
    assert (
        f"nothing left to train: the run has its 2 epochs (best by mean: epoch {best}); more with training.epochs"
        in printed
    )
    assert "Test set, 20 sentences" in printed
    assert copy.path("model.safetensors").read_bytes() == weights
    assert len(copy.read_metrics()) == 2
    assert {**copy.read_json("run.json"), "date": None} == {**manifest, "date": None}


def test_resuming_a_run_that_stopped_early_says_how_to_go_on(stopped, tmp_path):
    path, run, more, _ = stopped
    there = shutil.copytree(run, tmp_path / "run")
    printed = quiet("train", path, "--run", there, *more, "--resume")
    assert len(Run(there).read_metrics()) == 3
    assert "nothing left to train" in printed
    (told,) = [line for line in printed.splitlines() if "nothing left to train" in line]
    assert "patience" in told or "early" in told  # more epochs would not go on


def test_a_run_goes_on_with_more_epochs_and_says_how_that_ended(trained, copy):
    path = trained / "secret" / "data" / "toy.toml"
    printed = quiet("train", path, "--run", copy.folder, "--set", "training.epochs=3", "--resume")
    assert "trained all 3 epochs (best by mean: epoch " in printed
    manifest = copy.read_json("run.json")
    assert manifest["data"] == Run(trained / "run").read_json("run.json")["data"]
    best = max(copy.read_metrics(), key=lambda epoch: epoch["selection"])
    assert (manifest["epoch"], manifest["scores"]["validation"]) == (best["epoch"], best["valid"])
    assert f"Of epoch {best['epoch']}, the best in validation." in copy.path("README.md").read_text(encoding="utf-8")


def test_resuming_on_other_data_is_refused_or_said(trained, copy, tmp_path, capsys):
    data = shutil.copytree(trained / "secret" / "data", tmp_path / "data")
    toy.write_lines(data / "train.jsonl", toy.requests(60, 77))
    argv = ["train", str(data / "toy.toml"), "--run", str(copy.folder), "--set", "training.epochs=3", "--resume"]
    status = main(argv)
    printed = capsys.readouterr()
    if status == 0:
        manifest = copy.read_json("run.json")
        digest = hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest()
        assert manifest["data"]["train"]["sha256"] == digest
    else:
        assert "train.jsonl" in printed.err


def test_a_run_from_before_sharing_was_written_down_is_one_of_hard_sharing(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert (config.pop("sharing")["kind"], config.pop("balancing")["kind"]) == ("hard", "ew")
    path.write_text(json.dumps(config))
    texts = ["play some jazz", "book sushi"]
    assert pymtl.load(tmp_path / "run").predict(texts) == pymtl.load(trained / "run").predict(texts)


def test_another_way_of_sharing_is_named_where_a_run_is_resumed_or_begun_from(trained, tmp_path, fails):
    path = toy.write_files(tmp_path, toy.TOML + toy.ALL_KINDS)
    shutil.copytree(trained / "run", tmp_path / "run")
    error = fails("train", path, "--run", tmp_path / "run", "--resume", "--set", "sharing=shared_private", *SMALL)
    assert "sharing ('hard', now 'shared_private')" in error
    start = ("--set", f"warm_start={{run='{tmp_path / 'run'}'}}", "--set", "sharing=shared_private")
    error = fails("train", path, "--run", tmp_path / "new", *start, *SMALL)
    assert "it has sharing = 'hard', this configuration 'shared_private'" in error


def test_a_resumed_run_keeps_its_number_of_threads(tmp_path, threads, fails):
    path = toy.write_files(tmp_path / "data", toy.TOML)
    run = tmp_path / "run"
    quiet("train", path, "--run", run, *SMALL, "--threads", "1")
    threads(2)
    quiet("train", path, "--run", run, *SMALL, "--resume")
    assert torch.get_num_threads() == 1
    quiet("train", path, "--run", run, *SMALL, "--resume", "--threads", "2")
    assert torch.get_num_threads() == 2
    Run(run).write_json("run.json", {**Run(run).read_manifest(), "threads": "many"})
    said = fails("train", path, "--run", run, *SMALL, "--resume")
    assert "run.json: damaged: expected a number of threads, got 'many'" in said
