"""Schemes of tags: the spans they mean, the sequences they allow, and what a CRF makes of them."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pymtl import CRF
from pymtl.serving import tags
from pymtl.serving.records import Record
from pymtl.training import config as configuration
from pymtl.training.building import model_of
from pymtl.training.data import read_all
from pymtl.training.errors import DataError
from pymtl.training.metrics import score
from pymtl.training.vocabulary import Vocabulary

LETTERS = {"bio": "BI", "iob1": "BI", "iobes": "BIES", "bilou": "BILU"}
every_scheme = pytest.mark.parametrize("scheme", list(LETTERS))


def labels_of(scheme, kinds="xy"):
    return ["O", *(f"{letter}-{kind}" for kind in kinds for letter in LETTERS[scheme])]


def sequences(scheme, kinds=("x", "y", "x-z"), alone=False):
    names = ["O", *LETTERS[scheme]] if alone else labels_of(scheme, kinds)
    return st.lists(st.sampled_from(names), max_size=12)


def well_formed(rng, scheme, length=9, kinds="xy"):
    """Random tags and their spans."""
    found, spans = [], []
    while len(found) < length:
        size = min(rng.randrange(1, 5), length - len(found))
        if rng.random() < 0.4:
            found += ["O"] * size
            continue
        kind = rng.choice(kinds)
        before = spans[-1] if spans and spans[-1][2] == len(found) - 1 else None
        spans.append((kind, len(found), len(found) + size - 1))
        first, inside, last, unit = {
            "bio": "BIIB",
            "iob1": "BIIB" if before is not None and before[0] == kind else "IIII",
            "iobes": "BIES",
            "bilou": "BILU",
        }[scheme]
        letters = unit if size == 1 else first + inside * (size - 2) + last
        found += [f"{letter}-{kind}" for letter in letters]
    return found, spans


# Spans


def as_seqeval_reads(sequence):
    letters = {"L": "E", "U": "S"}
    return get_entities([letters.get(tag[0], tag[0]) + tag[1:] for tag in sequence])


@pytest.mark.parametrize("alone", [False, True], ids=["named", "alone"])
@every_scheme
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_spans_of_any_tags_are_those_that_seqeval_finds(scheme, alone, data):
    sequence = data.draw(sequences(scheme, alone=alone))
    assert tags.spans_of(sequence) == as_seqeval_reads(sequence)


@settings(max_examples=300, deadline=None)
@given(
    sequence=st.lists(st.sampled_from(["O", "B", "I", "E", "S", "L", "U", *labels_of("iobes"), *labels_of("bilou")]))
)
@example(["I-x", "I-y", "E-y", "E-y", "S-y", "I-y"])
def test_spans_of_mixed_schemes_are_those_that_seqeval_finds(sequence):
    assert tags.spans_of(sequence) == as_seqeval_reads(sequence)


@every_scheme
def test_spans_of_well_formed_tags_are_those_they_were_made_of(scheme):
    rng = random.Random(0)
    for _ in range(200):
        sequence, spans = well_formed(rng, scheme)
        assert tags.first_fault(sequence, scheme) is None
        assert all(tags.belongs_to(tag, scheme) for tag in sequence)
        assert tags.spans_of(sequence) == spans


def test_tags_of_spans_are_bio_and_come_back():
    rng = random.Random(0)
    for _ in range(200):
        sequence, spans = well_formed(rng, "bio")
        assert tags.tags_of(spans, len(sequence)) == sequence


def test_spans_without_a_name_are_tagged_with_the_letters_alone():
    assert tags.spans_of(["B", "I", "O", "B", "B"]) == [("_", 0, 1), ("_", 3, 3), ("_", 4, 4)]
    assert tags.tags_of([("_", 0, 1), ("_", 3, 3)], 4) == ["B", "I", "O", "B"]


# What follows what


@pytest.mark.parametrize(
    ("scheme", "allowed", "first", "last"),
    [
        ("bio", ["OO", "OB", "BO", "BB", "BI", "IO", "IB", "II"], "OB", "OBI"),
        ("iob1", ["OO", "OI", "BO", "BB", "BI", "IO", "IB", "II"], "OI", "OBI"),
        ("iobes", ["OO", "OB", "OS", "BI", "BE", "II", "IE", "EO", "EB", "ES", "SO", "SB", "SS"], "OBS", "OES"),
        ("bilou", ["OO", "OB", "OU", "BI", "BL", "II", "IL", "LO", "LB", "LU", "UO", "UB", "UU"], "OBU", "OLU"),
    ],
)
def test_what_a_scheme_allows_within_one_type(scheme, allowed, first, last):
    def name(letter):
        return letter if letter == "O" else f"{letter}-x"

    letters = "O" + LETTERS[scheme]
    for a, b in itertools.product(letters, repeat=2):
        assert tags.may_follow(name(a), name(b), scheme) == (a + b in allowed)
    assert "".join(a for a in letters if tags.may_follow(None, name(a), scheme)) == first
    assert "".join(sorted(a for a in letters if tags.may_follow(name(a), None, scheme))) == "".join(sorted(last))


@pytest.mark.parametrize(
    ("scheme", "before", "after", "allowed"),
    [
        ("bio", "B-x", "I-y", False),
        ("bio", "I-x", "B-y", True),
        ("iob1", "I-x", "I-y", True),
        ("iob1", "I-x", "B-y", False),
        ("iobes", "B-x", "E-y", False),
        ("iobes", "E-x", "B-y", True),
        ("iobes", "B-x", "S-y", False),
        ("bilou", "I-x", "L-y", False),
        ("bilou", "L-x", "U-y", True),
    ],
)
def test_what_a_scheme_allows_between_types(scheme, before, after, allowed):
    assert tags.may_follow(before, after, scheme) == allowed


@pytest.mark.parametrize(
    ("scheme", "sequence", "fault"),
    [
        ("bio", ["O", "I-x"], 1),
        ("bio", ["I-x"], 0),
        ("bio", [None, "I-x"], None),
        ("bio", ["B-x", None, "I-y"], None),
        ("iobes", ["O", "B-x"], 2),
        ("iobes", ["B-x", None], None),
        ("iobes", ["B-x", "E-x", "I-x"], 2),
        ("bilou", ["U-x", "L-x"], 1),
        ("iob1", ["I-x", "O", "B-x"], 2),
        ("bio", [], None),
        ("iobes", [], None),
    ],
)
def test_the_first_fault_is_found(scheme, sequence, fault):
    assert tags.first_fault(sequence, scheme) == fault


# Which scheme it is


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([["O", "B-x", "I-x"]], "bio"),
        ([["B-x", "B-x"]], "bio"),
        ([["B-x", "E-x"]], "iobes"),
        ([["O", "S-x"]], "iobes"),
        ([["B-x", "L-x"]], "bilou"),
        ([["O", "U-x"], ["B-y", "I-y", "L-y"]], "bilou"),
        ([["I-x", "B-x"], ["O", "I-y"]], "iob1"),
        ([["I-x"], ["B-x"]], "bio"),  # goes against both
        ([["O"]], None),
        ([], None),
        ([["NOUN", "VERB"]], None),
        ([["O", "NOUN"]], None),
        ([["B-x", "NOUN"]], None),
        ([["S-x", "U-x"]], None),
        ([["B", "I", "O"]], "bio"),
        ([["B", "E"], ["S"]], "iobes"),
        ([["S", "O"]], None),
        ([[None, "B-x"], [None]], "bio"),
    ],
)
def test_the_scheme_is_seen_from_the_tags(sentences, scheme):
    assert tags.scheme_of(sentences) == scheme


@every_scheme
def test_the_scheme_of_many_sentences_is_theirs(scheme):
    rng = random.Random(1)
    assert tags.scheme_of([well_formed(rng, scheme)[0] for _ in range(60)]) == scheme


# In training


@pytest.fixture
def read(tmp_path):
    def read(sentences, tags_of_valid=None, **task):
        for name, rows in (("a", sentences), ("b", tags_of_valid or sentences)):
            lines = (json.dumps({"tokens": ["w"] * len(row), "t": row}) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        raw = {"data": {"train": "a.jsonl", "valid": "b.jsonl"}, "tasks": {"t": {"kind": "tagging", **task}}}
        return read_all(configuration.parse({**raw, "folder": str(tmp_path)}, "c.toml"))

    return read


@every_scheme
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_the_configuration_that_comes_back_names_the_scheme(read, scheme, asked):
    rng = random.Random(2)
    sentences = [well_formed(rng, scheme)[0] for _ in range(40)]
    sets = read(sentences, scheme="auto" if asked == "auto" else scheme, decoder="crf", constrained=True)
    assert sets.config.tasks["t"].scheme == scheme
    assert sets.notes == [f"t: tags of spans, scheme {scheme}"]


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_other_tags_have_no_scheme(read, asked):
    sets = read([["NOUN", "VERB"], ["NOUN"]], scheme=asked)
    assert sets.config.tasks["t"].scheme == "none"
    assert sets.notes == []


def test_tags_of_spans_may_be_taken_for_tags_of_tokens(read):
    sets = read([["B-x", "I-x"], ["O"]], scheme="none")
    assert sets.config.tasks["t"].scheme == "none"
    result = score(
        [Record(["w"] * 2, {"t": ["B-x", "I-x"]})], [{"t": ["B-x", "O"]}], sets.config, {"t": ["B-x", "I-x"]}
    )
    assert result["t/accuracy"] == 0.5
    assert "t/f1" not in result


@pytest.mark.parametrize(
    ("sentences", "task", "reason"),
    [
        (
            [["O"], ["O", "U-x"]],
            {"scheme": "iobes"},
            "a.jsonl:2: field 't': expected tags of the scheme iobes, got 'U-x' at token 2",
        ),
        ([["S-x"]], {"scheme": "bio"}, "a.jsonl:1: field 't': expected tags of the scheme bio, got 'S-x' at token 1"),
        ([["O", "NOUN"]], {"scheme": "bilou"}, "expected tags of the scheme bilou, got 'NOUN' at token 2"),
        ([["O", "B-"]], {"scheme": "bio"}, "expected tags of the scheme bio, got 'B-' at token 2"),
        (
            [["B-x", "O", "S-x"]],
            {"constrained": True},
            "'O' at token 2 follows 'B-x', which constrained = true with scheme = 'iobes' forbids",
        ),
        (
            [["S-x", "B-x"]],
            {"constrained": True},
            "the sentence ends behind 'B-x', which constrained = true with scheme = 'iobes' forbids",
        ),
        (
            [["S-x", "E-x"]],
            {"constrained": True},
            "'E-x' at token 2 follows 'S-x', which constrained = true with scheme = 'iobes' forbids",
        ),
        (
            [["B-x"], ["O", "I-x"]],
            {"bio": True},
            "a.jsonl:2: field 't': 'I-x' at token 2 follows 'O', which bio = true forbids",
        ),
        ([["NOUN"]], {"constrained": True}, "task 't': expected tags of spans with constrained = true"),
        ([["S-x", "U-x"]], {"constrained": True}, "U-x"),
    ],
)
def test_tags_against_the_scheme_are_refused_by_name(read, sentences, task, reason):
    options = {"decoder": "crf", **task} if "scheme" not in task else task
    with pytest.raises(DataError) as error:
        read(sentences, **options)
    assert reason in str(error.value)


def test_tags_that_follow_wrongly_are_taken_without_constraints(read):
    sets = read([["S-x", "E-x"], ["B-x", "O"]], decoder="crf")
    assert sets.config.tasks["t"].scheme == "iobes"
    assert [record.labels["t"] for record in sets.train[""]] == [["S-x", "E-x"], ["B-x", "O"]]


@every_scheme
def test_span_f1_counts_spans_of_every_scheme(read, scheme):
    rng = random.Random(3)
    sentences = [well_formed(rng, scheme) for _ in range(40)]
    guessed = [well_formed(rng, scheme) if i % 2 else sentences[i] for i in range(40)]
    config = read([sentence for sentence, _ in sentences]).config
    records = [Record(["w"] * 9, {"t": sentence}) for sentence, _ in sentences]
    result = score(records, [{"t": sentence} for sentence, _ in guessed], config, {"t": labels_of(scheme)})
    true, found = ({(i, *span) for i, (_, spans) in enumerate(each) for span in spans} for each in (sentences, guessed))
    assert 0 < len(true & found) < len(true)
    assert result["t/f1"] == pytest.approx(2 * len(true & found) / (len(true) + len(found)))


@pytest.mark.parametrize(
    ("scheme", "truth", "guess", "f1"),
    [
        ("iobes", ["B-x", "E-x", "S-y"], ["B-x", "E-x", "S-x"], 0.5),
        ("iobes", ["B-x", "I-x", "E-x"], ["B-x", "E-x", "O"], 0.0),
        ("bilou", ["B-x", "L-x", "U-x"], ["B-x", "L-x", "U-x"], 1.0),
        ("bilou", ["B-x", "L-x", "U-x"], ["B-x", "I-x", "L-x"], 0.0),
        ("iob1", ["I-x", "B-x", "O"], ["I-x", "I-x", "O"], 0.0),
        ("iob1", ["I-x", "B-x", "O"], ["I-x", "B-x", "O"], 1.0),
        ("bilou", ["U-x", None, "U-x"], ["U-x", "U-x", "O"], 2 / 3),
    ],
)
def test_span_f1_of_small_cases(scheme, truth, guess, f1):
    task = {"kind": "tagging", "scheme": scheme}
    config = configuration.parse({"data": {"train": "a", "valid": "b"}, "tasks": {"t": task}}, "c.toml")
    result = score([Record(["w"] * 3, {"t": truth})], [{"t": guess}], config, {"t": labels_of(scheme)})
    assert result["t/f1"] == pytest.approx(f1)


@every_scheme
def test_a_model_of_a_constrained_task_is_bound_to_its_scheme(read, scheme):
    rng = random.Random(4)
    sets = read([well_formed(rng, scheme)[0] for _ in range(40)], decoder="crf", constrained=True)
    vocabulary = Vocabulary.of(sets.train[""], sets.config)
    labels = vocabulary.labels["t"]
    assert sorted(labels) == sorted(labels_of(scheme))
    model = model_of(sets.config, vocabulary)
    crf = model.heads["t"].crf
    assert (crf.scheme, crf.labels) == (scheme, labels)
    found = [[labels[i] for i in row] for row in crf.decode(5 * torch.randn(30, 6, len(labels)))[0].tolist()]
    assert all(tags.first_fault(row, scheme) is None for row in found)


# The CRF


def crf_of(labels, scheme="bio", batch_first=True):
    crf = CRF(len(labels), labels, batch_first, scheme)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf.double()


@torch.no_grad()
def paths(crf, emissions):
    """Every path of one sentence [T, C] that the scheme allows, and its score without the scheme's bounds."""
    found = {}
    for path in itertools.product(range(crf.num_tags), repeat=len(emissions)):
        names = [None] if crf.labels is None else [None, *(crf.labels[i] for i in path), None]
        if not all(tags.may_follow(a, b, crf.scheme) for a, b in itertools.pairwise(names)):
            continue
        value = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
        value = value + sum(emissions[t, y] for t, y in enumerate(path))
        found[path] = float(value + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path)))
    return found


