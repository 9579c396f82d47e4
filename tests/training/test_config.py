"""The configuration: what it takes, and what it refuses by name."""

import json
import math

import pytest
import toy

from pymtl.training import config as configuration
from pymtl.training.config import ConfigError

MINIMAL = '[data]\ntrain = "a.jsonl"\nvalid = "b.jsonl"\n[tasks.intent]\nkind = "classification"\n'


@pytest.fixture
def load(tmp_path):
    """A function from TOML text and overrides to a configuration."""

    def load(text, *overrides):
        path = tmp_path / "c.toml"
        path.write_text(text, encoding="utf-8")
        return configuration.load(path, list(overrides))

    return load


def test_a_minimal_configuration_takes_the_defaults(load):
    config = load(MINIMAL)
    assert (config.model.hidden_size, config.training.batch_size, config.seed) == (128, 16, 0)
    assert config.tasks["intent"] == configuration.TaskConfig("classification")
    assert config.data.test is None


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("sead = 1\n" + MINIMAL, "'sead'", "unknown key"),
        (MINIMAL + "wait = 1\n", "'tasks.intent.wait'", "unknown key"),
        (MINIMAL + "[model]\nhiden_size = 1\n", "'model.hiden_size'", "expected one of words, embedding_dim"),
        (MINIMAL.replace('train = "a.jsonl"', ""), "'data.train'", "missing key"),
        (MINIMAL.replace('kind = "classification"', ""), "'tasks.intent.kind'", "missing key"),
        ('[data]\ntrain = "a"\nvalid = "b"\n', "'tasks'", "missing key"),
        ('[data]\ntrain = "a"\nvalid = "b"\n[tasks]\n', "tasks", "at least one task"),
        (MINIMAL.replace('"classification"', '"clasification"'), "tasks.intent.kind", "expected one of classification"),
        (MINIMAL + 'pooling = ["mean"]\n', "tasks.intent.pooling", "expected one of last, mean, max"),
        (MINIMAL.replace('"a.jsonl"', "5"), "data.train", "expected str, got 5"),
        ('seed = "1"\n' + MINIMAL, "seed", "expected int, got '1'"),
        ("seed = true\n" + MINIMAL, "seed", "expected int, got True"),
        (MINIMAL + "[training]\nepochs = 1.5\n", "training.epochs", "expected int, got 1.5"),
        (MINIMAL + "[model]\nbidirectional = 1\n", "model.bidirectional", "expected true or false, got 1"),
        ('model = "big"\n' + MINIMAL, "model", "expected a section, got 'big'"),
        ("data = 1\n[tasks.intent]\nkind = 'tagging'\n", "data", "expected a section"),
        ('tasks = 1\n[data]\ntrain = "a"\nvalid = "b"\n', "tasks", "expected a section"),
        (MINIMAL + "weight = -1\n", "tasks.intent.weight", "at least 0, got -1.0"),
        (MINIMAL + "weight = nan\n", "tasks.intent.weight", "at least 0, got nan"),
        (MINIMAL + "label_smoothing = 1.5\n", "tasks.intent.label_smoothing", "from 0 to 1, got 1.5"),
        (MINIMAL + "[model]\nhidden_size = 0\n", "model.hidden_size", "above 0, got 0"),
        (MINIMAL + "[model]\ndropout = 1\n", "model.dropout", "below 1, got 1.0"),
        (MINIMAL + "[training]\npatience = 0\n", "training.patience", "above 0, got 0"),
        (MINIMAL + "[training]\nlearning_rate = 0\n", "training.learning_rate", "above 0, got 0.0"),
        (MINIMAL + "[training]\nlearning_rate = nan\n", "training.learning_rate", "above 0, got nan"),
        (MINIMAL + "[training]\nword_dropout = -0.1\n", "training.word_dropout", "below 1, got -0.1"),
    ],
)
def test_a_wrong_setting_is_named_with_file_key_and_expectation(load, text, key, reason):
    with pytest.raises(ConfigError) as error:
        load(text)
    message = str(error.value)
    assert "c.toml" in message
    assert key in message
    assert reason in message


