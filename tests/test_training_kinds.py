"""Every kind of task, input and start, trained from a configuration and asked on the command line."""

import json
import random

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.__main__ import main
from pymtl.training import comparison
from pymtl.training import config as configuration
from pymtl.training.batches import schedule
from pymtl.training.config import TrainingConfig
from pymtl.training.data import Record, read_records, read_sets
from pymtl.training.errors import ConfigError, DataError
from pymtl.training.run import Run
from pymtl.training.vectors import read_vectors
from pymtl.training.warm_start import warm_start

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
        assert answer["politeness"] in (0.0, 1.0, 2.0)
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


def test_a_model_with_further_fields_asks_for_records(every, capsys):
    assert main(["predict", str(every / "run"), "play jazz"]) == 1
    assert "--records: expected it with a model that reads case, signal" in capsys.readouterr().err
    assert main(["predict", str(every / "run"), "--records", '{"tokens": ["play"]}']) == 1
    assert "text 1: field 'case': expected a list of 1" in capsys.readouterr().err


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


# Holding out, CSV, vectors, warm starts.


def test_records_are_held_out_by_a_field(tmp_path):
    lines = [{**record, "shop": "xy"[i % 2]} for i, record in enumerate(toy.requests(10))]
    toy.write_lines(tmp_path / "train.jsonl", lines)
    data = 'train = "train.jsonl"\nholdout_field = "shop"\nholdout_values = ["y"]\n'
    (tmp_path / "c.toml").write_text(f'[data]\n{data}[tasks.intent]\nkind = "classification"\n')
    train, valid = read_sets(configuration.load(tmp_path / "c.toml"))
    assert [record.tokens for record in train[""]] == [line["tokens"] for line in lines[::2]]
    assert [record.tokens for record in valid[""]] == [line["tokens"] for line in lines[1::2]]
    with pytest.raises(DataError, match="others to hold out by 'shop' = z, got 10 and 0"):
        read_sets(configuration.load(tmp_path / "c.toml", ['data.holdout_values=["z"]']))


CSV = """
[data]
train = "t.csv"
tokens = "text"
[tasks.intent]
kind = "classification"
[tasks.slots]
kind = "tagging"
[tasks.topics]
kind = "multilabel"
[tasks.score]
kind = "regression"
"""


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_of_csv_are_records(tmp_path, bom):
    (tmp_path / "c.toml").write_text(CSV)
    rows = [
        "text,intent,slots,topics,score",
        'play jazz,"music, loud",O B-genre,a|b,1.5',
        "stop it,,,,",
        '"say ""x""",y,O O,|,-2',
    ]
    (tmp_path / "t.csv").write_text(bom + "\n".join(rows) + "\n", encoding="utf-8")
    found = read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))
    assert [record.tokens for record in found] == [["play", "jazz"], ["stop", "it"], ["say", '"x"']]
    assert found[0].labels == {"intent": "music, loud", "slots": ["O", "B-genre"], "topics": ["a", "b"], "score": 1.5}
    assert found[1].labels == {"intent": None, "slots": None, "topics": None, "score": None}
    assert found[2].labels == {"intent": "y", "slots": ["O", "O"], "topics": [], "score": -2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("play jazz,x,O,,1", "t.csv:2: field 'slots': expected a list of 2"),
        ("play jazz,x,O O,,many", "t.csv:2: field 'score': expected a finite number, got 'many'"),
        ("play jazz,x", "t.csv:2: expected 5 cells, got more or fewer"),
        ("play jazz,x,O O,,1,6", "t.csv:2: expected 5 cells, got more or fewer"),
        ('play "jazz,x', "t.csv:2: "),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    (tmp_path / "c.toml").write_text(CSV)
    (tmp_path / "t.csv").write_text("text,intent,slots,topics,score\n" + row + "\n")
    with pytest.raises(DataError) as error:
        read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))
    assert reason in str(error.value)


