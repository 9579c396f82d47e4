"""Files of models whose answers are generated: searches, steps and the likeliest answers are those of the model."""

import json
import sys
import threading

import numpy as np
import pytest
import torch
from parity import assert_parity
from programs import FIELDS, batch_of, combinations, loaded, pymtl_runtime, run

import pymtl
from pymtl.__main__ import main
from pymtl.lowering import export, lower

CLASSES = 11
SEARCHES = [
    None,
    pymtl.Search(beam_size=4, nbest=3, coverage_penalty=0.1),
    pymtl.Search(beam_size=3, no_repeat_ngram=2, length_penalty=0.5, max_length=5),
    pymtl.Search(sample=True, nbest=2, temperature=1.5, seed=3),
    pymtl.Search(sample=True, top_k=3, top_p=0.8),
]
EVERY_DECODER = [
    options
    for options in combinations(
        cell=["lstm", "gru"],
        attention=["dot", "general", "additive"],
        attention_heads=[1, 2],
        tied=[False, True],
        num_layers=[1, 2],
    )
    if options["attention_heads"] == 1 or options["num_layers"] == 2
]


SOURCES = "said/sources"


def sources_of(lengths):
    """Of a decoder that copies what each token is among its classes, padded: some none, of one sequence many."""
    rng = np.random.default_rng(1)
    found = torch.from_numpy(rng.integers(0, CLASSES + 2, (len(lengths), int(max(lengths)))))
    found[1, ::2] = CLASSES + 4
    return found


def model_of(fields=("words",), encoder=None, head=None, **options):
    """A decoder beside a task of classes, with weights as large as trained ones."""
    torch.manual_seed(0)
    head = head or pymtl.DecoderHead(CLASSES, 12, embedding_dim=7, **options)
    embedding = FIELDS["words"]() if fields == ("words",) else pymtl.TokenFeatures({f: FIELDS[f]() for f in fields})
    size = 12 if fields == ("words",) else 15
    encoder = encoder(size) if encoder else pymtl.LSTM(size, 6, batch_first=True, bidirectional=True)
    model = pymtl.MultiTaskModel(embedding, encoder, {"said": head, "mood": pymtl.ClassificationHead(3)}).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(3)
    return model


def with_sources(model, inputs, lengths):
    """The file's inputs, and the model's sources, of a decoder that copies."""
    if not model.heads["said"].copy:
        return inputs, None
    sources = sources_of(lengths)
    return inputs | {SOURCES: sources}, {"said": sources}


def check(model, path, fields=("words",), searches=SEARCHES, **options):
    """That the file answers as the model does."""
    export(model, path, never={"said": [1, 4]}, max_length=9, **options)
    inputs, lengths = batch_of(fields)
    given = inputs if isinstance(model.embedding, pymtl.TokenFeatures) else inputs["words"]
    inputs, sources = with_sources(model, inputs, lengths)
    session = loaded(path).session()
    arguments = {"max_length": 9, "never": [1, 4], "sources": sources}
    for search in searches:
        run(session, inputs, lengths, by_steps=True)
        ours = session.generate("said", search, max_length=9, attention=True, never=[1, 4])
        theirs = model.generate(given, lengths, "said", search, attention=True, **arguments)
        assert len(ours) == len(theirs) == len(lengths)
        for own, others in zip(ours, theirs):
            assert [each.tokens for each in own] == [each.tokens for each in others]
            for a, b in zip(own, others):
                assert a.score == pytest.approx(b.score, abs=1e-4)
                assert a.ended == b.ended
                np.testing.assert_allclose(a.attention, b.attention, atol=1e-5)
    run(session, inputs, lengths, probabilities=True)
    answer = session.answer("said")
    found = model.generate(given, lengths, "said", **arguments)
    for ids, probabilities, probability, (best,) in zip(
        answer.ids, answer.probabilities, answer.probability, found, strict=True
    ):
        assert ids.tolist() == best.tokens
        assert np.log(probability) == pytest.approx(best.log_probability, abs=1e-4)
        assert len(probabilities) == len(ids)
        assert probability <= np.prod(probabilities) * (1 + 1e-6)  # which the end's is not among
    assert answer.numbers is None


@pytest.mark.parametrize("options", EVERY_DECODER, ids=str)
def test_every_decoder(options, tmp_path):
    check(model_of(**options), tmp_path / "m.pymtl")


