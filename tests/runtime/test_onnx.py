"""Programs as ONNX graphs: ONNX Runtime answers as the model does."""

import json

import numpy as np
import pytest
import torch
from programs import EVERY_SCHEME, HEADS, batch_of, combinations, mask_of, model_of

import pymtl
from pymtl.lowering import export

onnxruntime = pytest.importorskip("onnxruntime")

EVERY_FIELD = ("words", "characters", "pos", "signal")


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, inputs, lengths):
    given = {"lengths": lengths.numpy(), **{name: x.numpy() for name, x in inputs.items()}}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, given)))


def check(model, inputs, lengths, path):
    export(model, path)
    found = run(session_of(path), inputs, lengths)
    given = inputs if isinstance(model.embedding, pymtl.TokenFeatures) else next(iter(inputs.values()))
    with torch.no_grad():
        expected = model(given, lengths)
    for task, z in expected.items():
        np.testing.assert_allclose(
            found[f"{task}/logits"], z.flatten(2) if z.dim() > 3 else z, rtol=1e-4, atol=1e-5, err_msg=task
        )
    return found, expected


@pytest.mark.parametrize("scheme", EVERY_SCHEME)
@pytest.mark.parametrize("options", combinations(layers=[1, 2], bidirectional=[False, True]), ids=str)
def test_every_scheme_with_every_head(scheme, options, tmp_path):
    model = model_of(scheme, fields=EVERY_FIELD, **options)
    inputs, lengths = batch_of(EVERY_FIELD)
    found, logits = check(model, inputs, lengths, tmp_path / "m.onnx")
    mask = mask_of(lengths)
    for task, head in model.heads.items():
        answer = torch.from_numpy(found[f"{task}/answer"])
        z = logits[task]
        if isinstance(head, pymtl.CRFHead):
            tags, _ = head.crf.decode(z, lengths)
            assert torch.equal(answer, tags)
        elif isinstance(head, pymtl.RegressionHead):
            torch.testing.assert_close(answer, head.values(z).float(), rtol=1e-4, atol=1e-4)
        elif isinstance(head, pymtl.MultiLabelHead):
            assert torch.equal(answer, z > 0)
        elif isinstance(head, pymtl.OrdinalHead):
            assert torch.equal(answer, head.classes(z))
        elif head.pooling is None:
            assert torch.equal(answer, z.argmax(-1) * mask)
        else:
            assert torch.equal(answer, z.argmax(-1))


@pytest.mark.parametrize(
    "fields", [("words",), ("words", "filters"), ("characters",), ("filters", "signal"), ("signal",)]
)
@pytest.mark.parametrize("lengths", [[1], [1, 1], [7], [4, 9, 1]])
def test_every_field_and_batch(fields, lengths, tmp_path):
    check(model_of(fields=fields), *batch_of(fields, lengths), tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", [pymtl.LSTM, pymtl.GRU, pymtl.RNN])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_every_kind_of_layer(kind, options, tmp_path):
    model = model_of(kind=lambda *a, **k: kind(*a, **k, **options), layers=2)
    check(model, *batch_of(), tmp_path / "m.onnx")


def test_a_relu_layer(tmp_path):
    model = model_of(kind=lambda *a, **k: pymtl.RNN(*a, nonlinearity="relu", **k))
    check(model, *batch_of(), tmp_path / "m.onnx")


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"reverse": True}], ids=str)
def test_layers_alone(options, tmp_path):
    torch.manual_seed(0)
    layers = pymtl.GRU(7, 11, batch_first=True, **options)
    export(layers, tmp_path / "m.onnx")
    x, lengths = torch.randn(3, 6, 7), torch.tensor([6, 2, 4])
    found = run(session_of(tmp_path / "m.onnx"), {"features": x}, lengths)["output/logits"]
    with torch.no_grad():
        np.testing.assert_allclose(found, layers(x, lengths=lengths)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 20])
def test_a_matrix_that_is_read_in_two_forms(size, tmp_path):
    torch.manual_seed(0)
    words = torch.nn.Embedding(size, 16)
    heads = {"words": pymtl.LanguageModelHead(size, embedding=words), "tags": pymtl.TokenClassificationHead(size)}
    model = pymtl.MultiTaskModel(words, pymtl.LSTM(16, 16, batch_first=True), heads).eval()
    model.heads["tags"].weight = words.weight
    check(model, {"words": torch.randint(size, (3, 9))}, torch.tensor([9, 4, 1]), tmp_path / "m.onnx")


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"zoneout": 0.1}], ids=str)
def test_what_onnx_lacks_is_named_and_nothing_is_written(options, tmp_path):
    model = model_of(kind=lambda *a, **k: pymtl.LSTM(*a, **k, **options))
    with pytest.raises(ValueError, match=f"ONNX has no recurrent operator with {next(iter(options))}"):
        export(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="float32"):
        export(model_of(), tmp_path / "m.onnx", weights=torch.int8)
    assert not list(tmp_path.iterdir())


def test_names_and_labels_are_in_the_file(tmp_path):
    model = model_of(heads={"intent": HEADS["intent"]})
    names = [f"w{i}" for i in range(50)]
    export(model, tmp_path / "m.onnx", names={"words": names}, labels={"intent": list("abcde")})
    about = session_of(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["inputs"])[0]["names"] == names
    assert json.loads(about["tasks"]) == [{"name": "intent", "decoder": "classes", "labels": list("abcde")}]