@pytest.mark.parametrize("header", ["", "4 3\n"])
def test_vectors_are_read_by_word_and_by_its_lower_case(tmp_path, header):
    (tmp_path / "v.txt").write_text(header + "play 1 2 3\nJazz 4 5 6\nrock 7 8 9\n. . . 1 1 1\n", encoding="utf-8")
    vectors, found = read_vectors(tmp_path / "v.txt", ["<pad>", "Play", "play", "Rock", "Jazz", "x", ". . ."], 3)
    assert found.tolist() == [False, True, True, True, True, False, True]
    assert vectors[1].tolist() == vectors[2].tolist() == [1, 2, 3]
    assert vectors[3].tolist() == [7, 8, 9]
    assert vectors[6].tolist() == [1, 1, 1]
    assert not vectors[[0, 5]].any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4 2\nplay 1 2\n", "v.txt:1: expected vectors of 3"),
        ("play 1 2\n", "v.txt:1: expected vectors of 3 numbers, got 2"),
        ("play 1 2 3 4\n", "v.txt:1: expected vectors of 3 numbers, got 4"),
        ("play 1 2 3\n\nx y 1\n", "v.txt:3: expected a word and 3"),
        ("play 1 2 x\n", "v.txt:1"),
    ],
)
def test_a_bad_line_of_vectors_is_named(tmp_path, text, reason):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(DataError) as error:
        read_vectors(tmp_path / "v.txt", ["play"], 3)
    assert reason in str(error.value)


def test_a_warm_start_takes_what_the_other_run_knows(tmp_path):
    config = toy.load(tmp_path, "training.epochs=1")
    first = toy.fitted(config, tmp_path / "first")
    again = configuration.load(
        tmp_path / "toy.toml",
        [
            f'warm_start={{run="{tmp_path / "first"}", parts=["embedding", "encoder", "heads.slots"], freeze=true}}',
            "training.min_count=25",
        ],
    )
    result = toy.trainer(again, tmp_path / "second")
    assert result.vocabulary.tokens != first.vocabulary.tokens
    fresh = {name: p.clone() for name, p in result.backend.model.state_dict().items()}
    taken = warm_start(result.backend.model, again, result.vocabulary)
    best = Run(tmp_path / "first").load_backend()[0].model.state_dict()
    own = result.backend.model.state_dict()
    for token in result.vocabulary.tokens:
        row, other = result.vocabulary.tokens.index(token), first.vocabulary.tokens.index(token)
        assert torch.equal(own["embedding.weight"][row], best["embedding.weight"][other])
    same = [name for name in own if name.startswith(("encoder", "heads.slots"))]
    assert_same_bits({name: own[name] for name in same}, {name: best[name] for name in same})
    assert torch.equal(own["heads.intent.weight"], fresh["heads.intent.weight"])
    assert {name for name, p in result.backend.model.named_parameters() if not p.requires_grad} == set(taken)


def test_a_warm_start_checks_the_labels_of_every_head_it_takes(tmp_path):
    toy.fitted(toy.load(tmp_path, "training.epochs=1"), tmp_path / "first")
    lines = [{**record, "intent": record["intent"] + "!"} for record in toy.requests(60)]
    toy.write_lines(tmp_path / "other.jsonl", lines)
    start = f'warm_start={{run="{tmp_path / "first"}", parts=["heads"]}}'
    config = configuration.load(tmp_path / "toy.toml", [start, "data.train=other.jsonl"])
    result = toy.trainer(config, tmp_path / "second")
    with pytest.raises(ConfigError, match=r"warm_start.parts: heads: expected the labels"):
        warm_start(result.backend.model, config, result.vocabulary)


