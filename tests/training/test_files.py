"""Data files in the formats that people have, and word vectors."""

import gzip
import json
import struct

import pytest
import torch

from pymtl.training import config as configuration
from pymtl.training.data import read_all, read_test_sets, rows_of
from pymtl.training.errors import DataError
from pymtl.training.files import count_columns, format_of, read_lines, read_rows
from pymtl.training.vectors import read_vectors

BOM = b"\xef\xbb\xbf"
MOOD = {"mood": {"kind": "classification"}}
TAGS = {"tags": {"kind": "tagging"}}
EXPECTED = [(["a", "tea"], "x"), (["two", "teas"], "y")]


@pytest.fixture
def config(tmp_path):
    """A function from a file and its content to a configuration that trains and validates on it."""

    def config(name, content, tasks=MOOD, **data):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        raw = {"data": {"train": name, "valid": name, **data}, "tasks": tasks, "folder": str(tmp_path)}
        return configuration.parse(raw, "c.toml")

    return config


@pytest.fixture
def read(config):
    """As ``config``, to all that is read of it."""
    return lambda *args, **options: read_all(config(*args, **options))


@pytest.fixture
def refused(config):
    """As ``config``, to the error it meets."""

    def refused(*args, **options):
        with pytest.raises(DataError) as error:
            read_all(config(*args, **options))
        return str(error.value)

    return refused


def pairs(records, task="mood"):
    return [(record.tokens, record.labels[task]) for record in records]


def lines_of(*objects):
    return "".join(json.dumps(each) + "\n" for each in objects)


# Formats

LINES = lines_of({"text": "a tea", "mood": "x"}, {"text": "two teas", "mood": "y"})
LIST = json.dumps([{"text": "a tea", "mood": "x"}, {"text": "two teas", "mood": "y"}], indent=2)
CSV = "text,mood\na tea,x\ntwo teas,y\n"
TSV = CSV.replace(",", "\t")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", BOM + LINES.encode()),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n")),
        ("a.json", LIST),
        ("a.json", BOM + LIST.encode()),
        ("a.json", json.dumps(json.loads(LIST))),
        ("a.json", LINES),
        ("a.json", "\n \n" + LIST),
        ("a.CSV", CSV),
        ("a.csv", BOM + CSV.encode()),
        ("a.csv", CSV.replace(",", ";")),
        ("a.csv", CSV.replace(",", "|")),
        ("a.csv", TSV),
        ("a.csv", CSV.replace("\n", "\r\n")),
        ("a.csv", CSV.rstrip("\n")),
        ("a.csv", "\n\n" + CSV),
        ("a.csv", 'text,mood\n"a tea",x\n"two\nteas",y\n'),
        ("a.tsv", TSV),
        ("a.TAB", TSV),
        ("a.Csv.Gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(LIST.encode(), mtime=0)),
    ],
)
def test_a_file_is_read_by_what_its_name_ends_in(read, name, content):
    assert pairs(read(name, content).train[""]) == EXPECTED


