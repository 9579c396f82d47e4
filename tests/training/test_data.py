"""The training package's input side: records, vocabulary and batches."""

import gzip
import json
import math

import pytest
import torch
import toy
from torch.nn.utils.rnn import pad_packed_sequence

from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.batches import Batcher, buckets
from pymtl.training.data import read_records
from pymtl.training.errors import DataError, RunError
from pymtl.training.kinds.sequences import RightAnswers
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
        ("{}", "expected a field 'tokens' or 'text', a text or a list of tokens (data.tokens names it), got none"),
        ({"tokens": 3}, "field 'tokens': expected a text or a list of strings, got 3"),
        ({"tokens": ["a", 1]}, "field 'tokens': expected a text or a list of strings"),
        (
            {**GOOD, "slots": ["O"]},
            "field 'slots': expected a list of 2 strings (or null), one a token, got a list of 1",
        ),
        ({**GOOD, "slots": ["O", "O", "O"]}, "field 'slots': expected a list of 2 strings"),
        (
            {**GOOD, "slots": "OO"},
            "field 'slots': expected a list of 2 strings (or null), one a token, got a list of 1",
        ),
        ({**GOOD, "slots": ["O", 1.5]}, "field 'slots': expected a list of 2 strings"),
        ({**GOOD, "slots": [[0, 1, "x"]]}, "field 'slots': spans with the places of their characters need a text"),
        ({**GOOD, "intent": 3.5}, "field 'intent': expected a string or a whole number, got 3.5"),
        ({**GOOD, "intent": ["x"]}, "field 'intent': expected a string"),
        ({**GOOD, "topics": "t"}, "field 'topics': expected a list of strings or whole numbers, got 't'"),
        ({**GOOD, "score": "1"}, "field 'score': expected a finite number, got '1'"),
        ({**GOOD, "score": True}, "field 'score': expected a finite number, got True"),
        pytest.param("[" * 50000 + "]" * 50000, "", id="nested too deeply"),
        ({**GOOD, "tokens": ["\ud800", "b"]}, "field 'tokens'"),
        ({**GOOD, "score": 10**400}, "field 'score': expected a"),
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
    with pytest.raises(
        DataError, match=r"data\.jsonl:3: byte 17 of the line, 0xe9, is not UTF-8: save the file as UTF-8"
    ):
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


ONE = '[data]\ntrain = "data.jsonl"\n[tasks.t]\n'


@pytest.mark.parametrize(
    ("tokens", "labels", "steps"), [(2, ["x", "y", "z"], 3), (2, ["x", "x"], 3), (4, ["x", "x", "x", "y"], 6)]
)
def test_labels_of_ctc_need_a_token_each_and_one_between_equal_neighbours(read, load, tokens, labels, steps):
    config = load(ONE + 'kind = "ctc"\n')
    assert read({"tokens": ["w"] * steps, "t": labels}, config=config)[0].labels == {"t": RightAnswers(tuple(labels))}
    with pytest.raises(DataError, match=f"data.jsonl:1: field 't': .* fit into {tokens} tokens, got {steps} steps"):
        read({"tokens": ["w"] * tokens, "t": labels}, config=config)


def test_some_of_several_numbers_may_be_missing(read, load):
    config = load(ONE + 'kind = "regression"\nnum_targets = 2\n')
    lines = [[1.0, None], [2, 3], [None, 7]]
    records = read(*({"tokens": ["a"], "t": label} for label in lines), config=config)
    assert [record.labels["t"] for record in records] == lines
    batch = Batcher(Vocabulary.of(records, config), config).batch(records, [0, 1, 2])
    expected = torch.tensor([[-1.0, math.nan], [1.0, -1.0], [math.nan, 1.0]])  # standardised
    torch.testing.assert_close(batch.targets["t"], expected, equal_nan=True)


@pytest.mark.parametrize("label", [[None, None], [1.0], [None], [1.0, None, 2.0], 1.0, [1.0, "x"]])
def test_numbers_that_are_all_missing_or_too_few_are_refused(read, load, label):
    config = load(ONE + 'kind = "regression"\nnum_targets = 2\n')
    with pytest.raises(DataError, match="field 't': expected a list of 2 finite numbers, some perhaps null"):
        read({"tokens": ["a"], "t": label}, config=config)