@pytest.mark.parametrize("name", ["a.b", "", "keys"])
def test_a_task_name_no_module_can_have_is_a_configuration_error(load, name):
    with pytest.raises(ConfigError, match=r"c\.toml: tasks"):
        load(MINIMAL.replace("tasks.intent", f'tasks."{name}"'))


def test_a_file_that_is_no_toml_is_named_with_the_line(load):
    with pytest.raises(ConfigError, match=r"c\.toml: .*line 2"):
        load("seed = 1\nseed = = 2\n")
    with pytest.raises(ConfigError, match=r"line 2, .*: bidirectional = True  # both \(TOML writes true\)$"):
        load("[model]\nbidirectional = True  # both\n")
    with pytest.raises(ConfigError, match=r"line 1, column \d+\): x = \"y = True$"):
        load('x = "y = True\n')
    with pytest.raises(ConfigError, match="at line 99"):
        load('a = {"at line 99" = 1, "at line 99" = 2}\n')
    with pytest.raises(ConfigError, match=r": x = \[0, 0, .{68}… \(TOML writes true\)$"):
        load(f"x = [{'0, ' * 100}True]\n")


def test_a_configuration_that_is_no_utf8_is_a_configuration_error(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"c\.toml"):
        configuration.load(path)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        configuration.load(tmp_path / "absent.toml")


def test_overrides_win_over_the_file_and_may_be_numbers_booleans_strings_or_bare_words(load):
    config = load(
        "seed = 1\n" + MINIMAL,
        "seed=7",
        "model.dropout=0.25",
        "model.bidirectional=false",
        "data.train=other.jsonl",
        'data.test="c d.jsonl"',
        "tasks.intent.weight=2",
        "tasks.tags.kind=tagging",
    )
    assert config.seed == 7
    assert (config.model.dropout, config.model.bidirectional) == (0.25, False)
    assert (config.data.train, config.data.test) == ("other.jsonl", "c d.jsonl")
    assert config.tasks["intent"].weight == 2.0
    assert config.tasks["tags"].kind == "tagging"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.epocs=5", "unknown key 'training.epocs'"),
        ("epochs=5", "unknown key 'epochs'"),
        ("=5", "unknown key ''"),
        ("training.epochs", "expected section.key=value"),
        ("training.epochs=many", "training.epochs: expected int, got 'many'"),
        ("training.epochs=", "training.epochs: expected int, got ''"),
        ("training.epochs=0", "training.epochs: expected a number above 0"),
        ("data.train.x=1", "train is a value, not a section"),
        ("model=3", "model: expected a section, got 3"),
    ],
)
def test_a_wrong_override_is_refused_with_its_reason(load, override, reason):
    with pytest.raises(ConfigError) as error:
        load(MINIMAL, override)
    assert reason in str(error.value)


def test_an_unknown_key_is_answered_with_those_of_the_kind(load):
    with pytest.raises(ConfigError) as error:
        load(MINIMAL, "tasks.intent.poling=last")
    assert "(did you mean 'pooling'?)" in str(error.value)
    expected = str(error.value).partition("expected one of ")[2].split(", ")
    assert {"kind", "weight", "auxiliary", "pooling", "class_weights"} <= set(expected)
    assert not {"decoder_size", "scheme", "num_targets"} & set(expected)
    with pytest.raises(ConfigError, match=r"unknown key 'tasks.intent.schem', expected one of"):  # of tagging alone
        load(MINIMAL, "tasks.intent.schem=bio")


def test_data_paths_are_relative_to_the_configuration_and_absolute_ones_stay(load, tmp_path):
    config = load(MINIMAL, "data.valid=/elsewhere/b.jsonl")
    assert config.path(config.data.train) == tmp_path.resolve() / "a.jsonl"
    assert str(config.path(config.data.valid)) == "/elsewhere/b.jsonl"


