"""Every kind of task, input and start, trained from a configuration and asked on the command line."""

import json
import shutil

import pytest
import torch
import toy
from every import records, write

from pymtl.__main__ import main
from pymtl.serving import ctc
from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.batches import schedule
from pymtl.training.config import TrainingConfig
from pymtl.training.run import Run


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A run of all kinds of task and input, and what it printed."""
    folder = tmp_path_factory.mktemp("every")
    assert main(["train", str(write(folder)), "--run", str(folder / "run")]) == 0
    return folder


def test_every_kind_of_task_is_scored(every):
    scores = Run(every / "run").read_scores()
    expected = {"intent/accuracy", "slots/accuracy", "topics/f1", "scores/r2", "politeness/kappa", "level/kappa"}
    assert (expected - {"slots/accuracy"}) | {"words/perplexity", "sounds/label_accuracy", "exact_match"} <= set(scores)
    assert {"spoken/token_error_rate", "spoken/exact_match"} <= set(scores)
    assert 1 < scores["words/perplexity"] < 20
    assert scores["intent/accuracy"] > 0.5
    assert scores["politeness/kappa"] > 0.5


@pytest.fixture(scope="module")
def exported(every):
    assert main(["export", str(every / "run"), str(every / "exported")]) == 0
    return every / "exported"


def asked(folder, capsys, *options):
    lines = [json.dumps(record) for record in records(4, 7)]
    capsys.readouterr()
    assert main(["predict", str(folder), "--records", *options, *lines]) == 0
    return capsys.readouterr().out


def test_predictions_have_the_form_of_the_labels(every, capsys):
    for line, record in zip(asked(every / "run", capsys, "--json").splitlines(), records(4, 7)):
        answer = json.loads(line)
        assert answer["tokens"] == record["tokens"]
        assert isinstance(answer["intent"], str)
        assert len(answer["slots"]) == len(record["tokens"])
        assert len(answer["scores"]) == 2
        assert answer["politeness"] in (0, 1, 2)
        assert isinstance(answer["politeness"], int)
        assert answer["level"] in ("low", "middle", "high")
        if answer["words/tokens"] > 0:
            assert answer["words"] >= 1
        else:
            assert answer["words"] is None
        assert all(isinstance(symbol, str) for symbol in answer["sounds"])


def test_an_exported_program_answers_as_the_run_does(every, exported, capsys):
    assert asked(exported, capsys, "--json") == asked(every / "run", capsys, "--json")
    assert asked(exported, capsys) == asked(every / "run", capsys)
    assert (exported / "program.pt2").exists()


ONE_WORD = json.dumps({"tokens": ["play"], "case": [1], "signal": [[0.0, 0.5]]})


def test_a_text_without_a_word_to_predict_says_so(every, capsys):
    capsys.readouterr()
    assert main(["predict", str(every / "run"), "--records", ONE_WORD]) == 0
    assert "words: no word to predict\n" in capsys.readouterr().out
    assert main(["predict", str(every / "run"), "--records", "--json", ONE_WORD]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["words"], answer["words/tokens"]) == (None, 0)


def test_predict_searches_ctc_labels_with_a_beam(every, capsys, monkeypatch):
    widths = []
    beam = ctc.beam
    monkeypatch.setattr(ctc, "beam", lambda scores, beam_size: widths.append(beam_size) or beam(scores, beam_size))
    asked(every / "run", capsys)
    assert widths == []
    answers = asked(every / "run", capsys, "--json", "--beam", "4").splitlines()
    assert widths == [4] * 4
    assert len(answers) == 4
    assert all(isinstance(json.loads(answer)["sounds"], list) for answer in answers)
    assert main(["predict", str(every / "run"), "--beam", "0", "play"]) == 1
    assert "--beam: expected a whole number above 0, got 0" in capsys.readouterr().err


def test_training_takes_the_place_of_an_exported_program_only_if_told_to(exported, tmp_path, capsys):
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    assert {"program.pt2", "crfs.safetensors"} <= {path.name for path in folder.iterdir()}
    command = ["train", str(toy.write_files(tmp_path)), "--run", str(folder), "--set", "training.epochs=1"]
    assert main(command) == 1
    assert "holds a run already: pass --resume, --overwrite" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in exported.iterdir())
    assert main([*command, "--overwrite"]) == 0
    assert not {"program.pt2", "crfs.safetensors"} & {path.name for path in folder.iterdir()}
    assert main(["predict", str(folder), "play jazz"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("slots: ")


def test_a_model_with_further_fields_asks_for_records(every, capsys):
    assert main(["predict", str(every / "run"), "play jazz"]) == 1
    assert "--records: expected it with a model that reads case, signal" in capsys.readouterr().err
    assert main(["predict", str(every / "run"), "--records", '{"tokens": ["play"]}']) == 1
    assert "input 1: field 'case': expected a list of 1" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_exported_into(every, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["export", str(every / "run"), str(tmp_path)]) == 1
    assert "holds something else" in capsys.readouterr().err


def test_features_alone_need_no_words(tmp_path, capsys):
    toml = """
