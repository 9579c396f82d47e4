"""Side tasks: labels that texts have of themselves, auxiliary tasks, texts without labels, limits, and the defaults."""

import csv
import json
import math
import os
from collections import Counter

import pytest
import torch
import toy
from parity import assert_same_bits
from safetensors.torch import load_file
from toy import quiet

import pymtl
from pymtl.__main__ import main
from pymtl.commands.train import _Screen
from pymtl.serving.answers import NO_LABEL
from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.batches import Batcher, schedule
from pymtl.training.config import TrainingConfig
from pymtl.training.data import read_all
from pymtl.training.errors import ConfigError, DataError
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary

FREQ = '[tasks.freq]\nkind = "log_frequency"\n'
SIDE = FREQ + "auxiliary = true\n"
UNLABELLED = 'data.unlabelled="u.jsonl"'
SLOTS_ASIDE = ("tasks.slots.auxiliary=true", 'tasks.slots.decoder="crf"')
ALONE = '[data]\ntrain = "t.jsonl"\nvalid = "v.jsonl"\n' + FREQ
DEFAULTS = toy.TOML.replace('sharing = "hard"\nbalancing = "ew"\n', "")
TEXTS = ["please book sushi", "watch hard rock", "play", "zebra jazz jazz jazz"]
COUNTS = Counter(token for record in toy.requests(60) for token in record["tokens"])
ONE = 'datasets.one = {train = "train.jsonl", valid = "valid.jsonl", test = "test.jsonl"}\n'
TWO = 'datasets.two = {train = "more.jsonl", tokens = "sentence"}\n'
SETS_TASKS = """
tasks.intent = {kind = "classification", dataset = "one"}
tasks.freq = {kind = "log_frequency", dataset = "two", auxiliary = true}
model = {embedding_dim = 4, hidden_size = 4}
"""
SETS = ONE + TWO + SETS_TASKS


def written(folder, toml):
    """The toy's files, and one of another data set."""
    (folder / "more.jsonl").write_text('{"sentence": "some jazz"}\n' * 20)
    return toy.write_files(folder, toml)


def train(folder, toml, *settings, run="run", options=()):
    """A finished run of the toy data in ``folder``, whose other files stay as they are; its folder."""
    path = written(folder, toml)
    more = [word for setting in ("training.epochs=2", *settings) for word in ("--set", setting)]
    quiet("train", path, "--run", folder / run, *more, *options)
    return folder / run


def weights_of(run):
    return load_file(run / "model.safetensors")


def read(folder, toml, *settings):
    return read_all(configuration.load(written(folder, toml), list(settings)))


def lines(records):
    return [" ".join(record.tokens) for record in records]


def texts(*words):
    return [{"tokens": text.split()} for text in words]


def parsed(toml, *settings):
    raw = configuration.tomllib.loads(toml)
    for setting in settings:
        configuration.set_value(raw, setting)
    return configuration.parse(raw, "c.toml")


# How frequent tokens are


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("unlabelled", [(), (UNLABELLED,)])
def test_targets_are_the_whole_parts_of_the_logarithms_of_counts(tmp_path, min_count, unlabelled):
    counts = {"A": 1, "b": 2, "c": 3, "d": 7, "e": 8, "f": 20, "g": 21, "h": 54, "i": 55, "<unk>": 9, "<pad>": 9}
    toy.write_lines(tmp_path / "t.jsonl", texts(*(" ".join([word] * count) for word, count in counts.items())))
    toy.write_lines(tmp_path / "v.jsonl", texts("a b zebra g", "zebra"))
    toy.write_lines(tmp_path / "u.jsonl", texts("b b c", "A " * 50, "new"))
    (tmp_path / "c.toml").write_text(ALONE)
    settings = [f"training.min_count={min_count}", "data.lowercase=true", *unlabelled]
    sets = read_all(configuration.load(tmp_path / "c.toml", settings))
    vocabulary = Vocabulary.of(sets.trained_on, sets.config)
    seen = Counter({word.lower(): count for word, count in counts.items()})
    seen.update({"b": 2, "c": 1, "a": 50, "new": 1} if unlabelled else {})
    batcher = Batcher(vocabulary, sets.config)
    classes = [label["class"] for label in vocabulary.labels["freq"]]
    found = {}
    for record in [*sets.trained_on, *sets.valid[""]]:
        (row,) = batcher.batch([record], [0]).targets["freq"].tolist()
        found |= {token: None if i == NO_LABEL else classes[i] for token, i in zip(record.tokens, row, strict=True)}
    known = {word: int(math.log(n)) for word, n in seen.items() if n >= min_count and word[0] != "<"}
    assert found == {word: known.get(word) for word in (*seen, "zebra")}