@pytest.mark.parametrize(
    ("form", "content"),
    [("jsonl", LINES), ("json", LIST), ("csv", CSV), ("csv", CSV.replace(",", ";")), ("tsv", TSV)],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.xml.gz"])
def test_a_format_that_the_configuration_names_wins_over_the_name(read, form, content, name):
    data = gzip.compress(content.encode(), mtime=0) if name.endswith(".gz") else content
    assert pairs(read(name, data, format=form).train[""]) == EXPECTED


def test_a_header_that_holds_a_quoted_delimiter_is_split_by_the_others(read):
    content = 'text;mood;"a, b, c, d"\na tea;x;1\ntwo teas;y;2\n'
    assert pairs(read("a.csv", content).train[""]) == EXPECTED


def test_a_pretty_printed_list_counts_its_records(refused):
    content = json.dumps([{"text": "a", "mood": "x"}, {"text": "b", "mood": 1.5}], indent=2)
    assert "a.json: record 2: field 'mood': expected a string or a whole number, got 1.5" in refused("a.json", content)


@pytest.mark.parametrize(
    ("name", "format", "content", "reason"),
    [
        ("a.jsonl", "auto", CSV, "as JSON lines, since its name ends in .jsonl"),
        ("a.json", "auto", CSV, "as JSON, since its name ends in .json"),
        ("a.txt", "auto", CSV, "as JSON lines, since its name ends in .txt: set data.format to one of"),
        ("data", "auto", CSV, "as JSON lines, since its name ends in nothing else: set data.format to one of"),
        ("a.csv", "jsonl", CSV, "as JSON lines, as the configuration says"),
        ("a.txt", "auto", "1\n2\n", "as JSON lines, since its name ends in .txt: set data.format to one of"),
        ("a.tsv", "auto", 'text\tmood\n"a" b\tx\n', "as tab-separated, since its name ends in .tsv"),
        ("a.csv", "auto", LINES, "as CSV, since its name ends in .csv"),
        ("a.csv", "auto", "a\tO\nb\tB-x\n\nc\tO\n", "as CSV, since its name ends in .csv"),
        ("a.csv", "tsv", CSV, "as tab-separated, as the configuration says"),
    ],
)
def test_a_file_in_another_format_is_told_how_it_was_read_and_why(refused, name, format, content, reason):
    message = refused(name, content, format=format)
    assert f"{name}:" in message
    assert reason in message


def test_format_of_names_the_format_and_the_reason(tmp_path):
    assert format_of(tmp_path / "x.CoNLL") == ("conll", "as CoNLL columns, since its name ends in .conll")
    assert format_of(tmp_path / "x.csv", "tsv") == ("tsv", "as tab-separated, as the configuration says")


def test_a_configuration_that_begins_with_a_bom_is_read(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(BOM + b'[data]\ntrain = "a"\n[tasks.mood]\nkind = "classification"\n')
    assert configuration.load(path).data.train == "a"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_says_so(refused, encoding):
    content = f"\ufeff{CSV}".encode(encoding)
    assert "a.csv:1: the file is in UTF-16: save it as UTF-8" in refused("a.csv", content)


# CoNLL's columns

CONLL = """-DOCSTART-\tO

# sent_id = s1
# mood = glad
a\tO
tea\tB-drink


# mood = sad
no\tO
green\tB-drink
tea\tI-drink
"""


def test_conll_columns_are_sentences_and_their_comments_are_fields(read):
    sets = read("a.conll", CONLL, {**TAGS, **MOOD})
    assert [record.tokens for record in sets.train[""]] == [["a", "tea"], ["no", "green", "tea"]]
    assert pairs(sets.train[""], "tags") == [
        (["a", "tea"], ["O", "B-drink"]),
        (["no", "green", "tea"], ["O", "B-drink", "I-drink"]),
    ]
    assert [record.labels["mood"] for record in sets.train[""]] == ["glad", "sad"]


@pytest.mark.parametrize("content", [BOM + CONLL.encode(), CONLL.replace("\n", "\r\n"), CONLL.replace("\t", "  ")])
@pytest.mark.parametrize("name", ["a.conll", "a.BIO", "a.txt"])
def test_conll_columns_with_a_bom_other_line_ends_or_spaces_are_the_same(read, name, content):
    found = read(name, content, {**TAGS, **MOOD}, format="conll" if name == "a.txt" else "auto").train[""]
    assert [(r.tokens, r.labels) for r in found] == [
        (["a", "tea"], {"tags": ["O", "B-drink"], "mood": "glad"}),
        (["no", "green", "tea"], {"tags": ["O", "B-drink", "I-drink"], "mood": "sad"}),
    ]


def test_conll_2003_has_its_tags_in_the_last_of_four_columns(read):
    content = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n"
    found = read("a.conll", content, TAGS).train[""]
    assert pairs(found, "tags") == [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])]


def test_conll_columns_may_be_named(read):
    content = "1\tEU\tNNP\tB-ORG\n2\trejects\tVBZ\tO\n"
    tasks = {**TAGS, "pos": {"kind": "tagging"}}
    found = read("a.conll", content, tasks, columns=["", "tokens", "pos", "tags"]).train[""]
    assert [(r.tokens, r.labels) for r in found] == [
        (["EU", "rejects"], {"tags": ["B-ORG", "O"], "pos": ["NNP", "VBZ"]})
    ]


def test_conll_columns_that_are_not_clear_have_to_be_named(refused):
    message = refused("a.conll", "EU\tNNP\tB-ORG\n", {**TAGS, "pos": {"kind": "tagging"}})
    assert "a.conll:1: expected data.columns, the fields of its 3 columns" in message
    assert "(pos, tags)" in message


def test_a_line_of_other_columns_is_named(refused):
    assert "a.conll:2: expected 2 columns (tokens, tags), got 3" in refused("a.conll", "a\tO\nb\tO\tO\n", TAGS)


def test_a_sentence_whose_comments_lack_a_label_has_none(read):
    content = "# sent_id = 1\na\tO\n\n# sent_id = 2\n# mood = x\nb\tB-y\n"
    found = read("a.conll", content, {**TAGS, **MOOD}).train[""]
    assert [record.labels["mood"] for record in found] == [None, "x"]


