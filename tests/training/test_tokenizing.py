"""Texts and their tokens."""

import itertools
import json
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymtl.serving.records import given_tokens, text_record, unlabelled_record
from pymtl.serving.tokenizing import JOINER, joined, pieces_of, places, tokens_of, went_on
from pymtl.training import config as configuration
from pymtl.training.data import read_all

# What tokenizers stumble over, with a bar between each and the next
PIECES = (
    "a|Z9|3.5|1,000|10:30|'|\u2019|don't|@|x@y.org|https://|http://a.b/c|.|-|_|+|$| |\n|\t|\u00a0|\u2003|\u3000|\x1c"
    "|\x85|\u200b|\u200d|\ufeff|\u00ad|\u0301|\u0300\u0323|\u093f|\u0e31|\u3099|\ufe0f|\u20e3|\u3042|\u30ac|\u6f22"
    "|\U00020000|\U0001f468\u200d\U0001f469|\U0001f44d\U0001f3fd|\u0130|\u00df|\u0661|\u00b2|\x00"
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES.split("|")), max_size=12).map("".join))
every_tokenizer = pytest.mark.parametrize("tokenizer", ["words", "whitespace", "characters"])


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("")
@example(" \u0301a ")
@example("e\u0301\u0301e\u0301 (\u0301")
def test_places_reproduce_the_tokens_and_no_character_but_spaces_is_lost(tokenizer, text):
    tokens, found = tokens_of(text, tokenizer), places(text, tokenizer)
    assert [text[first:last] for first, last in found] == tokens
    assert "".join(tokens) == "".join(text.split())
    assert all(first < last for first, last in found)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))
    assert not any(character.isspace() for token in tokens for character in token)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_whitespace_splits_as_python_does(text):
    assert tokens_of(text, "whitespace") == text.split()
    assert tokens_of(text, "characters") == [character for character in text if not character.isspace()]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_no_token_begins_with_a_mark_that_stands_on_something(text):
    for first, _ in places(text, "words"):
        is_mark = unicodedata.category(text[first]) in ("Mn", "Mc", "Me")
        assert not is_mark or first == 0 or text[first - 1].isspace()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I don't know.", ["I", "don't", "know", "."]),
        ("l\u2019\u00e9t\u00e9", ["l\u2019\u00e9t\u00e9"]),
        ("rock'n'roll 'quoted'", ["rock'n'roll", "'", "quoted", "'"]),
        ("3.50 1,000.5 10:30", ["3.50", "1,000.5", "10:30"]),
        ("It cost 3. Or 4, 5:", ["It", "cost", "3", ".", "Or", "4", ",", "5", ":"]),
        ("$3.50/kg (10%)", ["$", "3.50", "/", "kg", "(", "10", "%", ")"]),
        ("mail a.b+c@d-e.co.uk.", ["mail", "a.b+c@d-e.co.uk", "."]),
        ("see https://a.b/c?d=e, (http://x.y/z).", ["see", "https://a.b/c?d=e", ",", "(", "http://x.y/z", ")", "."]),
        ("wait... what?!", ["wait", ".", ".", ".", "what", "?", "!"]),
        ("snake_case x2", ["snake_case", "x2"]),
        ("well-known COVID-19 a -- b", ["well-known", "COVID-19", "a", "-", "-", "b"]),
        ("2/7/2021 2021-07-02 5-10", ["2/7/2021", "2021-07-02", "5-10"]),
        ("and/or -5 mid-", ["and", "/", "or", "-", "5", "mid", "-"]),
        ("\u6f22\u5b57 kana\u304b\u306a", ["\u6f22", "\u5b57", "kana", "\u304b", "\u306a"]),
        (
            "\u0441\u043b\u043e\u0432\u043e, \u03bb\u03cc\u03b3\u03bf\u03c2",
            ["\u0441\u043b\u043e\u0432\u043e", ",", "\u03bb\u03cc\u03b3\u03bf\u03c2"],
        ),
        ("", []),
        (" \n\t", []),
    ],
)
def test_words_are_split_from_signs(text, tokens):
    assert tokens_of(text, "words") == tokens


