"""Files answer as the models that they were made of: every scheme of sharing with every head, pooling and feature."""

import pytest
import torch
from parity import assert_parity, assert_same_bits
from programs import (
    EVERY_SCHEME,
    HEADS,
    PLAIN,
    answers_of,
    batch_of,
    combinations,
    loaded,
    logits_of,
    model_of,
    run,
    wide,
)

import pymtl
from pymtl.lowering import export

EVERY_FIELD = ("words", "characters", "pos", "signal")


def check(model, inputs, lengths, path, **options):
    """That the file's logits obey the rule of errors beside the model's; returns them."""
    export(model, path, **options)
    session = loaded(path).session()
    run(session, inputs, lengths)
    ours = logits_of(session)
    theirs = answers_of(model, inputs, lengths)
    truth = answers_of(*wide(model, inputs), lengths)
    model.float()
    assert_parity(ours, theirs, truth)
    return ours


@pytest.mark.parametrize("scheme", EVERY_SCHEME)
@pytest.mark.parametrize("options", combinations(layers=[1, 2], bidirectional=[False, True]), ids=str)
def test_every_scheme_with_every_head(scheme, options, tmp_path):
    model = model_of(scheme, fields=EVERY_FIELD, **options)
    check(model, *batch_of(EVERY_FIELD), tmp_path / "m.pymtl")


@pytest.mark.parametrize(
    "fields", [("words",), ("words", "filters"), ("characters",), ("filters", "signal"), ("signal",), ("pos", "words")]
)
def test_every_field(fields, tmp_path):
    check(model_of(fields=fields), *batch_of(fields), tmp_path / "m.pymtl")


@pytest.mark.parametrize(
    "kind", [pymtl.LSTM, pymtl.GRU, pymtl.RNN, lambda *a, **k: pymtl.RNN(*a, nonlinearity="relu", **k)]
)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": 0.3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_every_kind_of_layer_and_its_options(kind, options, layers, tmp_path):
    model = model_of(kind=lambda *a, **k: kind(*a, **k, **options), layers=layers)
    check(model, *batch_of(), tmp_path / "m.pymtl")


@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", [pymtl.LSTM, pymtl.GRU, pymtl.RNN])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": (0.2, 0.3)}], ids=str)
def test_the_bits_are_those_of_the_frozen_module(weights, kind, options, tmp_path, every_isa):
    if kind is not pymtl.LSTM and "zoneout" in options:
        options = {"zoneout": 0.2}
    heads = {task: HEADS[task] for task in PLAIN}
    model = model_of(heads=heads, kind=lambda *a, **k: kind(*a, **k, **options), layers=2, hidden=19)
    inputs, lengths = batch_of()
    export(model, tmp_path / "m.pymtl", weights=weights)
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, inputs, lengths)
    pymtl.freeze(model, weights)
    if "layer_norm" in options:  # whose products with the input are normalised by torch
        found, expected = logits_of(session), answers_of(model, inputs, lengths)
        assert max((found[task] - expected[task]).abs().max() for task in found) < (2e-2 if weights else 1e-5)
    else:
        assert_same_bits(logits_of(session), answers_of(model, inputs, lengths))


@pytest.mark.parametrize("characters", ["characters", "filters"])
def test_a_sequence_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads(characters, tmp_path, isa):
    model = model_of("shared_private", fields=("words", characters), layers=2, hidden=33)
    inputs, lengths = batch_of(("words", characters), [5, 12, 1, 7, 12, 3, 8, 2])
    export(model, tmp_path / "m.pymtl")
    whole = loaded(tmp_path / "m.pymtl", threads=1).session()
    run(whole, inputs, lengths)
    expected = logits_of(whole)
    for threads in (2, 3, 5):
        session = loaded(tmp_path / "m.pymtl", threads=threads).session()
        run(session, inputs, lengths)
        assert_same_bits(logits_of(session), expected)
        first = 0
        for number, length in enumerate(lengths.tolist()):
            alone = {name: x[number : number + 1, :length] for name, x in inputs.items()}
            run(session, alone, lengths[number : number + 1])
            of_tokens = {task.name for task in session.model.tasks if task.of_tokens}
            rows = {
                task: z[first : first + length] if task in of_tokens else z[number : number + 1]
                for task, z in expected.items()
            }
            assert_same_bits(logits_of(session), rows)
            first += length


def test_tasks_that_are_not_wanted_are_not_computed_and_have_no_answers(tmp_path):
    model = model_of("soft")
    inputs, lengths = batch_of()
    export(model, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, inputs, lengths)
    expected = logits_of(session)
    for task in HEADS:
        run(session, inputs, lengths, tasks=[task])
        assert_same_bits(logits_of(session, [task]), {task: expected[task]})
        with pytest.raises(ValueError, match="there are no answers: run a batch that asks for it first"):
            session.logits("slots" if task != "slots" else "intent")


def test_a_file_of_some_tasks_has_what_these_read_and_no_more(tmp_path):
    model = model_of("soft")
    inputs, lengths = batch_of()
    program = pymtl.lowering.lower(model, ["of tokens"])
    assert [task["name"] for task in program.tasks] == ["of tokens"]
    assert {name.split(".")[3] for name in program.tensors if name.startswith("encoder")} == {"of tokens", "slots"}
    export(model, tmp_path / "some.pymtl", tasks=["of tokens"])
    session = loaded(tmp_path / "some.pymtl").session()
    run(session, inputs, lengths)
    export(model, tmp_path / "all.pymtl")
    other = loaded(tmp_path / "all.pymtl").session()
    run(other, inputs, lengths)
    assert_same_bits(logits_of(session), logits_of(other, ["of tokens"]))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_beside_a_task(directions, tied, tmp_path):
    words = torch.nn.Embedding(50, 12, padding_idx=0)
    torch.manual_seed(0)
    heads = {
        "words": pymtl.LanguageModelHead(40, 7, words if tied else None),
        "slots": pymtl.TokenClassificationHead(3),
    }
    encoder = pymtl.LSTM(12, 10, batch_first=True, bidirectional=directions == 2)
    model = pymtl.MultiTaskModel(words, encoder, heads).eval()
    found = check(model, *batch_of(), tmp_path / "m.pymtl")
    assert found["words"].shape == (26, directions * 40)


@pytest.mark.parametrize("kind", [pymtl.LSTM, pymtl.GRU, pymtl.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"reverse": True}, {"num_layers": 3}], ids=str)
def test_layers_alone(kind, options, tmp_path):
    torch.manual_seed(0)
    layers = kind(7, 11, **options)
    export(layers, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    x = torch.randn(9, 1, 7)
    session.run([9], {"features": x[:, 0].numpy()})
    with torch.no_grad():
        assert_same_bits({"output": torch.from_numpy(session.logits("output"))}, {"output": layers(x)[0][:, 0]})