def test_comments_that_are_no_fields_are_no_tokens(read):
    # As the files of Universal Dependencies begin.
    content = "# newdoc id = weblog-1\n# newpar\n# sent_id = 1\n1\tEU\tNNP\n2\trejects\tVBZ\n\n"
    found = read("a.conllu", content, TAGS, columns=["", "tokens", "tags"]).train[""]
    assert pairs(found, "tags") == [(["EU", "rejects"], ["NNP", "VBZ"])]


def test_a_comment_of_a_column_s_name_does_not_take_its_place(read):
    found = read("a.conll", "# tags = all\na\tO\nb\tB-x\n", TAGS).train[""]
    assert pairs(found, "tags") == [(["a", "b"], ["O", "B-x"])]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.conll", "a\tO\n".encode("utf-16"), "the file is in UTF-16"),
        ("a.conll", "café\tO\n".encode("cp1252"), "byte 4 of the line, 0xe9, is not UTF-8"),
        ("a.conll.gz", b"a\tO\n", "gzip"),
    ],
)
def test_a_conll_file_that_cannot_be_read_is_named_with_its_line(refused, name, content, reason):
    message = refused(name, content, TAGS)
    assert f"{name}:1: " in message
    assert reason in message


# Tables


@pytest.mark.parametrize(
    "content",
    [
        "text,mood,,\na tea,x,,\ntwo teas,y,,\n",
        ",text,mood\n0,a tea,x\n1,two teas,y\n",  # a pandas index
        "text,,mood\na tea,left over,x\ntwo teas,,y\n",
        "text,mood\na tea,x,\ntwo teas,y,,,\n",
        "text,mood,,\na tea,x\ntwo teas,y\n",
    ],
)
def test_columns_without_a_name_are_ignored(read, content):
    assert pairs(read("a.csv", content).train[""]) == EXPECTED


@pytest.mark.parametrize("empty", [",", ",,,", " , ", "", "   "])
def test_empty_rows_of_a_spreadsheet_are_ignored(read, empty):
    sets = read("a.csv", f"text,mood\na tea,x\n{empty}\ntwo teas,y\n{empty}\n")
    assert pairs(sets.train[""]) == EXPECTED
    assert sets.notes == []


def test_a_cell_without_a_column_is_refused(refused):
    assert "a.csv:2: expected 2 cells, got 3" in refused("a.csv", "text,mood\na, tea,x\n")


def test_a_header_with_spaces_around_its_names_is_read(read):
    assert pairs(read("a.csv", " text ,  mood\na tea,x\ntwo teas, y \n").train[""]) == EXPECTED


def test_the_tasks_whose_columns_a_test_file_has_are_scored_and_a_note_names_the_other(config, tmp_path):
    (tmp_path / "test.csv").write_text("text,mood\na tea,x\n")
    both = {**MOOD, "score": {"kind": "regression"}}
    sets = read_all(config("a.csv", "text,mood,score\na tea,x,1\ntwo teas,y,2\n", both, test="test.csv"))
    assert [record.labels for record in sets.test[""]] == [{"mood": "x", "score": None}]
    assert sets.notes == ["test.csv: has no column 'score': task 'score' is not scored on it"]


def test_a_validation_file_may_lack_a_column_too(config, tmp_path):
    (tmp_path / "valid.csv").write_text("text,score\na tea,1\n")
    both = {**MOOD, "score": {"kind": "regression"}}
    sets = read_all(config("a.csv", "text,mood,score\na tea,x,1\ntwo teas,y,2\n", both, valid="valid.csv"))
    assert [record.labels for record in sets.valid[""]] == [{"mood": None, "score": 1.0}]
    assert sets.notes == ["valid.csv: has no column 'mood': task 'mood' is not scored on it"]


def test_a_training_file_without_a_task_s_column_is_an_error_of_its_header(refused):
    message = refused("a.csv", "text,other\na tea,x\n")
    assert "a.csv:1: expected a column 'mood', got text, other" in message


def test_a_table_without_the_text_is_an_error_of_its_header(refused):
    message = refused("a.csv", "sentence,mood\na tea,x\n")
    assert (
        "a.csv:1: expected a column 'tokens' or 'text' with the text (data.tokens names it), got sentence, mood"
        in message
    )


