"""``pymtl evaluate``: scores, each label's own, calibration and the wrong answers, of a run and of its export."""

import contextlib
import io
import json
import shutil

import pytest
import toy
from seqeval.metrics import classification_report
from sklearn import metrics

import pymtl
from pymtl.__main__ import main
from pymtl.training.evaluation import calibration

PNG = b"\x89PNG\r\n\x1a\n"
CODES = {"music": 10, "table": 20, "film": 30}
TASKS = """
[tasks.code]
kind = "classification"

[tasks.stars]
kind = "ordinal"
pooling = "mean"

[tasks.words]
kind = "tagging"
scheme = "none"
"""
CLASSES = ("intent", "code", "stars")
DISCRETE = (*CLASSES, "slots", "words", "topics")


def record_of(record):
    """With a class of numbers, an ordered class, and tags that are not of spans."""
    words = ["verb" if token in toy.VERBS else "please" if token == "please" else "thing" for token in record["tokens"]]
    return {**record, "code": CODES[record["intent"]], "stars": record["score"] + 1, "words": words}


def quiet(*argv):
    """Runs a command that must succeed; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in argv]) == 0
    return printed.getvalue()


def strict(path):
    """The JSON of a file, in which NaN is none."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(folder, *argv, out):
    """An evaluation, its wrong answers, its page and what was printed."""
    printed = quiet("evaluate", folder, *argv, "--out", out)
    page = (out / "evaluation.md").read_text(encoding="utf-8")
    return strict(out / "evaluation.json"), lines(out / "errors.jsonl"), page, printed


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def records():
    return [record_of(record) for record in toy.requests(50, 2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, records):
    """A folder with the run of a model that has learnt a little, and its export."""
    folder = tmp_path_factory.mktemp("evaluated")
    path = toy.write_files(folder / "data", toy.TOML + TASKS + toy.ALL_KINDS)
    for name, count, seed in (("train", 60, 0), ("valid", 20, 1)):
        toy.write_lines(path.parent / f"{name}.jsonl", map(record_of, toy.requests(count, seed)))
    toy.write_lines(path.parent / "test.jsonl", records)
    quiet("train", path, "--run", folder / "run", "--set", "training.epochs=3")
    quiet("export", folder / "run", folder / "exported")
    return folder


@pytest.fixture(scope="module", params=["run", "exported"])
def found(trained, request, tmp_path_factory):
    """Of the test set: the evaluation, its wrong answers, its page, and what was printed."""
    return evaluated(trained / request.param, out=tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def answers(trained, records):
    return pymtl.load(trained / "run").predict([record["tokens"] for record in records], distributions=False)


def test_scores_are_those_that_training_ended_with(trained, found):
    assert found[0]["scores"] == pytest.approx(strict(trained / "run" / "test.json"), rel=1e-6)
    assert list(found[0]["scores"]) == list(strict(trained / "run" / "test.json"))
    assert found[0]["sentences"] == 50
    assert found[0]["unknown_tokens"] == 0


@pytest.mark.parametrize("task", CLASSES)
def test_each_class_has_the_numbers_of_scikit_learn(found, records, answers, task):
    truth, guess = [str(r[task]) for r in records], [str(a[task]) for a in answers]
    report = metrics.classification_report(truth, guess, output_dict=True, zero_division=0)
    own = found[0]["tasks"][task]
    assert own["labelled"] == 50
    assert {row["label"] for row in own["classes"]} == set(truth) | set(guess)
    for row in own["classes"]:
        expected = report[row["label"]]
        assert row["precision"] == pytest.approx(expected["precision"])
        assert row["recall"] == pytest.approx(expected["recall"])
        assert row["f1"] == pytest.approx(expected["f1-score"])
        assert row["support"] == expected["support"] == truth.count(row["label"])
    labels = own["confusion"]["labels"]
    assert labels == sorted(set(truth) | set(guess))
    assert own["confusion"]["counts"] == metrics.confusion_matrix(truth, guess, labels=labels).tolist()
    assert sum(map(sum, own["confusion"]["counts"])) == 50


def test_each_tag_that_is_not_of_spans_has_the_numbers_of_scikit_learn(found, records, answers):
    truth, guess = [t for r in records for t in r["words"]], [t for a in answers for t in a["words"]]
    report = metrics.classification_report(truth, guess, output_dict=True, zero_division=0)
    own = found[0]["tasks"]["words"]
    for row in own["classes"]:
        expected = report[row["label"]]
        assert (row["precision"], row["recall"]) == pytest.approx((expected["precision"], expected["recall"]))
        assert (row["f1"], row["support"]) == pytest.approx((expected["f1-score"], expected["support"]))
    labels = own["confusion"]["labels"]
    assert own["confusion"]["counts"] == metrics.confusion_matrix(truth, guess, labels=labels).tolist()


def test_each_type_of_span_has_the_numbers_of_seqeval(found, records, answers):
    truth, guess = [r["slots"] for r in records], [a["slots"] for a in answers]
    report = classification_report(truth, guess, output_dict=True, zero_division=0)
    own = found[0]["tasks"]["slots"]["classes"]
    assert [row["label"] for row in own] == ["food", "genre"]
    for row in own:
        expected = report[row["label"]]
        assert row["precision"] == pytest.approx(expected["precision"])
        assert row["recall"] == pytest.approx(expected["recall"])
        assert row["f1"] == pytest.approx(expected["f1-score"])
        assert row["support"] == expected["support"]


def test_each_of_several_labels_has_the_numbers_of_scikit_learn(found, records, answers):
    for row in found[0]["tasks"]["topics"]["classes"]:
        truth, guess = ([row["label"] in each["topics"] for each in some] for some in (records, answers))
        p, r, f, _ = metrics.precision_recall_fscore_support(truth, guess, average="binary", zero_division=0.0)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((p, r, f))
        assert row["support"] == sum(truth)
    assert [row["label"] for row in found[0]["tasks"]["topics"]["classes"]] == ["food", "genre"]


def test_numbers_have_their_errors_in_the_units_of_the_data(found, records, answers):
    errors = [a["politeness"] - r["score"] for r, a in zip(records, answers)]
    assert found[0]["tasks"]["politeness"]["errors"] == pytest.approx(
        {
            "mean absolute error": sum(map(abs, errors)) / 50,
            "root mean squared error": (sum(e * e for e in errors) / 50) ** 0.5,
            "mean error": sum(errors) / 50,
        },
        rel=1e-4,
        abs=1e-6,
    )


@pytest.mark.parametrize("task", [*CLASSES, "topics"])
def test_the_calibration_error_is_the_mean_gap_over_ten_bins(found, records, answers, task):
    def right(record, answer):
        return set(record[task]) == set(answer[task]) if task == "topics" else record[task] == answer[task]

    chances = [answer[f"{task}/probability"] for answer in answers]
    hits = [right(record, answer) for record, answer in zip(records, answers)]
    error = 0.0
    for i in range(10):
        inside = [k for k, p in enumerate(chances) if i / 10 <= p < (i + 1) / 10 or (i == 9 and p == 1)]
        if inside:
            mean = sum(chances[k] for k in inside) / len(inside)
            error += len(inside) / 50 * abs(mean - sum(hits[k] for k in inside) / len(inside))
    own = found[0]["tasks"][task]["calibration"]
    assert own["error"] == pytest.approx(error, abs=1e-6)
    assert sum(each["count"] for each in own["bins"]) == 50
    assert all(each["from"] <= each["probability"] <= each["to"] for each in own["bins"])
    assert sum(each["count"] * each["right"] for each in own["bins"]) == pytest.approx(sum(hits))


def test_a_calibration_of_known_numbers():
    own = calibration([0.05, 0.95, 1.0, 0.9, 0.3], [False, True, True, False, True])
    assert [(each["from"], each["count"]) for each in own["bins"]] == [(0.0, 1), (0.3, 1), (0.9, 3)]
    assert own["error"] == pytest.approx((0.05 + 0.7 + 3 * abs(2.85 / 3 - 2 / 3)) / 5)
    assert calibration([], []) == {"error": 0.0, "bins": []}


def test_the_errors_are_exactly_the_wrong_answers(found, records, answers):
    expected = {name: [] for name in DISCRETE}
    for record, answer in zip(records, answers):
        for task in DISCRETE:
            wrong = set(record[task]) != set(answer[task]) if task == "topics" else record[task] != answer[task]
            if wrong:
                line = {"text": " ".join(record["tokens"]), "truth": record[task], "answer": answer[task]}
                if f"{task}/probability" in answer:
                    line["probability"] = pytest.approx(answer[f"{task}/probability"], abs=1e-6)
                expected[task].append({"task": task, **line})
    assert sum(map(len, expected.values())) > 0
    for task in DISCRETE:
        assert [line for line in found[1] if line["task"] == task] == expected[task]
    assert f"{len(found[1]):,} wrong answers in errors.jsonl" in found[3]


def test_numbers_far_off_are_wrong_the_farthest_first(trained, tmp_path):
    path = toy.write_lines(
        tmp_path / "far.jsonl",
        [{"tokens": ["play", "jazz"], "score": score} for score in (0.5, 40, -300, 1)],
    )
    _, wrong, page, _ = evaluated(trained / "run", path, out=tmp_path / "out")
    assert [(line["task"], line["truth"]) for line in wrong] == [("politeness", -300), ("politeness", 40)]
    assert "2 wrong answers" in page


def test_the_page_has_the_tables(found):
    evaluation, wrong, page, _ = found
    rows = page.splitlines()
    for name, value in evaluation["scores"].items():
        assert [row for row in rows if row.startswith(f"| {name}") and row.endswith(f" | {value:.4f} |")]
    for task, own in evaluation["tasks"].items():
        assert f"## {task}" in rows
        for row in own.get("classes", []):
            cells = (row["label"], *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']}")
            assert f"| {' | '.join(cells)} |" in rows
        confusion = own.get("confusion", {"labels": [], "counts": []})
        for label, counts in zip(confusion["labels"], confusion["counts"]):
            assert f"| {label} | {' | '.join(map(str, counts))} |" in rows
        count = sum(line["task"] == task for line in wrong)
        assert count == 0 or [row for row in rows if row.startswith(f"{count:,} wrong answer")]
    widths = {}
    for i, row in enumerate(rows):  # a table's rows are all as wide as its head
        if row.startswith("|"):
            widths[i] = row.replace("\\|", "").count("|")
            assert i - 1 not in widths or widths[i - 1] == widths[i]


def test_what_is_printed_has_the_scores_and_the_classes(found):
    printed = found[3]
    for text in ("test, 50 sentences", "intent accuracy", "0.0 % of the tokens are unknown", "calibration", "recall"):
        assert text in printed
    assert f"{100 * found[0]['scores']['intent/accuracy']:.2f} %" in printed


def test_an_evaluation_is_written_beside_the_run_under_the_name_of_its_file(trained, tmp_path, records):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    path = toy.write_lines(tmp_path / "may.jsonl", records[:5])
    quiet("evaluate", run, "--data", trained / "data")
    quiet("evaluate", run, path)
    for name, count in (("test", 50), ("may.jsonl", 5)):
        folder = run / "evaluation" / name
        assert sorted(each.name for each in folder.iterdir()) == [
            "errors.jsonl",
            "evaluation.json",
            "evaluation.md",
            "evaluation.png",
        ]
        assert strict(folder / "evaluation.json")["sentences"] == count
        assert strict(folder / "evaluation.json")["file"] == name
        assert (folder / "evaluation.png").read_bytes().startswith(PNG)


def test_the_batch_size_changes_nothing(trained, found, tmp_path):
    for size in (1, 50):
        evaluation, wrong, _, _ = evaluated(trained / "run", "--batch-size", size, out=tmp_path / str(size))
        assert evaluation["scores"] == pytest.approx(found[0]["scores"], rel=1e-6)
        assert [(line["text"], line["answer"]) for line in wrong if line["task"] in DISCRETE] == [
            (line["text"], line["answer"]) for line in found[1] if line["task"] in DISCRETE
        ]


# Other files


def test_a_run_that_was_moved_takes_its_data_from_a_given_folder(trained, tmp_path, found, capsys):
    for name in ("run", "exported"):
        moved = shutil.copytree(trained / name, tmp_path / "elsewhere" / "deep" / name)
        assert main(["evaluate", str(moved)]) == 1
        assert "pass --data DIR" in capsys.readouterr().err
        own = evaluated(moved, "--data", trained / "data", out=tmp_path / f"out-{name}")
        assert own[0]["scores"] == pytest.approx(found[0]["scores"], rel=1e-6)


def test_a_table_that_lacks_the_column_of_a_task_is_evaluated_on_the_others(trained, tmp_path, records, answers):
    path = tmp_path / "some.csv"
    rows = [f"{' '.join(r['tokens'])},{r['code']},{r['stars']}\n" for r in records]
    path.write_text("text,code,stars\n" + "".join(rows), encoding="utf-8")
    evaluation, wrong, page, printed = evaluated(trained / "run", path, out=tmp_path / "out")
    assert list(evaluation["tasks"]) == ["code", "stars"]
    assert "some.csv: has no column 'intent': task 'intent' is not scored on it" in printed
    right = sum(r["code"] == a["code"] for r, a in zip(records, answers))
    assert evaluation["scores"]["code/accuracy"] == pytest.approx(right / 50)
    assert {line["task"] for line in wrong} <= {"code", "stars"}
    assert "## intent" not in page


def test_the_truth_of_a_table_is_written_as_the_answer_is(trained, tmp_path, records):
    path = tmp_path / "some.csv"
    path.write_text("text,code,stars\nplay jazz,30,3\nbook sushi,10,3\n", encoding="utf-8")
    _, wrong, page, _ = evaluated(trained / "run", path, out=tmp_path / "out")
    stars = [line for line in wrong if line["task"] == "stars"]
    assert len(stars) == 2
    assert [json.dumps(line["truth"]) for line in stars] == ["3", "3"]
    assert "| play jazz | 3.0 |" not in page


def test_labels_missing_from_some_records_do_not_count(trained, tmp_path, records, answers):
    some = [{k: v for k, v in r.items() if k != "intent" or i % 3 == 0} for i, r in enumerate(records)]
    path = toy.write_lines(tmp_path / "some.jsonl", some)
    evaluation = evaluated(trained / "run", path, out=tmp_path / "out")[0]
    kept = [(r["intent"], a["intent"]) for i, (r, a) in enumerate(zip(records, answers)) if i % 3 == 0]
    assert evaluation["tasks"]["intent"]["labelled"] == len(kept) == 17
    assert evaluation["scores"]["intent/accuracy"] == pytest.approx(sum(a == b for a, b in kept) / 17)
    assert evaluation["tasks"]["code"]["labelled"] == 50


def test_labels_that_training_has_not_seen_are_named_with_their_counts(trained, tmp_path):
    records = [
        {"tokens": ["play", "jazz"], "intent": "opera", "topics": ["genre", "night"], "code": 99, "stars": 7},
        {"tokens": ["play", "jazz"], "intent": "opera", "topics": ["night"], "slots": ["O", "B-tune"]},
        {"tokens": ["play", "jazz"], "intent": "ballet", "words": ["verb", "noun"]},
        {"tokens": ["play", "zzz"], "intent": "music"},
    ]
    path = toy.write_lines(tmp_path / "new.jsonl", records)
    evaluation, wrong, page, printed = evaluated(trained / "run", path, out=tmp_path / "out")
    assert {name: own.get("unknown_labels") for name, own in evaluation["tasks"].items()} == {
        "intent": {"opera": 2, "ballet": 1},
        "code": {"99": 1},
        "stars": {"7": 1},
        "topics": {"night": 2},
        "slots": {"B-tune": 1},
        "words": {"noun": 1},
    }
    assert "Labels that training has not seen, each one missed: opera 2, ballet 1." in page
    assert "intent: labels that training lacks, each one missed: 'opera' 2, 'ballet' 1" in printed
    assert sum(line["task"] == "intent" for line in wrong) >= 3
    assert {row["label"]: row["support"] for row in evaluation["tasks"]["intent"]["classes"]}["opera"] == 2
    assert evaluation["unknown_tokens"] == 1 / 8


@pytest.mark.parametrize("value", ["nothing", "an empty cell"])
def test_a_file_without_any_label_is_refused(trained, tmp_path, capsys, value):
    path = tmp_path / "bare.csv"
    path.write_text("text,n\nplay jazz,1\n" if value == "nothing" else "text,intent\nplay jazz,\n", encoding="utf-8")
    assert main(["evaluate", str(trained / "run"), str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "bare.csv" in error
    assert "label" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [{"intent": "music"}, {"score": 1}, {"topics": []}, {"slots": ["O", "O"]}])
def test_one_record_is_evaluated_without_a_number_that_is_none(trained, tmp_path, labels):
    path = toy.write_lines(tmp_path / "one.jsonl", [{"tokens": ["play", "jazz"], **labels}])
    evaluation, wrong, page, _ = evaluated(trained / "run", path, out=tmp_path / "out")
    assert evaluation["sentences"] == 1
    assert [own["labelled"] for own in evaluation["tasks"].values()] == [1]
    assert all(isinstance(value, float) for value in evaluation["scores"].values())
    assert "nan" not in page
    assert len(wrong) <= 1


def test_a_page_survives_texts_and_labels_with_bars_and_line_breaks(trained, tmp_path):
    path = toy.write_lines(
        tmp_path / "odd.jsonl", [{"text": "play | jazz\nnow <b>", "intent": "a|b"}, {"text": "play", "intent": "c\nd"}]
    )
    _, wrong, page, printed = evaluated(trained / "run", path, out=tmp_path / "out")
    assert [line["text"] for line in wrong] == ["play | jazz\nnow <b>", "play"]
    table = [row.replace("\\|", "") for row in page.splitlines() if row.startswith("| play")]
    assert len(table) == 2
    assert {row.count("|") for row in table} == {5}
    assert "a|b" in printed


def test_an_absent_file_and_a_configuration_without_a_test_set_are_named(trained, tmp_path, capsys):
    assert main(["evaluate", str(trained / "run"), str(tmp_path / "absent.csv")]) == 1
    assert "absent.csv" in capsys.readouterr().err
    moved = shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    config["data"]["test"] = None
    (moved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["evaluate", str(moved)]) == 1
    assert "has no test set: name a FILE" in capsys.readouterr().err


def test_a_data_set_that_is_not_there_is_named(trained, capsys):
    assert main(["evaluate", str(trained / "run"), str(trained / "data" / "test.jsonl"), "--dataset", "other"]) == 1
    assert "--dataset: expected" in capsys.readouterr().err


def test_evaluating_leaves_the_run_as_it_was(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in (trained / "run").iterdir() if path.is_file()}
    evaluated(trained / "run", out=tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (trained / "run").iterdir() if path.is_file()}


def test_a_file_of_one_of_several_data_sets_is_evaluated_on_its_own_tasks(tmp_path, capsys):
    toml = """
[datasets.one]
train = "train.jsonl"
test = "test.jsonl"
[datasets.two]
train = "train.jsonl"
valid = "valid.jsonl"
[tasks.intent]
kind = "classification"
dataset = "one"
[tasks.slots]
kind = "tagging"
dataset = "two"
[model]
embedding_dim = 4
hidden_size = 4
[training]
epochs = 2
"""
    path = toy.write_files(tmp_path / "data", toml)
    quiet("train", path, "--run", tmp_path / "run")
    run, file = tmp_path / "run", path.parent / "valid.jsonl"
    scores = {}
    for name in ("one", "two"):
        found = evaluated(run, file, "--dataset", name, out=tmp_path / name)[0]
        scores[name] = set(found["scores"])
        assert found["sentences"] == 20
        assert list(found["tasks"]) == ["intent" if name == "one" else "slots"]
    assert scores == {"one": {"intent/accuracy", "intent/macro_f1", "exact_match"}, "two": {"slots/f1", "exact_match"}}
    assert evaluated(run, out=tmp_path / "test")[0]["scores"] == pytest.approx(strict(run / "test.json"), rel=1e-6)
    assert main(["evaluate", str(run), str(file)]) == 1
    assert "--dataset: expected one of one, two" in capsys.readouterr().err