@pytest.mark.parametrize(
    ("part", "overrides", "reason"),
    [
        ("heads.nothing", [], "expected one of embedding, encoder, heads.*got 'heads.nothing'"),
        ("encoder", ["model.hidden_size=9"], r"encoder.weight_ih_l0: expected shape \[36, 8\], got \[32, 8\]"),
        ("embedding", ["model.embedding_dim=9"], "expected embeddings of 9 numbers, got 8"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused(tmp_path, part, overrides, reason):
    toy.fitted(toy.load(tmp_path, "training.epochs=1"), tmp_path / "first")
    config = configuration.load(
        tmp_path / "toy.toml", [f'warm_start={{run="{tmp_path / "first"}", parts=["{part}"]}}', *overrides]
    )
    result = toy.trainer(config, tmp_path / "second")
    with pytest.raises(ConfigError, match=reason):
        warm_start(result.backend.model, config, result.vocabulary)


# Comparing.


def test_a_comparison_trains_the_grid_once_and_goes_on_where_it_stopped(tmp_path, capsys):
    toy.write_files(tmp_path)
    arguments = ["compare", str(tmp_path / "toy.toml"), "--over", "sharing=hard,soft", "--seeds", "2", "--single-task"]
    arguments += ["--out", str(tmp_path / "out"), "--set", "training.epochs=1", "--threads", "1", "--jobs", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["intent alone", "slots alone", "hard", "soft"]
    for row in result["rows"]:
        runs = [
            Run(path).read_scores() for path in sorted((tmp_path / "out" / row["variant"].replace(" ", "_")).iterdir())
        ]
        assert len(runs) == 2
        for name, value in row["scores"].items():
            assert value["mean"] == pytest.approx(sum(run[name] for run in runs) / 2)
        assert row["step_ms"]["mean"] > 0
    for name in ("compare.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert "delta" in printed
    # Again: nothing is trained anew, but for the run whose result is gone.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/state.pt")}
    (tmp_path / "out" / "soft" / "seed3" / "test.json").unlink()
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]


def test_a_comparison_names_the_log_of_a_run_that_failed(tmp_path, capsys):
    toy.write_files(tmp_path)
    (tmp_path / "broken.jsonl").write_text("nothing\n")
    arguments = [
        "compare",
        str(tmp_path / "toy.toml"),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--threads",
        "1",
    ]
    assert main([*arguments, "--over", "data.train=broken.jsonl"]) == 1
    assert "train.log" in capsys.readouterr().err
    assert main([*arguments, "--over", "data.train=missing.jsonl"]) == 1
    assert "missing.jsonl: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ("sharing", "--over sharing: expected key=value,value"),
        ("sharing=hard,", "--over sharing=hard,: expected key=value,value"),
        ("sharing=hard,softer", "sharing: expected one of hard"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, capsys, over, reason):
    toy.write_files(tmp_path)
    assert main(["compare", str(tmp_path / "toy.toml"), "--over", over, "--out", str(tmp_path / "out")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_of_a_grid_may_be_tables(tmp_path):
    path = toy.write_files(tmp_path)
    grid = comparison.variants(
        path, ['sharing={kind="soft",penalty="trace_norm"},hard', "model.hidden_size=4,8"], [], False
    )
    assert [variant.raw["sharing"] for variant in grid] == [{"kind": "soft", "penalty": "trace_norm"}] * 2 + [
        "hard"
    ] * 2
    with pytest.raises(ConfigError, match="variants all different"):
        comparison.variants(path, ["sharing=hard,hard"], [], False)


def test_two_tasks_may_read_one_column_of_csv(tmp_path):
    (tmp_path / "t.csv").write_text("tokens,stars\nplay,3\nstop,1\n")
    tasks = "".join(f'[tasks.{kind}]\nkind = "{kind}"\nfield = "stars"\n' for kind in ("ordinal", "regression"))
    (tmp_path / "c.toml").write_text('[data]\ntrain = "t.csv"\n' + tasks)
    found = read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))
    assert [record.labels for record in found] == [
        dict.fromkeys(("ordinal", "regression"), stars) for stars in (3.0, 1.0)
    ]
    (tmp_path / "t.csv").write_text("tokens,star\nplay,3\n")
    with pytest.raises(DataError, match=r"t\.csv:2: expected a column 'stars', got tokens, star"):
        read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))


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
