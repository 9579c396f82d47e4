"""What ``pymtl.load`` gives: answers to texts, lists of tokens and records."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy

import pymtl
from pymtl.__main__ import main
from pymtl.serving.tokenizing import tokens_of
from pymtl.training.errors import ConfigError, DataError, RunError

VERBS = ("music", "table", "film")
CODES = {"music": 10, "table": 20, "film": 30}
TASKS = """
[tasks.code]
kind = "classification"

[tasks.stars]
kind = "ordinal"
pooling = "mean"

[tasks.size]
kind = "ordinal"
order = ["small", "large"]

[tasks.score]
kind = "regression"
pooling = "mean"

[tasks.topics]
kind = "multilabel"
pooling = "max"
"""
TEXTS = [
    "please book hot dogs",
    "play jazz",
    "watch hard rock, sushi",
    "  play   hard rock!  ",
    "Book a TABLE for two...",
    "watch",
    "please please play hot dogs jazz",
    "caf\u00e9 \U0001f600 sushi",
]


def text_record(record):
    """A record whose text is a string, and whose spans have their places in it."""
    spans, place = [], 0
    for token, tag in zip(record["tokens"], record["slots"]):
        if tag.startswith("B-"):
            spans.append({"start": place, "end": place + len(token), "label": tag[2:]})
        elif tag.startswith("I-"):
            spans[-1]["end"] = place + len(token)
        place += len(token) + 1
    return {
        "text": " ".join(record["tokens"]),
        "intent": record["intent"],
        "code": CODES[record["intent"]],
        "stars": record["score"] + 1,
        "size": "large" if len(record["tokens"]) > 4 else "small",
        "score": 100 + 10.0 * record["score"],
        "topics": record["topics"],
        "slots": spans,
    }


def make(folder, toml, *settings):
    """A run of a configuration in ``folder``, and its export."""
    path = toy.write_files(folder / "data", toml)
    for name, count, seed in (("train", 60, 0), ("valid", 20, 1), ("test", 20, 2)):
        toy.write_lines(path.parent / f"{name}.jsonl", map(text_record, toy.requests(count, seed)))
    more = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", str(path), "--run", str(folder / "run"), *more]) == 0
    assert main(["export", str(folder / "run"), str(folder / "exported")]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of every kind of label, and its export."""
    return make(tmp_path_factory.mktemp("trained"), toy.TOML + TASKS)


@pytest.fixture(scope="module", params=["run", "exported"])
def model(trained, request):
    return pymtl.load(trained / request.param)


@pytest.fixture(scope="module")
def answers(model):
    return model.predict(TEXTS)


def same(answers, others, within=1e-6):
    """Asserts that answers are equal, numbers within a little."""
    if isinstance(answers, float):
        assert answers == pytest.approx(others, abs=within, rel=within)
    elif isinstance(answers, dict):
        assert list(answers) == list(others)
        for key in answers:
            same(answers[key], others[key], within)
    elif isinstance(answers, list):
        assert len(answers) == len(others)
        for one, other in zip(answers, others):
            same(one, other, within)
    else:
        assert (type(answers), answers) == (type(others), others)


def test_a_run_and_its_export_give_the_same_answers(trained):
    run, exported = (pymtl.load(trained / name).predict(TEXTS) for name in ("run", "exported"))
    same(run, exported)


@pytest.mark.parametrize(
    ("settings", "device"), [((), "cpu"), ((), torch.device("cpu"))], ids=["a name", "a device of torch"]
)
def test_a_model_is_loaded_from_a_path_or_a_name(trained, settings, device, answers):
    same(pymtl.load(str(trained / "run"), device).predict(TEXTS), answers)


@pytest.mark.parametrize("constrained", ["false", "true"])
def test_a_crf_answers_with_the_probability_of_each_tag(tmp_path, constrained):
    folder = make(
        tmp_path, toy.TOML, "training.epochs=2", 'tasks.slots.decoder="crf"', f"tasks.slots.constrained={constrained}"
    )
    models = [pymtl.load(folder / name) for name in ("run", "exported")]
    run, exported = ([m.predict(TEXTS, distributions=d) for d in (False, True)] for m in models)
    same(run, exported, 1e-5)
    assert [a["slots"] for a in run[0]] == [a["slots"] for a in run[1]]
    for answer in run[1]:
        assert len(answer["slots/probabilities"]) == len(answer["tokens"])
        assert all(0 < p <= 1 + 1e-6 for p in answer["slots/probabilities"])


# What may be asked


