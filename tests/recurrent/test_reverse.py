"""One direction that reads from the end, against torch's modules over each sequence turned around."""

import copy
import pickle

import pytest
import torch
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl.recurrent.route import NO_DTYPE, ON_CPU, RECORDED, Route
from pymtl.sharing import HardSharing
from pymtl.sharing.parallel import ParallelLSTM

I, H, B, T = 5, 7, 4, 9
LENGTHS = [3, 9, 1, 6]
KINDS = ["LSTM", "GRU", "RNN"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_depth = pytest.mark.parametrize("layers", [1, 2])
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])


def made(kind, layers=1, dtype=torch.float64, batch_first=False):
    """Ours in reverse, and torch's with the same weights."""
    torch.manual_seed(5)
    sizes = {"num_layers": layers, "batch_first": batch_first, "dtype": dtype}
    ours = getattr(pymtl, kind)(I, H, **sizes, reverse=True)
    plain = getattr(nn, kind)(I, H, **sizes)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def parts_of(state):
    return state if isinstance(state, tuple) else (state,)


def initial(module, *batch):
    """Initial states, as the module takes them."""
    h, c = (torch.randn(module.num_layers, *batch, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return (h, c) if module.mode == "LSTM" else h


def turned_around(plain, x, hx, lengths):
    """Each sequence alone, from its own last step on: padded [T, B, H] in the input's order, and the states."""
    outputs, states = [], []
    for row, length in enumerate(lengths):
        own = tuple(part[:, row] for part in parts_of(hx))
        output, state = plain(x[:length, row].flip(0), own if isinstance(hx, tuple) else own[0])
        outputs.append(nn.functional.pad(output.flip(0), (0, 0, 0, x.shape[0] - length)))
        states.append(parts_of(state))
    return torch.stack(outputs, 1), [torch.stack(each, 1) for each in zip(*states)]


def assert_agree(ours, plain, actual, expected, leaves):
    """Outputs, states, and the gradients of all leaves and parameters."""
    losses = []
    for output, states in (actual, expected):
        torch.manual_seed(6)
        losses.append(sum((r * torch.randn(r.shape, dtype=r.dtype)).sum() for r in (output, *states)))
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
    found = torch.autograd.grad(losses[0], [*leaves, *ours.parameters()])
    wanted = torch.autograd.grad(losses[1], [*leaves, *plain.parameters()])
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


@every_kind
@every_depth
@each_layout
def test_a_dense_batch_is_read_from_the_end(kind, layers, batch_first):
    ours, plain = made(kind, layers, batch_first=batch_first)
    x, hx = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True), initial(ours, B)
    if not batch_first:
        x = x.transpose(0, 1)
    time = 1 if batch_first else 0
    output, state = ours(x, hx)
    expected, last = plain(x.flip(time), hx)
    results = (output, parts_of(state)), (expected.flip(time), parts_of(last))
    assert_agree(ours, plain, *results, [x, *parts_of(hx)])


@every_kind
@every_depth
@pytest.mark.parametrize("given", ["lengths", "packed"])
def test_each_sequence_is_read_from_its_own_end(kind, layers, given):
    ours, plain = made(kind, layers)
    x, hx = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), initial(ours, B)
    if given == "lengths":
        output, state = ours(x, hx, lengths=torch.tensor(LENGTHS))
    else:
        packed, state = ours(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
        output = pad_packed_sequence(packed, total_length=T)[0]
    results = (output, parts_of(state)), turned_around(plain, x, hx, LENGTHS)
    assert_agree(ours, plain, *results, [x, *parts_of(hx)])


@every_kind
@pytest.mark.parametrize("steps", [1, T])
def test_an_unbatched_sequence(kind, steps):
    ours, plain = made(kind, batch_first=True)
    x, hx = torch.randn(steps, I, dtype=torch.float64, requires_grad=True), initial(ours)
    output, state = ours(x, hx)
    expected, last = plain(x.flip(0), hx)
    assert_agree(ours, plain, (output, parts_of(state)), (expected.flip(0), parts_of(last)), [x, *parts_of(hx)])


@every_kind
@every_depth
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_resets_are_those_of_the_backward_half_of_a_bidirectional_layer(kind, layers, ragged):
    ours, _ = made(kind)
    both = getattr(pymtl, kind)(I, H, bidirectional=True, dtype=torch.float64)
    both.load_state_dict({name + end: value for name, value in ours.state_dict().items() for end in ("", "_reverse")})
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3
    resets[0] = torch.tensor([True, False, True, False])
    lengths = torch.tensor(LENGTHS) if ragged else None
    hx = initial(ours, B)
    doubled = tuple(part.repeat(2, 1, 1) for part in parts_of(hx))
    for cuts in (resets, resets & (torch.arange(T) == 0)[:, None]):  # some, and none that counts
        output, state = ours(x, hx, lengths=lengths, resets=cuts)
        wide, states = both(x, doubled if isinstance(hx, tuple) else doubled[0], lengths=lengths, resets=cuts)
        torch.testing.assert_close(output, wide[..., H:], rtol=0, atol=1e-12)
        for a, e in zip(parts_of(state), parts_of(states), strict=True):
            torch.testing.assert_close(a, e[1:], rtol=0, atol=1e-12)


@every_kind
def test_the_same_bits_in_any_batch_frozen_or_not(kind):
    ours, _ = made(kind, 2, torch.float32)
    ours.eval()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        output, state = ours(x, lengths=torch.tensor(LENGTHS))
        for row, length in enumerate(LENGTHS):
            alone, own = ours(x[:length, row])
            assert_same_bits({"output": alone}, {"output": output[:length, row]})
            for a, e in zip(parts_of(own), parts_of(state), strict=True):
                assert_same_bits({"state": a}, {"state": e[:, row]})
        pymtl.freeze(ours)
        frozen, last = ours(x, lengths=torch.tensor(LENGTHS))
        assert_same_bits({"output": frozen}, {"output": output})
        assert_same_bits(dict(enumerate(parts_of(last))), dict(enumerate(parts_of(state))))
        dense, _ = ours(x)
        ours.unfreeze()
        assert_same_bits({"output": dense}, {"output": ours(x)[0]})


@every_kind
@pytest.mark.parametrize("frozen", [False, True])
def test_heads_and_pooling_inside_the_last_layer(kind, frozen):
    ours, _ = made(kind, 2, torch.float32)
    ours.eval()
    x, weight, bias = torch.randn(T, B, I), torch.randn(3, H), torch.randn(3)
    with torch.no_grad():
        if frozen:
            pymtl.freeze(ours)
        result = ours.forward_heads(x, None, weight, bias, mean=True, max=True)
        output, state = ours(x)
        expected = {
            "logits": pymtl.ops.heads(output.flatten(0, 1), weight, bias).view(T, B, 3),
            "mean": pymtl.ops.pool(output, None, "mean", reverse=[True]),
            "max": output.amax(0),
            "h_n": parts_of(state)[0][-1:],
        }
    assert_same_bits({name: getattr(result, name) for name in expected}, expected)


def test_other_options_go_along():
    options = {"zoneout": 0.2, "layer_norm": True, "dtype": torch.float64}
    ours, forward = pymtl.LSTM(I, H, reverse=True, **options), pymtl.LSTM(I, H, **options)
    forward.load_state_dict(ours.state_dict())
    ours.eval(), forward.eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    output, state = ours(x)
    expected, last = forward(x.flip(0))
    torch.testing.assert_close(output, expected.flip(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)
    pymtl.set_variants(ours, recurrent_dropout=0.5)
    assert ours.extra_repr() == "5, 7, recurrent_dropout=0.5, zoneout=0.2, layer_norm=True, reverse=True"


@every_kind
@pytest.mark.parametrize("given", ["nothing", "lengths", "resets", "both"])
def test_a_dtype_without_kernels_runs_through_torchs_path_on_sequences_turned_around(kind, given):
    ours, _ = made(kind, 2, dtype=torch.float16)
    exact, x = copy.deepcopy(ours).double(), torch.randn(T, B, I, dtype=torch.float16)
    assert ours.route(x) == Route("torch", NO_DTYPE)
    hx = initial(exact, B)
    halves = tuple(part.half() for part in parts_of(hx))
    options = {"lengths": torch.tensor(LENGTHS)} if given in ("lengths", "both") else {}
    options |= {"resets": torch.rand(T, B) < 0.3} if given in ("resets", "both") else {}
    output, state = ours(x, halves if isinstance(hx, tuple) else halves[0], **options)
    expected, last = exact(x.double(), hx, **options)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-3)
    torch.testing.assert_close([part.double() for part in parts_of(state)], list(parts_of(last)), rtol=0, atol=5e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_what_it_takes_from_the_start(weights, autocast):
    x = torch.randn(T, B, I).to(weights)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    found = []
    for reverse in (False, True):
        module = pymtl.GRU(I, H, reverse=reverse).to(weights)
        for given in (x, packed):
            with torch.autocast("cpu", autocast), torch.no_grad():
                try:
                    output = module(given)[0]
                    found.append(output.data.dtype if given is packed else output.dtype)
                except RuntimeError as error:
                    found.append(str(error))
    assert found[2:] == found[:2]


def test_a_projection_runs_through_torchs_path():
    sizes = {"proj_size": 3, "dtype": torch.float64}
    ours, plain = pymtl.LSTM(I, H, **sizes, reverse=True), nn.LSTM(I, H, **sizes)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = torch.randn(1, B, 3, dtype=torch.float64), torch.randn(1, B, H, dtype=torch.float64)
    expected, last = turned_around(plain, x, hx, LENGTHS)
    output, state = ours(x, hx, lengths=torch.tensor(LENGTHS))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(list(state), last, rtol=0, atol=1e-12)


class Sharing(HardSharing):
    def lstm(self, *arguments):
        return pymtl.LSTM(self.input_size, self.hidden_size, batch_first=True, reverse=True)


def test_compiled_and_exported():
    ours, _ = made("GRU", 2, torch.float32, batch_first=True)
    ours.eval()
    x = torch.randn(B, T, I)
    with torch.no_grad():
        expected = ours(x)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:2]), ours(x[:2]))


