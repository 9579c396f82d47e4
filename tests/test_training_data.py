"""The training package's input side: configuration, records, vocabulary and batches."""

import gzip
import json
import math

import pytest
import torch
import toy
from torch.nn.utils.rnn import pad_packed_sequence

from pymtl.training import config as configuration
from pymtl.training.batches import Encoder, buckets
from pymtl.training.config import ConfigError
from pymtl.training.data import Record, read_records
from pymtl.training.errors import DataError, RunError
from pymtl.training.vocabulary import Vocabulary

MINIMAL = '[data]\ntrain = "a.jsonl"\nvalid = "b.jsonl"\n[tasks.intent]\nkind = "classification"\n'
KINDS = """
[data]
train = "data.jsonl"
valid = "data.jsonl"
[tasks.intent]
kind = "classification"
[tasks.slots]
kind = "tagging"
[tasks.topics]
kind = "multilabel"
[tasks.score]
kind = "regression"
"""


@pytest.fixture
def load(tmp_path):
    """A function from TOML text and overrides to a configuration."""

    def load(text, *overrides):
        path = tmp_path / "c.toml"
        path.write_text(text, encoding="utf-8")
        return configuration.load(path, list(overrides))

    return load


@pytest.fixture
def config(load):
    """Of all four kinds of task."""
    return load(KINDS)


