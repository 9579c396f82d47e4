"""What no file can hold is refused by name, and nothing is written then; what is written is whole."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from programs import HEADS, batch_of, loaded, logits_of, model_of, run
from torch import nn

import pymtl
from pymtl.lowering import export, lower


class OwnHead(pymtl.ClassificationHead):
    pass


class OwnEmbedding(nn.Embedding):
    pass


class OwnScheme(pymtl.sharing.HardSharing):
    pass


def small(embedding=None, encoder=None, heads=None):
    torch.manual_seed(0)
    return pymtl.MultiTaskModel(
        embedding or nn.Embedding(9, 4),
        encoder or pymtl.LSTM(4, 5, batch_first=True),
        heads or {"a": pymtl.ClassificationHead(3)},
    )


def hooked():
    model = small()
    model.heads["a"].register_forward_hook(lambda *_: None)
    return model


def parametrized():
    model = small()
    nn.utils.parametrizations.weight_norm(model.heads["a"], "weight")
    return model


def own_forward():
    model = small()
    model.embedding.forward = lambda ids: torch.zeros(*ids.shape, 4)
    return model


def two_identities():
    embedding = pymtl.TokenFeatures({"words": nn.Embedding(9, 4), "x": nn.Identity(), "y": nn.Identity()})
    return small(embedding, pymtl.LSTM(7, 5, batch_first=True))


def two_embeddings():
    embedding = pymtl.TokenFeatures({"words": nn.Embedding(9, 4), "more": nn.Embedding(9, 2)})
    return small(embedding, pymtl.LSTM(7, 5, batch_first=True))


def no_mean():
    model = small(heads={"a": pymtl.RegressionHead(2)})
    model.heads["a"].mean = (float("nan"), 0.0)
    return model


def two_characters():
    fields = {"one": pymtl.CharacterLSTM(9, 3, 2), "two": pymtl.CharacterLSTM(9, 3, 2)}
    return small(pymtl.TokenFeatures(fields), pymtl.LSTM(8, 5, batch_first=True))


def padded_row():
    characters = pymtl.CharacterCNN(9, 3, 2)
    characters.embedding.weight.data[0] = 1.0
    return small(pymtl.TokenFeatures({"characters": characters}), pymtl.LSTM(4, 5, batch_first=True))


REFUSED = {
    "a head of one's own": (
        lambda: small(heads={"a": OwnHead(3)}),
        r"heads\.a: expected one of pymtl's heads, got OwnHead",
    ),
    "an embedding of one's own": (
        lambda: small(OwnEmbedding(9, 4)),
        "embedding: expected an nn.Embedding.*OwnEmbedding",
    ),
    "a scheme of one's own": (
        lambda: small(encoder=OwnScheme(["a"], 4, 5)),
        "encoder: expected a pymtl.LSTM, GRU or RNN, or one of pymtl.sharing's schemes, got OwnScheme",
    ),
    "a hook": (hooked, r"heads\.a \(ClassificationHead\): expected a module without hooks"),
    "a parametrization": (parametrized, r"heads\.a .*got parametrizations: remove them first"),
    "a forward of one's own": (own_forward, r"embedding \(Embedding\): expected a module without hooks or a forward"),
    "a projection": (
        lambda: small(encoder=pymtl.LSTM(4, 5, proj_size=3, batch_first=True)),
        "encoder: expected proj_size=0, got 3",
    ),
    "max_norm": (lambda: small(nn.Embedding(9, 4, max_norm=1.0)), "expected an embedding without max_norm, got 1.0"),
    "float64": (
        lambda: small().double(),
        r"expected parameters of torch\.float32, got torch\.float64: model\.float\(\)",
    ),
    "two fields of numbers": (two_identities, "sizes: expected how many numbers a token has of x, y"),
    "two fields of characters": (two_characters, "expected one field of characters in a file, got 'one' and 'two'"),
    "numbers for no character": (padded_row, "expected zeros in the row of what is no character"),
    "another module": (
        lambda: nn.Linear(3, 4),
        "module: expected a pymtl.MultiTaskModel, LSTM, GRU or RNN, got Linear",
    ),
    "no module": (lambda: None, "module: expected a pymtl.MultiTaskModel, LSTM, GRU or RNN, got NoneType"),
    "the meta device": (lambda: small().to("meta"), r"embedding\.weight: expected a parameter with values"),
    "too many features": (lambda: small(nn.Embedding(9, 5)), "embedding: expected 4 features of a token, got 5"),
    "too few features": (two_embeddings, "embedding: expected 7 features of a token in all"),
    "a mean that is no number": (no_mean, "a: expected finite numbers"),
    "torch's LSTM": (lambda: nn.LSTM(3, 4), "module: expected a pymtl.MultiTaskModel, LSTM, GRU or RNN, got LSTM"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["m.pymtl", "m.onnx"])
def test_what_no_file_can_hold_is_refused_by_name(case, name, tmp_path):
    make, reason = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=reason):
        export(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"tasks": ["b"]}, KeyError, "unknown task 'b'"),
        ({"tasks": []}, ValueError, "at least one task"),
        ({"names": {"tokens": ["x"]}}, KeyError, "expected fields of ids among"),
        ({"names": {"words": list("abcabcabc")}}, ValueError, "expected different ones, got 'a' twice"),
        ({"names": {"words": list("abcdefghij")}}, ValueError, "expected from 1 to 9, got 10"),
        ({"names": {"words": []}}, ValueError, "expected from 1 to 9, got 0"),
        ({"names": {"words": "abc"}}, TypeError, "names of 'words': expected a list of strings, got the string 'abc'"),
        ({"names": {"words": ["x"]}, "unknown": {"words": True}}, TypeError, "unknown of 'words': expected an id"),
        ({"names": {"words": ["x"]}, "unknown": {"words": "x"}}, TypeError, "unknown of 'words': expected an id"),
        ({"names": {"words": ["\udc80"]}}, ValueError, "names of 'words': expected text"),
        ({"labels": {"a": "abc"}}, TypeError, "labels of 'a': expected a list of 3, got the string 'abc'"),
        ({"labels": {"a": ["x", "y", "x"]}}, ValueError, "labels of 'a': expected different ones, got 'x' twice"),
        ({"labels": {"a": ["x", "y", "z\0"]}}, ValueError, "labels of 'a': expected strings without a zero"),
        ({"tasks": "a"}, TypeError, "tasks: expected a list of names, got the string 'a'"),
        ({"names": {"words": ["x"]}, "unknown": {"words": 9}}, ValueError, "expected an id below 9, got 9"),
        ({"unknown": {"words": 1}}, KeyError, "unknown: expected fields that names has"),
        ({"labels": {"b": ["x"]}}, KeyError, "labels: expected tasks among"),
        ({"labels": {"a": ["x"]}}, ValueError, "labels of 'a': expected 3, got 1"),
        ({"names": {"words": [1, 2]}}, ValueError, "expected strings without a zero character, got 1"),
        ({"names": {"words": ["a\0"]}}, ValueError, "expected strings without a zero character"),
        ({"sizes": {"words": 4}}, KeyError, "sizes: expected fields that are numbers already"),
        ({"weights": torch.float16}, ValueError, "weights: expected torch.int8 or torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_named(options, kind, reason, tmp_path):
    with pytest.raises(kind, match=reason):
        export(small(), tmp_path / "m.pymtl", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "what"), [({"tasks": ["x"]}, "tasks"), ({"sizes": {"x": 1}}, "sizes")])
def test_wrong_arguments_of_layers_are_named(options, what, tmp_path):
    with pytest.raises(KeyError, match=f"{what}: expected"):
        export(pymtl.GRU(3, 4), tmp_path / "m.pymtl", **options)


def test_fields_may_have_any_name_and_tasks_may_be_named_twice(tmp_path):
    embedding = pymtl.TokenFeatures(
        {"words": nn.Embedding(9, 4), "linear3": nn.Identity(), "recurrent2": nn.Identity()}
    )
    model = small(embedding, pymtl.LSTM(7, 5, batch_first=True))
    export(model, tmp_path / "m.pymtl", sizes={"linear3": 2}, tasks=["a", "a"])
    assert [task.name for task in loaded(tmp_path / "m.pymtl").tasks] == ["a"]


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    export(small(), tmp_path / "real.pymtl")
    (tmp_path / "link.pymtl").symlink_to("real.pymtl")
    export(small(heads={"b": pymtl.ClassificationHead(3)}), tmp_path / "link.pymtl")
    assert (tmp_path / "link.pymtl").is_symlink()
    assert loaded(tmp_path / "real.pymtl").tasks[0].name == "b"


def test_many_threads_may_write_one_file(tmp_path):
    models = [small() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: [export(model, tmp_path / "m.pymtl") for _ in range(10)], models))
    assert os.listdir(tmp_path) == ["m.pymtl"]
    loaded(tmp_path / "m.pymtl")


def test_a_folder_that_cannot_be_written_is_named_and_what_stood_there_stays(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.pymtl: there is no folder .*nowhere"):
        export(small(), tmp_path / "nowhere" / "m.pymtl")
    (tmp_path / "folder.pymtl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.pymtl: is a folder: name a file"):
        export(small(), tmp_path / "folder.pymtl")
    (tmp_path / "folder.pymtl").rmdir()
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.pymtl or \.onnx, got m\.bin"):
        export(small(), tmp_path / "m.bin")
    path = tmp_path / "m.pymtl"
    export(small(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="parametrizations"):
        export(parametrized(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.pymtl"]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a.pymtl", "b.pymtl", "a.onnx", "b.onnx"):
        export(model_of("cgc", layers=2), tmp_path / name)
    for suffix in ("pymtl", "onnx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_file_has_each_tensor_once_and_nothing_of_training(tmp_path):
    words = nn.Embedding(50, 12, padding_idx=0)
    heads = {"words": pymtl.LanguageModelHead(50, embedding=words), "slots": pymtl.TokenClassificationHead(3)}
    encoder = pymtl.sharing.SharedPrivate(list(heads), 12, 5, adversarial=0.1)
    program = lower(pymtl.MultiTaskModel(words, encoder, heads))
    assert not [name for name in program.tensors if "discriminator" in name]
    addresses = [tensor.data_ptr() for tensor in program.tensors.values()]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_is_what_a_file_holds_whatever_mode_the_model_is_in(training, frozen, tmp_path):
    model = model_of("mmoe")
    export(model, tmp_path / "eval.pymtl")
    if frozen:
        pymtl.freeze(model)
    model.train(training)
    export(model, tmp_path / "m.pymtl")
    assert model.training == training
    assert (tmp_path / "m.pymtl").read_bytes() == (tmp_path / "eval.pymtl").read_bytes()


def test_a_converted_model_is_exported_like_one_of_its_own(tmp_path):
    torch.manual_seed(0)
    plain = nn.LSTM(5, 6, 2, bidirectional=True)
    converted = pymtl.convert(nn.Sequential(plain))[0]
    export(converted, tmp_path / "m.pymtl")
    session = loaded(tmp_path / "m.pymtl").session()
    x = torch.randn(7, 5)
    session.run([7], {"features": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(session.logits("output"), plain(x)[0], rtol=1e-5, atol=1e-6)


def test_strings_and_ids_are_the_same_and_unknown_ones_are_told(tmp_path):
    fields = ("words", "characters")
    model = model_of(heads={task: HEADS[task] for task in ("intent", "tags")}, fields=fields)
    letters = ["<pad>", "<unk>", *"abcdéf"]
    names = {"words": ["<pad>", "<unk>", "bad", "café"], "characters": letters}
    export(
        model, tmp_path / "m.pymtl", names=names, unknown={"words": 1, "characters": 1}, labels={"tags": list("OBICD")}
    )
    session = loaded(tmp_path / "m.pymtl").session()
    words = ["bad", "café", "", "x🎉"]
    session.run([4], {"words": words})
    expected = logits_of(session)
    spelled = [[letters.index(c) if c in letters else 1 for c in word] for word in words]
    ids = np.array([row + [0] * (6 - len(row)) for row in spelled])
    session.run([4], {"words": np.array([2, 3, 1, 1]), "characters": ids})
    for task, z in logits_of(session).items():
        assert torch.equal(z, expected[task])
    export(model, tmp_path / "strict.pymtl", names=names)
    strict = loaded(tmp_path / "strict.pymtl").session()
    with pytest.raises(ValueError, match=r'field "words": expected names of ids .* got "x🎉" at token 1 of sequence 1'):
        strict.run([1, 2], {"words": ["bad", "café", "x🎉"]})
    with pytest.raises(ValueError, match="without a zero character"):
        strict.run([1], {"words": ["a\0b"]})


def test_the_header_is_what_the_format_says(tmp_path):
    export(small(), tmp_path / "m.pymtl", labels={"a": ["x", "y", "z"]})
    with open(tmp_path / "m.pymtl", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    program = json.loads(header["__metadata__"]["pymtl"])
    assert program["version"] == 1
    assert program["inputs"] == [{"name": "words", "kind": "ids", "count": 9}]
    assert [each["op"] for each in program["instructions"]] == ["gather", "recurrent", "pool", "linear"]
    assert program["tasks"] == [{"name": "a", "logits": "linear.3", "decoder": "classes", "labels": ["x", "y", "z"]}]
    used = {value for each in program["instructions"] for value in each.values() if isinstance(value, str)}
    assert {"embedding.weight", "heads.a.weight", "heads.a.bias"} <= used & set(header)


def test_several_sessions_and_streams_of_one_model_do_not_disturb_one_another(tmp_path):
    heads = {task: HEADS[task] for task in ("intent", "slots")}
    model = model_of(heads=heads, bidirectional=False)
    inputs, lengths = batch_of()
    export(model, tmp_path / "m.pymtl")
    shared = loaded(tmp_path / "m.pymtl")
    first, second, stream = shared.session(), shared.session(), shared.stream()
    run(first, inputs, lengths)
    expected = logits_of(first)
    run(second, {"words": inputs["words"][:2]}, lengths[:2])
    stream.run([2], {"words": np.array([3, 4])})
    for task, z in logits_of(first).items():
        assert torch.equal(z, expected[task])
    del shared
    run(first, inputs, lengths)  # a session keeps its model
    for task, z in logits_of(first).items():
        assert torch.equal(z, expected[task])
