"""Tasks whose answer is a sequence, trained from a configuration and asked on the command line."""

import csv
import json
import math
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
import toy
from parity import assert_same_bits

import pymtl
from pymtl.__main__ import main
from pymtl.serving.answers import Decoding, Scored
from pymtl.serving.generation import Hypothesis, Search
from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.config import TaskConfig
from pymtl.training.data import read_all
from pymtl.training.errors import ConfigError, DataError
from pymtl.training.kinds import KINDS
from pymtl.training.kinds.sequences import RightAnswers, error_rate
from pymtl.training.plots import attention_plot
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary

REVERSED = """
[data]
train = "train.jsonl"
valid = "valid.jsonl"
test = "test.jsonl"

[tasks.turned]
kind = "generation"
decoder_size = 64
decoder_embedding_dim = 16
decoder_dropout = 0.1

[model]
embedding_dim = 16
hidden_size = 64
dropout = 0.1

[training]
epochs = 16
batch_size = 32
learning_rate = 0.01
schedule = "cosine"
ema_decay = 0.99
patience = 16
"""


def turned(count, seed):
    """Letters, and the same from the last to the first."""
    rng = random.Random(seed)
    for _ in range(count):
        letters = rng.sample("abcdefghij", rng.randint(1, 5))
        yield {"tokens": letters, "turned": letters[::-1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that turns sequences around."""
    folder = tmp_path_factory.mktemp("turned")
    # Of few texts to validate, an early epoch is as good as the last.
    for name, count, seed in (("train", 4000, 0), ("valid", 1000, 1), ("test", 300, 2)):
        toy.write_lines(folder / f"{name}.jsonl", list(turned(count, seed)))
    (folder / "turned.toml").write_text(REVERSED, encoding="utf-8")
    toy.quiet("train", folder / "turned.toml", "--run", folder / "run")
    return folder


def test_reversing_is_learnt_without_a_mistake(folder):
    assert Run(folder / "run").read_scores() == {"turned/token_error_rate": 0.0, "turned/exact_match": 1.0}


def test_answers_on_the_command_line(folder):
    run = folder / "run"
    text = toy.quiet("predict", run, "a b c d")
    assert text.startswith("turned: d c b a (")
    answer = json.loads(toy.quiet("predict", run, "a b c d", "--json", "--beam", 3, "--nbest", 3))
    assert answer["turned"] == ["d", "c", "b", "a"]
    assert [set(each) for each in answer["turned/nbest"]] == [{"answer", "probability", "score", "ended"}] * 3
    assert answer["turned/nbest"][0]["answer"] == answer["turned"]
    assert 0.5 < answer["turned/probability"] <= 1
    short = json.loads(toy.quiet("predict", run, "a b c d", "--json", "--max-length", 2))
    assert short["turned"] == ["d", "c"]
    assert (answer["turned/ended"], short["turned/ended"]) == (True, False)
    assert ", cut off)" in toy.quiet("predict", run, "a b c d", "--max-length", 2)
    lines = toy.quiet("predict", run, "a b", "c d", "--nbest", 2).split("\n\n")
    assert [len(each.strip().splitlines()) for each in lines] == [2, 2]


def test_samples_on_the_command_line_repeat_with_their_seed(folder):
    given = ["predict", folder / "run", "a b c d", "--json", "--sample", "--temperature", 20, "--nbest", 4]
    first, same, other = (toy.quiet(*given, "--seed", seed) for seed in (1, 1, 2))
    assert first == same != other
    assert len({tuple(each["answer"]) for each in json.loads(first)["turned/nbest"]}) == 4


def test_the_attention_of_long_texts_is_drawn_below_one_another():
    text, answer = [f"word{i}" for i in range(500)], [f"said{i}" for i in range(130)]
    title = "reply: " + " ".join(answer)
    figure = attention_plot(
        [(text, answer, [[0.002] * 500] * 131, title), (["a"], [], [[1.0]], "reply: $1 and $ (50 %)")]
    )
    assert max(figure.get_size_inches()) <= 36
    panel, short, _ = figure.axes
    assert [label.get_text() for label in panel.get_xticklabels()] == text[::11]
    assert [label.get_text() for label in panel.get_yticklabels()] == [*answer, "end"][::3]
    assert [label.get_text() for label in short.get_yticklabels()] == ["end"]
    title = panel.get_title()
    assert (title[:15], title[-2:], title.count("\n")) == ("reply: said0 sa", " …", 1)
    assert short.get_title() == r"reply: \$1 and \$ (50 %)"  # no formula


def test_attention_is_drawn_and_given(folder):
    toy.quiet("predict", folder / "run", "a b c", "d e", "--attention", folder / "read.png")
    assert (folder / "read.png").read_bytes().startswith(b"\x89PNG")
    answer = pymtl.load(folder / "run").predict("a b c d e")
    weights = answer["turned/attention"]
    assert [len(row) for row in weights] == [5] * 6  # each letter, and the end
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in weights)
    # What is written first is read where the text ends.
    assert max(range(5), key=weights[0].__getitem__) >= 3


def test_a_file_s_rows_get_their_answers(folder, tmp_path):
    (tmp_path / "in.csv").write_text("tokens,note\na b c,x\nd e,y\n", encoding="utf-8")
    toy.quiet("predict", folder / "run", "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv", "--beam", 2)
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted_turned"] for row in rows] == ["c b a", "e d"]
    assert [row["note"] for row in rows] == ["x", "y"]


def test_an_evaluation_takes_a_beam(folder):
    text = toy.quiet("evaluate", folder / "run", "--beam", 3, "--out", folder / "evaluation")
    assert "exact_match" in text
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["scores"]["turned/exact_match"] == 1.0
    assert (folder / "evaluation" / "errors.jsonl").read_text(encoding="utf-8") == ""


def test_an_exported_program_answers_the_same(folder, tmp_path):
    text = toy.quiet("export", folder / "run", tmp_path / "exported")
    assert "program.pt2" in text
    assert "steps.turned.pt2" in text
    run, exported = pymtl.load(folder / "run"), pymtl.load(tmp_path / "exported")
    texts = [" ".join(record["tokens"]) for record in turned(20, 3)]
    for search in (None, Search(beam_size=3, nbest=2, coverage_penalty=0.1), Search(sample=True, temperature=5.0)):
        for ours, theirs in zip(exported.predict(texts, search=search), run.predict(texts, search=search)):
            assert ours["turned"] == theirs["turned"]
            assert ours["turned/probability"] == pytest.approx(theirs["turned/probability"])
            for a, b in zip(ours["turned/attention"], theirs["turned/attention"], strict=True):
                assert a == pytest.approx(b, abs=1e-6)
    with pytest.raises(ConfigError, match="expected a run folder to go on with a text, got an exported program"):
        exported.go_on(["a"], 3)


def test_batches_do_not_change_answers(folder):
    model = pymtl.load(folder / "run")
    texts = [" ".join(record["tokens"]) for record in turned(20, 3)]
    for search in (Search(beam_size=3, nbest=2), Search(sample=True, temperature=5.0)):
        whole = model.predict(texts, search=search)
        assert model.predict(texts, batch_size=3, search=search) == whole
        assert [model.predict([text], first=i, search=search)[0] for i, text in enumerate(texts, 1)] == whole


WRONG = {
    "no generation": (
        ["--continue", "3"],
        "expected a run with one task of kind 'language_model' to go on with a text, got turned (gen",
    ),
    "samples": (["--top-k", "3"], "--top-k: expected --sample with it"),
    "more than the beam": (
        ["--beam", "2", "--nbest", "3"],
        "--nbest: expected at most --beam 2 without sampling, got 3",
    ),
    "beam of samples": (["--beam", "2", "--sample"], "--beam: expected none with sampling"),
    "temperature": (["--sample", "--temperature", "0"], "--temperature: expected a number above 0, got 0"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_options_that_do_not_fit(folder, capsys, options, message):
    capsys.readouterr()
    assert main(["predict", str(folder / "run"), "a b", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_beam_size_and_a_search_are_one_too_many(folder):
    with pytest.raises(ValueError, match="beam_size: expected none beside search, which has its own, got 2"):
        pymtl.load(folder / "run").predict("a b", beam_size=2, search=Search())


def test_every_option_of_a_search_reaches_it(folder, tmp_path, capsys):
    model, text = pymtl.load(folder / "run"), "a b a b"
    options = {
        ("--beam", 3, "--nbest", 2, "--length-penalty", 0): Search(3, 2, length_penalty=0.0),
        ("--beam", 3, "--nbest", 2, "--coverage-penalty", 0.5): Search(3, 2, coverage_penalty=0.5),
        ("--no-repeat", 1): Search(no_repeat_ngram=1),
        ("--max-length", 2): Search(max_length=2),
        ("--sample", "--temperature", 9, "--top-p", 0.9, "--seed", 4): Search(
            sample=True, temperature=9.0, top_p=0.9, seed=4
        ),
        ("--sample", "--temperature", 9, "--top-k", 2, "--nbest", 3): Search(
            sample=True, temperature=9.0, top_k=2, nbest=3
        ),
    }
    plain = model.predict([text], distributions=False)[0]
    for given, search in options.items():
        (line,) = toy.quiet("predict", folder / "run", text, "--json", *given).splitlines()
        expected = model.predict([text], search=search, distributions=False)[0]
        assert json.loads(line) == json.loads(json.dumps(expected))
        assert expected != plain
    assert model.predict(text, search=Search(max_length=2))["turned/ended"] is False
    scores = {}
    shutil.copytree(folder / "run", tmp_path / "run")
    for given, name, search in (((), "test", {}), (("--max-length", 2), "test-max-length-2", {"max-length": 2})):
        toy.quiet("evaluate", tmp_path / "run", *given, "--data", folder)
        found = json.loads((tmp_path / "run" / "evaluation" / name / "evaluation.json").read_text(encoding="utf-8"))
        assert found["search"] == search
        scores[given] = found["scores"]["turned/exact_match"]
    assert scores[()] == 1.0
    assert scores["--max-length", 2] < 0.5  # most are longer
    assert main(["evaluate", str(folder / "run"), "--length-penalty", "-1"]) == 1
    assert "--length-penalty: expected a number of at least 0, got -1" in capsys.readouterr().err


def test_every_option_of_a_decoder_reaches_it(tmp_path):
    toml = JOINT.replace("decoder_size = 12", "decoder_size = 24\ndecoder_layers = 2\ndecoder_dropout = 0.2")
    toml = toml.replace("label_smoothing = 0.1", 'label_smoothing = 0.1\ndecoder_cell = "gru"\ndecoder_tied = true')
    options = ["--set", "tasks.tags.attention=dot", "--set", "tasks.tags.attention_heads=3", "--set"]
    options += ["training.epochs=1", "--set", "model.hidden_size=12"]
    toy.quiet("train", toy.write_files(tmp_path, toml), "--run", tmp_path / "run", *options)
    head = Run(tmp_path / "run").load_model()[0].model.heads["tags"]
    assert (head.hidden_size, head.num_layers, head.embedding_dim, head.cell) == (24, 2, 6, "gru")
    assert (head.score, head.attention_heads, head.tied, head.dropout, head.copy) == ("dot", 3, True, 0.2, False)
    assert head.loss.label_smoothing == 0.1
    assert isinstance(pymtl.load(tmp_path / "run").predict("play jazz")["tags"], list)


# Labels.

TASK = """
[data]
train = "train.{form}"

[tasks.said]
kind = "generation"
{options}
"""


def labels(tmp_path, text, form="jsonl", **options):
    """The configuration as training settles it, and the labels."""
    (tmp_path / f"train.{form}").write_text(text, encoding="utf-8")
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    (tmp_path / "run.toml").write_text(TASK.format(form=form, options=lines), encoding="utf-8")
    sets = read_all(configuration.load(tmp_path / "run.toml"))
    return sets.config.tasks["said"], [r.labels["said"] for r in (*sets.train[""], *sets.valid[""])], sets


def lines(*said, **more):
    return "".join(json.dumps({"text": f"word {i}", "said": each, **more}) + "\n" for i, each in enumerate(said))


def test_lists_texts_and_characters(tmp_path):
    task, found, _ = labels(tmp_path, lines(["a", "b"], ["c"], []))
    assert task.units == "tokens"
    assert task.max_length == 4
    assert {label.tokens for label in found} == {("a", "b"), ("c",), ()}
    task, found, _ = labels(tmp_path, lines("a  b c", "d"))
    assert task.units == "words"
    assert {label.tokens for label in found} == {("a", "b", "c"), ("d",)}
    assert KINDS["generation"].in_form(("a", "b"), task) == "a b"
    task, found, _ = labels(tmp_path, lines("a b", "cd"), units="characters", max_length=3)
    assert task.max_length == 3
    assert {label.tokens for label in found} == {("a", " ", "b"), ("c", "d")}
    assert KINDS["generation"].in_form(("a", " ", "b"), task) == "a b"
    task, found, _ = labels(tmp_path, lines("a, b", "(c)  d <unk>"), units="pieces")
    assert {label.tokens for label in found} == {("a", "￭,", "b"), ("(￭", "c", "￭)", "d", "<￭", "unk", "￭>")}
    assert KINDS["generation"].in_form(("(￭", "c", "￭)", "d"), task) == "(c) d"
    task, found, _ = labels(tmp_path, "text,said\nx,a b\ny,c\n", "csv", units="tokens")
    assert {label.tokens for label in found} == {("a", "b"), ("c",)}
    assert KINDS["generation"].in_form(("a", "b"), task) == ["a", "b"]


def test_tokens_that_become_one_word_are_told_as_they_were_written():
    task = TaskConfig("generation", units="pieces")
    found = Hypothesis([2, 3], -1.0, -1.0, True, np.ones((3, 4)) / 4)
    given = Decoding(task, ["<end>", "<unk>", "Ann", "￭Lee"])
    assert KINDS["generation"].decode([[found]], given) == ["AnnLee"]
    said = KINDS["generation"].distributions([[found]], given)
    assert said["written"] == [["Ann", "￭Lee"]]
    assert len(said["attention"][0]) == 3


def test_several_right_answers(tmp_path):
    given = [
        {"text": "x", "said": ["a"], "all": [["a"], ["b", "c"], ["b", "c"]]},
        {"text": "y", "said": ["d"], "all": None},
    ]
    _, found, _ = labels(tmp_path, "".join(json.dumps(each) + "\n" for each in given), references="all")
    assert set(found) == {RightAnswers(("a",), (("b", "c"),)), RightAnswers(("d",))}
    _, found, _ = labels(tmp_path, "text,said,all\nx,a b,a b | c | |\ny,d,\nz,e,|\n", "csv", references="all")
    expected = {
        RightAnswers(("a", "b"), (("c",),), True),
        RightAnswers(("d",), (), True),
        RightAnswers(("e",), (), True),
    }
    assert set(found) == expected
    none = [{"text": "x", "said": ["a"], "all": []}, {"text": "y", "said": ["b", "c"]}]
    _, found, sets = labels(tmp_path, "".join(json.dumps(each) + "\n" for each in none), references="all")
    assert set(found) == {RightAnswers(("a",)), RightAnswers(("b", "c"))}
    assert "said: no record has another right answer in 'all'" in sets.notes
    message = r"csv:1: expected a column 'others' \(tasks.said.references names it\), got text, said"
    with pytest.raises(DataError, match=message):
        labels(tmp_path, "text,said\nx,a b\n", "csv", references="others")


def test_what_training_is_told_of_answers_that_cannot_be_learnt(tmp_path):
    dates = lines(*(f"2001-02-{day:02}" for day in range(1, 21)))
    _, _, sets = labels(tmp_path, dates)
    (note,) = (note for note in sets.notes if note.startswith("said: "))
    assert note.startswith("said: 20 of 20 answers hold a word that stands in no other answer")
    assert 'Then units = "characters"' in note
    for options in ({"units": "characters"}, {"copy": True}):
        assert not any("no other answer" in note for note in labels(tmp_path, dates, **options)[2].notes)
    _, _, sets = labels(tmp_path, lines(*["a b", "b a"] * 9, "c d"))
    assert not any("no other answer" in note for note in sets.notes)
    _, _, sets = labels(tmp_path, lines("a b c", "a", "b a"), max_length=1)
    said = "said: 2 of 3 answers are longer than max_length = 1 and can never be given: the longest has 3 words"
    assert said in sets.notes


COPIED = "of its answers' words stand in their texts and can be copied"
CAPITALS = (
    "differ in capitals, as {!r} from the text's {!r}: a copy looks as in the text, which lowercase = true makes small"
)
SIGNS = (
    "differ in signs, as {!r} from the text's {!r}: "
    'tokenizer = "words" splits them off in texts, units = "pieces" in answers'
)


@pytest.mark.parametrize(
    ("text", "answer", "units", "share", "more"),
    [
        ("I am Ann .", "hi Ann", "words", 50, ""),
        ("I am Ann .", "oh hi I'm (Ann!", "words", 0, "; 25 % " + SIGNS.format("(Ann!", "Ann")),
        ("i am ann . ", "Ann ! I", "words", 0, "; 100 % " + CAPITALS.format("Ann", "ann")),
        (
            "is Ann in?",
            "Is Ann! in",
            "words",
            0,
            "; 33 % " + CAPITALS.format("Is", "is") + "; 67 % " + SIGNS.format("Ann!", "Ann"),
        ),
        ("I a m A n n", "hi Ann !", "words", 0, ": are texts and answers split alike?"),
        ("I saw Ann 's cat", "Ann's cat ( 3 )", "pieces", 67, ""),
        ("我 叫 李 雷 。", "你好李雷!", "pieces", 50, ""),
    ],
    ids=["alike", "signs", "capitals", "both", "nothing", "a sign of letters", "ideographs"],
)
def test_what_training_is_told_of_what_can_be_copied(text, answer, units, share, more):
    rules, task = KINDS["generation"], TaskConfig("generation", copy=True, units=units)
    tokens = text.split()
    records = [Record(tokens, {"said": RightAnswers(rules.sequence_of(answer, task))}), Record(tokens, {"said": None})]
    assert rules.remarks("said", task, records) == [f"said: {share} % {COPIED}{more}"]
    assert rules.remarks("said", TaskConfig("generation"), records) == []
    assert rules.remarks("said", task, [records[1], Record(tokens, {"said": RightAnswers(())})]) == []


def test_the_vocabulary_begins_with_the_end(tmp_path):
    task, _, sets = labels(tmp_path, lines(*[["b", "a"], ["b", "c"], ["b", "a"]] * 4), label_min_count=4)
    records = [*sets.train[""], *sets.valid[""]]
    vocabulary = Vocabulary.of(records, sets.config)
    assert vocabulary.labels["said"] == ["<end>", "<unk>", "b", "a", "c"]
    rules = task.rules
    encoding = rules.encoding(vocabulary.labels["said"])
    target = rules.target(RightAnswers(("b", "z", "c")), encoding, None, task, None)
    assert target.tolist() == [2, 1, 4, 0]
    assert rules.unknown(RightAnswers(("b", "z")), encoding) == ["z"]
    answers, task = [RightAnswers(("a", "b")), RightAnswers(("b",))], TaskConfig("generation", label_min_count=3)
    with pytest.raises(
        DataError, match=r"tasks\.said\.label_min_count: expected 2 at most, how often the most frequent "
    ):
        rules.vocabulary("said", answers, task)
    assert rules.vocabulary("said", answers, replace(task, copy=True)) == ["<end>", "<unk>"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (lines(3), {}, "field 'said': expected a text or a list of strings, got 3"),
        (lines(["a", 3]), {}, "field 'said': expected a text or a list of strings, got a list of 2, in which 3"),
        (lines("a b"), {"units": "tokens"}, "field 'said': expected a list of strings, got 'a b'"),
        (lines(["a"]), {"units": "words"}, "field 'said': expected a text, got a list of 1"),
        (lines(["a", "<end>"]), {}, "expected answers without <end>"),
        (lines("a ￭ b"), {"units": "pieces"}, "expected answers without ￭, which has a meaning of its own with units"),
        (lines("a <unk>"), {}, "expected answers without <unk>"),
        (lines(None), {}, "train.jsonl: no record has a label of any task"),
        (lines("a", ["b"]), {}, "tasks.said: expected labels that are all texts or all lists of tokens, got both"),
        (lines("a", all=3), {"references": "all"}, "its references in 'all': expected a list of answers, got 3"),
        (lines("a", all="b"), {"references": "all"}, "its references in 'all': expected a list of answers, got 'b'"),
        (lines("a", all=[3]), {"references": "all"}, "in 'all': expected a text or a list of strings, got 3"),
        (
            lines("a", all=["b", ""]),
            {"references": "all"},
            "its references in 'all': expected answers, got an empty one",
        ),
        (lines("a", all=["\ud800"]), {"references": "all"}, "its references in 'all': field 'all': "),
    ],
)
def test_labels_that_do_not_fit(tmp_path, text, options, message):
    with pytest.raises(DataError) as error:
        labels(tmp_path, text * 2, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_size": 0}, "tasks.said.decoder_size: expected a number above 0, got 0"),
        ({"beam_size": 0}, "tasks.said.beam_size: expected a number above 0, got 0"),
        ({"decoder_dropout": 1.0}, "tasks.said.decoder_dropout: expected a number from 0 to below 1, got 1.0"),
        ({"max_length": -1}, "tasks.said.max_length: expected a number of at least 0, got -1"),
        ({"attention_heads": 3}, "tasks.said.attention_heads: expected a divisor of decoder_size, got 3"),
        ({"attention": "none"}, "tasks.said.attention: expected"),
        (
            {"pooling": "max"},
            "tasks.said.pooling: expected none with kind = 'generation' (an option of classification and",
        ),
        ({"copy": "yes"}, "tasks.said.copy: expected true or false, got 'yes'"),
        ({"copy": True, "label_smoothing": 0.1}, "tasks.said.label_smoothing: expected 0 with copy, got 0.1"),
        ({"copy": True, "units": "characters"}, "tasks.said.units: expected tokens, words or pieces with copy"),
        ({"label_smoothing": 2.0}, "tasks.said.label_smoothing: expected a number from 0 to 1, got 2.0"),
    ],
)
def test_options_of_the_task_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        labels(tmp_path, lines("a b", "c"), **options)
    assert message in str(error.value)


# Scores.


def scored(units, truth, guess):
    task = type("Task", (), {"units": units})()
    return KINDS["generation"].score(truth, guess, [{}] * len(guess), Scored(task, []))


def test_error_rates_go_by_the_nearest_right_answer():
    truth = [RightAnswers(("a", "b", "c"), (("x", "y"),)), RightAnswers(("d",)), RightAnswers(())]
    found = scored("tokens", truth, [["x", "z"], ["d"], ["e"]])
    # 1 of 2 from the second answer, 0 of 1, and 1 of none.
    assert found == {"token_error_rate": pytest.approx(2 / 3), "exact_match": pytest.approx(1 / 3)}
    assert error_rate([[("a",), ("b",)]], [("b",)]) == 0


def words(text):
    return tuple(text.split())


def test_an_answer_that_no_record_may_have_is_wrong():
    """A text may hold what the end is called by, and an answer copy it."""
    task = TaskConfig("generation", units="words", copy=True)
    assert not KINDS["generation"].is_right(RightAnswers(("a",)), "<end> <unk>", task)
    assert KINDS["generation"].is_right(RightAnswers(("a", "b")), "a b", task)


def test_what_joins_pieces_is_not_copied():
    rules, encoding = KINDS["generation"], {"<end>": 0, "<unk>": 1, "Ann": 2}
    task = TaskConfig("generation", units="pieces", copy=True)
    found = rules.sources(["Ann", "￭", "Lee", "<end>"], encoding, task)
    assert [found[token] for token in ("Ann", "￭", "Lee", "<end>")] == [2, 1, 3, 4]
    assert list(found.maps[0]) == ["Lee", "<end>"]


def test_texts_are_scored_by_sacrebleu():
    truth = [
        RightAnswers(words("the cat sat on the mat"), (words("a cat was on the mat"),), True),
        RightAnswers(words("it is a fine day today"), (), True),
    ]
    guess = ["the cat is on the mat", "it is a day"]
    found = scored("words", truth, guess)
    references = [["the cat sat on the mat", "it is a fine day today"], ["a cat was on the mat", None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(guess, references).score / 100)
    assert scored("words", [RightAnswers(("a",), (), True)], ["a"])["bleu"] == 1.0  # which has no four words in a row
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(guess, references).score / 100)
    assert found["token_error_rate"] == pytest.approx((1 + 2) / 12)
    spelled = [RightAnswers(tuple("a cat"), (), True), RightAnswers(tuple("dog"), (), True)]
    found = scored("characters", spelled, ["a cat", "dig"])
    assert found["token_error_rate"] == pytest.approx(1 / 8)
    assert found["word_error_rate"] == pytest.approx(1 / 3)
    assert found["exact_match"] == 0.5


def test_reports_have_the_answers_as_the_data_do():
    task = type("Task", (), {"units": "words"})()
    rules = KINDS["generation"]
    assert rules.in_report(RightAnswers(("a", "b"), (), True), task) == "a b"
    assert rules.in_report(RightAnswers(("a", "b"), (("c",),), True), task) == ["a b", "c"]
    assert rules.is_right(RightAnswers(("a",), (("b", "c"),), True), "b c", task)
    assert not rules.is_right(RightAnswers(("a",), (), True), "b", task)


# Beside other tasks.

JOINT = (
    toy.TOML
    + """
[tasks.tags]
kind = "generation"
field = "slots"
decoder_size = 12
decoder_embedding_dim = 6
label_smoothing = 0.1
"""
)


TOGETHER = {
    "hard": "ew",
    "soft": "uw",
    "shared_private": "equal_norm",
    "hierarchical": "dwa",
    "cross_stitch": "gls",
    "mmoe": "famo",
    "cgc": "rlw",
    "task_attention": "stch",
}


@pytest.mark.parametrize(("sharing", "balancing"), TOGETHER.items(), ids=TOGETHER)
def test_it_is_learnt_beside_other_tasks_from_partial_labels(tmp_path, sharing, balancing):
    path = toy.write_files(tmp_path, JOINT)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for i, record in enumerate(records):
        if i % 3 == 0:
            del record["slots"]
        elif i % 3 == 1:
            del record["intent"]
    toy.write_lines(tmp_path / "train.jsonl", records)
    given = (f"sharing={sharing}", f"balancing={balancing}", "training.epochs=12")
    options = [part for pair in given for part in ("--set", pair)]
    toy.quiet("train", path, "--run", tmp_path / "run", *options)
    scores = Run(tmp_path / "run").read_scores()
    assert scores["tags/token_error_rate"] < 0.5
    assert {"intent/accuracy", "slots/f1", "tags/exact_match"} <= set(scores)
    toy.quiet("train", path, "--run", tmp_path / "again", *options)
    models = [Run(tmp_path / name).load_model()[0].model.state_dict() for name in ("run", "again")]
    assert_same_bits(*models)


def test_it_is_compared_with_itself_alone(tmp_path):
    """By its error rate, of which less is better."""
    path = toy.write_files(tmp_path, JOINT)
    options = ["--over", "tasks=tags,tags+intent", "--seeds", "1", "--set", "training.epochs=2"]
    shown = toy.quiet("compare", path, *options, "--single-task", "--out", tmp_path / "compared")
    assert "tags token_error_rate" in shown
    rows = {row["variant"]: row for row in json.loads((tmp_path / "compared" / "compare.json").read_text())["rows"]}
    assert list(rows) == ["tags alone", "intent alone", "tags", "tags+intent"]

    def score(variant, name):
        return rows[variant]["scores"][name]["mean"]

    errors, alone = score("tags+intent", "tags/token_error_rate"), score("tags alone", "tags/token_error_rate")
    right, before = score("tags+intent", "intent/accuracy"), score("intent alone", "intent/accuracy")
    both = rows["tags+intent"]
    assert both["changes"]["tags/token_error_rate"]["mean"] == pytest.approx(errors - alone)
    assert both["delta"]["mean"] == pytest.approx(((alone - errors) / alone + (right - before) / before) / 2)


def test_data_sets_of_their_own(tmp_path):
    toml = """
[datasets.a]
train = "train.jsonl"
[datasets.b]
train = "test.jsonl"
[tasks.intent]
kind = "classification"
dataset = "a"
[tasks.tags]
kind = "generation"
field = "slots"
dataset = "b"
decoder_size = 8
[training]
epochs = 2
"""
    path = toy.write_files(tmp_path, toml)
    toy.quiet("train", path, "--run", tmp_path / "run")
    model = pymtl.load(tmp_path / "run")
    answer = model.predict("play some jazz")
    assert answer["intent"] in model.labels["intent"]
    assert set(answer["tags"]) <= set(model.labels["tags"])
    scores = Run(tmp_path / "run").read_manifest()["scores"]["validation"]
    assert set(scores) >= {"intent/accuracy", "tags/token_error_rate"}


def test_the_plain_model_learns_the_same(tmp_path):
    config = toy.load(tmp_path, "model.dropout=0.0", "training.epochs=2", "tasks.tags.decoder_dropout=0.0", toml=JOINT)
    config = read_all(config).config
    runs = [toy.fitted(config, tmp_path / backend, backend) for backend in ("pymtl", "reference")]
    for ours, theirs in zip(*(run.epochs for run in runs)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["valid"] == pytest.approx(theirs["valid"])


def test_a_run_s_report_times_it_beside_plain_pytorch(tmp_path):
    path = toy.write_files(tmp_path, JOINT)
    toy.quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=1")
    assert "plain PyTorch, packed" in toy.quiet("report", tmp_path / "run", "--batches", 3)


def test_a_batch_without_a_label_of_the_decoder_is_timed_too(tmp_path):
    path = toy.write_files(tmp_path, JOINT)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for record in records[1:]:
        record["tags"] = None
    records[0]["tags"] = records[0]["slots"]
    toy.write_lines(tmp_path / "train.jsonl", records)
    options = ["--set", "training.epochs=1", "--set", "tasks.tags.field=tags"]
    toy.quiet("train", path, "--run", tmp_path / "run", *options)
    assert "plain PyTorch, packed" in toy.quiet("report", tmp_path / "run", "--batches", 3)


CTC = """
[data]
train = "train.jsonl"

[tasks.said]
kind = "ctc"
references = "all"
"""


def test_ctc_is_scored_by_the_nearest_right_answer(tmp_path):
    given = [{"tokens": ["x"] * 4, "said": ["a"], "all": [["b", "c"]]}] * 4
    toy.write_lines(tmp_path / "train.jsonl", given)
    (tmp_path / "run.toml").write_text(CTC, encoding="utf-8")
    sets = read_all(configuration.load(tmp_path / "run.toml"))
    (label, *_) = (record.labels["said"] for record in sets.train[""])
    assert label == RightAnswers(("a",), (("b", "c"),))
    rules, task = KINDS["ctc"], sets.config.tasks["said"]
    found = rules.score([label] * 2, [["b", "c"], ["b"]], [{}] * 2, Scored(task, []))
    assert found == {"label_accuracy": pytest.approx(1 - 1 / 3), "exact_match": 0.5}


def test_several_answers_of_one_task_do_not_widen_ctc_s_search():
    task = type("Task", (), {"beam_size": 3})()
    assert KINDS["ctc"].search(task, Search(nbest=8)).beam_size == 1
    assert KINDS["ctc"].search(task, Search(beam_size=8)).beam_size == 8
    assert KINDS["generation"].search(task, Search(nbest=8)).beam_size == 8
    assert KINDS["generation"].search(task, None).beam_size == 3


# Language models.


def test_a_language_model_goes_on_with_a_text(tmp_path, capsys):
    records = [{"tokens": list("abcdefgh" * 3)[i : i + 9]} for i in range(8)] * 8
    toy.write_lines(tmp_path / "train.jsonl", records)
    (tmp_path / "run.toml").write_text(
        '[data]\ntrain = "train.jsonl"\n[tasks.letters]\nkind = "language_model"\n[model]\nbidirectional = false\n'
        "hidden_size = 32\nembedding_dim = 16\ndropout = 0.0\n[training]\nepochs = 12\nlearning_rate = 0.02\n",
        encoding="utf-8",
    )
    toy.quiet("train", tmp_path / "run.toml", "--run", tmp_path / "run")
    assert toy.quiet("predict", tmp_path / "run", "b c d", "--continue", 5) == "b c d e f g h a\n"
    found = toy.quiet("predict", tmp_path / "run", "a b", "--continue", 2, "--json", "--nbest", 2)
    (line,) = map(json.loads, found.splitlines())
    assert line["tokens"] == ["a", "b"]
    assert line["continuations"][0] == ["c", "d"]
    assert len(line["continuations"]) == 2
    assert len(toy.quiet("predict", tmp_path / "run", "a b", "--continue", 2, "--nbest", 2).splitlines()) == 2
    record = json.dumps({"tokens": ["a", "b"]})
    assert toy.quiet("predict", tmp_path / "run", "--records", record, "--continue", 1) == "a b c\n"
    assert toy.quiet("predict", tmp_path / "run", "a", "", "b", "--continue", 1) == "a b\n\nb c\n"
    given = ["predict", tmp_path / "run", "a b", "--continue", 6, "--sample", "--temperature", 50]
    assert toy.quiet(*given, "--seed", 1) == toy.quiet(*given, "--seed", 1)
    assert toy.quiet(*given, "--seed", 1) != toy.quiet(*given, "--seed", 2)
    model = pymtl.load(tmp_path / "run")
    one, other = model.go_on(["c d", ["g", "h"]], 3)
    assert (one["tokens"], one["continuations"], one["texts"]) == (list("cd"), [list("efg")], ["c d e f g"])
    assert (other["tokens"], other["continuations"], other["texts"]) == (list("gh"), [list("abc")], ["g h a b c"])
    beam = model.go_on(["c d"], 3, Search(beam_size=3, nbest=3, length_penalty=0.0))[0]
    assert beam["continuations"][0] == list("efg")
    assert beam["scores"] == pytest.approx(list(map(math.log, beam["probabilities"])))
    assert beam["scores"] == sorted(beam["scores"], reverse=True)
    search = Search(sample=True, temperature=50.0)
    whole = model.go_on(["c d"] * 5, 3, search)
    assert model.go_on(["c d"] * 5, 3, search, batch_size=2) == whole
    assert [model.go_on(["c d"], 3, search, first=i)[0] for i in range(1, 6)] == whole
    assert model.go_on(["a zz"], 20, Search(no_repeat_ngram=1))[0]["continuations"][0] != []
    for options, message in (({"count": 0}, "count"), ({"batch_size": 0}, "batch_size")):
        with pytest.raises(ValueError, match=f"{message}: expected a number above 0, got 0"):
            model.go_on(["a"], **{"count": 2, **options})
    with pytest.raises(TypeError, match=r"count: expected a whole number, got 2\.5"):
        model.go_on(["a"], 2.5)
    with pytest.raises(TypeError, match=r"search: expected a Search, as pymtl.Search\(beam_size=5\), got dict"):
        model.go_on(["a"], 2, {"beam_size": 3})
    with pytest.raises(ValueError, match="search: expected no coverage_penalty"):
        model.go_on(["a"], 2, Search(coverage_penalty=1.0))
    assert toy.quiet("predict", tmp_path / "run", "b c ", "--continue", 2) == "b c d e\n"
    for option in ("--max-length", "--coverage-penalty", "--length-penalty"):
        assert main(["predict", str(tmp_path / "run"), "a", "--continue", "3", option, "2"]) == 1
        assert f"{option}: expected none beside --continue" in capsys.readouterr().err


def test_one_token_many_times_is_no_warning(tmp_path):
    toy.write_lines(tmp_path / "train.jsonl", [{"tokens": ["x"] * 9, "said": ["a"] * (1 + i % 4)} for i in range(40)])
    toml = '[data]\ntrain = "train.jsonl"\n[tasks.said]\nkind = "generation"\n[training]\nepochs = 1\n'
    (tmp_path / "run.toml").write_text(toml, encoding="utf-8")
    shown = toy.quiet("train", tmp_path / "run.toml", "--run", tmp_path / "run")
    assert "said: 1 token of answers: a (" in shown
    assert "nothing to tell apart" not in shown


def test_texts_go_on_as_their_data_set_splits_them(tmp_path):
    toy.write_lines(tmp_path / "train.jsonl", [{"text": "abc abc abc"[i : i + 7]} for i in range(3)] * 8)
    (tmp_path / "run.toml").write_text(
        '[data]\ntrain = "train.jsonl"\ntokenizer = "characters"\n[tasks.letters]\nkind = "language_model"\n'
        "[model]\nbidirectional = false\nhidden_size = 16\ndropout = 0.0\n"
        "[training]\nepochs = 12\nlearning_rate = 0.02\n",
        encoding="utf-8",
    )
    toy.quiet("train", tmp_path / "run.toml", "--run", tmp_path / "run")
    assert toy.quiet("predict", tmp_path / "run", "a b", "--continue", 4) == "a bcabc\n"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ([["a", "b", "a"], ["c"], ["b", "a"]], "generation"),
        ([["a", "b"], ["c"], ["b", "a", "c", "d"]], "multilabel"),  # which never name a label twice
        ([["a", "a"], ["b", "c"], ["b", "b"]], "tagging"),  # as many as tokens
    ],
    ids=["generation", "multilabel", "tagging"],
)
def test_init_takes_lists_whose_order_counts_for_answers(tmp_path, said, kind):
    toy.write_lines(tmp_path / "new.jsonl", [{"tokens": ["x", "y"], "said": each} for each in said * 4])
    assert f"said: {kind}" in toy.quiet("init", tmp_path / "new.jsonl")
    config = configuration.load(tmp_path / "new.toml")
    assert config.tasks["said"].kind == kind


GREETINGS = """
[data]
train = "train.jsonl"
valid = "valid.jsonl"
test = "test.jsonl"

[tasks.reply]
kind = "generation"
copy = true
units = "pieces"
decoder_size = 24
decoder_embedding_dim = 8
decoder_dropout = 0.1
label_min_count = 2

[model]
embedding_dim = 16
hidden_size = 24
dropout = 0.1

[training]
epochs = 12
batch_size = 16
learning_rate = 0.01
min_count = 2
"""


def greetings(count, seed):
    """A name, and a reply to it; no name comes twice."""
    rng = random.Random(seed)
    for _ in range(count):
        name = "".join(rng.choice("aeioubdfklmnrst") for _ in range(8))
        before, after = rng.choice([("my name is", ", please!"), ("hello, I am", "."), ("this is", " speaking.")])
        yield {"text": f"{before} {name}{after}", "reply": f"hello {name}, welcome!"}


def test_unknown_words_are_copied(tmp_path):
    for name, count, seed in (("train", 400, 0), ("valid", 30, 1), ("test", 60, 2)):
        toy.write_lines(tmp_path / f"{name}.jsonl", list(greetings(count, seed)))
    (tmp_path / "run.toml").write_text(GREETINGS, encoding="utf-8")
    said = toy.quiet("train", tmp_path / "run.toml", "--run", tmp_path / "run")
    assert re.search(rf"reply: [45]\d % {COPIED}\n", said)
    assert "labels of reply that training lacks" not in said  # the names of validation and test
    assert Run(tmp_path / "run").read_scores()["reply/exact_match"] > 0.95
    model = pymtl.load(tmp_path / "run")
    answers = model.predict(["my name is Zaphod, please!", "this is Trillian speaking."], search=Search(beam_size=3))
    assert [answer["reply"] for answer in answers] == ["hello Zaphod, welcome!", "hello Trillian, welcome!"]
    toy.quiet("predict", tmp_path / "run", "hello, I am Ford.", "--attention", tmp_path / "read.png")
    texts = ["my name is Zaphod, please!", "this is Trillian speaking.", "hello, I am Ford Prefect.", "is is is"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    exported = pymtl.load(tmp_path / "exported")
    for options in (
        {"distributions": False},
        {"search": Search(beam_size=30, nbest=30, max_length=3)},
        {"search": Search(sample=True, nbest=5, temperature=3.0, seed=1)},
    ):
        expected = model.predict(texts, **options)
        for ours, theirs in zip(exported.predict(texts, **options), expected, strict=True):
            assert ours["reply"] == theirs["reply"]
            assert ours["reply/probability"] == pytest.approx(theirs["reply/probability"], rel=1e-3)
            nbest = [[each["answer"] for each in found.get("reply/nbest", [])] for found in (ours, theirs)]
            assert nbest[0] == nbest[1]
    toy.write_lines(tmp_path / "new.jsonl", [*greetings(5, 3), {"text": "I am Xi", "reply": "hello Yu!"}])
    assert "labels that training lacks, each one missed: 'Yu' 1" in toy.quiet(
        "evaluate", tmp_path / "run", tmp_path / "new.jsonl", "--out", tmp_path / "new"
    )