@pytest.mark.parametrize("kinds", ["x", "xy"])
@every_scheme
@torch.no_grad()
def test_decoding_finds_the_best_of_the_allowed_paths(scheme, kinds):
    labels = labels_of(scheme, kinds)
    for length in range(1, 4 if kinds == "xy" else 5):
        crf = crf_of(labels, scheme)
        emissions = 2 * torch.randn(5, length, len(labels), dtype=torch.float64)
        found, scores = crf.decode(emissions)
        for row in range(5):
            every = paths(crf, emissions[row])
            best = max(every, key=every.get)
            assert tuple(found[row].tolist()) == best
            assert scores[row].item() == pytest.approx(every[best])


@every_scheme
@torch.no_grad()
def test_the_likelihoods_of_the_allowed_paths_sum_to_one_and_others_have_none(scheme):
    labels = labels_of(scheme, "x")
    crf = crf_of(labels, scheme)
    emissions = torch.randn(1, 3, len(labels), dtype=torch.float64)
    every = list(itertools.product(range(len(labels)), repeat=3))
    values = crf.log_likelihood(emissions.expand(len(every), -1, -1).contiguous(), torch.tensor(every))
    allowed = paths(crf, emissions[0])
    assert [path for path, value in zip(every, values) if value > -torch.inf] == list(allowed)
    assert values.exp().sum().item() == pytest.approx(1)