@pytest.fixture
def read(tmp_path, config):
    """A function from lines (text, or objects for JSON) to records."""

    def read(*lines, config=config, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return read_records(path, config, **options)

    return read


# Configuration


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
        (MINIMAL + "[model]\nbidirectional = 1\n", "model.bidirectional", "expected bool, got 1"),
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


def test_data_paths_are_relative_to_the_configuration_and_absolute_ones_stay(load, tmp_path):
    config = load(MINIMAL, "data.valid=/elsewhere/b.jsonl")
    assert config.path(config.data.train) == tmp_path.resolve() / "a.jsonl"
    assert str(config.path(config.data.valid)) == "/elsewhere/b.jsonl"


def test_a_resolved_configuration_comes_back_the_same_from_json(load):
    config = load(toy.TOML + toy.ALL_KINDS)
    assert configuration.parse(json.loads(json.dumps(config.as_dict())), "config.json") == config


# Records


GOOD = {"tokens": ["a", "b"], "intent": "x", "slots": ["O", "B-y"], "topics": ["t"], "score": 1}


def test_records_hold_tokens_and_the_labels_of_every_task(read):
    assert (
        read(GOOD, GOOD)
        == [Record(["a", "b"], {"intent": "x", "slots": ["O", "B-y"], "topics": ["t"], "score": 1})] * 2
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{tokens: 1}", "not JSON"),
        ('{"tokens": ["a"]', "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ("{}", "field 'tokens': expected a list of at least one string, got None"),
        ({"tokens": []}, "field 'tokens': expected a list of at least one string, got []"),
        ({"tokens": "a b"}, "field 'tokens': expected a list"),
        ({"tokens": ["a", 1]}, "field 'tokens': expected a list"),
        (
            {**GOOD, "slots": ["O"]},
            "field 'slots': expected a list of 2 strings (or null), one a token, got a list of 1",
        ),
        ({**GOOD, "slots": ["O", "O", "O"]}, "field 'slots': expected a list of 2 strings"),
        ({**GOOD, "slots": "OO"}, "field 'slots': expected a list of 2 strings (or null), one a token, got 'OO'"),
        ({**GOOD, "slots": ["O", 1]}, "field 'slots': expected a list of 2 strings"),
        ({**GOOD, "intent": 3}, "field 'intent': expected a string, got 3"),
        ({**GOOD, "intent": ["x"]}, "field 'intent': expected a string"),
        ({**GOOD, "topics": "t"}, "field 'topics': expected a list of strings, got 't'"),
        ({**GOOD, "score": "1"}, "field 'score': expected a finite number, got '1'"),
        ({**GOOD, "score": True}, "field 'score': expected a finite number, got True"),
        pytest.param("[" * 50000 + "]" * 50000, "", id="nested too deeply"),
        ({**GOOD, "tokens": ["\ud800", "b"]}, "field 'tokens'"),
        ({**GOOD, "score": 10**400}, "field 'score': expected a"),
        ({**GOOD, "score": math.nan}, "field 'score': expected a"),
        ({**GOOD, "score": math.inf}, "field 'score': expected a"),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_reason(read, line, reason):
    with pytest.raises(DataError) as error:
        read(GOOD, "", line, GOOD)
    assert "data.jsonl:3: " in str(error.value)
    assert reason in str(error.value)


def test_a_line_that_is_no_utf8_is_named(tmp_path, config):
    good = json.dumps(GOOD).encode() + b"\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + good + b'{"tokens": ["caf\xe9"]}\n' + good)
    with pytest.raises(DataError, match=r"data\.jsonl:3: .*utf-8"):
        read_records(path, config)


def packed_lines(count=2000):
    return gzip.compress("".join(json.dumps({**GOOD, "tokens": [f"w{i}", "b"]}) + "\n" for i in range(count)).encode())


def test_gzipped_records_are_read(tmp_path, config):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(packed_lines(30))
    assert [r.tokens[0] for r in read_records(path, config)] == [f"w{i}" for i in range(30)]


def test_a_truncated_gzip_file_is_a_data_error_with_file_and_line(tmp_path, config):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(packed_lines()[:4000])
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:\d+: .*end-of-stream"):
        read_records(path, config)


@pytest.mark.parametrize("position", [12, 60, 1000])
def test_a_damaged_gzip_file_is_a_data_error(tmp_path, config, position):
    path = tmp_path / "data.jsonl.gz"
    content = bytearray(packed_lines())
    content[position : position + 64] = bytes(64)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:\d+: "):
        read_records(path, config)


def test_a_plain_file_called_gz_is_a_data_error(tmp_path, config):
    path = toy.write_lines(tmp_path / "data.jsonl.gz", [GOOD])
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:\d+: .*gzip"):
        read_records(path, config)


def test_a_file_without_records_is_a_data_error(read):
    with pytest.raises(DataError, match=r"data\.jsonl: expected at least one record"):
        read("", "  ")


def test_a_missing_data_file_is_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_records(tmp_path / "absent.jsonl", config)


def test_null_and_missing_labels_are_no_labels(read):
    first, second = read({**GOOD, "intent": None, "slots": None}, {"tokens": ["a"]})
    assert first.labels == {"intent": None, "slots": None, "topics": ["t"], "score": 1}
    assert second.labels == dict.fromkeys(["intent", "slots", "topics", "score"])


def test_labels_are_not_read_where_none_are_wanted(read):
    assert read({**GOOD, "intent": 3}, labelled=False) == [Record(["a", "b"], {})]


def test_blank_lines_are_skipped(read):
    assert len(read("", GOOD, "   ", GOOD, "")) == 2


def test_lowercase_and_fields_of_other_names(read, load):
    config = load(MINIMAL + 'field = "class"\n', "data.lowercase=true", "data.tokens=words")
    records = read({"words": ["Ab", "ÄC"], "class": "Music"}, config=config)
    assert records == [Record(["ab", "äc"], {"intent": "Music"})]


# Vocabulary


def test_tokens_are_ordered_by_count_then_name_and_labels_by_name(read, config):
    lines = [
        {"tokens": ["b", "c", "c", "a"], "intent": "y", "slots": ["O", "B-z", "I-z", "O"], "topics": ["q"], "score": 1},
        {"tokens": ["a", "d"], "intent": "x", "slots": ["B-a", "O"], "topics": ["p", "q"], "score": 1},
    ]
    vocabulary = Vocabulary.of(read(*lines), config)
    assert vocabulary.tokens == ["<pad>", "<unk>", "a", "c", "b", "d"]
    assert vocabulary.labels == {
        "intent": ["x", "y"],
        "slots": ["B-a", "B-z", "I-z", "O"],
        "topics": ["p", "q"],
    }
    assert Vocabulary.of(read(*reversed(lines)), config) == vocabulary


def test_rare_tokens_are_left_out(read, load):
    config = load(MINIMAL, "training.min_count=2")
    records = read({"tokens": ["a", "b", "a", "<unk>", "<unk>"], "intent": "x"}, config=config)
    assert Vocabulary.of(records, config).tokens == ["<pad>", "<unk>", "a"]


def test_a_task_without_any_label_in_training_is_a_data_error(read, config):
    with pytest.raises(DataError, match="task 'slots': no training record has a label"):
        Vocabulary.of(read({**GOOD, "slots": None}), config)


def test_a_multilabel_task_whose_lists_are_all_empty_is_a_data_error(read, config):
    with pytest.raises(DataError, match="task 'topics'"):
        Vocabulary.of(read({**GOOD, "topics": []}), config)


def test_a_vocabulary_comes_back_the_same_from_its_dictionary(read, config):
    vocabulary = Vocabulary.of(read(GOOD), config)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.as_dict())), config, "v.json") == vocabulary


