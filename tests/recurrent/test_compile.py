import copy
import os
import shutil

import pytest
import torch
from modules import states_of
from parity import assert_parity, assert_same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl.ops.autograd import constant_to_tracers

KINDS = ("LSTM", "GRU", "RNN")
every_kind = pytest.mark.parametrize("kind", KINDS)
sorted_or_not = pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor compiles C++"
)
OPTIONS = {"num_layers": 2, "bidirectional": True, "batch_first": True}


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.encoder = getattr(nn, kind)(12, 8, **OPTIONS)
        self.linear = nn.Linear(16, 5)

    def forward(self, tokens, lengths=None):
        return self.linear(self.encoder(self.embedding(tokens), lengths=lengths)[0])


def tagger(kind="LSTM"):
    return pymtl.convert(Tagger(kind))


def batch_of(batch, steps):
    return torch.randint(50, (batch, steps)), torch.randint(1, steps + 1, (batch,))


def compiled_and_counter(module, backend="aot_eager", fullgraph=True, **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=fullgraph, **options), counter


def with_gradients(call, module, *args):
    output = call(*args)
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    names, parameters = zip(*module.named_parameters())
    gradients = torch.autograd.grad(output, parameters, seed)
    return {"output": output.detach()} | {f"gradient of {n}": g for n, g in zip(names, gradients)}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_kind
def test_twenty_sets_of_lengths_share_one_graph_and_give_eagers_bits(kind):
    model = tagger(kind)
    compiled, counter = compiled_and_counter(model)
    for _ in range(20):
        batch = batch_of(4, 9)
        assert_same_bits(with_gradients(compiled, model, *batch), with_gradients(model, model, *batch))
    assert counter.frame_count == 1


@every_kind
def test_other_padded_shapes_cost_one_more_graph_in_all(kind):
    model = tagger(kind)
    compiled, counter = compiled_and_counter(model)
    for shape in ((4, 9), (3, 7), (6, 12), (2, 5), (4, 8)):
        batch = batch_of(*shape)
        assert_same_bits(with_gradients(compiled, model, *batch), with_gradients(model, model, *batch))
    assert counter.frame_count == 2


@needs_a_compiler
def test_inductors_code_keeps_to_the_tolerance_at_any_size():
    model = tagger()
    compiled, counter = compiled_and_counter(model, "inductor", dynamic=True)
    exact = copy.deepcopy(model).double()
    frames = []
    for shape in ((4, 9), (3, 7), (6, 12)):
        batch = batch_of(*shape)
        assert_parity(*(with_gradients(*call, *batch) for call in ((compiled, model), (model, model), (exact, exact))))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_a_compiled_model_trains_as_the_eager_one_does():
    eager = tagger()
    model = copy.deepcopy(eager)
    compiled, counter = compiled_and_counter(model)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (eager, model)]
    for _ in range(5):
        tokens, lengths = batch_of(4, 9)
        for call, optimizer in zip((eager, compiled), optimizers):
            optimizer.zero_grad()
            F.cross_entropy(call(tokens, lengths).flatten(0, 1), tokens.flatten() % 5).backward()
            optimizer.step()
    assert_same_bits(model.state_dict(), eager.state_dict())
    assert counter.frame_count == 1


@every_kind
def test_last_states_meet_tensors_of_the_batch_in_one_graph(kind):
    encoder = getattr(pymtl, kind)(6, 8, **OPTIONS)

    def run(x, lengths, more):
        _, state = encoder(x, lengths=lengths)
        h_n = state[0] if kind == "LSTM" else state
        return torch.cat([h_n[-2], h_n[-1], more], -1)

    compiled, counter = compiled_and_counter(run)
    for batch in (4, 4, 6, 3):
        args = torch.randn(batch, 9, 6), torch.randint(1, 10, (batch,)), torch.randn(batch, 3)
        assert_same_bits(with_gradients(compiled, encoder, *args), with_gradients(run, encoder, *args))
    assert counter.frame_count == 2


