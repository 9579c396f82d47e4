import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import assert_parity, assert_same_bits
from recurrent.test_compile import KINDS, Tagger, batch_of, needs_a_compiler, tagger, with_gradients
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl import _native

SIZES = [(1, 1), (1, 5), (4, 1), (2, 9), (16, 33)]
LIBRARY = Path(_native.__file__).with_name("libpymtl_ops.so")
with_and_without_lengths = pytest.mark.parametrize("given", [False, True], ids=["dense", "lengths"])

# Answers the batches in a file by a program, in a process that has torch and the op library but not pymtl.
ANSWER = """
import sys, torch, torch._inductor.codecache  # torch 2.10 itself forgets the last
library, program, batches, answers = sys.argv[1:]
torch.ops.load_library(library)
if program.endswith("compiled.pt2"):
    run = torch._inductor.aoti_load_package(program)
else:
    run = torch.export.load(program).module()
with torch.no_grad():
    torch.save({str(i): run(*batch) for i, batch in enumerate(torch.load(batches))}, answers)
assert "pymtl" not in sys.modules
"""


def answers_elsewhere(program, batches, folder):
    torch.save(batches, folder / "batches.pt")
    files = [LIBRARY, program, folder / "batches.pt", folder / "answers.pt"]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *map(str, files)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "answers.pt")


def batches_of(given):
    return [batch_of(*size)[: 2 if given else 1] for size in SIZES]


def answers(model, batches):
    with torch.no_grad():
        return {str(i): model(*batch) for i, batch in enumerate(batches)}


def exported(model, given):
    batch, steps = Dim("batch"), Dim("steps")
    shapes = ({0: batch, 1: steps}, {0: batch}) if given else ({0: batch, 1: steps},)
    return torch.export.export(model, batch_of(3, 7)[: len(shapes)], dynamic_shapes=shapes)


def ops_of(program):
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("pymtl.")}


@with_and_without_lengths
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_same_bits_at_other_sizes(kind, given):
    model = tagger(kind).eval()
    with torch.no_grad():
        program = exported(model, given)
    batches = batches_of(given)
    assert_same_bits(answers(program.module(), batches), answers(model, batches))
    packing = {f"pymtl.{op}.default" for op in ("packing_order", "pack", "unpack")} if given else set()
    assert ops_of(program) == packing | {"pymtl.rnn_inference.default"}


def test_a_frozen_models_program_reads_the_weights_and_not_the_snapshot():
    model = pymtl.freeze(tagger().eval())
    with torch.no_grad():
        program = exported(model, True)
    batches = batches_of(True)
    assert_same_bits(answers(program.module(), batches), answers(model, batches))
    assert dict(program.state_dict).keys() == model.state_dict().keys()


def test_a_program_exported_with_gradients_trains():
    model = tagger()
    program = exported(model, True).module()
    for batch in batches_of(True):
        assert_same_bits(with_gradients(program, program, *batch), with_gradients(model, model, *batch))


@with_and_without_lengths
def test_a_saved_program_runs_where_only_torch_and_the_op_library_are(given, tmp_path):
    model = tagger().eval()
    with torch.no_grad():
        torch.export.save(exported(model, given), tmp_path / "program.pt2")
    batches = batches_of(given)
    expected = answers(model, batches)
    assert_same_bits(answers(torch.export.load(tmp_path / "program.pt2").module(), batches), expected)
    assert_same_bits(answers_elsewhere(tmp_path / "program.pt2", batches, tmp_path), expected)


@needs_a_compiler
def test_a_program_compiled_ahead_of_time_agrees_here_and_without_pymtl(tmp_path):
    model = tagger().eval()
    path = str(tmp_path / "compiled.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(model, True), package_path=path)
        exact = Tagger("LSTM").double()
        exact.load_state_dict(model.state_dict())
        exact = pymtl.convert(exact).eval()
    batches = batches_of(True)
    theirs, truth = answers(model, batches), answers(exact, batches)
    assert_parity(answers(torch._inductor.aoti_load_package(path), batches), theirs, truth)
    assert_parity(answers_elsewhere(path, batches, tmp_path), theirs, truth)


@needs_a_compiler
@pytest.mark.parametrize("options", [{"bias": False}, {"layer_norm": True, "zoneout": 0.1}], ids=str)
def test_a_package_passes_lists_on_that_are_empty(options, tmp_path):
    module, x = pymtl.LSTM(5, 7, bidirectional=True, **options).eval(), torch.randn(4, 3, 5)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        # The compiler normalises a projection in its own way.
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), module(x), rtol=1e-4, atol=1e-5)


