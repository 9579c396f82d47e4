"""Scores of predictions, and logits decoded into them."""

import math

import pytest
import torch

from pymtl.serving.generation import Search
from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.batches import Batcher
from pymtl.training.errors import DataError
from pymtl.training.metrics import check_scorable, decode, delta, score, selection_score
from pymtl.training.vocabulary import Vocabulary


def config_of(**kinds):
    raw = {"data": {"train": "a", "valid": "b"}, "tasks": {name: {"kind": kind} for name, kind in kinds.items()}}
    return configuration.parse(raw, "test")


def scores(kind, truth, guess):
    """Of one task, t."""
    records = [Record(["w"] * (len(label) if kind == "tagging" and label else 1), {"t": label}) for label in truth]
    tags = {tag for tags in truth for tag in tags or () if tag is not None} if kind == "tagging" else ()
    return score(records, [{"t": label} for label in guess], config_of(t=kind), {"t": tags})


def test_accuracy_of_classes_leaves_out_records_without_a_label():
    result = scores("classification", ["x", "y", None, "x", "x"], ["x", "x", "y", "x", "y"])
    assert result["t/accuracy"] == 2 / 4


@pytest.mark.parametrize(
    ("truth", "guess", "f1"),
    [
        ([["B-a", "I-a", "O"]], [["B-a", "I-a", "O"]], 1.0),
        ([["B-a", "I-a", "O"]], [["B-a", "O", "O"]], 0.0),  # the span's end is wrong
        ([["B-a", "I-a", "O"]], [["B-b", "I-b", "O"]], 0.0),  # its type is wrong
        ([["B-a", "O", "B-b"]], [["B-a", "O", "O"]], 2 / 3),  # precision 1, recall 1/2
        ([["B-a", "O", "O"]], [["B-a", "O", "B-b"]], 2 / 3),
        ([["B-a", "I-a", "O", "B-b"], ["B-a", "O"]], [["B-a", "I-a", "B-b", "O"], ["B-a", "B-b"]], 4 / 7),
        ([["B-a", "O"], None], [["B-a", "O"], ["B-b"]], 1.0),
        ([["B-a", None, "B-b"]], [["B-a", "B-a", "O"]], 2 / 3),  # a token without a label does not count
        ([["B", "I", "O", "B"]], [["B", "I", "O", "O"]], 2 / 3),  # spans of one kind
    ],
)
def test_span_f1_counts_whole_spans(truth, guess, f1):
    assert scores("tagging", truth, guess)["t/f1"] == pytest.approx(f1)


@pytest.mark.filterwarnings("error")
def test_span_f1_without_any_predicted_span_is_zero_and_quiet():
    assert scores("tagging", [["B-a", "O"]], [["O", "O"]])["t/f1"] == 0.0


@pytest.mark.parametrize("other", ["NOUN", "O"])
def test_tags_that_are_no_spans_are_scored_by_token(other):
    truth, guess = [["O", other, "O"], [other], None], [["O", "O", "O"], [other], ["O"]]
    assert scores("tagging", truth, guess)["t/accuracy"] == (3 / 4 if other == "NOUN" else 1.0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["B-a", "I-a", "O"], {"t/f1": 0.0}), (["O"], {"t/accuracy": 0.5}), (["B-a", "NOUN", "O"], {"t/accuracy": 0.5})],
)
def test_what_tags_are_scored_by_follows_from_training_not_from_the_tags_at_hand(labels, expected):
    records = [Record(["w", "w"], {"t": ["O", "O"]})]
    result = score(records, [{"t": ["O", "B-a"]}], config_of(t="tagging"), {"t": labels})
    assert {name: value for name, value in result.items() if name != "exact_match"} == expected


@pytest.mark.parametrize(
    ("truth", "guess", "f1"),
    [
        ([["p", "q"], ["p"], []], [["p"], ["p", "q"], []], 2 / 3),  # tp 2, fp 1, fn 1
        ([["p"], None, ["q"]], [["p"], ["q"], []], 2 / 3),
        ([["p"], ["p"], [], []], [["p"], [], [], []], 2 / 3),  # a single label
        ([[], []], [["p"], []], 0.0),
        ([["p"]], [[]], 0.0),
        ([["p"]], [["p"]], 1.0),
        ([["p", "q"]], [["p", "q"]], 1.0),
        ([["p", "q"]], [["q"]], 2 / 3),
    ],
)
def test_micro_f1_of_multiple_labels_counts_every_label(truth, guess, f1):
    assert scores("multilabel", truth, guess)["t/f1"] == pytest.approx(f1)


