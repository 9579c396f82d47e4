"""``pymtl predict`` from a file to a file and on a pipe, and ``pymtl init`` from a file to a configuration."""

import csv
import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from toy import quiet

import pymtl
from pymtl.__main__ import main
from pymtl.training import config as configuration
from pymtl.training.files import read_rows
from pymtl.training.run import Run

ROOT = Path(__file__).parents[2]
TABLE = """id,text,intent,predicted_intent,note
1,play jazz,music,mine,"a, b"
2,,film,mine,"two
lines"
3,please book hot dogs jazz,table,,\u00fc
4,   ,film,,
5,"watch ""hard"" rock",,mine,x|y
"""
CODES = {"music": 10, "table": 20, "film": 30}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a model of every kind of label."""
    folder = tmp_path_factory.mktemp("files")
    code = '\n[tasks.code]\nkind = "classification"\n'
    path = toy.write_files(folder / "data", toy.TOML + toy.ALL_KINDS + code)
    for name, count, seed in (("train", 60, 0), ("valid", 20, 1), ("test", 20, 2)):
        records = [{**record, "code": CODES[record["intent"]]} for record in toy.requests(count, seed)]
        toy.write_lines(path.parent / f"{name}.jsonl", records)
    quiet("train", path, "--run", folder / "run", "--set", "training.epochs=6")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return pymtl.load(run)


def table(path, delimiter=","):
    """The header and the rows of a table, every row as long as the header."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter=delimiter, strict=True)
    assert {len(row) for row in rows} <= {len(header)}
    return header, rows


def labelled(run, content, given, asked, folder):
    """The output for an input of some content."""
    source, target = folder / given, folder / asked
    source.write_text(content, encoding="utf-8")
    printed = quiet("predict", run, "--input", source, "--output", target)
    return target, printed


# predict, from a file to a file


def test_a_table_keeps_its_rows_and_columns_and_has_the_answers_behind_them(run, model, tmp_path):
    target, printed = labelled(run, TABLE, "new.csv", "answers.csv", tmp_path)
    header, rows = table(target)
    given = list(csv.reader(io.StringIO(TABLE)))
    assert header[:5] == given[0]
    assert [row[:5] for row in rows] == given[1:]
    assert printed == f"{target}: 5 rows, 2 without text\n"
    answers = model.predict([row[1] for row in given[1:]])
    for row, answer in zip(rows, answers):
        cells = dict(zip(header[5:], row[5:]))
        if not answer["tokens"]:
            assert set(cells.values()) == {""}
            continue
        assert cells["predicted_intent_2"] == answer["intent"]
        assert cells["predicted_code"] == str(answer["code"])
        assert float(cells["predicted_intent_probability"]) == pytest.approx(answer["intent/probability"], abs=1e-6)
        assert float(cells["predicted_politeness"]) == pytest.approx(answer["politeness"], abs=1e-5)
        assert cells["predicted_slots"] == " ".join(answer["slots"])
        spans = [{k: v for k, v in span.items() if k != "probability"} for span in answer["slots/spans"]]
        assert json.loads(cells["predicted_slots_spans"] or "[]") == spans
    intents = [answer.get("intent") for answer in answers]
    assert [row[header.index("intent")] for row in rows] == ["music", "film", "table", "film", ""]
    assert None in intents


def test_no_two_columns_of_what_is_written_have_one_name(run, tmp_path):
    target, _ = labelled(run, TABLE, "new.csv", "answers.csv", tmp_path)
    header, _ = table(target)
    assert len(set(header)) == len(header)
    kept = [row.values["predicted_intent"] for row in read_rows(target)]
    assert kept == ["mine", "mine", "", "", "mine"]


def test_a_field_named_predicted_is_kept(run, tmp_path):
    content = json.dumps({"text": "play jazz", "predicted": "mine", "intent": 7}) + "\n"
    target, _ = labelled(run, content, "new.jsonl", "answers.jsonl", tmp_path)
    (line,) = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert line["intent"] == 7
    assert line["predicted"] == "mine"