@pytest.mark.parametrize("options", EVERY_DECODER[::3], ids=str)
def test_every_decoder_that_copies(options, tmp_path):
    check(model_of(copy=True, **options), tmp_path / "m.pymtl")


@pytest.mark.parametrize(
    "encoder",
    [
        lambda size: pymtl.GRU(size, 12, batch_first=True),
        lambda size: pymtl.LSTM(size, 6, 2, batch_first=True, bidirectional=True),
        lambda size: pymtl.sharing.SCHEMES["soft"](["said", "mood"], size, 6, 1, True),
        lambda size: pymtl.sharing.SCHEMES["mmoe"](["said", "mood"], size, 6, 1, True),
    ],
)
def test_every_encoder(encoder, tmp_path):
    check(model_of(encoder=encoder), tmp_path / "m.pymtl")


@pytest.mark.parametrize("copy", [False, True])
def test_what_a_decoder_reads_besides(copy, tmp_path):
    """Characters, the tokens' own features, and another task's answer."""
    reads = pymtl.Reads(skip=True, after="mood")
    head = pymtl.DecoderHead(CLASSES, 14, embedding_dim=7, reads=reads, attention_heads=1, copy=copy)
    check(model_of(("words", "pos"), head=head), tmp_path / "m.pymtl", ("words", "pos"))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_narrow_weights_answer_as_the_frozen_model(weights, cell, tmp_path):
    model = model_of(cell=cell, num_layers=2)
    path = tmp_path / "m.pymtl"
    export(model, path, weights=weights)
    assert path.stat().st_size < 0.8 * (export(model, tmp_path / "f.pymtl") or (tmp_path / "f.pymtl").stat().st_size)
    pymtl.freeze(model, weights)
    # Not closer: torch's tanh of what the decoder begins with may round an 8-bit number the other way.
    expected = steps_of_model(model)
    for name, found in steps_of_session(path, model).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-3)


def steps_of(classes):
    """Of some steps what hypotheses read, and which they go on from: some twice, and some never; at the first step the
    sequences, which the others belong to."""
    rng = np.random.default_rng(0)
    parents = sequences = np.array([4, 0, 1, 1, 3])
    for step in range(6):
        yield rng.integers(0, classes, len(parents)), parents, sequences
        parents = rng.integers(0, len(parents), 1 + step)
        sequences = sequences[parents]


def steps_of_session(path, model):
    inputs, lengths = batch_of()
    session = loaded(path).session()
    run(session, with_sources(model, inputs, lengths)[0], lengths, by_steps=True)
    found = {}
    for step, (ids, parents, _) in enumerate(steps_of(classes_of(model))):
        logits, attention = session.step("said", ids, **{"parents" if step else "sequences": parents})
        found |= {f"logits {step}": torch.from_numpy(logits), f"attention {step}": torch.from_numpy(attention)}
    return found


def classes_of(model):
    return CLASSES + (5 if model.heads["said"].copy else 0)


def steps_of_model(model):
    inputs, lengths = batch_of()
    found = {}
    with torch.no_grad():
        memory = model(inputs["words"], lengths, ["said"], sources=with_sources(model, inputs, lengths)[1])["said"]
        state = tuple(each.index_select(1, memory.places) for each in memory.initial)
        for step, (ids, parents, sequences) in enumerate(steps_of(classes_of(model))):
            state = tuple(each.index_select(1, torch.from_numpy(parents)) for each in state)
            places = memory.places[torch.from_numpy(sequences)]
            logits, state, weights = memory.step(torch.from_numpy(ids), state, memory.attended, places, memory.copied)
            found |= {f"logits {step}": logits, f"attention {step}": weights.mean(1)}
    return found


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("options", EVERY_DECODER[::5], ids=str)
def test_steps_are_those_of_the_model(options, copy, tmp_path, every_isa):
    model = model_of(copy=copy, **options)
    export(model, tmp_path / "m.pymtl")
    theirs = steps_of_model(model)
    ours = steps_of_session(tmp_path / "m.pymtl", model)
    exact = steps_of_model(model.double())
    for found in (ours, theirs, exact) if copy else ():
        for step in range(6):  # of other sequences' tokens, which none can have
            assert torch.equal(found[f"logits {step}"].isinf(), exact[f"logits {step}"].isinf())
            found[f"logits {step}"] = found[f"logits {step}"].exp()
    assert_parity(ours, theirs, exact)


