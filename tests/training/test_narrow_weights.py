"""Trained models whose recurrent layers keep their matrices in fewer bits: loaded so, scored so, exported so."""

import json

import pytest
import torch
import toy

import pymtl
from pymtl.__main__ import main
from pymtl.training.errors import ConfigError
from pymtl.training.exporting import PROGRAM

TEXTS = ["please book hot dogs", "play jazz", "watch hard rock , sushi", "watch", "please please play hot dogs jazz"]
SHARING = {
    "own": (),  # the default: encoders of the tasks beside the shared one
    "two layers": ('sharing="hard"', "model.num_layers=2"),
    "one direction": ('sharing="soft"', "model.bidirectional=false"),
    "characters": ('sharing="hard"', 'characters.kind="lstm"'),
}
NARROW = {"int8": torch.int8, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=SHARING)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    path = toy.write_files(folder / "data", toy.TOML)
    settings = ["model.hidden_size=48", "training.epochs=2", *SHARING[request.param]]
    more = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", str(path), "--run", str(folder / "run"), *more]) == 0
    return folder / "run"


def logits(folder, weights=None):
    return pymtl.load(folder, weights=weights).logits(TEXTS)


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[task] - other[task]).abs().max()) for task in one)


@pytest.mark.parametrize("name", NARROW)
def test_all_recurrent_layers_are_kept_so_and_answers_stay_near(run, name):
    model = pymtl.load(run, weights=NARROW[name])
    plain = pymtl.load(run)
    lines = pymtl.describe(model._trained.model).splitlines()
    assert len(lines) >= 1
    assert all(f"frozen in torch.{name}" in line for line in lines)
    smaller = pymtl.frozen_bytes(plain._trained.model) / pymtl.frozen_bytes(model._trained.model)
    assert smaller > {"int8": 2.5, "bfloat16": 1.8}[name]
    assert 0 < largest_difference(logits(run, NARROW[name]), logits(run)) < 0.5
    assert [a["intent"] for a in model.predict(TEXTS)] == [a["intent"] for a in plain.predict(TEXTS)]


@pytest.mark.parametrize("name", NARROW)
def test_an_export_gives_the_same_bits_in_a_smaller_file(run, name, tmp_path):
    assert main(["export", str(run), str(tmp_path / "small"), "--weights", name]) == 0
    assert main(["export", str(run), str(tmp_path / "plain")]) == 0
    exported, expected = logits(tmp_path / "small"), logits(run, NARROW[name])
    assert largest_difference(exported, expected) < 1e-5
    assert largest_difference(logits(tmp_path / "plain"), expected) > 1e-5
    sizes = {folder: (tmp_path / folder / PROGRAM).stat().st_size for folder in ("small", "plain")}
    assert sizes["small"] < sizes["plain"]
    assert json.loads((tmp_path / "small" / "run.json").read_text())["weights"] == name
    with pytest.raises(ConfigError, match="weights: expected none for an exported program, which has its own"):
        pymtl.load(tmp_path / "small", weights=torch.int8)


def test_commands_take_weights(run, tmp_path, capsys):
    assert main(["predict", str(run), "--weights", "int8", "play jazz"]) == 0
    assert "intent: " in capsys.readouterr().out
    assert main(["evaluate", str(run), "--weights", "int8"]) == 0
    assert "weights in int8" in capsys.readouterr().out
    written = run / "evaluation" / "test-int8"
    assert json.loads((written / "evaluation.json").read_text())["weights"] == "int8"
    assert "weights in int8" in (written / "evaluation.md").read_text()
    assert main(["report", str(run), "--weights", "int8", "--batches", "3"]) == 0
    assert "pymtl, frozen in int8" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert "pymtl, frozen in int8" in report["bucketed"]["inference"]
    assert "pymtl, frozen in int8" not in report["bucketed"]["training"]


def test_a_model_without_layers_of_this_library_is_refused(tmp_path, capsys):
    path = toy.write_files(tmp_path / "data", toy.TOML)
    more = ("--set", "training.epochs=1", "--set", 'sharing="hard"', "--set", 'balancing="ew"')
    assert main(["train", str(path), "--run", str(tmp_path / "run"), "--backend", "reference", *more]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "--weights", "int8", "play jazz"]) == 1
    assert "weights: expected a model with layers of this library to keep in torch.int8, got none" in (
        capsys.readouterr().err
    )


def test_another_dtype_is_refused_by_the_command_line(run, capsys):
    with pytest.raises(SystemExit):
        main(["predict", str(run), "--weights", "int4", "play jazz"])
    assert "--weights: invalid choice: 'int4' (choose from" in capsys.readouterr().err


def test_bench_times_one_more_contender(capsys):
    assert main(["bench", "--shape", "1,4,8,16", "--seconds", "0.01", "--weights", "int8"]) == 0
    assert "pymtl frozen int8" in capsys.readouterr().out
    assert main(["bench", "--shape", "1,4,8,16", "--dtype", "float64", "--weights", "int8"]) == 1
    assert "--weights: expected none but with --dtype float32 on the CPU" in capsys.readouterr().err