def test_a_table_becomes_json_lines(run, model, tmp_path):
    target, _ = labelled(run, TABLE, "new.csv", "answers.jsonl", tmp_path)
    given = list(csv.DictReader(io.StringIO(TABLE)))
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in line.items() if k != "predicted"} for line in found] == given
    answers = model.predict([row["text"] for row in given])
    assert [line["predicted"].get("intent") for line in found] == [answer.get("intent") for answer in answers]
    assert [type(line["predicted"].get("code")) for line in found] == [int, type(None), int, type(None), int]
    assert found[1]["predicted"] == found[3]["predicted"] == {"tokens": []}
    assert set(found[0]["predicted"]) == set(answers[0])
    assert sum(found[0]["predicted"]["intent/probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_json_lines_become_json_lines_with_what_they_held(run, model, tmp_path):
    given = [
        {"id": 7, "text": "play jazz", "intent": None, "more": {"a": [1, 2.5, None, True]}},
        {"id": 8, "tokens": ["book", "sushi"], "slots": "mine"},
        {"id": 9, "text": ""},
        {"id": 10, "text": None, "intent": "film"},
        {"id": 11, "text": "watch \u00e9t\u00e9 jazz", "intent": "kept"},
    ]
    content = "".join(json.dumps(record) + "\n" for record in given)
    target, printed = labelled(run, content, "new.jsonl", "answers.jsonl", tmp_path)
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in line.items() if k != "predicted"} for line in found] == given
    answers = model.predict(given)
    assert [line["predicted"].get("slots") for line in found] == [answer.get("slots") for answer in answers]
    assert "5 rows, 2 without text" in printed


@pytest.mark.parametrize(("name", "delimiter"), [("answers.csv", ","), ("answers.tsv", "\t"), ("ANSWERS.CSV", ",")])
def test_tab_separated_rows_become_a_table(run, model, tmp_path, name, delimiter):
    content = 'n\ttext\tintent\n1\tplay jazz\tmine\n2\t"book\thot ""dogs"""\t\n'
    target, _ = labelled(run, content, "new.tsv", name, tmp_path)
    header, rows = table(target, delimiter)
    assert header[:3] == ["n", "text", "intent"]
    assert [row[:3] for row in rows] == [["1", "play jazz", "mine"], ["2", 'book\thot "dogs"', ""]]
    answers = model.predict([row[1] for row in rows])
    assert [row[header.index("predicted_intent")] for row in rows] == [answer["intent"] for answer in answers]


def test_a_plain_file_has_a_text_a_line(run, model, tmp_path):
    target, printed = labelled(run, "play jazz\r\n\nbook, sushi\n", "new.txt", "answers.csv", tmp_path)
    header, rows = table(target)
    assert [row[0] for row in rows] == ["play jazz", "", "book, sushi"]
    answers = model.predict(["play jazz", "", "book, sushi"])
    assert [row[header.index("predicted_intent")] for row in rows] == [a.get("intent", "") for a in answers]
    assert "3 rows, 1 without text" in printed


def test_several_labels_are_written_as_training_reads_them(run, tmp_path):
    records = [*toy.requests(30, 9), {"tokens": ["zzz"], "topics": []}]
    content = "".join(json.dumps(record) + "\n" for record in records)
    target, _ = labelled(run, content, "new.jsonl", "answers.csv", tmp_path)
    header, rows = table(target)
    assert [row[header.index("topics")] for row in rows[:-1]] == ["|".join(record["topics"]) for record in records[:-1]]
    assert rows[-1][header.index("topics")] == "|"
    predicted = {row[header.index("predicted_topics")] for row in rows}
    assert predicted <= {"food", "genre", "food|genre", "|"}


def test_a_task_is_before_what_is_said_of_it(run, tmp_path):
    target, _ = labelled(run, "play jazz\n", "new.txt", "answers.csv", tmp_path)
    header, _ = table(target)
    for task in ("intent", "topics", "code"):
        assert header.index(f"predicted_{task}") < header.index(f"predicted_{task}_probability")