@pytest.mark.parametrize(
    "word",
    [
        "\u0915\u093e\u0930\u094d\u092f\u0915\u094d\u0930\u092e",  # Devanagari
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",  # Thai
        "\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f",  # Arabic with its vowels
        "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",  # Hebrew with its points
        unicodedata.normalize("NFD", "Vi\u1ec7t"),
        unicodedata.normalize("NFD", "na\u00efvet\u00e9"),
        "e\u0323\u0301\u0302x",
    ],
)
def test_marks_stay_with_their_letters(word):
    assert tokens_of(f"({word}, {word})", "words") == ["(", word, ",", word, ")"]


@pytest.mark.parametrize(
    "text",
    [
        "caf\u00e9s, na\u00efve.",
        "l'\u00e9t\u00e9",
        "Andr\u00e9's caf\u00e9's",  # an apostrophe behind a letter with an accent
        "caf\u00e9-bar",
        "\u304c\u304e\u3050",  # kana with marks of voice: each a token
        "\u30d1\u30d4",
    ],
)
def test_composed_and_decomposed_letters_give_the_same_tokens(text):
    composed, decomposed = (tokens_of(unicodedata.normalize(form, text), "words") for form in ("NFC", "NFD"))
    assert [unicodedata.normalize("NFC", token) for token in decomposed] == composed


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("one,\u200btwo", ["one", ",", "two"]),  # a zero-width space
        ("(\u200f\u05e9\u05dc\u05d5\u05dd)", ["(", "\u05e9\u05dc\u05d5\u05dd", ")"]),  # a mark of direction
    ],
)
def test_signs_without_a_width_do_not_join_a_word_to_a_sign(text, tokens):
    found = tokens_of(text, "words")
    assert [token.strip("\u200b\u200f") for token in found if token.strip("\u200b\u200f")] == tokens