def test_a_sentence_of_one_token_has_a_span_of_one_token_or_none():
    for scheme, unit in (("bio", "B-x"), ("iob1", "I-x"), ("iobes", "S-x"), ("bilou", "U-x")):
        labels = labels_of(scheme, "x")
        emissions = torch.full((1, 1, len(labels)), 10.0, dtype=torch.float64)
        emissions[0, 0, 0] = -10
        assert labels[crf_of(labels, scheme).decode(emissions)[0].item()] == unit


@pytest.mark.parametrize(
    ("labels", "scheme", "reason"),
    [
        (["O", "B-x", "U-x"], "iobes", "labels: expected tags of the scheme iobes, got 'U-x'"),
        (["O", "NOUN"], "bilou", "labels: expected tags of the scheme bilou, got 'NOUN'"),
        (["O", "E-x"], "iob1", "labels: expected tags of the scheme iob1, got 'E-x'"),
        (["B-x", "E-x"], "iobes", "labels: expected O or a span of one token among the tags of iobes, got neither"),
        (["O", "B-x"], "none", "scheme: expected one of bio, iob1, iobes, bilou, got 'none'"),
        (["O", "B-x"], "BIO", "scheme: expected one of bio, iob1, iobes, bilou, got 'BIO'"),
    ],
)
def test_labels_of_another_scheme_are_refused(labels, scheme, reason):
    with pytest.raises(ValueError, match=reason):
        CRF(len(labels), labels, scheme=scheme)