BIO = '[data]\ntrain = "data.jsonl"\n[tasks.t]\nkind = "tagging"\nfield = "tags"\ndecoder = "crf"\nbio = true\n'


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (["O", "I-x", "I-x"], "'I-x' at token 2 follows 'O'"),
        (["I-x", "O", "O"], "'I-x' at token 1 begins the sentence"),
        (["B-x", "I-x", "I-y"], "'I-y' at token 3 follows 'I-x'"),
        (["O", "I", "O"], "'I' at token 2 follows 'O'"),
    ],
)
def test_a_tag_that_bio_forbids_is_named(read, load, tmp_path, tags, reason):
    config = load(BIO, "data.holdout_field=held", 'data.holdout_values=["yes"]')
    good = [["B-x", "I-x", "I-x"], ["B", "I", "I"], [None, "I-x", "O"], ["B-x", None, "I-y"]]
    lines = [{"tokens": ["a", "b", "c"], "tags": given} for given in good]
    held = {**lines[0], "held": "yes"}
    read(*lines, held, config=config)
    assert len(toy.read_sets(config)[0][""]) == 4
    read(*lines, {**lines[0], "tags": tags}, held, config=config)
    with pytest.raises(DataError, match=f"data.jsonl:5: field 'tags': {reason}, which bio = true forbids"):
        toy.read_sets(config)


def test_the_record_of_a_tag_that_bio_forbids_is_counted_in_the_file(read, load):
    config = load(BIO, "data.holdout_field=held", 'data.holdout_values=["yes"]')
    held = {"tokens": ["a"], "tags": ["O"], "held": "yes"}
    read(held, {"tokens": ["a"]}, {"tokens": ["a"], "tags": ["I-x"]}, config=config)
    with pytest.raises(DataError, match=r"data\.jsonl:3: field 'tags'"):
        toy.read_sets(config)


# Holding out, CSV


def test_records_are_held_out_by_a_field(tmp_path):
    lines = [{**record, "shop": "xy"[i % 2]} for i, record in enumerate(toy.requests(10))]
    toy.write_lines(tmp_path / "train.jsonl", lines)
    data = 'train = "train.jsonl"\nholdout_field = "shop"\nholdout_values = ["y"]\n'
    (tmp_path / "c.toml").write_text(f'[data]\n{data}[tasks.intent]\nkind = "classification"\n')
    train, valid = toy.read_sets(configuration.load(tmp_path / "c.toml"))
    assert [record.tokens for record in train[""]] == [line["tokens"] for line in lines[::2]]
    assert [record.tokens for record in valid[""]] == [line["tokens"] for line in lines[1::2]]
    with pytest.raises(DataError, match="others to hold out by 'shop' = z, got 10 and 0"):
        toy.read_sets(configuration.load(tmp_path / "c.toml", ['data.holdout_values=["z"]']))


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
        ("play jazz,x", "t.csv:2: expected 5 cells, got 2"),
        ("play jazz,x,O O,,1,6", "t.csv:2: expected 5 cells, got 6"),
        ('play "jazz,x', "t.csv:2: "),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    (tmp_path / "c.toml").write_text(CSV)
    (tmp_path / "t.csv").write_text("text,intent,slots,topics,score\n" + row + "\n")
    with pytest.raises(DataError) as error:
        read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))
    assert reason in str(error.value)


def test_two_tasks_may_read_one_column_of_csv(tmp_path):
    (tmp_path / "t.csv").write_text("tokens,stars\nplay,3\nstop,1\n")
    tasks = "".join(f'[tasks.{kind}]\nkind = "{kind}"\nfield = "stars"\n' for kind in ("ordinal", "regression"))
    (tmp_path / "c.toml").write_text('[data]\ntrain = "t.csv"\n' + tasks)
    found = read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))
    assert [record.labels for record in found] == [
        dict.fromkeys(("ordinal", "regression"), stars) for stars in (3.0, 1.0)
    ]
    (tmp_path / "t.csv").write_text("tokens,star\nplay,3\n")
    with pytest.raises(DataError, match=r"t\.csv:1: expected a column 'stars', got tokens, star"):
        read_records(tmp_path / "t.csv", configuration.load(tmp_path / "c.toml"))