[data]
train = "train.jsonl"
test = "test.jsonl"
[tasks.sounds]
kind = "ctc"
[tasks.score]
kind = "regression"
pooling = "max"
[fields.signal]
kind = "numbers"
size = 2
[model]
words = false
hidden_size = 8
[training]
epochs = 1
"""
    path = write(tmp_path, toml)
    assert main(["train", str(path), "--run", str(tmp_path / "run")]) == 0
    assert Run(tmp_path / "run").load()[1].tokens == ["<pad>", "<unk>"]
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "--records", '{"signal": [[1, 2], [0.5, 1]]}']) == 0
    assert capsys.readouterr().out.startswith("sounds: ")


# Several data sets.

TWO = """
seed = 1
[datasets.a]
train = "a.jsonl"
valid = "valid.jsonl"
test = "test.jsonl"
[datasets.b]
train = "b.jsonl"
valid = "valid.jsonl"
test = "test.jsonl"
[tasks.intent]
kind = "classification"
dataset = "a"
[tasks.slots]
kind = "tagging"
dataset = "b"
[model]
embedding_dim = 8
hidden_size = 8
[training]
epochs = 3
batch_size = 8
learning_rate = 0.02
"""


def two_sets(folder, *overrides):
    for name, count, seed in (("a", 60, 0), ("b", 24, 4), ("valid", 20, 1), ("test", 20, 2)):
        toy.write_lines(folder / f"{name}.jsonl", toy.requests(count, seed))
    path = folder / "two.toml"
    path.write_text(TWO, encoding="utf-8")
    return configuration.load(path, list(overrides))


@pytest.mark.parametrize("sampling", ["proportional", "round_robin", "uniform", "temperature"])
def test_data_sets_take_turns_and_every_task_learns(tmp_path, sampling):
    config = two_sets(tmp_path, f"training.sampling={sampling}", "sharing=shared_private", "sharing.adversarial=0.1")
    result = toy.fitted(config, tmp_path / "run")
    assert set(result.epochs[-1]["valid"]) == {"intent/accuracy", "intent/macro_f1", "slots/f1", "exact_match"}
    assert result.epochs[-1]["loss"]["intent"] < result.epochs[0]["loss"]["intent"]
    assert result.epochs[-1]["loss"]["slots"] < result.epochs[0]["loss"]["slots"]


def schedule_of(sampling, sizes=(1000, 100), temperature=2.0, cap=0):
    sets = {str(i): [Record(["w"] * (1 + k % 5), {}) for k in range(size)] for i, size in enumerate(sizes)}
    settings = TrainingConfig(batch_size=10, sampling=sampling, temperature=temperature, epoch_cap=cap)
    return schedule(sets, settings, torch.Generator().manual_seed(0))


def test_proportional_sampling_takes_every_record_once():
    batches = schedule_of("proportional")
    for name, size in (("0", 1000), ("1", 100)):
        assert sorted(i for own, indices in batches if own == name for i in indices) == list(range(size))


def test_round_robin_alternates_and_begins_the_shorter_set_anew():
    names = [name for name, _ in schedule_of("round_robin")]
    assert names == ["0", "1"] * 55


@pytest.mark.parametrize(
    ("sampling", "temperature", "share"),
    [("uniform", 2.0, 0.5), ("temperature", 2.0, 1 / (1 + 10**0.5)), ("temperature", 1.0, 1 / 11)],
)
def test_sampling_follows_the_sizes_as_it_says(sampling, temperature, share):
    names = [name for name, _ in schedule_of(sampling, (10_000, 1000), temperature)]
    assert len(names) == 1100
    assert names.count("1") / len(names) == pytest.approx(share, abs=5 * (share * (1 - share) / 1100) ** 0.5)


def test_a_cap_limits_an_epoch_of_each_set():
    batches = schedule_of("proportional", cap=200)
    assert sum(len(indices) for name, indices in batches if name == "0") == 200
    assert sum(len(indices) for name, indices in batches if name == "1") == 100


def test_each_data_set_reads_a_text_as_it_was_trained_on(tmp_path, capsys):
    config = two_sets(tmp_path)
    text = (tmp_path / "two.toml").read_text().replace('train = "b.jsonl"', 'train = "b.jsonl"\nlowercase = true')
    (tmp_path / "two.toml").write_text(text)
    assert main(["train", str(tmp_path / "two.toml"), "--run", str(tmp_path / "run")]) == 0
    answers = []
    for text in ("please play jazz", "please play JAZZ"):
        capsys.readouterr()
        assert main(["predict", str(tmp_path / "run"), "--json", text]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["slots"] == answers[1]["slots"]
    assert config.sets["b"].lowercase is False


def test_a_record_may_be_of_one_data_set_of_several(tmp_path, capsys):
    two_sets(tmp_path)
    text = (tmp_path / "two.toml").read_text().replace('train = "b.jsonl"', 'train = "b.jsonl"\ntokens = "words"')
    (tmp_path / "two.toml").write_text(text)
    for name in ("b", "valid", "test"):
        lines = [{**line, "words": line["tokens"]} for line in toy.requests(24, 4)]
        toy.write_lines(tmp_path / f"{name}.jsonl", lines)
    options = ["--run", str(tmp_path / "run"), "--set", "training.epochs=1"]
    assert main(["train", str(tmp_path / "two.toml"), *options]) == 0
    words = ["play", "jazz"]
    for fields, tasks in ((["tokens"], {"intent"}), (["words"], {"slots"}), (["tokens", "words"], {"intent", "slots"})):
        record = json.dumps(dict.fromkeys(fields, words))
        capsys.readouterr()
        assert main(["predict", str(tmp_path / "run"), "--records", "--json", record]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["tokens"] == words
        assert {"intent", "slots"} & set(answer) == tasks
        assert main(["predict", str(tmp_path / "run"), "--records", record]) == 0
        assert {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} == tasks
    assert main(["predict", str(tmp_path / "run"), "--records", '{"body": ["play"]}']) == 1
    assert "input 1: expected a field 'tokens' or 'text', a text or a list of tokens" in capsys.readouterr().err