@pytest.mark.parametrize("copy", [False, True])
def test_a_sequence_gets_the_same_bits_in_any_batch_and_on_any_number_of_threads(copy, tmp_path):
    model = model_of(num_layers=2, attention="additive", copy=copy)
    export(model, tmp_path / "m.pymtl")
    inputs, lengths = batch_of(lengths=[5, 12, 1, 7, 12, 3, 8, 2])
    inputs, _ = with_sources(model, inputs, lengths)

    def answers(threads, size):
        session = loaded(tmp_path / "m.pymtl", threads=threads).session()
        for first in range(0, len(lengths), size):
            part = slice(first, first + size)
            own = {name: x[part, : int(lengths[part].max())] for name, x in inputs.items()}
            run(session, own, lengths[part], by_steps=True)
            for found in session.generate("said", pymtl.Search(beam_size=3, nbest=3), 12, attention=True):
                # With copying, a score is a sum over as many columns as the batch has.
                score = (lambda each: float(f"{each.score:.12g}")) if copy else (lambda each: each.score)
                yield [(each.tokens, score(each), each.attention.tolist()) for each in found]

    expected = list(answers(1, 8))
    for threads, size in ((1, 1), (2, 8), (3, 3), (5, 8)):
        assert list(answers(threads, size)) == expected