@pytest.mark.parametrize(
    ("labels", "scheme"), [(["I-x", "I-y", "B-x"], "iob1"), (["S-x", "B-x", "E-x"], "iobes"), (["B-x", "I-x"], "bio")]
)
def test_tags_without_o_are_bound_too(labels, scheme):
    crf = crf_of(labels, scheme)
    found = crf.decode(3 * torch.randn(20, 4, len(labels), dtype=torch.float64))[0]
    assert all(tags.first_fault([labels[i] for i in row], scheme) is None for row in found.tolist())


# Marginals

LENGTHS = [3, 1, 4, 2]


def marginal_case(labels, scheme="bio", batch_first=True):
    crf = CRF(3, None, batch_first) if labels is None else CRF(len(labels), labels, batch_first, scheme)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    crf = crf.double()
    emissions = torch.randn(4, 4, crf.num_tags, dtype=torch.float64)
    expected = torch.zeros_like(emissions)
    for row, length in enumerate(LENGTHS):
        every = paths(crf, emissions[row, :length])
        weights = torch.tensor(list(every.values()), dtype=torch.float64).softmax(0)
        for path, weight in zip(every, weights):
            for t, y in enumerate(path):
                expected[row, t, y] += weight
    if not batch_first:
        emissions, expected = (each.transpose(0, 1).contiguous() for each in (emissions, expected))
    return crf, emissions, expected