def test_the_rows_of_a_large_file_stay_in_order(run, model, tmp_path):
    texts = [" ".join(record["tokens"]) for record in toy.requests(150, 4)]
    source = tmp_path / "new.csv"
    source.write_text("n,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)), encoding="utf-8")
    quiet("predict", run, "--input", source, "--output", tmp_path / "answers.csv", "--batch-size", 1)
    header, rows = table(tmp_path / "answers.csv")
    assert [row[:2] for row in rows] == [[str(i), text] for i, text in enumerate(texts)]
    assert [row[header.index("predicted_intent")] for row in rows] == [a["intent"] for a in model.predict(texts)]


def test_a_column_without_a_name_is_kept_too(run, tmp_path):
    target, _ = labelled(run, ",text\n0,play jazz\n1,book sushi\n", "new.csv", "answers.csv", tmp_path)
    header, rows = table(target)
    assert header[:2] == ["", "text"]
    assert [row[:2] for row in rows] == [["0", "play jazz"], ["1", "book sushi"]]


@pytest.mark.parametrize("content", ["play\njazz\n\nbook\nsushi\n", "play\tO\njazz\tO\n\nbook\tO\nsushi\tO\n"])
def test_columns_of_tokens_are_labelled_with_tags_or_without(run, tmp_path, content):
    target, _ = labelled(run, content, "new.conll", "answers.csv", tmp_path)
    header, rows = table(target)
    assert [row[0] for row in rows] == ["play jazz", "book sushi"]
    assert [row[header.index("predicted_intent")] for row in rows] == ["music", "table"]


@pytest.mark.parametrize("asked", ["answers.jsonl", "answers.csv"])
def test_half_a_letter_in_another_field_is_kept_or_named(run, tmp_path, capsys, asked):
    source, target = tmp_path / "new.jsonl", tmp_path / asked
    source.write_text('{"text": "play jazz", "note": "\\ud800"}\n', encoding="utf-8")
    if main(["predict", str(run), "--input", str(source), "--output", str(target)]) == 0:
        assert "play jazz" in target.read_text(encoding="utf-8", errors="surrogatepass")
    else:
        assert capsys.readouterr().err.count("\n") == 1
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("content", ["text\n", "n,text\n"])
def test_a_table_without_rows_keeps_its_header_or_is_refused(run, tmp_path, capsys, content):
    source, target = tmp_path / "new.csv", tmp_path / "answers.csv"
    source.write_text(content, encoding="utf-8")
    status = main(["predict", str(run), "--input", str(source), "--output", str(target)])
    assert status == 1 or table(target)[0][: content.count(",") + 1] == content.strip().split(",")


@pytest.mark.parametrize("option", ["--input", "--output"])
def test_only_one_of_input_and_output_is_refused(run, tmp_path, fails, option):
    (tmp_path / "new.csv").write_text(TABLE, encoding="utf-8")
    assert "--input and --output: expected both" in fails("predict", run, option, tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_text(encoding="utf-8") == TABLE


def test_what_does_not_fit_input_and_output_is_named(run, tmp_path, fails):
    source = tmp_path / "new.csv"
    source.write_text(TABLE, encoding="utf-8")
    both = ("predict", run, "--input", source, "--output")
    assert "expected none beside --input" in fails(*both, tmp_path / "a.csv", "play jazz")
    assert "expected a file that ends in .csv, .tsv or .jsonl" in fails(*both, tmp_path / "a.xlsx")
    assert "expected another file than --input" in fails(*both, source)
    assert "absent.csv" in fails("predict", run, "--input", tmp_path / "absent.csv", "--output", tmp_path / "a.csv")
    (tmp_path / "bare.csv").write_text("n,body\n1,play\n", encoding="utf-8")
    bare = fails("predict", run, "--input", tmp_path / "bare.csv", "--output", tmp_path / "a.csv")
    assert "bare.csv:1: expected a column 'tokens' or 'text' with the text" in bare
    assert source.read_text(encoding="utf-8") == TABLE
    assert not (tmp_path / "a.csv").exists()


def test_a_folder_that_is_not_there_is_named_as_it_was_given(run, tmp_path, fails):
    (tmp_path / "new.csv").write_text(TABLE, encoding="utf-8")
    target = tmp_path / "absent" / "answers.csv"
    error = fails("predict", run, "--input", tmp_path / "new.csv", "--output", target)
    assert str(target.parent) in error
    assert ".part" not in error


def test_a_text_that_names_a_file_is_said_to_be_one(run, tmp_path, fails):
    source = tmp_path / "new.csv"
    source.write_text(TABLE, encoding="utf-8")
    error = fails("predict", run, "play jazz", source)
    assert f"text 2: {source} is a file: --input {source} --output FILE" in error


def test_a_text_that_names_no_file_is_a_text(run, tmp_path):
    assert quiet("predict", run, "play/jazz.csv", "x" * 5000, tmp_path).count("intent: ") == 3


# predict, on a pipe


@pytest.fixture
def process(run):
    """``pymtl predict --json``, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "0"}
    command = [sys.executable, "-m", "pymtl", "predict", str(run), "--json"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        yield started
        if started.poll() is None:
            started.kill()


def test_many_lines_on_a_pipe_are_answered_line_for_line(process, model):
    texts = [" ".join(record["tokens"]) for record in toy.requests(3000, 3)]
    texts[7] = texts[2999] = ""
    printed, error = process.communicate("".join(f"{text}\n" for text in texts).encode(), timeout=120)
    assert (process.returncode, error) == (0, b"")
    answers = [json.loads(line) for line in printed.decode().splitlines()]
    assert [" ".join(answer["tokens"]) for answer in answers] == texts
    expected = model.predict(texts)
    assert [answer.get("intent") for answer in answers] == [answer.get("intent") for answer in expected]


def test_who_writes_a_line_and_waits_gets_its_answer(process):
    for text, intent in (("play jazz", "music"), ("", None), ("caf\u00e9 book sushi", "table")):
        process.stdin.write(f"{text}\n".encode())
        process.stdin.flush()
        deadline = time.monotonic() + 60
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
            assert ready, "no answer while standard input is open"
            line += os.read(process.stdout.fileno(), 1 << 16)
        answer = json.loads(line)
        assert answer.get("intent") == intent
        assert process.poll() is None
    printed, error = process.communicate(b"watch jazz", timeout=60)
    assert error == b""
    assert json.loads(printed)["intent"] == "film"  # a last line without its end


def test_a_line_that_comes_in_parts_is_one_line(process):
    for part in (b"play ", b"ja", b"zz\nbook su"):
        process.stdin.write(part)
        process.stdin.flush()
        time.sleep(0.3)
    printed, _ = process.communicate("shi \u00fc\n".encode(), timeout=60)
    tokens = [json.loads(line)["tokens"] for line in printed.splitlines()]
    assert tokens == [["play", "jazz"], ["book", "sushi", "\u00fc"]]


# init


def rows_for_init(count=60):
    """Rows of a table with a column of each kind."""
    rows = []
    for i, record in enumerate(toy.requests(count, 0)):
        rows.append(
            {
                "id": f"T-{i:05}",
                "text": " ".join(record["tokens"]),
                "mood": record["intent"],
                "price": f"{100 + 7 * record['score'] + i / 9:.2f}",
                "stars": str(record["score"] + 1),
                "topics": "|".join(record["topics"]),
                "tags": " ".join(record["slots"]),
            }
        )
    return rows


def write_table(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_entities(path):
    """JSON lines of texts with spans."""
    records = []
    for record in toy.requests(60, 0):
        spans, place = [], 0
        for token, tag in zip(record["tokens"], record["slots"]):
            if tag.startswith("B-"):
                spans.append({"start": place, "end": place + len(token), "label": tag[2:]})
            elif tag.startswith("I-"):
                spans[-1]["end"] = place + len(token)
            place += len(token) + 1
        records.append({"text": " ".join(record["tokens"]), "entities": spans, "labels": record["topics"]})
    return toy.write_lines(path, records)


def write_conll(path, *columns):
    """CoNLL columns: the token, and the given functions of its token and tag."""
    sentences = [
        "\n".join("\t".join([token, *(column(token, tag) for column in columns)]) for token, tag in zip(*pair))
        for pair in ((record["tokens"], record["slots"]) for record in toy.requests(60, 0))
    ]
    path.write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    return path


FILES = {
    "t.csv": (
        lambda path: write_table(path, rows_for_init()),
        {
            "mood": "classification",
            "price": "regression",
            "stars": "ordinal",
            "topics": "multilabel",
            "tags": "tagging",
        },
    ),
    "t.jsonl": (write_entities, {"entities": "tagging", "labels": "multilabel"}),
    "t.conll": (lambda path: write_conll(path, lambda _, tag: tag), {"tags": "tagging"}),
}


@pytest.mark.parametrize("name", FILES)
def test_init_writes_a_configuration_that_trains(tmp_path, name):
    write, tasks = FILES[name]
    source = write(tmp_path / name)
    printed = quiet("init", source)
    target = tmp_path / "t.toml"
    config = configuration.load(target)
    assert {task: settings.kind for task, settings in config.tasks.items()} == tasks
    assert config.data.train == name
    for task, kind in tasks.items():
        assert f"\n{task}: {kind}, " in printed
    text = target.read_text(encoding="utf-8")
    assert sum(line.startswith("#") for line in text.splitlines()) >= len(tasks) + 2
    assert "# valid = " in text
    small = ("training.epochs=1", "model.hidden_size=4", "model.embedding_dim=4")
    more = [word for setting in small for word in ("--set", setting)]
    quiet("train", target, "--run", tmp_path / "run", *more)
    assert len(Run(tmp_path / "run").read_metrics()) == 1
    answer = pymtl.load(tmp_path / "run").predict("play some jazz")
    assert set(tasks) <= set(answer)
    assert f"{target}: look it over, then: pymtl train {target}" in printed


def test_the_text_ids_of_a_table_are_no_task(tmp_path):
    printed = quiet("init", write_table(tmp_path / "t.csv", rows_for_init()))
    assert "id: not used" in printed
    assert "# Not used: id" in (tmp_path / "t.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("first", [0, 1, 50017])
def test_running_numbers_are_no_task(tmp_path, first):
    rows = [{**row, "id": str(first + i)} for i, row in enumerate(rows_for_init())]
    printed = quiet("init", write_table(tmp_path / "t.csv", rows))
    assert "id: not used" in printed


def test_tags_that_are_not_of_spans_can_be_trained_as_init_writes_them(tmp_path):
    kind_of = {"please": "UH", **dict.fromkeys(toy.VERBS, "VB")}
    source = write_conll(tmp_path / "t.conll", lambda token, _: kind_of.get(token, "NN"), lambda _, tag: tag)
    quiet("init", source)
    small = ("--set", "training.epochs=1", "--set", "model.hidden_size=4", "--set", "model.embedding_dim=4")
    assert main(["train", str(tmp_path / "t.toml"), "--run", str(tmp_path / "run"), *small]) == 0


@pytest.mark.parametrize("value", [[], "", None, {"a": 1}])
def test_a_field_with_nothing_in_it_is_no_task(tmp_path, value):
    records = [{"text": row["text"], "mood": row["mood"], "more": value} for row in rows_for_init()]
    printed = quiet("init", toy.write_lines(tmp_path / "t.jsonl", records))
    assert "more: not used" in printed
    assert list(configuration.load(tmp_path / "t.toml").tasks) == ["mood"]


def test_init_names_the_text_of_an_unusual_column(tmp_path):
    rows = [{"what they said" if k == "text" else k: v for k, v in row.items()} for row in rows_for_init()]
    source = write_table(tmp_path / "t.csv", rows)
    assert quiet("init", source).startswith("text: what they said\n")
    assert configuration.load(tmp_path / "t.toml").data.tokens == "what they said"


def test_init_takes_the_text_that_it_is_told(tmp_path, fails):
    source = write_table(tmp_path / "t.csv", [{**row, "other": row["mood"]} for row in rows_for_init()])
    quiet("init", source, "--text", "other", "--out", tmp_path / "o.toml")
    assert configuration.load(tmp_path / "o.toml").data.tokens == "other"
    assert "--text: expected one of id, text, mood" in fails("init", source, "--text", "absent")


@pytest.mark.parametrize("name", ['what is "it"?', "a.b", "total", "tokens2", "\u00e4rger", "1st", "class", "a/b"])
def test_a_column_of_any_name_is_a_task_that_can_be_read(tmp_path, name):
    rows = [{"text": row["text"], name: row["mood"]} for row in rows_for_init()]
    quiet("init", write_table(tmp_path / "t.csv", rows))
    (task,) = configuration.load(tmp_path / "t.toml").tasks.items()
    assert task[1].kind == "classification"
    assert (task[1].field or task[0]) == name


def test_columns_whose_names_differ_in_signs_only_are_tasks_of_their_own(tmp_path):
    rows = [{"text": row["text"], "a b": row["mood"], "a-b": row["stars"]} for row in rows_for_init()]
    quiet("init", write_table(tmp_path / "t.csv", rows))
    fields = [task.field or name for name, task in configuration.load(tmp_path / "t.toml").tasks.items()]
    assert fields == ["a b", "a-b"]


@pytest.mark.parametrize("name", ['it\'s "mine".csv', "back\\slash.csv", "\u00fcber.csv", "a b.v2.csv"])
def test_a_file_of_any_name_is_found_from_the_configuration(tmp_path, name):
    quiet("init", write_table(tmp_path / name, rows_for_init()), "--out", tmp_path / "c.toml")
    config = configuration.load(tmp_path / "c.toml")
    assert config.path(config.data.train).samefile(tmp_path / name)


def test_init_into_another_folder_finds_the_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = write_table(tmp_path / "a" / "t.csv", rows_for_init())
    quiet("init", source, "--out", tmp_path / "b" / "c.toml")
    config = configuration.load(tmp_path / "b" / "c.toml")
    assert config.path(config.data.train).samefile(source)
    assert str(tmp_path) not in (tmp_path / "b" / "c.toml").read_text(encoding="utf-8")


def test_init_overwrites_only_when_told_to(tmp_path, fails):
    source = write_table(tmp_path / "t.csv", rows_for_init())
    (tmp_path / "t.toml").write_text("mine", encoding="utf-8")
    assert "t.toml: is there already: pass --overwrite or --out" in fails("init", source)
    assert (tmp_path / "t.toml").read_text(encoding="utf-8") == "mine"
    quiet("init", source, "--overwrite")
    assert configuration.load(tmp_path / "t.toml").data.train == "t.csv"


def test_init_never_overwrites_the_data(tmp_path):
    source = write_table(tmp_path / "t.csv", rows_for_init())
    before = source.read_bytes()
    assert main(["init", str(source), "--out", str(source), "--overwrite"]) == 1
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "", "expected at least one record, got none"),
        ("t.csv", "text,mood\n", "expected at least one record, got none"),
        ("t.csv", "a,b\n1,2\n3,4\n", "no field looks like a text: say which with --text"),
        ("t.csv", "text\nplay some jazz\nbook it\n", "no field beside the text 'text' looks like a label"),
        ("t.jsonl", "{", "t.jsonl:1: not JSON"),
        ("t.jsonl", "[1]", "expected a JSON object"),
    ],
)
def test_a_file_that_init_cannot_read_is_named_and_nothing_is_written(tmp_path, fails, name, content, reason):
    (tmp_path / name).write_text(content, encoding="utf-8")
    error = fails("init", tmp_path / name)
    assert name in error
    assert reason in error
    assert not (tmp_path / "t.toml").exists()


def test_init_of_a_file_that_is_not_there_is_refused(tmp_path, fails):
    assert "absent.csv" in fails("init", tmp_path / "absent.csv")


# What people try


def test_a_data_file_in_a_configuration_s_place_is_told_so(tmp_path, fails):
    (tmp_path / "my data.csv").write_text("text,mood\na tea,x\n")
    assert f"pymtl init '{tmp_path}/my data.csv' writes a configuration" in fails("train", tmp_path / "my data.csv")


def test_a_mistyped_key_is_told_what_it_may_have_been(tmp_path, fails):
    config = toy.write_files(tmp_path)
    assert "did you mean 'epochs'?" in fails("train", config, "--set", "training.epoch=3")


def test_a_missing_data_file_is_named_with_its_key(tmp_path, fails):
    config = toy.write_files(tmp_path)
    error = fails("train", config, "--set", "data.test=absent.jsonl", "--run", tmp_path / "run")
    assert "data.test: there is no file" in error
    assert "data.train: expected a file, got the folder" in fails("train", config, "--set", "data.train=.")


@pytest.mark.parametrize(
    ("content", "name", "used"),
    [
        ("text,team,id\n" + "".join(f"a tea {i},{'xy'[i % 2]},{i * 7}\n" for i in range(30)), "a.csv", {"team"}),
        (
            "text,team,sent\n" + "".join(f"a {i},{'xy'[i % 2]},{1 + i % 28}.05.2026\n" for i in range(30)),
            "a.csv",
            {"team"},
        ),
        ("text,team,_hash\n" + "".join(f"a {i},{'xy'[i % 2]},{i * 31 % 17}\n" for i in range(30)), "a.csv", {"team"}),
        ("text,team,site\n" + "".join(f"a {i},{'xy'[i % 2]},here\n" for i in range(30)), "a.csv", {"team"}),
        ("text;price\n" + "".join(f"a {i};{10 ** (i % 5)},5\n" for i in range(30)), "a.csv", {"price"}),
    ],
    ids=["ids", "dates", "hashes", "a single value", "decimal commas"],
)
def test_init_leaves_out_what_is_of_the_record_and_not_of_its_text(tmp_path, content, name, used):
    (tmp_path / name).write_text(content, encoding="utf-8")
    quiet("init", tmp_path / name)
    config = configuration.load(tmp_path / "a.toml")
    assert set(config.tasks) == used
    if "price" in used:
        assert (config.tasks["price"].kind, config.tasks["price"].scale) == ("regression", "log")


def test_init_of_a_table_without_a_header_asks_for_one(tmp_path, fails):
    (tmp_path / "a.csv").write_text("the printer is gone,office,33.02\nthe invoice,billing,7\n")
    assert "expected the names of the columns in the first line, got '33.02'" in fails("init", tmp_path / "a.csv")


def test_init_of_parts_of_speech_and_names_can_be_trained(tmp_path):
    lines = "".join(f"w{i}\tNOUN\tO\nParis\tPROPN\tB-LOC\n\n" for i in range(20))
    (tmp_path / "a.conll").write_text(lines)
    quiet("init", tmp_path / "a.conll")
    config = configuration.load(tmp_path / "a.toml")
    assert [task.constrained for task in config.tasks.values()] == [False, True]
    quiet("train", tmp_path / "a.toml", "--run", tmp_path / "run", "--set", "training.epochs=1")
    (answer,) = pymtl.load(tmp_path / "run").predict(["w1 Paris."])
    assert answer["tokens"] == ["w1", "Paris", "."]


def test_a_table_with_semicolons_is_written_as_it_came(run, tmp_path):
    target, _ = labelled(run, "\ufefftext;note\nplay jazz;1,5\n", "new.csv", "answers.csv", tmp_path)
    assert target.read_bytes().startswith(b"\xef\xbb\xbftext;note;predicted_")
    assert target.read_text(encoding="utf-8-sig").splitlines()[1].startswith("play jazz;1,5;")