def test_what_a_file_of_one_task_holds(tmp_path):
    program = lower(model_of(), ["said"])
    (task,) = program.tasks
    assert task["decoder"] == "generation"
    assert task["step"]["count"] == CLASSES
    assert not any("mood" in name for name in program.tensors)
    export(model_of(), tmp_path / "m.pymtl", labels={"said": [f"t{i}" for i in range(CLASSES)]})
    info = {task.name: task for task in loaded(tmp_path / "m.pymtl").tasks}["said"]
    assert (info.kind, info.columns, info.of_tokens, info.streams) == ("generated", CLASSES, False, False)
    assert info.labels[3] == "t3"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"max_length": 0}, ValueError, "max_length: expected a number from 1 to 1048576, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length: expected whole numbers, got 2.5"),
        ({"never": {"said": [0]}}, ValueError, "never of 'said': expected other ids than 0, which ends an answer"),
        ({"never": {"said": [11]}}, ValueError, "never: expected a number from 0 to 10, got 11"),
        ({"never": {"said": [1.5]}}, TypeError, "never: expected whole numbers, got 1.5"),
        ({"never": {"mood": [1]}}, KeyError, r"expected tasks whose answers are generated, \['said'\], got 'mood'"),
        ({"labels": {"said": ["a"]}}, ValueError, "labels of 'said': expected 11, got 1"),
    ],
)
def test_what_an_export_refuses(arguments, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export(model_of(), tmp_path / "m.pymtl", **arguments)
    assert not list(tmp_path.iterdir())


def test_onnx_has_no_generated_answers(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(
        ValueError, match=r"task 'said': expected .* got generated ones, .* export to a .pymtl file or a folder"
    ):
        export(model_of(), tmp_path / "m.onnx")
    export(model_of(), tmp_path / "m.onnx", tasks=["mood"])


def test_what_is_refused_of_sources(tmp_path):
    export(model_of(copy=True), tmp_path / "m.pymtl")
    inputs, lengths = batch_of()
    session = loaded(tmp_path / "m.pymtl").session()
    (info,) = (each for each in session.model.inputs if each.name == SOURCES)
    assert (info.kind, info.size, info.takes_strings) == ("ids", 1 << 20, False)
    run(session, inputs, lengths, tasks=["mood"])
    assert len(session.answer("mood").ids) == 5
    with pytest.raises(ValueError, match=r'field "said/sources": expected one of the batch, got none'):
        run(session, inputs, lengths)
    count = int(lengths.sum())
    for wrong, error, match in (
        (np.full(count, -1), ValueError, "expected ids from 0 to 1048575, got -1 at token 0 of sequence 1"),
        (np.full(count, 1 << 20), ValueError, "expected ids from 0 to 1048575, got 1048576 at token 0 of sequence 1"),
        (["a"] * count, ValueError, "expected ids, since the model has no names of them, got strings"),
        (np.zeros(count - 1, dtype=np.int64), ValueError, r"fields\['said/sources'\]"),
        (np.zeros(count), TypeError, r"fields\['said/sources'\]"),
    ):
        with pytest.raises(error, match=match):
            session.run(lengths.tolist(), {"words": np.zeros(count, dtype=np.int64), SOURCES: wrong})
    inputs, _ = with_sources(model_of(copy=True), inputs, lengths)
    run(session, inputs, lengths, by_steps=True)
    first = {"sequences": np.zeros(1, dtype=np.int64)}
    logits, _ = session.step("said", np.zeros(1, dtype=np.int64), **first)
    assert logits.shape == (1, CLASSES + 5)
    with pytest.raises(ValueError, match="ids: expected numbers from 0 to 15, got 16 of hypothesis 0"):
        session.step("said", np.full(1, CLASSES + 5), **first)
    wide = {"words": inputs["words"], SOURCES: torch.full((5, 9), (1 << 20) - 1)}
    small = loaded(tmp_path / "m.pymtl", memory_limit=1 << 20).session()
    with pytest.raises(MemoryError, match="expected a step that fits into 1048576 bytes"):
        run(small, wide, lengths)
    fields = pymtl.TokenFeatures({"words": FIELDS["words"](), SOURCES: FIELDS["pos"]()})
    encoder = pymtl.LSTM(15, 6, batch_first=True, bidirectional=True)
    doubled = pymtl.MultiTaskModel(fields, encoder, {"said": pymtl.DecoderHead(5, 8, copy=True)})
    with pytest.raises(ValueError, match="inputs: expected fields of different names, got 'said/sources' twice"):
        export(doubled, tmp_path / "m.pymtl")
    export(model_of(copy=True), tmp_path / "m.pymtl", tasks=["mood"])
    assert [each.name for each in loaded(tmp_path / "m.pymtl").inputs] == ["words"]


def test_what_steps_refuse(tmp_path):
    export(model_of(), tmp_path / "m.pymtl")
    inputs, lengths = batch_of()
    session = loaded(tmp_path / "m.pymtl").session()
    zeros = np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match="there are no answers: run a batch that asks for it first"):
        session.step("said", zeros, sequences=zeros)
    run(session, inputs, lengths, tasks=["mood"])
    with pytest.raises(ValueError, match="there are no answers"):
        session.step("said", zeros, sequences=zeros)
    run(session, inputs, lengths, by_steps=True)
    with pytest.raises(ValueError, match="its answers were left to steps"):
        session.answer("said")
    with pytest.raises(ValueError, match="expected one whose answers are generated"):
        session.step("mood", zeros, sequences=zeros)
    with pytest.raises(ValueError, match="only a step has logits"):
        session.logits("said")
    for given, match in (
        ({}, "parents: expected these or sequences, got neither"),
        ({"parents": zeros, "sequences": zeros}, "got both"),
        ({"parents": zeros}, "parents: expected hypotheses of the step before, but there was none"),
        ({"sequences": zeros + 5}, "sequences: expected numbers below 5, the batch's sequences, got 5 of hypothesis 0"),
        ({"sequences": np.zeros(2, dtype=np.int64)}, "sequences: expected one for each of the 1 ids, got 2"),
        ({"sequences": 0}, "sequences: expected a list of whole numbers, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            session.step("said", zeros, **given)
    with pytest.raises(ValueError, match="ids: expected numbers from 0 to 10, got 11 of hypothesis 0"):
        session.step("said", zeros + 11, sequences=zeros)
    with pytest.raises(ValueError, match="count: expected from 1 to 2147483647 hypotheses, got 0"):
        session.step("said", [], sequences=[])
    with pytest.raises(ValueError, match=r"ids: expected numbers below 2\^63, got 9223372036854775813"):
        session.step("said", np.array([2**63 + 5], dtype=np.uint64), sequences=zeros)
    with pytest.raises(TypeError, match="ids: expected whole numbers, got float64"):
        session.step("said", zeros / 2, sequences=zeros)
    session.step("said", zeros, sequences=zeros)
    with pytest.raises(ValueError, match="parents: expected numbers below 1"):
        session.step("said", zeros, parents=zeros + 1)
    session.step("said", zeros, parents=zeros)  # what failed is no step
    small = loaded(tmp_path / "m.pymtl", memory_limit=1 << 17).session()
    run(small, inputs, lengths, by_steps=True)
    many = np.zeros(10_000, dtype=np.int64)
    with pytest.raises(MemoryError, match="got one of 10000 hypotheses: fewer of them, or a smaller batch"):
        small.step("said", many, sequences=many)
    stream = model_of(encoder=lambda size: pymtl.LSTM(size, 12, batch_first=True))
    export(stream, tmp_path / "one_way.pymtl", tasks=["said"])
    with pytest.raises(ValueError, match="a task whose answers follow from the tokens so far"):
        loaded(tmp_path / "one_way.pymtl").stream()


def test_what_generate_refuses(tmp_path):
    export(model_of(), tmp_path / "m.pymtl")
    inputs, lengths = batch_of()
    session = loaded(tmp_path / "m.pymtl").session()
    nothing = "there are no answers: run a batch that asks for it first"
    with pytest.raises(ValueError, match=nothing):
        session.generate("said")
    run(session, inputs, lengths, by_steps=True)
    assert len(session.generate("said")) == len(lengths)
    with pytest.raises(KeyError, match="task: expected one of"):
        session.generate("nothing")
    with pytest.raises(ValueError, match="task: expected one whose answers are generated, got 'mood'"):
        session.generate("mood")
    for arguments, match in (
        ({"max_length": 0}, "max_length: expected a number from 1 to 1048576, got 0"),
        ({"never": [11]}, "never: expected a number from 0 to 10, got 11"),
        ({"never": [-1]}, "never: expected a number from 0 to 10, got -1"),
        ({"search": pymtl.Search(sample=True), "numbers": [1]}, "numbers: expected one for each of 5 sentences, got 1"),
    ):
        with pytest.raises(ValueError, match=match):
            session.generate("said", **arguments)
    with pytest.raises(TypeError, match=r"max_length: expected whole numbers, got 2.5"):
        session.generate("said", max_length=2.5)
    with pytest.raises(ValueError, match="lengths"):
        session.run([0], {"words": []})
    with pytest.raises(ValueError, match=nothing):
        session.generate("said")  # nor are there older ones


def test_one_thread_at_a_time_generates(tmp_path, monkeypatch):
    export(model_of(), tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    inputs, lengths = batch_of()
    run(session, inputs, lengths, by_steps=True)
    expected = [found[0].tokens for found in session.generate("said")]
    library = sys.modules[type(session).__module__]
    search, errors = library.found_by, []

    def disturb():
        for call in (lambda: run(session, inputs, lengths), lambda: session.generate("said")):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    def disturbed(*arguments):
        other = threading.Thread(target=disturb)
        other.start()
        other.join()
        return search(*arguments)

    monkeypatch.setattr(library, "found_by", disturbed)
    assert [found[0].tokens for found in session.generate("said")] == expected
    assert errors == ["session: in use by another thread: make one for each, by Model.session()"] * 2


def test_answers_that_do_not_end_are_limited_by_memory(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.heads["said"].bias[0] = -1e4
    inputs, lengths = batch_of()
    export(model, tmp_path / "m.pymtl", max_length=1 << 20)
    session = loaded(tmp_path / "m.pymtl", memory_limit=1 << 16).session()
    with pytest.raises(
        MemoryError, match="expected answers that fit into 65536 bytes, the limit of memory, got longer"
    ):
        run(session, inputs, lengths)
    run(session, inputs, lengths, by_steps=True)
    assert [len(found[0].tokens) for found in session.generate("said", max_length=7)] == [7] * len(lengths)


def test_answers_without_an_id(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.heads["said"].bias[0] = 1e4
    export(model, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, *batch_of(), probabilities=True)
    answer = session.answer("said")
    assert [len(each) for each in answer.ids] == [len(each) for each in answer.probabilities] == [0] * 5
    assert answer.probability == pytest.approx(np.ones(5))
    run(session, *batch_of())
    assert session.answer("said").probabilities is None


def test_two_tasks_write(tmp_path):
    torch.manual_seed(0)
    heads = {name: pymtl.DecoderHead(7 + i, 8, embedding_dim=4) for i, name in enumerate("ab")}
    encoder = pymtl.LSTM(12, 6, batch_first=True, bidirectional=True)
    model = pymtl.MultiTaskModel(FIELDS["words"](), encoder, heads).eval()
    export(model, tmp_path / "m.pymtl", max_length=6)
    inputs, lengths = batch_of()
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, inputs, lengths)
    for task in heads:
        found = model.generate(inputs["words"], lengths, task, max_length=6)
        assert [ids.tolist() for ids in session.answer(task).ids] == [each.tokens for (each,) in found]


def test_a_lowered_program_is_whole(tmp_path):
    """Without what export says besides."""
    pymtl.lowering.write(lower(model_of()), tmp_path / "m.pymtl", {})
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, *batch_of())
    assert len(session.answer("said").ids) == 5


def test_weights_that_are_nan(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.heads["said"].bias[2] = float("nan")
    export(model, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    run(session, *batch_of(), by_steps=True)
    with pytest.raises(RuntimeError, match="logits: expected numbers to choose the next token by, got nan"):
        session.generate("said")
    with pytest.raises(ValueError, match="expected numbers to choose the next id by, got nan"):
        run(session, *batch_of())


TURNED = """
[data]
train = "train.jsonl"
holdout = 0.2

[tasks.turned]
kind = "generation"
units = "words"
decoder_size = 16
decoder_embedding_dim = 8
beam_size = 2

[tasks.length]
kind = "classification"

[model]
embedding_dim = 8
hidden_size = 16

[training]
epochs = 2
learning_rate = 0.02
"""


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A run that writes words from the last to the first, and its file."""
    folder = tmp_path_factory.mktemp("turned")
    rng = np.random.default_rng(0)
    texts = [list(rng.choice(list("abcdef"), rng.integers(1, 6))) for _ in range(80)]
    records = [{"tokens": text, "turned": " ".join(text[::-1]), "length": str(len(text))} for text in texts]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "turned.toml").write_text(TURNED)
    assert main(["train", str(folder / "turned.toml"), "--run", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "turned.pymtl")]) == 0
    return folder


TEXTS = ["a b c", "f", "", "d d e a x", ["b", "a"]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 1},
        {"distributions": False, "batch_size": 1},
        {"search": pymtl.Search(beam_size=4, nbest=3, coverage_penalty=0.2)},
        {"search": pymtl.Search(sample=True, nbest=2, seed=5), "first": 7},
    ],
    ids=str,
)
def test_a_run_answers_texts(options, turned):
    ours = pymtl_runtime.load(turned / "turned.pymtl").predict(TEXTS, **options)
    theirs = pymtl.load(turned / "run").predict(TEXTS, **options)
    assert [list(answer) for answer in ours] == [list(answer) for answer in theirs]
    for own, others in zip(ours, theirs):
        for key in own:
            if key in ("turned/nbest", "turned/attention", "length/probabilities"):
                continue
            assert own[key] == (pytest.approx(others[key], rel=1e-4) if isinstance(own[key], float) else others[key])
        np.testing.assert_allclose(own.get("turned/attention", []), others.get("turned/attention", []), atol=1e-5)
        nbest = [[each["answer"] for each in answer.get("turned/nbest", [])] for answer in (own, others)]
        assert nbest[0] == nbest[1]


def test_a_run_copies_words(tmp_path):
    """Also of several texts at a time, of which some have more words to copy than others."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdef"), 6)) for _ in range(80)]
    records = [{"text": f"I am {name}, today", "turned": f"hello, {name}!", "length": "3"} for name in names]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = 'copy = true\nlabel_min_count = 2\nunits = "pieces"'
    (tmp_path / "turned.toml").write_text(TURNED.replace('units = "words"', options))
    assert main(["train", str(tmp_path / "turned.toml"), "--run", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "turned.pymtl")]) == 0
    ours, theirs = pymtl_runtime.load(tmp_path / "turned.pymtl"), pymtl.load(tmp_path / "run")
    texts = ["I am Zaphod Beeblebrox today", "hello", "", "a b c d e f g Trillian", ["I", "am", "<end>", "<unk>"]]
    searches = (None, pymtl.Search(beam_size=20, nbest=20), pymtl.Search(sample=True, nbest=9, temperature=4.0))
    for search in searches:
        found, expected = (model.predict(texts, search=search) for model in (ours, theirs))
        for own, others in zip(found, expected, strict=True):
            for key in ("turned", "turned/written"):
                assert own.get(key) == others.get(key)
            nbest = [[each["answer"] for each in answer.get("turned/nbest", [])] for answer in (own, others)]
            assert nbest[0] == nbest[1]
    assert any("￭!" in pieces for pieces in (answer.get("turned/written", []) for answer in found))
    copied = " ".join(each["answer"] for each in found[0]["turned/nbest"])
    assert "Zaphod" in copied or "Beeblebrox" in copied
    copied = " ".join(each["answer"] for each in found[-1]["turned/nbest"])
    assert "<end>" in copied or "<unk>" in copied  # what a text holds is no end
    assert list(ours.logits(["I am Zaphod"])) == ["length"]


@pytest.mark.parametrize("load", [pymtl.load, pymtl_runtime.load])
def test_a_search_is_a_search(load, turned):
    model = load(turned / ("run" if load is pymtl.load else "turned.pymtl"))
    with pytest.raises(TypeError, match=r"search: expected a Search, as pymtl.Search\(beam_size=5\), got dict"):
        model.predict("a b", search={"beam_size": 5})


def test_logits_are_of_the_other_tasks(turned):
    assert list(pymtl_runtime.load(turned / "turned.pymtl").logits(["a b"])) == ["length"]


def test_the_command(turned, capsys):
    from pymtl_runtime.__main__ import main as command

    file = str(turned / "turned.pymtl")
    assert command(["predict", file, "a b c", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["turned"] == pymtl.load(turned / "run").predict("a b c")["turned"]
    for options in (
        ("--beam", "4", "--nbest", "3", "--length-penalty", "0.5", "--no-repeat", "2"),
        ("--beam", "2", "--coverage-penalty", "0.3", "--max-length", "2"),
        ("--sample", "--temperature", "9", "--top-k", "5", "--top-p", "0.9", "--seed", "3", "--nbest", "4"),
    ):
        assert command(["predict", file, "a b c", *options]) == 0
        shown = capsys.readouterr().out
        assert main(["predict", str(turned / "run"), "a b c", *options]) == 0
        assert shown.splitlines() == capsys.readouterr().out.splitlines()
    assert command(["info", file]) == 0
    assert "answers turned: generated of texts, 8 tokens, labels <end>, <unk>, " in capsys.readouterr().out
    assert command(["predict", file, "a b c", "--beam", "2", "--nbest", "3"]) == 1
    assert "--nbest: expected at most --beam 2 without sampling, got 3" in capsys.readouterr().err


def test_the_options_are_refused_without_such_a_task(tmp_path, capsys):
    import toy
    from pymtl_runtime.__main__ import main as command

    toy.write_files(tmp_path)
    assert main(["train", str(tmp_path / "toy.toml"), "--run", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "toy.pymtl")]) == 0
    capsys.readouterr()
    assert command(["predict", str(tmp_path / "toy.pymtl"), "play jazz", "--nbest", "2"]) == 1
    assert "--nbest: expected a model with a task of kind 'generation', got none" in capsys.readouterr().err
    assert command(["predict", str(tmp_path / "toy.pymtl"), "play jazz", "--beam", "2"]) == 1
    assert "--beam: expected a model with a task of kind 'generation' or 'ctc'" in capsys.readouterr().err
    for name, text in (("predict", "play jazz"), ("evaluate", str(tmp_path / "test.jsonl"))):
        assert main([name, str(tmp_path / "run"), text, "--beam", "2"]) == 1
        assert "--beam: expected a model with a task of kind 'generation' or 'ctc'" in capsys.readouterr().err


def test_a_model_of_no_words(tmp_path):
    """Whose layers read numbers."""
    torch.manual_seed(0)
    heads = {"said": pymtl.DecoderHead(5, 8, embedding_dim=4)}
    model = pymtl.MultiTaskModel(None, pymtl.LSTM(3, 4, batch_first=True, bidirectional=True), heads).eval()
    export(model, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    x = torch.randn(1, 6, 3)
    (name,) = (each.name for each in session.model.inputs)
    session.run([6], {name: x[0].numpy()})
    (found,) = model.generate(x, [6])
    assert session.answer("said").ids[0].tolist() == found[0].tokens