@pytest.mark.parametrize(
    "raw",
    [[], {}, {"tokens": ["a"]}, {"tokens": "a", "labels": {}}, {"tokens": [1], "labels": {"intent": ["x"]}}]
    + [{"tokens": ["<pad>", "<unk>"], "labels": {"intent": labels}} for labels in ("x", [1], None)],
)
def test_what_is_no_vocabulary_is_refused_with_its_path(raw, config):
    with pytest.raises(RunError, match=r"v\.json"):
        Vocabulary.from_dict(raw, config, "v.json")


# Batches


@pytest.fixture
def partial():
    """Records with some labels missing, and an encoder that knows tokens a, b and labels x, y; B-s, O; p, q."""
    records = [
        Record(["a", "b"], {"intent": "y", "slots": ["O", "B-s"], "topics": ["q"], "score": 2}),
        Record(["b", "zzz", "a"], {"intent": None, "slots": ["new", "O", "B-s"], "topics": [], "score": None}),
        Record(["a"], {"intent": "new", "slots": None, "topics": None, "score": -0.5}),
    ]
    labels = {"intent": ["x", "y"], "slots": ["B-s", "O"], "topics": ["p", "q"]}
    return records, Vocabulary(["<pad>", "<unk>", "a", "b"], labels)


def test_a_batch_is_padded_and_its_missing_or_unknown_labels_are_marked(partial, config):
    records, vocabulary = partial
    batch = Encoder(vocabulary, config).batch(records, [1, 0, 2])
    nan = math.nan
    assert batch.indices == [1, 0, 2]
    assert batch.tokens.tolist() == [[3, 1, 2], [2, 3, 0], [2, 0, 0]]
    assert batch.lengths.tolist() == [3, 2, 1]
    assert batch.targets["intent"].tolist() == [-100, 1, -100]
    assert batch.targets["slots"].tolist() == [[-100, 1, 0], [1, 0, -100], [-100, -100, -100]]
    torch.testing.assert_close(
        batch.targets["topics"], torch.tensor([[0.0, 0.0], [0.0, 1.0], [nan, nan]]), equal_nan=True
    )
    torch.testing.assert_close(batch.targets["score"], torch.tensor([[nan], [2.0], [-0.5]]), equal_nan=True)


def test_a_batch_has_no_targets_of_a_task_none_of_its_records_has_labels_for(partial, config):
    records, vocabulary = partial
    assert set(Encoder(vocabulary, config).batch(records, [2]).targets) == {"intent", "score"}
    assert Encoder(vocabulary, config).batch([Record(["a"], {})], [0]).targets == {}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 2]])
def test_a_packed_batch_holds_the_padded_one_without_its_padding(partial, config, order):
    records, vocabulary = partial
    batch = Encoder(vocabulary, config).batch(records, order)
    tokens, targets = batch.packed()
    padded, lengths = pad_packed_sequence(tokens, batch_first=True)
    assert padded.tolist() == batch.tokens.tolist()
    assert lengths.tolist() == batch.lengths.tolist()
    if "slots" in batch.targets:
        slots, _ = pad_packed_sequence(targets["slots"], batch_first=True, padding_value=-100)
        assert slots.tolist() == batch.targets["slots"].tolist()
    for name in {"intent", "topics", "score"} & set(batch.targets):
        assert targets[name] is batch.targets[name]


def test_whole_sentence_targets_stay_as_they_are_when_labels_are_as_many_as_tokens(partial, config):
    records, vocabulary = partial
    batch = Encoder(vocabulary, config).batch(records, [0, 0])
    assert batch.targets["topics"].shape == batch.tokens.shape
    assert batch.packed()[1]["topics"] is batch.targets["topics"]


@pytest.mark.parametrize("count", [1, 7, 8, 61, 450])
@pytest.mark.parametrize("seed", [None, 0])
def test_buckets_hold_each_record_once_and_similar_lengths_together(count, seed):
    records = [Record(r["tokens"], {}) for r in toy.requests(count)]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(buckets(records, 8, generator))
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(1 <= len(batch) <= 8 for batch in batches)
    padding = sum(max(len(records[i].tokens) for i in b) * len(b) for b in batches)
    assert count < 60 or padding <= 1.2 * sum(len(r.tokens) for r in records)


def test_buckets_follow_the_seed():
    records = [Record(r["tokens"], {}) for r in toy.requests(60)]
    first, again, other = (list(buckets(records, 8, torch.Generator().manual_seed(s))) for s in (1, 1, 2))
    assert first == again
    assert first != other