class Scores(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.encoder = getattr(pymtl, kind)(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(16, 5)

    def forward(self, x):
        return self.linear(self.encoder(x)[0])


@pytest.mark.parametrize("exporter", ["dynamo", "TorchScript"])
@pytest.mark.parametrize("as_it_is", [True, False], ids=["as it is", "reverted"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_model_answers_through_onnx_as_ours_does(kind, as_it_is, exporter, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Scores(kind).eval()
    given, path = model if as_it_is else pymtl.revert(model), tmp_path / "model.onnx"
    if exporter == "dynamo":
        options = {"dynamic_shapes": ({0: Dim("batch")},), "verbose": False}
    else:
        options = {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    torch.onnx.export(given, (torch.randn(3, 7, 6),), path, dynamo=exporter == "dynamo", **options)
    session = runtime.InferenceSession(path)
    nodes = onnx.load(path).graph.node
    assert all(node.domain == "" for node in nodes)
    if kind != "RNN":  # which torch takes apart
        assert kind in {node.op_type for node in nodes}
    inputs = [torch.randn(batch, 7, 6) for batch in (3, 1, 8)]
    ours = answers(model, [(x,) for x in inputs])
    name = session.get_inputs()[0].name
    theirs = {str(i): torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for i, x in enumerate(inputs)}
    assert_parity(ours, theirs, answers(model.double(), [(x.double(),) for x in inputs]))


# Traces and scripts.


class Layers(nn.Module):
    def __init__(self, kind, modules, **options):
        super().__init__()
        self.encoder = getattr(modules, kind)(6, 8, num_layers=2, bidirectional=True, batch_first=True, **options)

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.encoder(x)[0]
        if not isinstance(self.encoder, pymtl.recurrent.Recurrent):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.encoder(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        return self.encoder(x, lengths=lengths)[0]


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_trace_is_that_of_torchs_module(kind, with_lengths, tmp_path):
    ours, theirs = Layers(kind, pymtl).eval(), Layers(kind, nn).eval()
    theirs.load_state_dict(ours.state_dict())
    lengths = (torch.tensor([2, 7, 4]),) if with_lengths else ()
    traces = [torch.jit.trace(model, (torch.randn(3, 7, 6), *lengths)) for model in (ours, theirs)]
    traces[0].save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    assert "pymtl::" not in str(loaded.inlined_graph)
    for batch in (3, 1, 5):
        own = (torch.cat([torch.randint(1, 8, (batch - 1,)), torch.tensor([7])]),) if with_lengths else ()
        x = torch.randn(batch, 7, 6)
        assert torch.equal(loaded(x, *own), traces[1](x, *own))
        torch.testing.assert_close(loaded(x, *own), ours(x, *own), rtol=1e-5, atol=1e-6)


class Resetting(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = pymtl.LSTM(6, 8)

    def forward(self, x, resets):
        return self.encoder(x, resets=resets)[0]


def with_heads():
    heads = {"a": pymtl.ClassificationHead(3, "mean"), "b": pymtl.TokenClassificationHead(2)}
    return pymtl.MultiTaskModel(None, pymtl.LSTM(6, 8, batch_first=True), heads)


X = torch.randn(3, 7, 6)
NOT_RECORDED = {
    "options": (lambda: Layers("LSTM", pymtl, layer_norm=True), (X,), "a layer with layer_norm=True: .* torch.export"),
    "zoneout": (lambda: Layers("GRU", pymtl, zoneout=0.1), (X,), "a layer with zoneout=0.1"),
    "resets": (Resetting, (X, torch.zeros(3, 7, dtype=torch.bool)), "resets: .* torch.export"),
    "heads": (with_heads, (X,), "a MultiTaskModel: .* torch.export"),
}


def export_to_onnx(model, inputs):
    torch.onnx.export(model, inputs, io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("record", [torch.jit.trace, export_to_onnx])
@pytest.mark.parametrize(("make", "inputs", "says"), NOT_RECORDED.values(), ids=NOT_RECORDED)
def test_what_a_trace_cannot_hold_is_refused_with_the_way_out(make, inputs, says, record):
    pytest.importorskip("onnx")
    model = make().eval()
    model(*inputs)
    with pytest.raises(RuntimeError, match=f"cannot record {says}"):
        record(model, inputs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_script_is_refused_with_the_way_out_and_leaves_the_model_as_it_is(kind):
    model, x = Scores(kind).eval(), torch.randn(3, 7, 6)
    with pytest.raises(RuntimeError, match=rf"pymtl's {kind}: script pymtl.revert\(model\)"):
        torch.jit.script(model)
    assert type(model.encoder) is getattr(pymtl, kind)
    reverted = pymtl.revert(model)
    assert torch.equal(torch.jit.script(reverted)(x), reverted(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_multi_task_model_exports_as_it_is_and_its_program_gives_a_dictionary(strict):
    model = with_heads().eval()
    lengths = torch.tensor([7, 2, 4])
    with torch.no_grad():
        program = torch.export.export(model, (X, lengths), strict=strict).module()
        found, expected = program(X, lengths), model(X, lengths)
    assert type(found) is dict
    assert_same_bits(found, expected)


def test_a_script_of_a_multi_task_model_is_refused_with_its_own_way_out():
    with pytest.raises(RuntimeError, match=r"a MultiTaskModel; torch.export.export can"):
        torch.jit.script(with_heads())
