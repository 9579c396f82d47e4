"""Labels in the forms that files have them, and what training makes of them."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from pymtl import JointLoss, RegressionHead
from pymtl.serving.answers import Decoding
from pymtl.serving.records import Record
from pymtl.serving.tags import spans_of
from pymtl.serving.tokenizing import places
from pymtl.training import config as configuration
from pymtl.training.batches import Batcher
from pymtl.training.building import model_of
from pymtl.training.data import read_all
from pymtl.training.errors import ConfigError, DataError
from pymtl.training.metrics import best_epoch, decode, score, selection_score
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.survey import survey
from pymtl.training.vocabulary import Vocabulary

NAN = math.nan


def parsed(tasks, folder=".", data=None, **more):
    raw = {"data": {"train": "a.jsonl", "valid": "a.jsonl", **(data or {})}, "tasks": tasks, "folder": str(folder)}
    return configuration.parse({**raw, **more}, "c.toml")


def write(path, content):
    lines = (content if isinstance(content, str) else "".join(json.dumps(each) + "\n" for each in content)).encode()
    path.write_bytes(lines)


@pytest.fixture
def read(tmp_path):
    """A function from tasks and the content of a file, perhaps of another to validate on, to what is read of it."""

    def read(tasks, content, valid=None, name="a.jsonl", **data):
        write(tmp_path / name, content)
        other = f"valid-{name}" if valid is not None else name
        if valid is not None:
            write(tmp_path / other, valid)
        return read_all(parsed(tasks, tmp_path, {"train": name, "valid": other, **data}))

    return read


def task(kind, **options):
    return {"t": {"kind": kind, **options}}


def labels(sets):
    return [record.labels["t"] for record in sets.train[""]]


# Values

CLASSES = task("classification", field="mood")
KEEP = {"other": {"kind": "regression"}}  # a second task, so that records without a class are kept


@pytest.mark.parametrize("value", [1, 1.0, "1"])
def test_a_class_that_is_a_number_is_the_same_in_every_file(read, value):
    sets = read(CLASSES, [{"text": "a", "mood": value}, {"text": "b", "mood": "2"}])
    vocabulary = Vocabulary.of(sets.train[""], sets.config)
    assert list(map(str, vocabulary.labels["t"])) == ["1", "2"]
    truth, guess = [Record(["a"], {"t": "1"})], [{"t": vocabulary.labels["t"][0]}]
    assert score(truth, guess, sets.config, vocabulary.labels)["t/accuracy"] == 1.0
    target = Batcher(vocabulary, sets.config).batch([Record(["a"], {"t": "1"}), Record(["a"], {"t": value})], [0, 1])
    assert target.targets["t"].tolist() == [0, 0]


def test_a_table_validates_what_json_was_trained_on(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a", "mood": 10}, {"text": "b", "mood": 9}, {"text": "c", "mood": True}])
    write(tmp_path / "b.csv", "text,mood\na,10\nb, 9\nc,true\nd,11\n")
    sets = read_all(parsed(CLASSES, tmp_path, {"valid": "b.csv"}))
    vocabulary = Vocabulary.of(sets.train[""], sets.config)
    batch = Batcher(vocabulary, sets.config).batch(sets.valid[""], range(4))
    names = ["true" if label is True else str(label) for label in vocabulary.labels["t"]]
    assert [names[i] if i >= 0 else None for i in batch.targets["t"].tolist()] == ["10", "9", "true", None]


def test_classes_that_are_numbers_are_in_order_of_size(read):
    sets = read(CLASSES, [{"text": "a", "mood": value} for value in (10, 9, 2.0)])
    assert Vocabulary.of(sets.train[""], sets.config).labels["t"] == [2, 9, 10]


def test_a_text_in_the_field_text_is_split(read):
    sets = read(CLASSES, [{"text": "a tea", "mood": "x"}])
    assert sets.train[""][0].tokens == ["a", "tea"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("classification", value) for value in ("", " ", None, NAN)),
        *(("regression", value) for value in ("", None, NAN)),
        *(("multilabel", value) for value in ("", None, NAN)),
        *(("ordinal", value) for value in ("", None, NAN)),
        *(("tagging", value) for value in ("", None, NAN)),
    ],
)
def test_labels_that_are_missing(read, kind, value):
    sets = read({**task(kind), **KEEP}, [{"text": "a", "t": value, "other": 1}, {"text": "b", "other": 2}])
    assert labels(sets) == [None, None]


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "ordinal", "tagging"])
@pytest.mark.parametrize("cell", ["", "  "])
def test_cells_that_are_missing(read, kind, cell):
    sets = read({**task(kind), **KEEP}, f"text,t,other\na,{cell},1\n", name="a.csv")
    assert labels(sets) == [None]


@pytest.mark.parametrize("cell", ["nan", "NaN"])
def test_a_number_that_is_none_in_a_table_is_missing_as_it_is_in_json(read, cell):
    sets = read({**task("regression"), **KEEP}, f"text,t,other\na,{cell},1\nb,2,1\n", name="a.csv")
    assert labels(sets) == [None, 2.0]


@pytest.mark.parametrize("value", [1.5, ["x"], {"a": 1}, math.inf])
def test_what_is_no_class_is_refused(read, value):
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'mood': expected a string or a whole number, got"):
        read(CLASSES, [{"text": "a", "mood": value}])


def test_spaces_around_a_class_are_no_other_class(read):
    sets = read(CLASSES, [{"text": "a", "mood": " x"}, {"text": "b", "mood": "x"}])
    assert Vocabulary.of(sets.train[""], sets.config).labels["t"] == ["x"]


# Spans with their places in the text

TEXT = "Fly to New York, please."
ENTITIES = task("tagging", field="entities")
TAGGED = ["O", "O", "B-city", "I-city", "O", "B-x", "O"]


@pytest.mark.parametrize(
    "spans",
    [
        [{"start": 7, "end": 15, "label": "city"}, {"start": 17, "end": 23, "label": "x"}],
        [{"start": 17, "end": 23, "label": "x"}, {"start": 7, "end": 15, "label": "city"}],  # in any order
        [[7, 15, "city"], [17, 23, "x"]],
        [{"start": 7, "end": 15, "labels": ["city"], "text": "New York"}, {"start": 17, "end": 23, "labels": ["x"]}],
        [[7, 15, "city"], {"start": 17, "end": 23, "label": "x", "score": 0.5}],
        [[6, 15, "city"], [16, 23, "x"]],  # with spaces at the edge
    ],
)
def test_spans_become_tags_of_the_tokens(read, spans):
    sets = read(ENTITIES, [{"text": TEXT, "entities": spans}])
    assert sets.train[""][0].tokens == ["Fly", "to", "New", "York", ",", "please", "."]
    assert labels(sets) == [TAGGED]
    assert sets.config.tasks["t"].scheme == "bio"
    assert sets.config.sets[""].tokenizer == "words"
    assert sets.notes == ["t: tags of spans, scheme bio"]


def test_spans_in_a_cell_of_a_table_are_read(read):
    content = 'text,entities\n"a b","[[0, 1, ""x""]]"\n"c d","[{""start"": 2, ""end"": 3, ""label"": ""y""}]"\n'
    assert labels(read(ENTITIES, content, name="a.csv")) == [["B-x", "O"], ["O", "B-y"]]


def test_no_spans_are_tags_outside_of_all(read):
    sets = read(ENTITIES, [{"text": "a b", "entities": []}, {"text": "c d", "entities": [[0, 3, "x"]]}])
    assert labels(sets) == [["O", "O"], ["B-x", "I-x"]]


@pytest.mark.parametrize("text", ["a b", "a"])
def test_no_spans_in_a_cell_of_a_table_are_tags_outside_of_all(read, text):
    content = f'text,entities\n{text},[]\n"c d","[[0, 1, ""x""]]"\n'
    assert labels(read(ENTITIES, content, name="a.csv")) == [["O"] * len(text.split()), ["B-x", "O"]]


def test_spans_count_characters_not_bytes(read):
    sets = read(ENTITIES, [{"text": "\U0001f600 caf\u00e9 \u00fc", "entities": [[2, 6, "x"], [7, 8, "y"]]}])
    assert labels(sets) == [["O", "B-x", "B-y"]]


def test_neighbouring_spans_of_one_type_stay_two(read):
    sets = read(ENTITIES, [{"text": "a b c", "entities": [[0, 1, "x"], [2, 5, "x"]]}])
    assert labels(sets) == [["B-x", "B-x", "I-x"]]


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([[0, 3, "x"], [2, 5, "y"]], "expected spans that do not overlap, got 0 to 3 (x) and 2 to 5 (y)"),
        ([[2, 5, "y"], [0, 6, "x"]], "expected spans that do not overlap, got 0 to 6 (x) and 2 to 5 (y)"),
        ([[0, 3, "x"], [0, 3, "y"]], "expected spans that do not overlap, got 0 to 3 (x) and 0 to 3 (y)"),
        ([[6, 8, "x"]], "expected spans within the text of 6 characters, got 6 to 8 (x)"),
        ([[4, 7, "x"]], "expected spans within the text of 6 characters, got 4 to 7 (x)"),  # the text has 6 characters
        ([[0, 600, "x"]], "expected spans within the text of 6 characters, got 0 to 600 (x)"),
        ([[-1, 3, "x"]], "expected spans within the text of 6 characters, got -1 to 3 (x)"),
        ([[3, 3, "x"]], "expected spans within the text of 6 characters, got 3 to 3 (x)"),
        ([[3, 0, "x"]], "expected spans within the text of 6 characters, got 3 to 0 (x)"),
        ([[0, 3]], "expected spans"),
        ([[0, 3, ""]], "expected spans"),
        ([[0, 3, 1]], "expected spans"),
        ([[0.5, 3, "x"]], "expected spans"),
        ([["0", "3", "x"]], "expected spans"),
        ([{"start": 0, "label": "x"}], "expected spans"),
        ([{"start": 0, "end": 3, "labels": ["x", "y"]}], "expected spans"),
        ([{"start": 0, "end": 3, "labels": []}], "expected spans"),
        ([[0, 3, "x"], "O"], "expected spans"),
        ([True], "expected a list of 2 strings"),
    ],
)
def test_spans_that_do_not_fit_are_refused(read, spans, reason):
    with pytest.raises(DataError) as error:
        read(ENTITIES, [{"text": "abc de", "entities": spans}])
    assert "a.jsonl:1: field 'entities': " in str(error.value)
    assert reason in str(error.value)


def test_spans_of_a_list_of_tokens_are_refused(read):
    with pytest.raises(DataError, match="spans with the places of their characters need a text that is a string"):
        read(ENTITIES, [{"tokens": ["a"], "entities": [[0, 1, "x"]]}])


@pytest.mark.parametrize(
    ("span", "tags", "widened"),
    [
        ([0, 2, "x"], ["B-x", "O", "O"], True),
        ([1, 3, "x"], ["B-x", "O", "O"], True),
        ([1, 5, "x"], ["B-x", "I-x", "O"], True),
        ([0, 3, "x"], ["B-x", "O", "O"], False),
        ([0, 4, "x"], ["B-x", "O", "O"], False),
        ([3, 9, "x"], ["O", "B-x", "I-x"], False),
    ],
)
def test_a_span_that_ends_within_a_token_is_widened_and_counted(read, span, tags, widened):
    sets = read(ENTITIES, [{"text": "abc de fg", "entities": [span]}], [{"text": "a", "entities": []}])
    assert labels(sets) == [tags]
    note = "a.jsonl: 1 spans begin or end within a token and were widened to it"
    assert sets.notes[-1] == "t: tags of spans, scheme bio"
    assert [text.partition(", as ")[0] for text in sets.notes[:-1]] == ([note] if widened else [])


def test_a_widened_span_is_shown_as_an_example(read):
    sets = read(ENTITIES, [{"text": "abc de fg", "entities": [[0, 2, "x"]]}], [{"text": "a", "entities": []}])
    assert sets.notes[0].endswith("and were widened to it, as 'ab' to 'abc'")


def test_of_two_spans_within_one_token_the_first_is_kept(read):
    sets = read(ENTITIES, [{"text": "abcd e", "entities": [[0, 2, "x"], [2, 4, "y"]]}], [{"text": "a", "entities": []}])
    assert labels(sets) == [["B-x", "O"]]
    assert "a.jsonl: 1 spans were left out, which begin within the last token of another" in sets.notes


@pytest.mark.parametrize(("text", "span"), [("ab   c", [3, 4, "x"]), ("ab   ", [3, 4, "x"]), ("  ab", [0, 1, "x"])])
def test_a_span_of_spaces_alone_is_left_out_and_counted(read, text, span):
    sets = read(ENTITIES, [{"text": text, "entities": [span]}], [{"text": "a", "entities": []}])
    assert sets.notes == ["a.jsonl: 1 spans of spaces alone were left out"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["tea", "New York", "caf\u00e9s", "3.50"]), st.sampled_from("xy-")), min_size=1)
)
def test_spans_of_whole_words_come_back_from_their_tags(tmp_path_factory, parts):
    text, spans = "", []
    for words, label in parts:
        begin = len(text)
        text += words
        if label != "-":
            spans.append([begin, len(text), label])
        text += " "
    folder = tmp_path_factory.mktemp("spans")
    write(folder / "a.jsonl", [{"text": text, "entities": spans}])
    sets = read_all(parsed(ENTITIES, folder))
    where = places(text, "words")
    assert [[where[a][0], where[b][1], kind] for kind, a, b in spans_of(sets.train[""][0].labels["t"])] == spans


# Numbers


def regression(values, **options):
    config = parsed(task("regression", **options))
    records = [Record([f"w{i}"], {"t": value}) for i, value in enumerate(values)]
    return config, records, Vocabulary.of([r for r in records if r.labels["t"] is not None], config)


def test_targets_are_standardised_by_what_training_has():
    values = [250_000.0, 310_000.0, 190_000.0, None, 275_000.0]
    config, records, vocabulary = regression(values)
    known = [value for value in values if value is not None]
    mean, std = statistics.fmean(known), statistics.pstdev(known)
    assert vocabulary.labels["t"] == [{"mean": pytest.approx(mean), "std": pytest.approx(std)}]
    target = Batcher(vocabulary, config).batch(records, range(5)).targets["t"].flatten()
    assert target[3].isnan()
    torch.testing.assert_close(target[[0, 1, 2, 4]], torch.tensor([(value - mean) / std for value in known]))
    later = Batcher(vocabulary, config).batch([Record(["w0"], {"t": mean + 3 * std})], [0]).targets["t"]
    torch.testing.assert_close(later.flatten(), torch.tensor([3.0]))


def test_every_one_of_several_targets_has_its_own_scale():
    config, records, vocabulary = regression([[1, 100.0], [3, None], [None, 500.0]], num_targets=2)
    assert vocabulary.labels["t"] == [{"mean": 2.0, "std": 1.0}, {"mean": 300.0, "std": 200.0}]
    target = Batcher(vocabulary, config).batch(records, range(3)).targets["t"]
    torch.testing.assert_close(target, torch.tensor([[-1, -1], [1, NAN], [NAN, 1]]), equal_nan=True)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_predictions_are_in_the_units_of_the_data(num_targets):
    row = [[20.0, 1e6], [24.0, 3e6]]
    config, records, vocabulary = regression(
        row if num_targets == 2 else [each[0] for each in row], **({"num_targets": 2} if num_targets == 2 else {})
    )
    batch = Batcher(vocabulary, config).batch(records, [0, 1])
    logits = torch.tensor([[0.0, 0.5], [1.0, -2.0]])[:, :num_targets]
    found = [prediction["t"] for prediction in decode({"t": logits}, batch, config, vocabulary)]
    expected = [[22.0, 2.5e6], [24.0, 0.0]]
    assert found == (expected if num_targets == 2 else [each[0] for each in expected])
    back = [
        prediction["t"] for prediction in decode({"t": batch.targets["t"].reshape(2, -1)}, batch, config, vocabulary)
    ]
    assert back == [record.labels["t"] for record in records]


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        ([3, 3.0, None], {}, "task 't': expected at least two different training values, got only 3: there is nothing"),
        ([3], {}, "task 't': expected at least two different training values, got only 3"),
        (
            [[1, 5], [2, 5]],
            {"num_targets": 2},
            "expected at least two different training values of number 2, got only 5",
        ),
        (
            [[1, None], [2, None]],
            {"num_targets": 2},
            "expected at least two different training values of number 2, got none",
        ),
        ([0, 1e-200], {}, "whose standard deviation is a number above 0, got 0"),
        ([0, 1e200], {}, "whose standard deviation is a number above 0"),
        ([1e308, 1.5e308], {}, "whose standard deviation is a number above 0"),
    ],
)
def test_numbers_that_cannot_be_standardised_are_refused_with_the_reason(values, options, reason):
    with pytest.raises(DataError) as error:
        regression(values, **options)
    assert reason in str(error.value)


@settings(max_examples=100, deadline=None)
@given(
    mean=st.floats(-1e6, 1e6), std=st.floats(1e-3, 1e6), z=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=5)
)
def test_standardized_and_values_invert_each_other(mean, std, z):
    head = RegressionHead(mean=[mean], std=[std])
    values = head.values(torch.tensor(z))
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), mean + std * np.array(z), rtol=1e-12, atol=1e-9 * std)
    standardized = head.standardized(values)
    assert standardized.dtype == torch.float32
    np.testing.assert_allclose(standardized.numpy(), z, rtol=1e-6, atol=1e-6 + 1e-15 * abs(mean) / std)


def test_standardising_keeps_what_is_missing_and_every_shape():
    head = RegressionHead(2, mean=[1, 2], std=[2, 4])
    targets = torch.tensor([[[3.0, 2.0], [NAN, 6.0]]])
    torch.testing.assert_close(head.standardized(targets), torch.tensor([[[1.0, 0.0], [NAN, 1.0]]]), equal_nan=True)
    torch.testing.assert_close(head.values(torch.ones(2)), torch.tensor([3.0, 6.0], dtype=torch.float64))
    assert RegressionHead(mean=[1], std=[2]).standardized(torch.tensor(5)).item() == 2.0
    with pytest.raises(ValueError, match=r"expected 2 numbers in the last dimension, got \[3\]"):
        head.values(torch.ones(3))


def test_large_values_survive_in_a_bfloat16_model():
    torch.manual_seed(0)
    values = (250_000 + 60_000 * torch.randn(500, dtype=torch.float64)).tolist()
    config, records, vocabulary = regression(values)
    model = model_of(config, vocabulary).to(torch.bfloat16)
    head = model.heads["t"]
    targets = torch.tensor(values, dtype=torch.float64)
    scale = vocabulary.labels["t"][0]
    assert (head.mean, head.std) == ((scale["mean"],), (scale["std"],))
    back = head.values(head.standardized(targets).to(torch.bfloat16))
    assert (back - targets).abs().max() <= 2**-8 * (targets - scale["mean"]).abs().max()
    batch = Batcher(vocabulary, config).batch(records[:4], range(4))
    found = decode({"t": model(batch.tokens, batch.lengths)["t"]}, batch, config, vocabulary)
    assert all(abs(each["t"] - scale["mean"]) < 3 * scale["std"] for each in found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mean": [1, 2]}, r"mean: expected 1 finite numbers, got \[1.0, 2.0\]"),
        ({"mean": [NAN]}, "mean: expected 1 finite numbers"),
        ({"std": [math.inf]}, "std: expected 1 finite numbers"),
        ({"std": [0]}, r"std: expected numbers above 0, got \[0.0\]"),
        ({"std": [-1]}, "std: expected numbers above 0"),
        ({"num_targets": 2, "std": [1]}, "std: expected 2 finite numbers"),
    ],
)
def test_scales_that_are_none_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        RegressionHead(**options)


def test_r2_of_predictions_in_the_data_s_units_and_of_several_targets_their_mean():
    config = parsed(task("regression", num_targets=2))
    truth = [[1.0, 100.0], [2.0, 200.0], [3.0, None], [None, 300.0]]
    guess = [[1.0, 100.0], [2.0, 200.0], [3.0, 999.0], [999.0, 200.0]]
    records = [Record(["w"], {"t": label}) for label in truth]
    result = score(records, [{"t": label} for label in guess], config, {})
    assert result["t/r2"] == pytest.approx((1 + (1 - 100**2 / (2 * 100**2))) / 2)


# What the best epoch is chosen by


def settings_of(select_by, tasks=None):
    kinds = tasks or {"kind": {"kind": "classification"}, "r": {"kind": "regression"}}
    return parsed(kinds, training={"select_by": select_by}).training


SCORES = {"kind/accuracy": 0.5, "kind/macro_f1": 0.25, "r/r2": -40.0, "r/pearson": 0.1, "exact_match": 0.75}


@pytest.mark.parametrize(
    ("select_by", "expected"),
    [
        ("mean", (0.5 - 1) / 2),
        ("kind", 0.5),
        ("kind/accuracy", 0.5),
        ("kind/macro_f1", 0.25),
        ("r", -40.0),
        ("r/r2", -40.0),
        ("r/pearson", 0.1),
        ("exact_match", 0.75),
    ],
)
def test_the_best_epoch_is_chosen_by_any_score(select_by, expected):
    assert selection_score(SCORES, settings_of(select_by)) == expected


@pytest.mark.parametrize(("r2", "mean"), [(-1.5, -0.25), (-1.0, -0.25), (-0.5, 0.0), (1.0, 0.75), (-math.inf, -0.25)])
def test_r2_enters_the_mean_as_minus_one_at_least(r2, mean):
    assert selection_score({"kind/accuracy": 0.5, "r/r2": r2}, settings_of("mean")) == mean


def test_of_a_perplexity_less_is_better():
    tasks = {"kind": {"kind": "classification"}, "lm": {"kind": "language_model"}}
    scores = {"kind/accuracy": 0.5, "lm/perplexity": 90.0}
    assert selection_score(scores, settings_of("lm/perplexity", tasks)) == -90
    assert selection_score(scores, settings_of("lm", tasks)) == -90
    assert selection_score(scores, settings_of("mean", tasks)) == 0.5


@pytest.mark.parametrize("select_by", ["kind/r2", "kind/", "other", "other/accuracy", "Mean", "kind/macro_f1 "])
def test_a_score_that_there_is_none_of_is_refused_with_those_there_are(select_by):
    with pytest.raises(ConfigError, match=r"training\.select_by: expected mean or .*kind/macro_f1"):
        settings_of(select_by)


def test_exact_match_counts_ordered_classes_and_sets_of_labels():
    tasks = {"o": {"kind": "ordinal"}, "m": {"kind": "multilabel"}, "r": {"kind": "regression"}}
    config = parsed(tasks)
    truth = [(1, ["p", "q"]), (2, []), (3, ["p"]), (2, None), (None, ["q"]), (None, None)]
    guess = [(1, ["q", "p"]), (2, ["p"]), (2, ["p"]), (2, ["q"]), (9, ["q"]), (1, [])]
    records = [Record(["w"], {"o": o, "m": m, "r": 1.0}) for o, m in truth]
    predictions = [{"o": o, "m": m, "r": 7.0} for o, m in guess]
    assert score(records, predictions, config, {"o": [1.0, 2.0, 3.0], "m": ["p", "q"]})["exact_match"] == 3 / 5


def test_numbers_alone_have_no_exact_match():
    records = [Record(["w"], {"t": float(i)}) for i in range(3)]
    assert "exact_match" not in score(records, [{"t": 1.0}] * 3, parsed(task("regression")), {})


# Weights of classes

COUNTS = {"often": 8, "rare": 1, "some": 3}


def weighed(class_weights, counts=COUNTS, kind="classification"):
    config = parsed(task(kind, class_weights=class_weights))
    truth = [name for name, count in counts.items() for _ in range(count)]
    of = {"classification": lambda name: name, "tagging": lambda name: [name]}[kind]
    records = [Record([f"w{i}"], {"t": of(name)}) for i, name in enumerate(truth)]
    return config, records, Vocabulary.of(records, config), truth


@pytest.mark.parametrize("kind", ["classification", "tagging"])
@pytest.mark.parametrize("counts", [COUNTS, {"a": 1, "b": 1}, {"a": 100, "b": 1, "c": 1, "d": 7}])
def test_balanced_weights_are_scikit_learn_s(kind, counts):
    config, _, vocabulary, truth = weighed("balanced", counts, kind)
    head = config.tasks["t"].rules.head(config.tasks["t"], vocabulary.learned("t"), None)
    names = np.array(vocabulary.labels["t"])
    np.testing.assert_allclose(head.loss.weight, compute_class_weight("balanced", classes=names, y=np.array(truth)))


def test_a_table_weighs_the_classes_it_names():
    config, _, vocabulary, _ = weighed({"rare": 5, "often": 0.5})
    head = config.tasks["t"].rules.head(config.tasks["t"], vocabulary.learned("t"), None)
    assert dict(zip(vocabulary.labels["t"], head.loss.weight)) == {"often": 0.5, "rare": 5.0, "some": 1.0}


def test_a_table_may_name_classes_that_are_numbers():
    config = parsed(task("classification", class_weights={"1": 3.0}))
    records = [Record(["w"], {"t": value}) for value in (1, 2, 10)]
    vocabulary = Vocabulary.of(records, config)
    assert config.tasks["t"].rules.head(config.tasks["t"], vocabulary.learned("t"), None).loss.weight == (3, 1, 1)


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_a_class_that_there_is_none_of_is_refused(kind):
    with pytest.raises(DataError, match=r"tasks\.t\.class_weights: expected labels of often, rare, some, got 'rar'"):
        weighed({"rar": 2.0}, kind=kind)


@pytest.mark.parametrize("weights", [{"rare": 0}, {"rare": -1.0}, {"rare": NAN}, {"rare": math.inf}, "Balanced", ""])
def test_weights_that_are_none_are_refused(weights):
    expected = r'tasks\.t\.class_weights: expected "none", "balanced" or a table of numbers above 0'
    with pytest.raises(ConfigError, match=expected):
        weighed(weights)


@pytest.mark.parametrize("weights", [{"rare": "2"}, ["balanced"], 2.0, True, {"rare": True}])
def test_weights_of_another_type_are_refused(weights):
    with pytest.raises(ConfigError, match=r"tasks\.t\.class_weights"):
        weighed(weights)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("regression", {}), ("multilabel", {}), ("ordinal", {}), ("tagging", {"decoder": "crf"})],
)
def test_tasks_whose_loss_weighs_no_classes_take_no_weights(kind, options):
    with pytest.raises(ConfigError, match=r"tasks\.t\.class_weights: expected"):
        parsed(task(kind, class_weights="balanced", **options))


@pytest.mark.parametrize("backend", ["pymtl", "reference"])
@pytest.mark.parametrize("weights", ["none", "balanced", {"rare": 5.0}])
@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_the_loss_is_torch_s_weighted_cross_entropy(kind, weights, backend):
    config, records, vocabulary, _ = weighed(weights, kind=kind)
    records = [
        *records,
        Record(["w0"], {"t": None}),
        Record(["w1"], {"t": "new" if kind == "classification" else ["new"]}),
    ]
    torch.manual_seed(1)
    model = ModelWithLoss(backend, config, vocabulary).eval()
    batch = Batcher(vocabulary, config).batch(records, range(len(records)))
    logits = model.logits(batch)["t"]
    names = vocabulary.labels["t"]
    if weights == "none":
        weight = None
    elif weights == "balanced":
        weight = torch.tensor([12 / (3 * COUNTS[name]) for name in names])
    else:
        weight = torch.tensor([weights.get(name, 1.0) for name in names])
    targets = batch.targets["t"].flatten()
    assert targets[-2:].tolist() == [-100, -100]
    expected = nn.functional.cross_entropy(logits.reshape(-1, 3), targets, weight)
    torch.testing.assert_close(model.loss(batch).per_task["t"], expected)


def test_a_head_s_weighted_loss_is_torch_s():
    config, _, vocabulary, _ = weighed("balanced")
    head = config.tasks["t"].rules.head(config.tasks["t"], vocabulary.learned("t"), None)
    logits, targets = torch.randn(9, 3), torch.tensor([0, 1, 2, -100, 1, 0, 0, 2, 2])
    result = JointLoss({"t": 1.0}, {"t": head.loss})({"t": logits}, {"t": targets}).total
    weight = torch.tensor(head.loss.weight)
    torch.testing.assert_close(result, nn.functional.cross_entropy(logits, targets, weight, ignore_index=-100))


# What a person sees


def seen(sets):
    records = [record for each in sets.train.values() for record in each]
    return survey(sets, Vocabulary.of(records, sets.config))


def test_labels_that_only_validation_has_are_named_and_counted(read):
    train = [{"text": "a b", "t": "x"}, {"text": "b", "t": "y"}]
    valid = [{"text": "a c", "t": value} for value in ("x", "new", "new", "newer", None)]
    lines = seen(read(task("classification"), train, valid))
    assert "validation: labels of t that training lacks, each one counts as missed: 'new' (2), 'newer' (1)" in lines
    assert "validation: 50.0 % of the tokens are unknown to training" in lines


def test_labels_that_only_the_test_records_have_are_named_too(read, tmp_path):
    write(tmp_path / "test.jsonl", [{"text": "a", "t": ["q", "p", "q2"]}])
    lines = seen(read(task("multilabel"), [{"text": "a", "t": ["p"]}, {"text": "a", "t": []}], test="test.jsonl"))
    assert "test: labels of t that training lacks, each one counts as missed: 'q' (1), 'q2' (1)" in lines


def test_tags_that_only_validation_has_are_named_and_counted(read):
    train, valid = [{"text": "a b", "t": ["O", "B-x"]}], [{"text": "a b c", "t": ["B-y", "I-y", "I-y"]}]
    lines = seen(read(task("tagging"), train, valid))
    assert "validation: labels of t that training lacks, each one counts as missed: 'I-y' (2), 'B-y' (1)" in lines


def test_nothing_is_said_of_labels_that_training_has(read):
    lines = seen(read(task("classification"), [{"text": "a", "t": "x"}, {"text": "a", "t": "y"}]))
    assert not any("lacks" in line for line in lines)
    assert not any("tell apart" in line for line in lines)


def test_classes_are_counted_the_most_frequent_first(read):
    values = ["x"] * 3 + ["y"] * 5 + ["z"] + [None] * 2
    lines = seen(
        read({**task("classification"), **KEEP}, [{"text": "a", "t": v, "other": i} for i, v in enumerate(values)])
    )
    assert "t: 3 labels: y (5), x (3), z (1)" in lines


def test_of_many_classes_the_most_frequent_and_the_rarest_are_named(read):
    values = [f"c{i}" for i in range(10) for _ in range(20 - i)]
    lines = seen(read(task("classification"), [{"text": "a", "t": value} for value in values]))
    assert "t: 10 labels: c0 (20), c1 (19), c2 (18), c3 (17), c4 (16), c5 (15), c6 (14), c7 (13), …, c9 (11)" in lines


@pytest.mark.parametrize(("kind", "value", "name"), [("classification", "x", "x"), ("tagging", ["O"], "O")])
def test_a_task_of_a_single_class_is_named(read, kind, value, name):
    lines = seen(read(task(kind), [{"text": "a", "t": value}] * 3))
    assert f"t: every training record with a label has {name!r}: there is nothing to tell apart" in lines


def test_a_single_label_that_only_some_have_is_something_to_tell_apart(read):
    lines = seen(read(task("multilabel"), [{"text": "a", "t": ["x"]}, {"text": "b", "t": []}]))
    assert not any("nothing to tell apart" in line for line in lines)


def test_the_tokenizer_and_the_notes_are_named(read):
    lines = seen(read(task("tagging"), [{"text": "a b", "t": ["O", "B-x"]}]))
    assert lines[0] == "t: tags of spans, scheme bio"
    assert "texts are split by the tokenizer 'whitespace'; lists of tokens are taken as they are" in lines


def test_numbers_have_no_labels_to_count(read):
    lines = seen(read(task("regression"), [{"text": "a", "t": 1}, {"text": "b", "t": 2}]))
    assert not any(line.startswith("t:") for line in lines)


# What a missing label means, numbers of very different sizes, other schemes


def test_a_missing_label_may_mean_that_there_is_none(tmp_path):
    rows = [
        {"text": "a tea", "topics": ["x"], "names": [[2, 5, "drink"]]},
        {"text": "a cup", "topics": None},
        {"text": "hot tea", "topics": ["y"], "names": [[4, 7, "drink"]]},
    ]
    write(tmp_path / "a.jsonl", rows)
    tasks = {"topics": {"kind": "multilabel"}, "names": {"kind": "tagging"}}
    raw = {"data": {"train": "a.jsonl", "valid": "a.jsonl"}, "tasks": tasks, "folder": str(tmp_path)}
    sets = read_all(configuration.parse(raw, "test"))
    assert [record.labels["topics"] for record in sets.train[""]] == [["x"], ["y"]]
    assert "a.jsonl: 1 records have no label of any task and were left out" in sets.notes
    raw["tasks"] = {name: {**task, "missing": "none"} for name, task in tasks.items()}
    sets = read_all(configuration.parse(raw, "test"))
    assert [record.labels["topics"] for record in sets.train[""]] == [["x"], [], ["y"]]
    assert [record.labels["names"] for record in sets.train[""]] == [["O", "B-drink"], ["O", "O"], ["O", "B-drink"]]


def test_logarithms_of_numbers_are_standardised_where_they_are_asked_for():
    head = RegressionHead(mean=[math.log(100.0)], std=[2.0], log=True)
    targets = torch.tensor([100.0, 100.0 * math.e**2, 250_000.0, math.nan], dtype=torch.float64)
    standardised = head.standardized(targets)
    torch.testing.assert_close(standardised[:2], torch.tensor([0.0, 1.0]))
    assert standardised[3].isnan()
    torch.testing.assert_close(head.values(standardised)[:3], targets[:3], rtol=1e-6, atol=0)
    assert head.values(torch.tensor([-50.0])) > 0


def test_a_number_that_has_no_logarithm_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a", "n": 1}, {"text": "b", "n": 0}])
    tasks = {"n": {"kind": "regression", "scale": "log"}}
    raw = {"data": {"train": "a.jsonl", "valid": "a.jsonl"}, "tasks": tasks, "folder": str(tmp_path)}
    config = configuration.parse(raw, "test")
    with pytest.raises(DataError, match="task 'n': expected values above 0 with scale = 'log', got 0"):
        Vocabulary.of(read_all(config).train[""], config)


def test_tags_in_another_scheme_are_right_if_they_mean_the_same_spans():
    task = configuration.TaskConfig("tagging", scheme="bio")
    rules = task.rules
    assert rules.is_right(["B-x", "E-x", "S-y"], ["B-x", "I-x", "B-y"], task)
    assert not rules.is_right(["B-x", "I-x"], ["I-x", "I-x"], task)  # in one scheme tag by tag
    assert not rules.is_right(["B-x", "E-x", "S-y"], ["B-x", "B-x", "B-y"], task)
    assert rules.is_right([None, "S-y"], ["B-x", "B-y"], task)
    assert not rules.is_right(["I", "S"], ["E", "S"], configuration.TaskConfig("tagging", scheme="none"))
    encoding = rules.encoding(["B-x", "I-x", "O"])
    assert rules.unknown(["S-x", "E-x", "B-z", "O"], encoding) == ["B-z"]


def test_of_epochs_with_one_selection_score_the_best_mean_is_kept():
    epochs = [
        {"epoch": 1, "selection": 1.0, "valid": {"a/accuracy": 1.0, "b/accuracy": 0.3}},
        {"epoch": 2, "selection": 1.0, "valid": {"a/accuracy": 1.0, "b/accuracy": 0.9}},
        {"epoch": 3, "selection": 0.9, "valid": {"a/accuracy": 0.9, "b/accuracy": 1.0}},
        {"epoch": 4, "selection": 1.0, "valid": {"a/accuracy": 1.0, "b/accuracy": 0.9}},
    ]
    assert best_epoch(epochs)["epoch"] == 2


@pytest.mark.parametrize(
    ("tokens", "tokenizer"),
    [
        (["U.N.", "said", ",", "it", "met", "."], "words"),
        (["Hello,", "my", "printer", "is", "gone."], "whitespace"),
        (["play", "some", "jazz"], "words"),
    ],
)
def test_lists_of_tokens_say_how_later_texts_are_split(tmp_path, tokens, tokenizer):
    write(tmp_path / "a.jsonl", [{"tokens": tokens, "t": ["O"] * len(tokens)}])
    tasks = {"t": {"kind": "tagging"}}
    raw = {"data": {"train": "a.jsonl", "valid": "a.jsonl"}, "tasks": tasks, "folder": str(tmp_path)}
    assert read_all(configuration.parse(raw, "test")).config.data.tokenizer == tokenizer


def test_tags_that_are_not_of_spans_are_shown_as_tags():
    task = configuration.TaskConfig("tagging", scheme="none")
    assert task.rules.describe(["E", "S"], {}, ["di", "casa"], task) == "di/E casa/S"


def test_partly_known_tags_have_a_path_through_a_constrained_model(tmp_path):
    tags = [["null", "I-y", "O"], ["O", "B-x", "O"]]
    rows = [{"tokens": ["a", "b", "c"], "t": [None if tag == "null" else tag for tag in row]} for row in tags]
    write(tmp_path / "a.jsonl", rows)
    tasks = {"t": {"kind": "tagging", "decoder": "crf", "constrained": True}}
    sets = read_all(parsed(tasks, tmp_path))
    vocabulary = Vocabulary.of(sets.train[""], sets.config)
    assert vocabulary.labels["t"] == ["B-x", "B-y", "I-y", "O"]
    loss = ModelWithLoss("pymtl", sets.config, vocabulary).loss(
        Batcher(vocabulary, sets.config).batch(sets.train[""], [0, 1])
    )
    assert math.isfinite(loss.total)


def test_numbers_with_a_decimal_comma_are_read_and_classes_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text;size;price;two\na;1,5;1.234;1,5 2,5\nb;2,5;1.234,5;3 4,5\n")
    tasks = {
        "size": {"kind": "classification"},
        "price": {"kind": "regression"},
        "two": {"kind": "regression", "num_targets": 2},
    }
    records = read_all(parsed(tasks, tmp_path, {"train": "a.csv", "valid": "a.csv"})).train[""]
    assert [record.labels for record in records] == [
        {"size": "1,5", "price": 1234.0, "two": [1.5, 2.5]},
        {"size": "2,5", "price": 1234.5, "two": [3.0, 4.5]},
    ]


def test_probabilities_of_ordered_classes_are_shares_even_where_thresholds_cross():
    task = configuration.TaskConfig("ordinal")
    given = Decoding(task, [1.0, 2.0, 3.0])
    (found,) = task.rules.distributions(np.array([[-1.0, 1.0]]), given)["probabilities"]
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0


def test_records_are_held_out_by_a_number_too(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a", "t": "x", "year": year} for year in (2019, 2020, "2020", 2021)])
    data = {"train": "a.jsonl", "holdout_field": "year", "holdout_values": ["2020"]}
    raw = {"data": data, "tasks": {"t": {"kind": "classification"}}, "folder": str(tmp_path)}
    sets = read_all(configuration.parse(raw, "c.toml"))
    assert (len(sets.train[""]), len(sets.valid[""])) == (2, 2)