def test_first_states_with_lengths_compile_into_one_graph():
    encoder = pymtl.LSTM(6, 8, **OPTIONS)
    compiled, counter = compiled_and_counter(lambda x, hx, lengths: encoder(x, hx, lengths=lengths)[0])
    for batch in (4, 4, 6, 3):
        x, hx, lengths = torch.randn(batch, 9, 6), states_of(encoder, batch), torch.randint(1, 10, (batch,))
        assert torch.equal(compiled(x, hx, lengths), encoder(x, hx, lengths=lengths)[0])
    assert counter.frame_count == 2


# Packed sequences.


def packed_batch(in_order, batch=5, steps=9):
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps
    lengths = lengths.sort(descending=True).values if in_order else lengths
    return pack_padded_sequence(torch.randn(batch, steps, 6), lengths, True, enforce_sorted=in_order)


@sorted_or_not
def test_a_packed_sequence_made_outside_compiles_into_one_graph(in_order):
    encoder = pymtl.LSTM(6, 4, **OPTIONS)

    def run(packed):
        output, (h_n, c_n) = encoder(packed)
        return torch.cat([output.data.flatten(), h_n.flatten(), c_n.flatten()])

    compiled, counter = compiled_and_counter(run)
    for _ in range(8):
        packed = packed_batch(in_order)
        assert_same_bits(with_gradients(compiled, encoder, packed), with_gradients(run, encoder, packed))
    assert counter.frame_count <= 2  # static, then dynamic in the number of tokens


@sorted_or_not
def test_a_packed_sequence_with_first_states_compiles_into_one_graph(in_order):
    encoder = pymtl.LSTM(6, 4, **OPTIONS)
    compiled, _ = compiled_and_counter(lambda packed, hx: encoder(packed, hx)[0].data)
    packed, hx = packed_batch(in_order), states_of(encoder, 5)
    assert torch.equal(compiled(packed, hx), encoder(packed, hx)[0].data)


def test_packing_inside_compiles_into_one_graph():
    encoder = pymtl.LSTM(6, 4, **OPTIONS)

    def run(x, lengths):
        return encoder(pymtl.pack(x, lengths, batch_first=True))[0].data

    compiled, counter = compiled_and_counter(run)
    for shape in ((5, 9), (5, 9), (3, 7), (6, 11)):
        args = torch.randn(*shape, 6), torch.randint(1, shape[1], shape[:1])
        assert_same_bits(with_gradients(compiled, encoder, *args), with_gradients(run, encoder, *args))
    assert counter.frame_count == 2


# Without fullgraph Dynamo does not capture sizes that are data, unless its configuration says so.


def test_without_fullgraph_a_model_gives_the_same_bits():
    model = tagger()
    compiled, counter = compiled_and_counter(model, fullgraph=False)
    frames = []
    for _ in range(6):
        batch = batch_of(4, 9)
        assert_same_bits(with_gradients(compiled, model, *batch), with_gradients(model, model, *batch))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[2]


def test_without_fullgraph_a_batch_without_lengths_is_one_graph():
    model = tagger()
    compiled, counter = compiled_and_counter(model, fullgraph=False)
    for _ in range(2):
        tokens, _ = batch_of(4, 9)
        assert_same_bits(with_gradients(compiled, model, tokens), with_gradients(model, model, tokens))
    assert counter.frame_count == 1


def test_dynamos_switch_for_such_sizes_keeps_a_batch_with_lengths_whole():
    model = tagger()
    compiled, counter = compiled_and_counter(model, fullgraph=False)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for _ in range(3):
            batch = batch_of(4, 9)
            assert_same_bits(with_gradients(compiled, model, *batch), with_gradients(model, model, *batch))
    assert counter.frame_count == 1


def test_a_constant_to_tracers_is_what_torchs_own_decorator_makes():
    def function():
        return 1

    expected = vars(torch.compiler.assume_constant_result(lambda: 1))
    assert expected
    assert vars(constant_to_tracers(function)) == expected