@pytest.fixture(scope="module")
def frequent(tmp_path_factory):
    """A folder with a run of a main task of frequencies, and its export."""
    folder = tmp_path_factory.mktemp("frequent")
    train(folder, toy.TOML + FREQ, "training.epochs=8")
    quiet("export", folder / "run", folder / "exported")
    return folder


def accuracy(answers, records):
    truth = [COUNTS.get(token) for record in records for token in record["tokens"]]
    guess = [number for answer in answers for number in answer["freq"]]
    right = [number == int(math.log(count)) for number, count in zip(guess, truth, strict=True) if count]
    return sum(right) / len(right)


def test_a_main_task_of_frequencies_learns_and_scores_what_one_counts(frequent):
    for part, seed in (("validation", 1), ("test", 2)):
        records = toy.requests(20, seed)
        answers = pymtl.load(frequent / "run").predict([record["tokens"] for record in records])
        scores = json.loads((frequent / "run/run.json").read_text())["scores"][part]
        assert scores["freq/accuracy"] == pytest.approx(accuracy(answers, records))
        assert scores["freq/accuracy"] > 0.8


@pytest.mark.parametrize("model", ["run", "exported"])
def test_frequencies_are_evaluated_on_any_file_words_of_training_alone(frequent, tmp_path, model):
    records = texts(*TEXTS)
    path = toy.write_lines(tmp_path / "own.jsonl", records)
    quiet("evaluate", frequent / model, path, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    answers = pymtl.load(frequent / model).predict([record["tokens"] for record in records])
    assert found["scores"] == {"freq/accuracy": pytest.approx(accuracy(answers, records))}


def test_frequencies_are_predicted_for_a_file_and_on_the_screen(frequent, tmp_path):
    (tmp_path / "in.csv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    expected = [answer["freq"] for answer in pymtl.load(frequent / "run").predict(TEXTS)]
    for form in ("csv", "jsonl"):
        quiet("predict", frequent / "run", "--input", tmp_path / "in.csv", "--output", tmp_path / f"out.{form}")
    with open(tmp_path / "out.csv", newline="") as file:
        assert [[int(n) for n in row["predicted_freq"].split()] for row in csv.DictReader(file)] == expected
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["predicted"]["freq"] for row in found] == expected
    shown = " ".join(f"{token}/{n}" for token, n in zip(TEXTS[0].split(), expected[0], strict=True))
    assert f"freq: {shown}" in quiet("predict", frequent / "run", TEXTS[0]).splitlines()


def test_frequencies_of_unknown_words_alone_cannot_choose_an_epoch(tmp_path, fails):
    toy.write_lines(tmp_path / "t.jsonl", texts("a b", "c d"))
    toy.write_lines(tmp_path / "v.jsonl", texts("zebra"))
    (tmp_path / "c.toml").write_text(ALONE + "[training]\nepochs = 1\n")
    fails("train", tmp_path / "c.toml", "--run", tmp_path / "run")


# Auxiliary tasks


@pytest.fixture(scope="module", params=["hard", "shared_private"])
def aside(tmp_path_factory, request):
    """A folder with a run of one main task beside two auxiliary ones, one of them a CRF, and its export."""
    folder = tmp_path_factory.mktemp("aside")
    train(folder, toy.TOML + SIDE, *SLOTS_ASIDE, f"sharing={request.param}")
    quiet("export", folder / "run", folder / "exported")
    return folder


def test_auxiliary_tasks_are_trained(aside):
    for epoch in Run(aside / "run").read_metrics():
        assert set(epoch["loss"]) >= {"total", "intent", "slots", "freq"}
    trained, config, vocabulary = Run(aside / "run").load_model()
    torch.manual_seed(config.seed)
    before = ModelWithLoss("pymtl", config, vocabulary).model.state_dict()
    own = [name for name in before if name.startswith(("heads.slots.", "heads.freq."))]
    assert any("crf" in name for name in own)
    assert not any(torch.equal(before[name], trained.model.state_dict()[name]) for name in own)


def test_auxiliary_tasks_read_the_shared_encoder_alone(aside):
    config = json.loads((aside / "run/config.json").read_text())
    names = set(load_file(aside / "run/model.safetensors"))
    encoders = {name.split(".")[3] for name in names if name.startswith("encoder.parallel.encoders.")}
    if config["sharing"]["kind"] == "shared_private":
        assert config["sharing"]["shared_only"] == ["slots", "freq"]
        assert encoders == {"shared", "intent"}
    else:
        assert config["sharing"] == {"kind": "hard"}
        assert encoders == set()


def test_a_run_from_before_auxiliary_tasks_read_the_shared_encoder_alone_loads(tmp_path):
    run = Run(train(tmp_path, toy.TOML + SIDE, *SLOTS_ASIDE, 'sharing={kind="shared_private", shared_only=[]}'))
    raw = run.read_json("config.json")
    assert raw["sharing"].pop("shared_only") == []
    expected = pymtl.load(run.folder).predict(TEXTS)
    run.write_json("config.json", raw)
    model, config, _ = run.load_model()
    assert config.sharing.options == {"shared_only": []}
    assert set(model.model.encoder.parallel.encoders) == {"shared", "intent", "slots", "freq"}
    assert pymtl.load(run.folder).predict(TEXTS) == expected


def test_auxiliary_tasks_are_not_scored(aside):
    scores = [epoch["valid"] for epoch in Run(aside / "run").read_metrics()] + [Run(aside / "run").read_scores()]
    for each in scores:
        assert set(each) == {"intent/accuracy", "intent/macro_f1", "exact_match"}
        assert each["exact_match"] == each["intent/accuracy"]
    quiet("evaluate", aside / "run", "--out", aside / "evaluated")
    found = json.loads((aside / "evaluated/evaluation.json").read_text())
    assert list(found["tasks"]) == ["intent"]
    assert found["scores"] == Run(aside / "run").read_scores()
    assert "slots" not in (aside / "evaluated/errors.jsonl").read_text()
    assert "auxiliary tasks: slots, freq" in (aside / "run/README.md").read_text()


@pytest.mark.parametrize("model", ["run", "exported"])
def test_auxiliary_tasks_are_not_asked(aside, tmp_path, model):
    loaded = pymtl.load(aside / model)
    assert list(loaded.tasks) == ["intent"]
    assert list(loaded.logits(TEXTS)) == ["intent"]
    for answer in loaded.predict(TEXTS):
        assert {key.partition("/")[0] for key in answer} == {"tokens", "unknown_tokens", "intent"}
    (tmp_path / "in.csv").write_text("text\nplay jazz\n")
    quiet("predict", aside / model, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert not any(name in (tmp_path / "out.csv").read_text() for name in ("slots", "freq"))


def test_a_file_without_labels_is_not_evaluated_for_an_auxiliary_task_s_sake(aside, tmp_path, fails):
    path = toy.write_lines(tmp_path / "own.jsonl", texts("play jazz"))
    assert "no record has a label of any task" in fails("evaluate", aside / "run", path, "--out", tmp_path / "out")


def test_an_export_answers_as_its_run_and_holds_no_weights_of_auxiliary_tasks(aside):
    run, exported = (pymtl.load(aside / model) for model in ("run", "exported"))
    assert_same_bits(run.logits(TEXTS), exported.logits(TEXTS))
    assert run.predict(TEXTS) == exported.predict(TEXTS)
    program = (aside / "exported/program.pt2").read_bytes()
    weights = weights_of(aside / "run")
    heads = {name: weight.numpy().tobytes() for name, weight in weights.items() if name.endswith(".weight")}
    assert heads["heads.intent.weight"] in program  # else the rest says nothing
    assert not any(heads[f"heads.{name}.weight"] in program for name in ("slots", "freq"))
    state = torch.export.load(aside / "exported/program.pt2").state_dict
    assert not any(p.numel() for name, p in state.items() if ".slots." in name or ".freq." in name)
    sizes = sum(p.numel() for p in state.values()), sum(p.numel() for p in weights.values())
    assert sizes[0] < sizes[1]
    assert not (aside / "exported/crfs.safetensors").exists()


def test_no_epoch_is_chosen_by_an_auxiliary_task():
    for asked in ("slots", "slots/f1", "freq/accuracy"):
        with pytest.raises(ConfigError, match=rf"training\.select_by: expected .*intent.*got '{asked}'"):
            parsed(toy.TOML + SIDE, *SLOTS_ASIDE, f"training.select_by={asked}")
    with pytest.raises(ConfigError, match=r"training\.baseline: .*slots/f1"):
        parsed(toy.TOML, *SLOTS_ASIDE, "training.select_by=delta", "training.baseline={'slots/f1' = 0.5}")
    both = ("tasks.intent.auxiliary=true", *SLOTS_ASIDE)
    with pytest.raises(ConfigError, match=r"training\.select_by: .*exact_match"):
        parsed(toy.TOML + FREQ, *both, "training.select_by=exact_match")
    with pytest.raises(ConfigError, match=r"tasks: .*not auxiliary.*intent, slots"):
        parsed(toy.TOML, *both)


@pytest.mark.parametrize("sharing", ["hard", "shared_private"])
def test_a_main_task_may_read_after_an_auxiliary_one(tmp_path, sharing):
    run = train(tmp_path, toy.TOML, *SLOTS_ASIDE, 'tasks.intent.after="slots"', f"sharing={sharing}")
    quiet("export", run, tmp_path / "exported")
    models = pymtl.load(run), pymtl.load(tmp_path / "exported")
    assert_same_bits(*(model.logits(TEXTS) for model in models))
    assert all(list(model.tasks) == ["intent"] and "slots" not in model.predict("play jazz") for model in models)


def test_a_data_set_may_have_an_auxiliary_task_alone(tmp_path):
    run = train(tmp_path, SETS)
    for epoch in Run(run).read_metrics():
        assert set(epoch["loss"]) >= {"intent", "freq"}
        assert set(epoch["valid"]) == {"intent/accuracy", "intent/macro_f1", "exact_match"}
    quiet("export", run, tmp_path / "exported")
    for model in (pymtl.load(run), pymtl.load(tmp_path / "exported")):
        assert {key.partition("/")[0] for key in model.predict("play jazz")} == {"tokens", "unknown_tokens", "intent"}
    quiet("evaluate", run)


def test_files_are_asked_as_the_data_set_of_main_tasks_has_them(tmp_path):
    run = train(tmp_path, TWO + ONE + SETS_TASKS)
    (tmp_path / "in.csv").write_text("text\nplay jazz\n")
    quiet("predict", run, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert "predicted_intent" in (tmp_path / "out.csv").read_text()


def test_the_plain_backend_trains_auxiliary_tasks_too(tmp_path):
    losses = []
    for name in ("pymtl", "reference"):
        run = train(tmp_path, toy.TOML + SIDE, "model.dropout=0", run=name, options=("--backend", name))
        losses.append(Run(run).read_metrics()[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_with_side_tasks_ends_as_the_uninterrupted(tmp_path, monkeypatch):
    def steps(self, epoch, total, first=0):
        yield from range(first, total if epoch == 1 else total // 2)
        if epoch == 2:
            raise KeyboardInterrupt

    toy.write_lines(tmp_path / "u.jsonl", toy.requests(30, seed=5))
    settings = [UNLABELLED, "training.epochs=3", "training.checkpoint_steps=1"]
    whole = train(tmp_path, DEFAULTS + SIDE, *settings, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(_Screen, "steps", steps)
        more = [word for setting in settings for word in ("--set", setting)]
        assert main(["train", str(tmp_path / "toy.toml"), "--run", str(tmp_path / "resumed"), *more]) != 0
    assert len(Run(tmp_path / "resumed").read_metrics()) == 1
    resumed = train(tmp_path, DEFAULTS + SIDE, *settings, run="resumed", options=("--resume",))
    assert_same_bits(weights_of(whole), weights_of(resumed))
    assert toy.timeless(Run(whole).read_metrics()) == toy.timeless(Run(resumed).read_metrics())


# Texts without labels


def test_labels_of_unlabelled_texts_are_never_read(tmp_path):
    records = toy.requests(30, seed=5)
    garbage = [{**record, "intent": {"a": [1]}, "slots": 7, "freq": "x"} for record in records]
    runs = []
    for name, own in (("plain", [{"tokens": r["tokens"]} for r in records]), ("right", records), ("wrong", garbage)):
        toy.write_lines(tmp_path / "u.jsonl", own)
        runs.append(train(tmp_path, toy.TOML + SIDE, UNLABELLED, run=name))
    for other in runs[1:]:
        assert_same_bits(weights_of(runs[0]), weights_of(other))
    sets = read(tmp_path, toy.TOML + SIDE, UNLABELLED)
    assert [record.labels for record in sets.unlabelled[""]] == [{"freq": True}] * 30
    batcher = Batcher(Vocabulary.of(sets.trained_on, sets.config), sets.config)
    batch = batcher.batch([*sets.train[""][:2], *sets.unlabelled[""][:3]], range(5))
    assert all((batch.targets[name][2:] == NO_LABEL).all() for name in ("intent", "slots"))
    assert (batch.targets["freq"] != NO_LABEL).any(1).all()


def test_unlabelled_texts_teach_words_and_weights(tmp_path):
    toy.write_lines(tmp_path / "u.jsonl", texts(*["please play zebra"] * 9))
    without = train(tmp_path, toy.TOML + SIDE, run="without")
    used = [train(tmp_path, toy.TOML + SIDE, UNLABELLED, run=name) for name in ("used", "again")]
    unused = train(tmp_path, toy.TOML + SIDE, UNLABELLED, "training.unlabelled_ratio=0", run="unused")
    assert [pymtl.load(run).predict("zebra")["unknown_tokens"] for run in (without, used[0])] == [["zebra"], []]
    assert_same_bits(*map(weights_of, used))
    assert not torch.equal(weights_of(used[0])["heads.freq.weight"], weights_of(unused)["heads.freq.weight"])


@pytest.mark.parametrize("spelling", ["train.jsonl", "./train.jsonl", "../{}/train.jsonl", "soft", "hard", "absolute"])
@pytest.mark.parametrize("valid", [True, False])
def test_a_text_is_read_once_however_its_file_is_called(tmp_path, spelling, valid):
    toml = toy.TOML if valid else toy.TOML.replace('valid = "valid.jsonl"', "")
    toy.write_files(tmp_path)
    (tmp_path / "soft").symlink_to("train.jsonl")
    os.link(tmp_path / "train.jsonl", tmp_path / "hard")
    name = str(tmp_path / "train.jsonl") if spelling == "absolute" else spelling.format(tmp_path.name)
    settings = [f"data.unlabelled={json.dumps(name)}", 'data.format="jsonl"']
    assert read(tmp_path, toml + SIDE, *settings).unlabelled[""] == []
    sets = read(tmp_path, toml + SIDE, *settings, "data.limit=20")
    kept = [*sets.train[""], *([] if valid else sets.valid[""]), *sets.unlabelled[""]]
    assert sorted(lines(kept)) == sorted(" ".join(record["tokens"]) for record in toy.requests(60))
    assert len({record.place.rpartition(":")[2] for record in kept}) == 60
    assert all(record.labels == {"freq": True} for record in sets.unlabelled[""])
    assert set(Vocabulary.of(kept, sets.config).tokens[2:]) == set(COUNTS)


def test_texts_that_are_all_validated_on_are_refused_and_none_left_to_learn_from_is_no_hindrance(tmp_path):
    with pytest.raises(DataError, match="expected texts that are not trained on"):
        read(tmp_path, toy.TOML + SIDE, 'data.unlabelled="valid.jsonl"')
    path = toy.write_files(tmp_path, toy.TOML + SIDE)
    settings = ("--set", 'data.unlabelled="train.jsonl"', "--set", "training.epochs=1")
    quiet("train", path, "--run", tmp_path / "run", *settings)


def test_a_table_of_texts_alone_is_read_without_a_word_about_its_missing_labels(tmp_path):
    (tmp_path / "u.csv").write_text("text\nplay jazz\nbook sushi\n")
    sets = read(tmp_path, toy.TOML + SIDE, 'data.unlabelled="u.csv"')
    assert lines(sets.unlabelled[""]) == ["play jazz", "book sushi"]
    assert not any("scored" in note for note in sets.notes)


def test_unlabelled_texts_without_a_task_that_takes_them_are_refused():
    with pytest.raises(ConfigError, match=r"data\.unlabelled: .*log_frequency"):
        parsed(toy.TOML, UNLABELLED)
    with pytest.raises(ConfigError, match=r"datasets\.one\.unlabelled: .*log_frequency"):
        parsed(SETS, 'datasets.one.unlabelled="u.jsonl"')


def test_files_of_unlabelled_texts_that_are_missing_or_changed_are_named(tmp_path, fails):
    argv = ("train", written(tmp_path, toy.TOML + SIDE), "--set", UNLABELLED, "--run", tmp_path / "run")
    assert "data.unlabelled: there is no file" in fails(*argv)
    toy.write_lines(tmp_path / "u.jsonl", toy.requests(30, seed=5))
    train(tmp_path, toy.TOML + SIDE, UNLABELLED)
    toy.write_lines(tmp_path / "u.jsonl", toy.requests(30, seed=6))
    assert "u.jsonl changed" in fails(*argv, "--set", "training.epochs=3", "--resume")


def test_unlabelled_texts_train_the_data_set_they_belong_to(tmp_path):
    (tmp_path / "u.jsonl").write_text('{"sentence": "zebra"}\n{"sentence": "zebra crossing"}\n')
    own = 'datasets.two.unlabelled="u.jsonl"'
    sets = read(tmp_path, SETS, own)
    assert {name: lines(records) for name, records in sets.unlabelled.items()} == {"two": ["zebra", "zebra crossing"]}
    runs = [train(tmp_path, SETS, own, run=name) for name in ("first", "again")]
    assert_same_bits(*map(weights_of, runs))
    assert pymtl.load(runs[0]).predict("zebra")["unknown_tokens"] == []


# Limits


@pytest.mark.parametrize("held_out", [False, True])
def test_a_smaller_limit_takes_the_first_of_a_larger_one(tmp_path, held_out):
    toml = toy.TOML.replace('valid = "valid.jsonl"', "") if held_out else toy.TOML
    small, large, every = (read(tmp_path, toml, f"data.limit={limit}") for limit in (10, 30, 0))
    places = [[record.place for record in sets.train[""]] for sets in (small, large, every)]
    assert [len(each) for each in places] == [10, 30, 54 if held_out else 60]
    assert places[0] == places[1][:10]
    assert len(set(places[1])) == 30
    assert set(places[1]) < set(places[2])
    assert small.valid == every.valid
    other = read(tmp_path, toml.replace("seed = 3", "seed = 4"), "data.limit=10")
    assert set(places[0]) != {record.place for record in other.train[""]}


def test_a_limit_above_the_records_is_refused_with_their_number(tmp_path, fails):
    assert len(read(tmp_path, toy.TOML, "data.limit=60").train[""]) == 60
    path = toy.write_files(tmp_path)
    error = fails("train", path, "--set", "data.limit=61", "--run", tmp_path / "run")
    assert all(part in error for part in ("train.jsonl", "limit", "61", "60"))
    with pytest.raises(ConfigError, match=r"data\.limit: .*-1"):
        parsed(toy.TOML, "data.limit=-1")


def test_a_side_task_does_not_change_which_records_a_limit_takes(tmp_path):
    toy.write_files(tmp_path)
    half = [record if i % 2 else {"tokens": record["tokens"]} for i, record in enumerate(toy.requests(60))]
    toy.write_lines(tmp_path / "half.jsonl", half)
    settings = ('data.train="half.jsonl"', "data.limit=20")
    places = [[r.place for r in read(tmp_path, toml, *settings).train[""]] for toml in (toy.TOML, toy.TOML + SIDE)]
    assert places[0] == places[1]


# Steps of an epoch


def records(name, count):
    return [Record([name] * (1 + i % 5), {}) for i in range(count)]


def planned(sets, unlabelled=None, **settings):
    return schedule(sets, TrainingConfig(batch_size=4, **settings), torch.Generator().manual_seed(1), unlabelled)


@pytest.mark.parametrize("sampling", ["proportional", "round_robin", "uniform", "temperature"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_an_epoch_has_the_steps_it_is_asked_for(sampling, accumulation, steps):
    sets = {"a": records("a", 21), "b": records("b", 6)}
    settings = {"sampling": sampling, "accumulation": accumulation, "epoch_steps": steps}
    batches = planned(sets, **settings)
    assert len(batches) == steps * accumulation
    assert all(0 < len(own) <= 4 and min(own) >= 0 and max(own) < len(sets[name]) for name, own in batches)
    assert batches == planned(sets, **settings)


@pytest.mark.parametrize("sets", [{"": 21}, {"a": 21, "b": 6, "c": 1}])
def test_each_record_comes_once_before_one_comes_again(sets):
    sets = {name: records(name, count) for name, count in sets.items()}
    seen = Counter(dict.fromkeys(((name, i) for name, own in sets.items() for i in range(len(own))), 0))
    for name, indices in planned(sets, epoch_steps=37):
        seen.update((name, i) for i in indices)
        assert max(seen.values()) - min(seen.values()) <= 1


def test_training_takes_as_many_steps(tmp_path):
    run = train(tmp_path, toy.TOML, "training.epoch_steps=11", "training.accumulation=2")
    assert torch.load(run / "state.pt")["steps"] == 22


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2])
@pytest.mark.parametrize("sampling", ["proportional", "round_robin"])
def test_a_batch_has_its_share_of_unlabelled_texts(ratio, sampling):
    sets, further = {"a": records("a", 21), "b": records("b", 6)}, {"a": records("u", 9)}
    seen = Counter(dict.fromkeys(range(21, 30), 0))
    for name, indices in planned(sets, further, unlabelled_ratio=ratio, sampling=sampling, epoch_steps=12):
        own = [i for i in indices if i < len(sets[name])]
        assert abs(len(indices) - len(own) - (ratio * len(own) if name == "a" else 0)) <= 0.5
        seen.update(i for i in indices if i >= len(sets[name]))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert set(seen) == set(range(21, 30))
    assert (max(seen.values()) > 0) == (ratio > 0)


# What is settled where nothing is said


def chosen(config):
    return config.sharing.kind, config.balancing.kind


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), ("shared_private", "equal_norm")),
        (("sharing=auto", "balancing=gradnorm"), ("hard", "gradnorm")),
        (("balancing=ew",), ("shared_private", "ew")),
        (("sharing=hard", "balancing=auto"), ("hard", "equal_norm")),
    ],
)
def test_several_tasks_have_units_of_their_own_and_equal_norms(tmp_path, settings, expected):
    assert chosen(parsed(DEFAULTS, *settings)) == expected
    run = train(tmp_path, DEFAULTS, *settings, "training.epochs=1")
    saved = json.loads((run / "config.json").read_text())
    assert (saved["sharing"]["kind"], saved["balancing"]["kind"]) == expected


def test_one_task_shares_and_balances_nothing_and_auto_has_no_options():
    one = DEFAULTS.replace('[tasks.slots]\nkind = "tagging"', "")
    assert chosen(parsed(one)) == ("hard", "ew")
    assert chosen(parsed(one + SIDE)) == ("hard", "equal_norm")
    for name in ("sharing", "balancing"):
        with pytest.raises(ConfigError, match=rf"c\.toml: {name}: .*auto"):
            parsed(one, f'{name}={{kind = "auto", size = 1}}')


def test_training_says_what_is_auxiliary_and_what_the_loss_is(tmp_path):
    path = written(tmp_path, DEFAULTS + SIDE + "weight = 0.3\n")
    printed = quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=1")
    assert "freq: auxiliary, weight 0.3: trained, not scored" in printed
    assert "loss: the sum of the tasks' losses as equal_norm scales them" in printed
    printed = quiet("train", path, "--run", tmp_path / "ew", "--set", "training.epochs=1", "--set", "balancing=ew")
    assert "equal_norm" not in printed