def test_one_text_gives_what_a_list_of_it_gives(model, answers):
    same(model.predict(TEXTS[0]), answers[0])
    same(model.predict([TEXTS[0]]), [answers[0]])
    assert model.predict([]) == []


def test_texts_tokens_and_records_are_the_same_question(model, answers):
    tokens = [tokens_of(text, "words") for text in TEXTS]
    assert [answer["tokens"] for answer in answers] == tokens
    of_records = model.predict([{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    same(of_records, answers)
    same(model.predict({"text": TEXTS[1]}), answers[1])
    of_lists = model.predict(tokens)
    of_tuples = model.predict([tuple(each) for each in tokens])
    of_token_records = model.predict([{"tokens": each} for each in tokens])
    same(of_tuples, of_lists)
    same(of_token_records, of_lists)
    same(*([{k: v for k, v in each.items() if k != "slots/spans"} for each in some] for some in (of_lists, answers)))


def test_different_forms_may_stand_in_one_list(model, answers):
    mixed = model.predict([TEXTS[0], {"text": TEXTS[1]}, ["watch"], ""])
    same(mixed[:2], answers[:2])
    assert mixed[2]["tokens"] == ["watch"]
    assert mixed[3] == {"tokens": []}


def test_answers_come_in_the_order_of_the_texts_whatever_the_batch_size(model):
    texts = [" ".join(record["tokens"]) for record in toy.requests(40, 5)] + TEXTS
    whole = model.predict(texts, batch_size=len(texts))
    assert [answer["tokens"] for answer in whole] == [tokens_of(text, "words") for text in texts]
    for size in (1, 7, 64):
        same(model.predict(texts, batch_size=size), whole)
    backwards = model.predict(texts[::-1], batch_size=5)
    same(backwards[::-1], whole)


def test_classes_and_tags_do_not_depend_on_the_batch_size_at_all(model):
    texts = [" ".join(record["tokens"]) for record in toy.requests(40, 6)]
    names = ("intent", "code", "stars", "size", "topics", "slots")
    found = [[[a[n] for n in names] for a in model.predict(texts, batch_size=size)] for size in (1, 3, 40)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("empty", ["", "   ", "\n\t", [], {"text": ""}, {"text": None}, {"tokens": []}])
def test_an_input_without_a_token_gives_no_answer(model, empty):
    assert model.predict([empty, "play jazz"])[0] == {"tokens": []}
    assert model.predict(["play jazz", empty])[1] == {"tokens": []}


def test_unknown_tokens_are_those_that_training_has_not_seen(model):
    found = model.predict(["play zzz jazz zzz", "play jazz", ["play", "jazz rock"]])
    assert [answer["unknown_tokens"] for answer in found] == [["zzz", "zzz"], [], ["jazz rock"]]


# What is answered


def test_whole_numbers_stay_whole_numbers(answers):
    for answer in answers:
        assert type(answer["code"]) is int
        assert answer["code"] in CODES.values()
        assert type(answer["stars"]) is int
        assert answer["stars"] in (1, 2, 3)
        assert answer["size"] in ("small", "large")
        assert type(answer["score"]) is float


def test_an_answer_is_json(answers):
    same(json.loads(json.dumps(answers, allow_nan=False)), answers)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("intent", ["film", "music", "table"]),
        ("code", ["10", "20", "30"]),
        ("stars", ["1", "2", "3"]),
        ("size", ["small", "large"]),
    ],
)
def test_a_distribution_names_every_label_and_sums_to_one(answers, task, labels):
    for answer in answers:
        found = answer[f"{task}/probabilities"]
        assert list(found) == labels
        assert all(0 <= p <= 1 for p in found.values())
        assert math.fsum(found.values()) == pytest.approx(1, abs=1e-5)
        assert answer[f"{task}/probability"] == pytest.approx(found[str(answer[task])], abs=1e-6)


def test_a_class_is_the_likeliest(answers):
    for answer in answers:
        for task in ("intent", "code"):
            found = answer[f"{task}/probabilities"]
            assert str(answer[task]) == max(found, key=found.get)


def test_labels_are_chosen_where_they_are_likelier_than_not(answers):
    for answer in answers:
        found = answer["topics/probabilities"]
        assert list(found) == ["food", "genre"]
        assert answer["topics"] == [label for label, p in found.items() if p > 0.5]
        chance = math.prod(p if label in answer["topics"] else 1 - p for label, p in found.items())
        assert answer["topics/probability"] == pytest.approx(chance, abs=1e-5)


def test_spans_say_where_they_stand_in_the_text(model, answers):
    assert any(answer["slots/spans"] for answer in answers)
    for text, answer in zip(TEXTS, answers):
        count = sum(tag.startswith("B-") for tag in answer["slots"])
        assert len(answer["slots/spans"]) >= count
        before = 0
        for span in answer["slots/spans"]:
            assert set(span) == {"start", "end", "label", "text", "probability"}
            assert span["text"] == text[span["start"] : span["end"]] != ""
            assert span["text"] == span["text"].strip()
            assert before <= span["start"] < span["end"] <= len(text)
            assert span["label"] in ("food", "genre")
            assert 0 < span["probability"] <= 1
            before = span["end"]


def test_spans_of_a_list_of_tokens_stand_in_the_tokens_with_spaces_between_them(model):
    tokens = ["book", "hot", "dogs", "jazz"]
    for span in model.predict([tokens])[0]["slots/spans"]:
        assert " ".join(tokens)[span["start"] : span["end"]] == span["text"]


def test_distributions_may_be_left_out(model, answers):
    short = model.predict(TEXTS, distributions=False)
    for few, many in zip(short, answers):
        assert not [key for key in few if key.endswith("/probabilities")]
        kept = {key: many[key] for key in few if key != "slots/spans"}
        same({key: value for key, value in few.items() if key != "slots/spans"}, kept)
        spans = [{k: v for k, v in span.items() if k != "probability"} for span in many["slots/spans"]]
        assert few["slots/spans"] == spans


# What else there is


def test_tasks_labels_and_vocabulary_are_there(model):
    assert {name: task.kind for name, task in model.tasks.items()} == {
        "intent": "classification",
        "slots": "tagging",
        "code": "classification",
        "stars": "ordinal",
        "size": "ordinal",
        "score": "regression",
        "topics": "multilabel",
    }
    assert model.labels["intent"] == ["film", "music", "table"]
    assert model.labels["code"] == [10, 20, 30]
    assert model.labels["stars"] == [1, 2, 3]
    assert model.labels["size"] == ["small", "large"]
    assert model.labels["topics"] == ["food", "genre"]
    scores = [text_record(record)["score"] for record in toy.requests(60, 0)]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    assert model.labels["score"] == [{"mean": pytest.approx(mean), "std": pytest.approx(deviation)}]
    seen = {token for record in toy.requests(60, 0) for token in record["tokens"]}
    assert set(model.vocabulary.tokens) == seen | {"<pad>", "<unk>"}


def test_logits_are_of_all_texts_in_one_batch(model, answers):
    logits = model.logits(TEXTS)
    longest = max(len(answer["tokens"]) for answer in answers)
    shapes = {name: tuple(z.shape) for name, z in logits.items()}
    count = len(TEXTS)
    assert shapes == {
        "intent": (count, 3),
        "slots": (count, longest, 5),
        "code": (count, 3),
        "stars": (count, 2),
        "size": (count, 1),
        "score": (count, 1),
        "topics": (count, 2),
    }
    for i, answer in enumerate(answers):
        chances = dict(zip(model.labels["intent"], logits["intent"][i].softmax(-1).tolist()))
        assert chances == pytest.approx(answer["intent/probabilities"], abs=1e-6)


@pytest.mark.parametrize("empty", [[""], ["play jazz", ""], [[]], []])
def test_logits_of_an_input_without_a_token_are_refused_with_its_number(model, empty):
    with pytest.raises((DataError, ValueError), match=r"input \d|at least one"):
        model.logits(empty)


def test_logits_of_a_single_text_are_not_those_of_its_letters(model):
    try:
        found = model.logits("play jazz")
    except TypeError:
        return
    assert found["intent"].shape == (1, 3)


def test_several_threads_get_the_answers_of_one(model):
    texts = [" ".join(record["tokens"]) for record in toy.requests(30, 7)]
    expected = model.predict(texts)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: model.predict(texts[i % 5 :], batch_size=1 + i % 7), range(24)))
    for i, each in enumerate(found):
        same(each, expected[i % 5 :])