@every_kind
@each_layout
def test_a_trace_turns_the_input_around(kind, batch_first):
    ours, _ = made(kind, 2, torch.float32, batch_first=batch_first)
    ours.eval()
    x = torch.randn(T, B, I)
    traced = torch.jit.trace(ours, (x,))
    torch.testing.assert_close(traced(x), ours(x))
    assert not any("pymtl" in node.kind() for node in traced.graph.nodes())
    assert ours.route(x) == Route("kernels", ON_CPU)
    assert Route("torch", RECORDED) == traced_route(ours, x)
    with pytest.raises(RuntimeError, match="cannot record reverse=True with lengths or a PackedSequence"):
        torch.jit.trace(lambda x: ours(x, lengths=torch.tensor([1] * x.shape[0 if batch_first else 1]))[0], (x,))


def traced_route(module, x):
    found = []

    def ask(x):
        found.append(module.route(x))
        return x + 0

    torch.jit.trace(ask, (x,))
    return found[0]


def test_what_cannot_be():
    with pytest.raises(ValueError, match="reverse: expected False with bidirectional=True"):
        pymtl.LSTM(I, H, bidirectional=True, reverse=True)
    with pytest.raises(TypeError, match="reverse should be of type bool, got: int"):
        pymtl.GRU(I, H, reverse=1)
    for encoder in (pymtl.RNN(I, H, reverse=True), Sharing(["task"], I, H, bidirectional=False)):
        with pytest.raises(ValueError, match="encoder: expected one that reads from the first token"):
            pymtl.MultiTaskModel(None, encoder, {"task": pymtl.ClassificationHead(2)})
    with pytest.raises(ValueError, match=r"encoders\['back'\]: expected one that reads from the first token"):
        ParallelLSTM({"back": pymtl.LSTM(I, H, reverse=True)})


def test_it_is_told_kept_and_left_alone_by_revert():
    ours, _ = made("LSTM", dtype=torch.float32)
    x = torch.randn(T, B, I)
    assert repr(ours) == "LSTM(5, 7, reverse=True)"
    again = pickle.loads(pickle.dumps(ours))
    assert_same_bits({"output": again(x)[0].detach()}, {"output": ours(x)[0].detach()})
    with pytest.warns(UserWarning, match="revert left alone what torch's modules cannot be"):
        reverted = pymtl.revert(ours)
    assert_same_bits({"output": reverted(x)[0].detach()}, {"output": ours(x)[0].detach()})


class TurnsItself(nn.GRU):
    """A subclass that has names of ours, as the attribute and the method."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.reverse = self._reverse = True

    def forward(self, x, hx=None):
        output, h_n = super().forward(x.flip(0) if self._reverse else x, hx)
        return output.flip(0), h_n


def test_a_subclass_may_have_a_reverse_of_its_own():
    module, x = TurnsItself(I, H).eval(), torch.randn(T, B, I)
    with torch.no_grad():
        torch.testing.assert_close(pymtl.convert(module)(x), module(x))
        torch.testing.assert_close(pymtl.freeze(pymtl.convert(module))(x), module(x))