@pytest.mark.parametrize("piece", [".", "-", "a.", "1.a", "_+"])
def test_a_long_text_without_spaces_takes_no_quadratic_time(piece):
    text = piece * (16_000 // len(piece))
    begin = time.process_time()
    assert "".join(tokens_of(text, "words")) == text
    assert time.process_time() - begin < 0.2


# What "auto" becomes

TAGGED = {"tags": {"kind": "tagging"}}
CLASSES = {"mood": {"kind": "classification"}}


@pytest.fixture
def read(tmp_path):
    def read(records, tasks, name="a.jsonl", **data):
        content = records if isinstance(records, str) else "".join(json.dumps(each) + "\n" for each in records)
        (tmp_path / name).write_text(content, encoding="utf-8")
        raw = {"data": {"train": name, "valid": name, **data}, "tasks": tasks, "folder": str(tmp_path)}
        return read_all(configuration.parse(raw, "c.toml"))

    return read


@pytest.mark.parametrize(
    ("records", "tasks", "tokenizer", "tokens"),
    [
        ([{"text": "Hi, you!", "mood": "x"}], CLASSES, "words", ["Hi", ",", "you", "!"]),
        ([{"text": "Hi, you!", "tags": ["O", "O"]}], TAGGED, "whitespace", ["Hi,", "you!"]),
        ([{"text": "a,b", "tags": [None]}, {"text": "c", "tags": None}], TAGGED, "whitespace", ["a,b"]),
        ([{"text": "Hi, you!", "tags": [[0, 2, "x"]]}], TAGGED, "words", ["Hi", ",", "you", "!"]),
        (
            [{"text": "Hi, you!", "tags": []}, {"text": "a", "tags": [[0, 1, "x"]]}],
            TAGGED,
            "words",
            ["Hi", ",", "you", "!"],
        ),
        ([{"tokens": ["Hi, you", "!"], "tags": ["O", "O"]}] * 9, TAGGED, "whitespace", ["Hi, you", "!"]),
        ([{"tokens": ["Hi", ",", "you"], "tags": ["O", "O", "B"]}], TAGGED, "words", ["Hi", ",", "you"]),
        ([{"tokens": ["Hi,", "you!"], "mood": "x"}], CLASSES, "whitespace", ["Hi,", "you!"]),
        ([{"tokens": ["Hi, you"], "mood": "x"}, {"tokens": "a, b", "mood": "x"}], CLASSES, "words", ["Hi, you"]),
    ],
)
def test_auto_is_seen_from_the_data(read, records, tasks, tokenizer, tokens):
    sets = read(records, tasks)
    assert sets.config.sets[""].tokenizer == tokenizer
    assert sets.train[""][0].tokens == tokens


@pytest.mark.parametrize(
    ("content", "tasks", "tokenizer", "tokens"),
    [
        ('text,mood\n"Hi, you!",x\n', CLASSES, "words", ["Hi", ",", "you", "!"]),
        ('text,tags\n"Hi, you!",O B-x\n', TAGGED, "whitespace", ["Hi,", "you!"]),
        ('text,tags\n"Hi, you!","[[0, 2, ""x""]]"\n', TAGGED, "words", ["Hi", ",", "you", "!"]),
    ],
)
def test_auto_is_seen_from_a_table_too(read, content, tasks, tokenizer, tokens):
    sets = read(content, tasks, "a.csv")
    assert sets.config.sets[""].tokenizer == tokenizer
    assert sets.train[""][0].tokens == tokens


@pytest.mark.parametrize(("tokenizer", "tokens"), [("words", ["hi", ",", "you"]), ("whitespace", ["hi,", "you"])])
def test_a_tokenizer_that_the_configuration_names_is_taken_for_every_text(read, tokenizer, tokens):
    sets = read([{"text": "Hi, you", "mood": "x"}], CLASSES, tokenizer=tokenizer, lowercase=True)
    record = sets.train[""][0]
    assert record.tokens == tokens
    assert text_record("Hi, you", sets.config).tokens == tokens
    assert unlabelled_record({"text": "Hi, you", "mood": "x"}, sets.config).tokens == tokens
    assert [token.lower() for token in given_tokens(record, sets.config.sets[""])] == tokens
    assert given_tokens(record, sets.config.sets[""])[0].startswith("Hi")


def test_validation_and_test_texts_are_split_as_those_of_training(read, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"text": "b, c", "tags": [[0, 1, "x"]]}\n')
    (tmp_path / "t.jsonl").write_text('{"text": "b, c"}\n')
    sets = read([{"text": "a, b", "tags": ["O", "B-x"]}], TAGGED, valid="v.jsonl", test="t.jsonl")
    assert [records[""][0].tokens for records in (sets.train, sets.valid, sets.test)] == [
        ["a,", "b"],
        ["b,", "c"],
        ["b,", "c"],
    ]
    assert sets.valid[""][0].labels["tags"] == ["B-x", "O"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("OK, (Ann) won't.", "OK ￭, (￭ Ann ￭) won't ￭."),
        ("'Ann-Lee's' 3.50€!?", "'￭ Ann-Lee ￭'s ￭' 3.50 ￭€ ￭! ￭?"),
        ('f("x", y)', 'f ￭( ￭"￭ x ￭" ￭, y ￭)'),
        ("我们 去。", "我 们 ￭␠￭ 去 ￭。"),
        ("我是Ann们", "我 是￭ Ann ￭们"),
        ("3.50kg", "3 ￭.￭ 50kg"),
        ("a / b/c", "a / b ￭/￭ c"),
        ("", ""),
    ],
)
def test_pieces_are_words_and_the_signs_beside_them(text, pieces):
    expected = [piece.replace("␠", " ") for piece in pieces.split()]
    assert pieces_of(text) == expected
    assert joined(expected) == text


@given(TEXTS.filter(lambda text: JOINER not in text))
@settings(max_examples=500)
def test_any_text_is_made_of_its_pieces_again(text):
    assert joined(pieces_of(text)) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "tokens", "tokenizer", "expected"),
    [
        ("once upon", ["a", "time", "."], "words", "once upon a time ."),
        ("once ", ["upon"], "whitespace", "once upon"),
        ("", ["a", "b"], "words", "a b"),
        ("a b", ["c", "d"], "characters", "a bcd"),
        ("\u65e5\u672c", ["\u8a9e", "x"], "words", "\u65e5\u672c\u8a9e x"),
        ("\u65e5", ["\u672c"], "whitespace", "\u65e5 \u672c"),
    ],
)
def test_a_text_goes_on_with_the_spaces_that_tokens_tell_of(text, tokens, tokenizer, expected):
    assert went_on(text, tokens, tokenizer) == expected