# Several data sets


TWO_SETS = """
[datasets.{}]
train = "{}.jsonl"

[datasets.{}]
train = "{}.jsonl"

[tasks.intent]
kind = "classification"
dataset = "whole"

[tasks.slots]
kind = "tagging"
dataset = "whole"

[tasks.words]
kind = "tagging"
dataset = "parts"

[model]
embedding_dim = 8
hidden_size = 8

[training]
epochs = 2
"""


@pytest.fixture(scope="module", params=["whole first", "parts first"])
def two_sets(request, tmp_path_factory):
    """A folder with the run of a model of two data sets, texts of "parts" split at spaces alone, and its export."""
    folder = tmp_path_factory.mktemp("two")
    names = ["whole", "whole", "parts", "parts"]
    names = names if request.param == "whole first" else names[::-1]
    (folder / "toy.toml").write_text(TWO_SETS.format(*names), encoding="utf-8")
    toy.write_lines(folder / "whole.jsonl", map(text_record, toy.requests(60, 0)))
    kinds = [{**r, "words": ["V" if t in toy.VERBS else "N" for t in r["tokens"]]} for r in toy.requests(60, 0)]
    toy.write_lines(folder / "parts.jsonl", [{"text": " ".join(r["tokens"]), "words": r["words"]} for r in kinds])
    assert main(["train", str(folder / "toy.toml"), "--run", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "exported")]) == 0
    return folder