def test_a_resolved_configuration_comes_back_the_same_from_json(load):
    config = load(toy.TOML + toy.ALL_KINDS)
    assert configuration.parse(json.loads(json.dumps(config.as_dict())), "config.json") == config


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.select_by=exact_match", "tasks={score={kind='regression'}}"], "a task of classes or tags"),
        (
            ["training.select_by=delta", "training.baseline={intent=0.5}"],
            "baseline: expected scores of intent/accuracy, .*got 'intent'",
        ),
        (
            ["training.select_by=delta", "training.baseline={'intent/fluency'=0.5}"],
            "baseline: expected scores of intent/accuracy, .*got 'intent/fluency'",
        ),
        (
            ["training.select_by=delta", "training.baseline={'intent/accuracy'=0}"],
            "baseline: expected another score of intent/accuracy to be relative to than, got 0.0",
        ),
        (["training.optimizer_options={lr=0.5}"], "training.learning_rate instead of lr"),
        (["training.optimizer=Rprop", "training.weight_decay=0.1"], "training.optimizer: .*weight_decay"),
        (["training.optimizer_options={betas=[0.9]}"], "training.optimizer: "),
        (["balancing={kind='famo',least='a'}"], "balancing: least: expected float, got 'a'"),
        (["balancing=gradnorm", "sharing=soft"], "sharing: expected hard with balancing by gradnorm"),
        (["balancing=gradient_aggregation", "tasks.intent.skip=true"], "heads that read states alone"),
        (["balancing=gradnorm", "warm_start={run='x',freeze=true}"], "warm_start.freeze: .*gradnorm"),
        (
            ["balancing=gradient_aggregation", "warm_start={run='x',freeze=true,parts=['encoder']}"],
            "warm_start.freeze: .*gradient_aggregation",
        ),
        (["tasks.intent.after=slots", "tasks.slots.after=intent"], "no circle of tasks"),
        (["tasks.intent.weight=inf"], "tasks.intent.weight"),
        (
            ["tasks.words.kind=language_model", "tasks.words.num_tokens=2"],
            "tasks.words.num_tokens: expected more than padding and the unknown token, got 2",
        ),
        (["warm_start={run='x',parts=['']}"], "warm_start.parts: expected names of modules"),
    ],
)
def test_settings_that_do_not_go_together_are_named(tmp_path, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        toy.load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["sharing={kind='hierarchical',levels={intent=1.5,slots=1}}"],
            "sharing: .*levels = {'intent': 1.5, 'slots': 1}",
        ),
        (
            ["sharing={kind='hierarchical',levels={intent=1.5,slots=2}}"],
            "sharing: .*levels = {'intent': 1.5, 'slots': 2}",
        ),
        (["sharing={kind='hierarchical',levels=3}"], r"sharing: .*\(given levels = 3\)"),
        (["training.optimizer_options={capturable=true}"], r"training.optimizer: .*\(given capturable = True\)"),
        (
            ["training.optimizer_options={differentiable=true}"],
            r"training.optimizer: .*\(given differentiable = True\)",
        ),
        (["training.optimizer_options={betas=[0.9]}"], r"training.optimizer: .*\(given betas = \[0.9\]\)"),
    ],
)
def test_an_option_that_does_not_fit_is_named_with_its_section(tmp_path, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        toy.load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ("pref_vector=[0.3,0.3,0.4]", r"pref_vector = \[0.3, 0.3, 0.4\]"),
        ("aggregator='GradDrop',leak=0.5", "leak = 0.5"),
        ("aggregator='GradDrop',leak=[0.5]", r"leak = \[0.5\]"),
        ("aggregator='AlignedMTL',scale_mode='x'", "scale_mode = 'x'"),
        ("aggregator='NashMTL',n_tasks=5", "n_tasks = 5"),
    ],
)
def test_an_aggregators_option_that_does_not_fit_is_named(tmp_path, options, given):
    pytest.importorskip("torchjd")
    with pytest.raises(ConfigError, match=rf"balancing: .*\(given .*{given}\)"):
        toy.load(tmp_path, f"balancing={{kind='gradient_aggregation',{options}}}")


@pytest.mark.parametrize("options", ["pref_vector=[0.3,0.7]", "aggregator='GradDrop',leak=[0.5,0.5]"])
def test_an_aggregators_tensor_is_a_list_in_toml(tmp_path, options):
    pytest.importorskip("torchjd")
    config = toy.load(tmp_path, f"balancing={{kind='gradient_aggregation',{options}}}", "training.epochs=1")
    losses = toy.fitted(config, tmp_path / "run").epochs[-1]["loss"]
    assert all(math.isfinite(value) for value in losses.values())