def test_micro_f1_where_neither_truth_nor_prediction_has_a_label_is_zero():
    assert scores("multilabel", [[], []], [[], []])["t/f1"] == 0.0


def test_r2_of_numbers():
    # Residuals 1, 0, 1 about truths of variance sum 8: 1 - 2/8.
    assert scores("regression", [1, 3, None, 5], [2.0, 3.0, 9.0, 4.0])["t/r2"] == pytest.approx(0.75)


def test_a_single_number_has_no_variance_to_explain_and_no_score():
    assert scores("regression", [1], [2.0]) == {}


def test_missing_ones_of_several_numbers_do_not_count():
    result = scores("regression", [[1, None], [3, 7], [5, None]], [[2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert result["t/r2"] == pytest.approx(0.75)  # of the first alone: the second has one number


def test_exact_match_wants_every_class_and_tag_right():
    config = config_of(i="classification", s="tagging", n="regression")
    truth = [("x", ["O"]), ("x", ["B-a"]), ("y", ["O"]), (None, ["B-a"])]
    guess = [("x", ["O"]), ("x", ["O"]), ("x", ["O"]), ("x", ["B-a"])]
    records = [Record(["w"], {"i": i, "s": s, "n": float(k)}) for k, (i, s) in enumerate(truth)]
    predictions = [{"i": i, "s": s, "n": 0.0} for i, s in guess]
    assert score(records, predictions, config, {"s": ["B-a", "O"]})["exact_match"] == 2 / 4


def test_exact_match_leaves_out_records_without_any_label():
    result = scores("classification", ["x", None, None, "y"], ["x", "x", "x", "x"])
    assert result["exact_match"] == 1 / 2


def test_the_selection_score_is_the_mean_of_the_tasks_own_scores():
    assert selection_score({"a/f1": 0.5, "b/accuracy": 1.0, "exact_match": 0.1}) == 0.75


def test_delta_is_the_mean_relative_change_and_no_number_beside_a_zero():
    baseline = {"a/f1": 0.5, "b/perplexity": 10.0}
    assert delta({"a/f1": 0.6, "b/perplexity": 12.0}, baseline) == pytest.approx(0.0)  # 20 % better, 20 % worse
    assert delta({"a/f1": 0.6}, baseline) == pytest.approx(0.2)  # b is not scored
    assert delta({"a/r2": 0.0}, {"a/r2": -0.5}) == pytest.approx(1.0)
    assert math.isnan(delta({"a/f1": 0.5, "b/f1": 0.5}, {"a/f1": 0.0, "b/f1": 0.25}))


SELECTIONS = {
    "t": {"select_by": "t"},
    "exact_match": {"select_by": "exact_match"},
    "delta": {"select_by": "delta", "baseline": {"t/accuracy": 0.5}},
}


@pytest.mark.parametrize("training", SELECTIONS.values(), ids=SELECTIONS)
def test_validation_has_to_have_labels_of_what_the_best_epoch_is_chosen_by(training):
    tasks = {"t": {"kind": "classification"}, "n": {"kind": "regression"}}
    raw = {"data": {"train": "a", "valid": "b"}, "tasks": tasks}
    numbers = [Record(["w"], {"t": None, "n": n}) for n in (1.0, 2.0)]
    check_scorable(numbers, configuration.parse(raw, "test"), "v.jsonl")
    config = configuration.parse({**raw, "training": training}, "test")
    check_scorable([*numbers, Record(["w"], {"t": "x", "n": None})], config, "v.jsonl")
    with pytest.raises(DataError, match=r"v\.jsonl: expected a label of t to score"):
        check_scorable(numbers, config, "v.jsonl")


def test_logits_are_decoded_into_the_form_of_the_records():
    config = config_of(i="classification", s="tagging", m="multilabel", n="regression")
    vocabulary = Vocabulary(["<pad>", "<unk>"], {"i": ["x", "y"], "s": ["B-a", "O"], "m": ["p", "q"]})
    logits = {
        "i": torch.tensor([[0.0, math.log(3.0)], [5.0, -5.0]]),
        "s": torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]),
        "m": torch.tensor([[1.0, -1.0], [0.5, 0.5]]),
        "n": torch.tensor([[0.25], [-2.0]]),
    }
    batch = Batcher(vocabulary, config).batch([Record(["w", "w"], {}), Record(["w"], {})], [0, 1])
    first, second = decode(logits, batch, config, vocabulary)
    assert first.pop("i/probability") == pytest.approx(0.75)
    assert first.pop("m/probability") == pytest.approx(torch.tensor([1.0, 1.0]).sigmoid().prod().item())
    assert first == {"i": "y", "s": ["B-a", "O"], "m": ["p"], "n": 0.25}
    assert second.pop("i/probability") == pytest.approx(1.0, abs=1e-4)
    assert second.pop("m/probability") == pytest.approx(torch.tensor([0.5, 0.5]).sigmoid().prod().item())
    assert second == {"i": "x", "s": ["O"], "m": ["p", "q"], "n": -2.0}


def test_kappa_follows_the_order_of_the_labels():
    raw = {"kind": "ordinal", "order": ["low", "medium", "high"]}
    config = configuration.parse({"data": {"train": "a", "valid": "b"}, "tasks": {"t": raw}}, "test")
    truth, guess = ["low", "medium", "high", "low"], ["low", "high", "high", "medium"]
    records = [Record(["w"], {"t": label}) for label in truth]
    result = score(records, [{"t": label} for label in guess], config, {})
    # Quadratic weights: observed disagreement 1 + 1, expected sum of (i - j)^2 over the outer product of counts / 4.
    expected = sum((i - j) ** 2 * a * b / 4 for i, a in enumerate([2, 1, 1]) for j, b in enumerate([1, 1, 2]))
    assert result["t/kappa"] == pytest.approx(1 - 2 / expected)


def test_a_beam_finds_labels_whose_paths_together_are_likelier_than_the_likeliest_path():
    config = config_of(t="ctc")
    vocabulary = Vocabulary(["<pad>", "<unk>"], {"t": ["<blank>", "a"]})
    batch = Batcher(vocabulary, config).batch([Record(["w", "w"], {})], [0])
    logits = {"t": torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()}  # 0.36 of nothing, 0.64 of a
    assert decode(logits, batch, config, vocabulary) == [{"t": []}]
    assert decode(logits, batch, config, vocabulary, search=Search(beam_size=3)) == [{"t": ["a"]}]


def perplexities(factor):
    """What a language model of a text of three tokens and one of a single token says, and its scores."""
    raw = {"data": {"train": "a", "valid": "b"}, "tasks": {"t": {"kind": "language_model", "num_tokens": 4}}}
    config = configuration.parse(raw, "test")
    vocabulary = Vocabulary(["<pad>", "<unk>", "a", "b"], {})
    records = [Record(["a", "b", "a"], {"t": True}), Record(["b"], {"t": True})]
    batch = Batcher(vocabulary, config).batch(records, [0, 1])
    logits = {"t": factor * torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 3, 2, 4)}
    found = decode(logits, batch, config, vocabulary)
    return found, score(records, found, config, {}), score(records[1:], found[1:], config, {})


def test_a_text_without_a_word_to_predict_has_no_perplexity():
    (text, word), scores, nothing = perplexities(0.0)
    assert text == {"t": pytest.approx(4.0), "t/tokens": 4}
    assert word == {"t": None, "t/tokens": 0}
    assert scores == {"t/perplexity": pytest.approx(4.0)}
    assert nothing == {}


def test_the_perplexity_of_a_model_that_diverged_is_still_a_number():
    (text, _), scores, _ = perplexities(1e6)
    assert 1e300 < text["t"] < math.inf
    assert 1e300 < scores["t/perplexity"] < math.inf