def test_a_model_of_two_data_sets_answers_all_tasks_run_and_export_alike(two_sets):
    texts = ["play jazz", "please book hot dogs"]
    (run, exported) = (pymtl.load(two_sets / name).predict(texts) for name in ("run", "exported"))
    same(run, exported)
    for text, answer in zip(texts, run):
        assert answer["tokens"] == text.split()
        assert len(answer["slots"]) == len(answer["words"]) == len(answer["tokens"])
        assert answer["intent"] in VERBS


@pytest.mark.parametrize("text", ["please,,, play (hard rock), jazz!!!", "hot-dogs, sushi, jazz: book..."])
def test_spans_stand_where_their_own_data_set_splits_the_text(two_sets, text):
    model = pymtl.load(two_sets / "run")
    answer = model.predict(text)
    assert len(answer["slots"]) == len(tokens_of(text, "words"))
    assert len(answer["words"]) == len(text.split())
    inside = [token for token, tag in zip(tokens_of(text, "words"), answer["slots"]) if tag != "O"]
    assert tokens_of(" ".join(span["text"] for span in answer["slots/spans"]), "words") == inside
    for span in answer["slots/spans"]:
        assert span["text"] == text[span["start"] : span["end"]]


# What may not be asked


@pytest.mark.parametrize("wrong", [3, 3.5, None, True, b"play jazz", object()])
def test_an_input_of_another_type_is_named(model, wrong):
    with pytest.raises((TypeError, DataError), match=r"input 2: .*expected a text"):
        model.predict(["play jazz", wrong, "book sushi"])


@pytest.mark.parametrize("wrong", [3, None, 2.5, object()])
def test_what_is_no_list_of_inputs_is_said_to_be_none(model, wrong):
    with pytest.raises((TypeError, DataError), match="expected"):
        model.predict(wrong)


@pytest.mark.parametrize(
    "make", [lambda texts: (text for text in texts), iter, set], ids=["a generator", "an iterator", "a set"]
)
def test_any_other_collection_of_texts_is_taken_or_refused(model, make):
    texts = ["play jazz"]
    try:
        found = model.predict(make(texts))
    except TypeError:
        return
    same(found, model.predict(texts))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"id": 3}, "expected a field 'tokens' or 'text'"),
        ({}, "expected a field 'tokens' or 'text'"),
        ({"text": 3}, "expected a text or a list of strings, got 3"),
        (["play", 3], "expected a text or a list of strings"),
        (["play", None], "expected a text or a list of strings"),
        ([["play"]], "expected a text or a list of strings"),
        ({"text": "play \ud800"}, "surrogates not allowed"),
    ],
)
def test_a_record_that_does_not_fit_is_named(model, wrong, reason):
    with pytest.raises((TypeError, DataError)) as error:
        model.predict(["play jazz", wrong], first=10)
    assert str(error.value).startswith("input 11: ")
    assert reason in str(error.value)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(model, size):
    with pytest.raises(ValueError, match=f"batch_size: expected a number above 0, got {size}"):
        model.predict(["play jazz"], batch_size=size)


def test_a_beam_below_one_is_refused(model):
    with pytest.raises(ValueError, match="beam_size: expected a whole number above 0, got 0"):
        model.predict(["play jazz"], beam_size=0)


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=f"is {tmp_path} a run"):
        pymtl.load(tmp_path)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_device_that_is_not_there_is_named(trained, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ConfigError, ValueError, RuntimeError), match=r"device|GPU"):
        pymtl.load(trained / kind, "cuda")