@pytest.mark.parametrize("word", ["w", "ab."])
def test_a_cell_of_more_than_131072_characters_is_read(read, word):
    text = " ".join([word * 3] * (200_000 // (3 * len(word) + 1)))
    assert len(text) > 131_072
    found = read("a.csv", f"text,mood\n{text},x\nb,y\n", tokenizer="whitespace").train[""]
    assert found[0].tokens == text.split()


def test_a_file_in_windows_1252_is_named_with_line_and_byte(refused):
    message = refused("a.csv", "text,mood\na tea,x\ntwo cafés,y\n".encode("cp1252"))
    assert "a.csv:3: byte 8 of the line, 0xe9, is not UTF-8: save the file as UTF-8" in message
    assert "Windows-1252" in message


def test_the_byte_of_a_first_line_is_counted(refused):
    assert "a.csv:1: byte 7 of the line, 0xe9" in refused("a.csv", "text,mé\na,x\n".encode("cp1252"))


def test_texts_that_are_empty_are_left_out_and_counted(read):
    sets = read("a.csv", 'text,mood\na tea,x\n,y\n"  ",y\ntwo teas,y\n')
    assert pairs(sets.train[""]) == EXPECTED
    assert sets.notes == ["a.csv: 2 records without text were left out"] * 2  # to train and to validate on


def test_empty_texts_of_json_are_left_out_too(read):
    sets = read("a.jsonl", lines_of({"text": ""}, {"text": None}, {"text": []}) + LINES)
    assert pairs(sets.train[""]) == EXPECTED
    assert sets.notes[0] == "a.jsonl: 3 records without text were left out"


def test_a_quote_that_never_ends_names_the_line_where_it_begins(refused):
    message = refused("a.csv", 'text,mood\nb,y\n"a,x\n' + "b,y\n" * 10)
    assert "a.csv:3: " in message


def test_a_row_over_several_lines_counts_them(refused):
    message = refused("a.csv", 'text,score\n"two\nteas",1\na tea,much\n', {"score": {"kind": "regression"}})
    assert "a.csv:4: field 'score': expected a finite number, got 'much'" in message


def test_rows_say_which_of_their_values_are_cells(tmp_path):
    (tmp_path / "a.csv").write_text("text,mood\na,1\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "mood": 1}\n')
    (row,), (other,) = read_rows(tmp_path / "a.csv"), read_rows(tmp_path / "a.jsonl")
    assert (row.place, row.values, row.cells) == (2, {"text": "a", "mood": "1"}, {"text", "mood"})
    assert (other.place, other.values, other.cells) == (1, {"text": "a", "mood": 1}, frozenset())


def test_texts_to_label_may_be_lines_of_plain_text(config, tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"a tea\r\n\r\ntwo teas")
    rows = rows_of(tmp_path / "a.txt", config("a.jsonl", LINES))
    assert [row.values for row in rows] == [{"tokens": "a tea"}, {"tokens": ""}, {"tokens": "two teas"}]
    assert read_lines(tmp_path / "a.txt") == ["a tea", "", "two teas"]


def test_test_sets_are_read_alone(config, tmp_path):
    (tmp_path / "test.tsv").write_text(TSV)
    found = read_test_sets(config("a.csv", CSV, test="test.tsv"))
    assert {name: pairs(records) for name, records in found.items()} == {"": EXPECTED}


# Word vectors

TOKENS = ["<pad>", "tea", "Cup", "none", "mug"]
GLOVE = "tea 1 2\ncup 3 4.5\nother 9 9\nmug -1e-1 0\n"


def vectors(path, content, tokens=TOKENS, size=2):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_vectors(path, tokens, size)


def binary(words, size=2, newline=b"", count=None):
    content = f"{len(words) if count is None else count} {size}\n".encode()
    for word, numbers in words:
        content += word + b" " + struct.pack(f"<{size}f", *numbers) + newline
    return content


WORDS = [(b"tea", (1, 2)), (b"cup", (3, 4.5)), (b"other", (9, 9)), (b"mug", (-0.1, 0))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("v.txt", GLOVE),
        ("v.vec", "4 2\n" + GLOVE),
        ("v.vec", BOM + b"4 2\n" + GLOVE.encode()),
        ("v.txt", BOM + GLOVE.encode()),
        ("v.txt", GLOVE.replace(" ", "\t")),
        ("v.txt", "4\t2\n" + GLOVE.replace(" ", "\t")),
        ("v.txt", "4 2\n" + GLOVE.replace(" ", "\t", 1)),
        ("v.txt", GLOVE.replace("\n", "\r\n")),
        ("v.txt", GLOVE.replace("\n", " \n")),
        ("v.TXT.GZ", gzip.compress(GLOVE.encode(), mtime=0)),
        ("v.bin", binary(WORDS)),
        ("v.bin", binary(WORDS, newline=b"\n")),
        ("v.bin.gz", gzip.compress(binary(WORDS), mtime=0)),
    ],
)
def test_vectors_of_every_form_are_the_same(tmp_path, name, content):
    found, has, skipped = vectors(tmp_path / name, content)
    expected = torch.tensor([[0, 0], [1, 2], [3, 4.5], [0, 0], [-0.1, 0]])
    assert torch.equal(found, expected)
    assert has.tolist() == [False, True, True, False, True]
    assert skipped == 0


@pytest.mark.parametrize("own", ["Cup 5 6\ncup 3 4\n", "cup 3 4\nCup 5 6\n"])
def test_a_word_s_own_vector_wins_over_that_of_its_lower_case(tmp_path, own):
    found, _, _ = vectors(tmp_path / "v.txt", own, ["Cup", "cup"])
    assert found.tolist() == [[5, 6], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("v.txt", b"te\xe9 7 7\n" + GLOVE.encode()),
        ("v.txt", b"4 2\n" + GLOVE.encode() + b"\xff\xfe 7 7\n"),
        ("v.bin", binary([(b"te\xe9", (7, 7)), *WORDS])),
    ],
)
def test_a_word_of_vectors_that_is_no_utf8_is_skipped_and_counted(tmp_path, name, content):
    found, has, skipped = vectors(tmp_path / name, content)
    assert skipped == 1
    assert found[1].tolist() == [1, 2]
    assert has.tolist() == [False, True, True, False, True]


def test_words_with_spaces_have_vectors(tmp_path):
    found, _, _ = vectors(tmp_path / "v.txt", ". . . 1 2\nnew york 3 4\ntea 5 6\n", ["tea", "new york"])
    assert found.tolist() == [[5, 6], [3, 4]]


def test_fasttext_s_own_model_is_refused_with_what_to_take(tmp_path):
    content = struct.pack("<ii", 793712314, 12) + bytes(range(200)) * 5
    with pytest.raises(DataError, match=r"v\.bin:0: expected word2vec's binary form, .*fastText's own \.bin.*\.vec"):
        vectors(tmp_path / "v.bin", content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("v.bin", binary(WORDS, count=5), "expected 5 words, the file ends after 4"),
        ("v.bin", binary(WORDS)[:-1], "expected 4 words, the file ends within number 4"),
        (
            "v.bin",
            binary([(b"tea", (1, 2, 3))], 3),
            "expected vectors of 2 numbers, got 3: set model.embedding_dim = 3",
        ),
        ("v.vec", "1 3\ntea 1 2 3\n", "v.vec:1: expected vectors of 2 numbers, got 3: set model.embedding_dim = 3"),
        ("v.txt", "tea 1 2 3\n", "v.txt:1: expected vectors of 2 numbers, got 3"),
        ("v.txt", "tea 1\n", "v.txt:1: expected vectors of 2 numbers, got 1"),
        ("v.txt", GLOVE + "x 1\n", "v.txt:5: expected a word and 2 numbers, got 1 numbers"),
        ("v.txt", "tea 1 nan\n", "v.txt:1: expected finite numbers of 'tea'"),
        ("v.txt", "other 1 1\ntea 1 x\n", "v.txt:2: "),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, name, content, reason):
    with pytest.raises(DataError) as error:
        vectors(tmp_path / name, content)
    assert reason in str(error.value)


def test_a_token_may_begin_with_a_number_sign(tmp_path):
    (tmp_path / "a.conll").write_text("#newyork B-loc\nis O\n\n#news: O\nhello O\n\n# topic: sport\nrun O\n")
    rows = list(read_rows(tmp_path / "a.conll", columns=["tokens", "t"]))
    assert [row.values["tokens"] for row in rows] == [["#newyork", "is"], ["#news:", "hello"], ["run"]]
    assert rows[2].values["topic"] == "sport"


def test_columns_are_counted_past_the_head_of_a_document(tmp_path):
    (tmp_path / "a.conll").write_text("#begin document (bc); part 000\nEU B-org\nsaid O\n\nno O\n")
    assert count_columns(tmp_path / "a.conll") == 2


def test_a_language_model_beside_tags_leaves_the_columns_clear(tmp_path):
    (tmp_path / "a.conll").write_text("EU B-org\nsaid O\n\nno O\n")
    tasks = {"t": {"kind": "tagging"}, "words": {"kind": "language_model"}}
    raw = {"data": {"train": "a.conll", "valid": "a.conll"}, "tasks": tasks, "folder": str(tmp_path)}
    sets = read_all(configuration.parse(raw, "c.toml"))
    assert [record.labels["t"] for record in sets.train[""]] == [["B-org", "O"], ["O"]]