def test_classes_of_csv_have_no_space_around_them(tmp_path, load):
    (tmp_path / "t.csv").write_text("text,intent,slots,topics,score\nplay, music ,O,,1\nplay,music,O,,1\n")
    found = read_records(tmp_path / "t.csv", load(CSV))
    assert [record.labels["intent"] for record in found] == ["music", "music"]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("text,intent,slots,topics,intent", "expected columns of different names, got 'intent' twice"),
        (
            "texts,intent,slots,topics,score",
            "expected a column 'text' with the text .*, got texts, intent, slots, topics, score",
        ),
    ],
)
def test_columns_that_come_twice_or_are_missing_are_named(tmp_path, load, header, reason):
    (tmp_path / "t.csv").write_text(f"{header}\nplay,x,O,,1\n")
    with pytest.raises(DataError, match=rf"t\.csv:\d: {reason}"):
        read_records(tmp_path / "t.csv", load(CSV))


# Vocabulary


def test_tokens_are_ordered_by_count_then_name_and_labels_by_name(read, config):
    lines = [
        {"tokens": ["b", "c", "c", "a"], "intent": "y", "slots": ["O", "B-z", "I-z", "O"], "topics": ["q"], "score": 1},
        {"tokens": ["a", "d"], "intent": "x", "slots": ["B-a", "O"], "topics": ["p", "q"], "score": 3},
    ]
    vocabulary = Vocabulary.of(read(*lines), config)
    assert vocabulary.tokens == ["<pad>", "<unk>", "a", "c", "b", "d"]
    assert vocabulary.labels == {
        "intent": ["x", "y"],
        "slots": ["B-a", "B-z", "I-z", "O"],
        "topics": ["p", "q"],
        "score": [{"mean": 2.0, "std": 1.0}],
    }
    assert vocabulary.counts == {"intent": [1, 1], "slots": [1, 1, 1, 3], "topics": [1, 2], "score": []}
    assert Vocabulary.of(read(*reversed(lines)), config) == vocabulary


def test_rare_tokens_are_left_out(read, load):
    config = load(MINIMAL, "training.min_count=2")
    records = read({"tokens": ["a", "b", "a", "<unk>", "<unk>"], "intent": "x"}, config=config)
    assert Vocabulary.of(records, config).tokens == ["<pad>", "<unk>", "a"]


@pytest.mark.parametrize("task", ["slots", "score"])
def test_a_task_without_any_label_in_training_is_a_data_error(read, config, task):
    with pytest.raises(DataError, match=f"task '{task}': no training record has a label"):
        Vocabulary.of(read({**GOOD, task: None}), config)


def test_a_multilabel_task_whose_lists_are_all_empty_is_a_data_error(read, config):
    with pytest.raises(DataError, match="task 'topics'"):
        Vocabulary.of(read({**GOOD, "topics": []}), config)


def test_a_vocabulary_comes_back_the_same_from_its_dictionary(read, config):
    vocabulary = Vocabulary.of(read(GOOD, {**GOOD, "score": 2}), config)
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
    """Records with some labels missing, and a batcher that knows tokens a, b and labels x, y; B-s, O; p, q."""
    records = [
        Record(["a", "b"], {"intent": "y", "slots": ["O", "B-s"], "topics": ["q"], "score": 2}),
        Record(["b", "zzz", "a"], {"intent": None, "slots": ["new", "O", "B-s"], "topics": [], "score": None}),
        Record(["a"], {"intent": "new", "slots": None, "topics": None, "score": -0.5}),
    ]
    labels = {"intent": ["x", "y"], "slots": ["B-s", "O"], "topics": ["p", "q"]}
    return records, Vocabulary(["<pad>", "<unk>", "a", "b"], labels)


def test_a_batch_is_padded_and_its_missing_or_unknown_labels_are_marked(partial, config):
    records, vocabulary = partial
    batch = Batcher(vocabulary, config).batch(records, [1, 0, 2])
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
    assert set(Batcher(vocabulary, config).batch(records, [2]).targets) == {"intent", "score"}
    assert Batcher(vocabulary, config).batch([Record(["a"], {})], [0]).targets == {}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 2]])
def test_a_packed_batch_holds_the_padded_one_without_its_padding(partial, config, order):
    records, vocabulary = partial
    batch = Batcher(vocabulary, config).batch(records, order)
    tokens, targets, _ = batch.packed()
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
    batch = Batcher(vocabulary, config).batch(records, [0, 0])
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