every_case = pytest.mark.parametrize(
    ("labels", "scheme"),
    [(None, "bio"), (labels_of("bio"), "bio"), *((labels_of(each, "x"), each) for each in ("iob1", "iobes", "bilou"))],
    ids=["free", "bio", "iob1", "iobes", "bilou"],
)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@every_case
def test_marginals_are_those_of_all_paths(labels, scheme, batch_first, packed, mode):
    crf, emissions, expected = marginal_case(labels, scheme, batch_first)
    with mode():
        inputs = emissions.clone()
        if packed:
            found = crf.marginals(pack_padded_sequence(inputs, LENGTHS, batch_first, enforce_sorted=False))
            found = pad_packed_sequence(found, batch_first)[0]
        else:
            found = crf.marginals(inputs, LENGTHS)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@every_case
def test_marginals_of_whole_sentences_need_no_lengths(labels, scheme):
    crf, emissions, _ = marginal_case(labels, scheme)
    found = crf.marginals(emissions)
    assert torch.equal(found, crf.marginals(emissions, [4] * 4))
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 4, dtype=torch.float64))


def test_marginals_leave_the_parameters_gradients_alone():
    crf, emissions, _ = marginal_case(None)
    emissions.requires_grad_()
    crf(emissions, torch.zeros(4, 4, dtype=torch.int64)).backward()
    before = [parameter.grad.clone() for parameter in (*crf.parameters(), emissions)]
    crf.marginals(emissions)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, (*crf.parameters(), emissions)))


def test_marginals_in_bfloat16_are_float32():
    crf, emissions, expected = marginal_case(None)
    found = crf.to(torch.bfloat16).marginals(emissions.to(torch.bfloat16), LENGTHS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("then", ["marginals", "training"])
def test_a_crf_that_first_decoded_in_inference_mode_can_be_differentiated(then):
    crf, emissions, expected = marginal_case(labels_of("bio"))
    with torch.inference_mode():
        crf.decode(emissions, LENGTHS)
        if then == "marginals":
            torch.testing.assert_close(crf.marginals(emissions, LENGTHS), expected)
    if then == "training":
        crf(emissions, torch.zeros(4, 4, dtype=torch.int64), LENGTHS).backward()
        assert crf.transitions.grad.isfinite().all()
