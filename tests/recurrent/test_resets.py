"""Sequences that begin anew inside a batch, against a loop over steps and against each piece alone."""

import itertools

import pytest
import torch
from parity import assert_same_bits
from torch import nn

import pymtl

I, H, B, T = 5, 7, 6, 11
KINDS = ["LSTM", "GRU", "RNN"]
every_kind = pytest.mark.parametrize("kind", KINDS)
STACKS = {
    "one": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two bidirectional layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
SHARES = {"none": 0.0, "some": 0.25, "all": 1.0}
every_share = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)


def same_bits(ours, expected):
    assert_same_bits(dict(enumerate(ours)), dict(enumerate(expected)))


def states(module, batch=B, dtype=torch.float64):
    """Initial states, as the module takes them, that require a gradient."""
    size = (module.num_layers * (2 if module.bidirectional else 1), batch, module.hidden_size)
    h, c = (torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(2))
    return (h, c) if module.mode == "LSTM" else h


def parts_of(state):
    return state if isinstance(state, tuple) else (state,)


def made(kind, stack, dtype=torch.float64, **options):
    torch.manual_seed(3)
    ours = getattr(pymtl, kind)(I, H, **stack, **options, dtype=dtype)
    plain = getattr(nn, kind)(I, H, **stack, dtype=dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def by_steps(plain, x, hx, resets):
    """What people write: a step at a time, the states of the sequences that begin anew set to zero. One direction."""
    outputs = []
    for step in range(x.shape[0]):
        keep = (~resets[step]).to(x.dtype)[None, :, None]
        hx = tuple(s * keep for s in hx) if isinstance(hx, tuple) else hx * keep
        output, hx = plain(x[step : step + 1], hx)
        outputs.append(output)
    return torch.cat(outputs), hx


def by_pieces(plain, x, hx, resets, lengths):
    """Each piece alone through torch's module: [T, B, D*H] and the states."""
    directions = 2 if plain.bidirectional else 1
    outputs, finals = [], []
    for row, length in enumerate(lengths):
        cuts = [0, *(t for t in range(1, length) if resets[t, row]), length]
        own = [part[:, row].unflatten(0, (-1, directions)) for part in parts_of(hx)]
        found, ends = [], []
        for piece, (start, end) in enumerate(itertools.pairwise(cuts)):
            begins = [torch.zeros_like(part) for part in own]
            for begin, part in zip(begins, own):
                if piece == 0 and not resets[0, row]:
                    begin[:, 0] = part[:, 0]
                if directions == 2 and end == length:
                    begin[:, 1] = part[:, 1]
            begins = tuple(begin.flatten(0, 1) for begin in begins)
            output, state = plain(x[start:end, row], begins if isinstance(hx, tuple) else begins[0])
            found.append(output)
            ends.append([part.unflatten(0, (-1, directions)) for part in parts_of(state)])
        outputs.append(torch.cat([*found, x.new_zeros(x.shape[0] - length, found[0].shape[1])]))
        of_row = []
        for index in range(len(own)):
            each = [ends[-1][index][:, 0], *([ends[0][index][:, 1]] if directions == 2 else [])]
            of_row.append(torch.stack(each, 1).flatten(0, 1))
        finals.append(of_row)
    state = tuple(torch.stack([row[index] for row in finals], 1) for index in range(len(finals[0])))
    return torch.stack(outputs, 1), state if isinstance(hx, tuple) else state[0]


def gradients(output, state, leaves):
    torch.manual_seed(4)
    results = [output, *parts_of(state)]
    return torch.autograd.grad(
        sum((r * torch.randn(r.shape, dtype=r.dtype)).sum() for r in results), leaves, allow_unused=True
    )


def assert_agree(ours, plain, actual, expected, leaves):
    for a, e in zip([actual[0], *parts_of(actual[1])], [expected[0], *parts_of(expected[1])], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
    found = gradients(*actual, [*leaves, *ours.parameters()])
    wanted = gradients(*expected, [*leaves, *plain.parameters()])
    for a, e in zip(found, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if e is None else e, rtol=0, atol=1e-11)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
@every_share
def test_resets_are_a_loop_over_steps(kind, layers, share):
    ours, plain = made(kind, {"num_layers": layers})
    x, hx = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), states(ours)
    resets = torch.rand(T, B) < share
    assert_agree(ours, plain, ours(x, hx, resets=resets), by_steps(plain, x, hx, resets), [x, *parts_of(hx)])


@every_kind
@every_stack
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("lengths", [[T] * B, [4, T, 1, 7, 2, 7]], ids=["equal", "ragged"])
def test_resets_are_each_piece_alone(kind, stack, batch_first, lengths):
    ours, plain = made(kind, stack, batch_first=batch_first)
    x, hx = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), states(ours)
    resets = torch.rand(T, B) < 0.3
    resets[0, :3] = torch.tensor([True, False, True])
    given = (x.transpose(0, 1), resets.t()) if batch_first else (x, resets)
    given_lengths = None if lengths == [T] * B else lengths
    output, state = ours(given[0], hx, lengths=given_lengths, resets=given[1])
    actual = (output.transpose(0, 1) if batch_first else output, state)
    assert_agree(ours, plain, actual, by_pieces(plain, x, hx, resets, lengths), [x, *parts_of(hx)])


@every_kind
def test_without_initial_states_they_are_zeros(kind):
    ours, _ = made(kind, {"bidirectional": True})
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3
    zeros = torch.zeros(2, B, H, dtype=torch.float64)
    output, state = ours(x, resets=resets)
    same, too = ours(x, (zeros, zeros) if kind == "LSTM" else zeros, resets=resets)
    same_bits([output, *parts_of(state)], [same, *parts_of(too)])


@every_kind
@every_stack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pieces_have_the_bits_they_have_alone(kind, stack, dtype):
    ours, _ = made(kind, stack, dtype)
    x, resets = torch.randn(T, B, I, dtype=dtype), torch.rand(T, B) < 0.3
    with torch.no_grad():
        output, _ = ours(x, resets=resets)
        for row in range(B):
            cuts = [0, *(t for t in range(1, T) if resets[t, row]), T]
            for start, end in itertools.pairwise(cuts):
                assert torch.equal(output[start:end, row], ours(x[start:end, row])[0])
        none = torch.zeros(T, B, dtype=torch.bool)
        assert torch.equal(ours(x, resets=none)[0], ours(x)[0])
        frozen = pymtl.freeze(ours.eval())
        assert torch.equal(frozen(x, resets=resets)[0], output)


@every_kind
def test_an_unbatched_sequence_is_a_batch_of_one(kind):
    for batch_first in (False, True):
        ours, _ = made(kind, {"bidirectional": True}, batch_first=batch_first)
        x, resets, hx = torch.randn(T, I, dtype=torch.float64), torch.rand(T) < 0.4, states(ours, 1)
        unbatched = tuple(part[:, 0] for part in hx) if kind == "LSTM" else hx[:, 0]
        output, state = ours(x, unbatched, resets=resets)
        place = 0 if batch_first else 1
        same, too = ours(x.unsqueeze(place), hx, resets=resets.unsqueeze(place))
        same_bits([output, *parts_of(state)], [same.squeeze(place), *(part.squeeze(1) for part in parts_of(too))])


@every_kind
@every_stack
@pytest.mark.parametrize("steps", [1, T])
def test_resets_at_the_first_step_alone_clear_the_state(kind, stack, steps):
    ours, plain = made(kind, stack)
    x, hx = torch.randn(steps, B, I, dtype=torch.float64, requires_grad=True), states(ours)
    resets = torch.zeros(steps, B, dtype=torch.bool)
    resets[0, ::2] = True
    lengths = [steps] * B
    actual = ours(x, hx, resets=resets)
    assert_agree(ours, plain, actual, by_pieces(plain, x, hx, resets, lengths), [x, *parts_of(hx)])
    if not ours.bidirectional:
        assert_agree(ours, plain, ours(x, hx, resets=resets), by_steps(plain, x, hx, resets), [x, *parts_of(hx)])


@pytest.mark.parametrize("batch", [0, 3])
def test_empty_and_full_batches_where_torch_runs_it(batch):
    resets = torch.zeros(5, batch, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    for module in (pymtl.GRU(I, H).half(), pymtl.LSTM(I, H, proj_size=3)):
        output, _ = module(torch.randn(5, batch, I, dtype=module.weight_ih_l0.dtype), resets=resets)
        assert output.shape == (5, batch, 3 if module.proj_size else H)


@every_kind
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 9), (4, 1), (0, 5)], ids=str)
@every_share
def test_small_and_empty_batches(kind, batch, steps, share):
    ours, plain = made(kind, {"num_layers": 2})
    x, hx = torch.randn(steps, batch, I, dtype=torch.float64, requires_grad=True), states(ours, batch)
    resets = torch.rand(steps, batch) < share
    output, state = ours(x, hx, resets=resets)
    assert output.shape == (steps, batch, H)
    if batch == 0:
        assert all(part.shape == (2, 0, H) for part in parts_of(state))
        return
    assert_agree(ours, plain, (output, state), by_steps(plain, x, hx, resets), [x, *parts_of(hx)])


def test_where_torch_runs_it_resets_too():
    torch.manual_seed(1)
    ours = pymtl.LSTM(I, H, 2, bidirectional=True, proj_size=3, dtype=torch.float64)
    plain = nn.LSTM(I, H, 2, bidirectional=True, proj_size=3, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    x, resets = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), torch.rand(T, B) < 0.3
    assert ours.route(x).runner == "torch"
    hx = (torch.randn(4, B, 3, dtype=torch.float64), torch.randn(4, B, H, dtype=torch.float64))
    lengths = [4, T, 1, 7, 2, 7]
    actual = ours(x, hx, lengths=lengths, resets=resets)
    assert_agree(ours, plain, actual, by_pieces(plain, x, hx, resets, lengths), [x])


@every_kind
def test_options_of_a_sequence_are_of_each_piece(kind):
    ours = getattr(pymtl, kind)(I, H, recurrent_dropout=0.5, layer_norm=True, dtype=torch.float64)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3
    torch.manual_seed(8)
    output = ours(x, resets=resets)[0]
    torch.manual_seed(8)
    assert torch.equal(ours(x, resets=resets)[0], output)
    assert not torch.equal(ours(x, resets=resets)[0], output)
    ours.eval()
    output = ours(x, resets=resets)[0]
    for row in range(B):
        cuts = [0, *(t for t in range(1, T) if resets[t, row]), T]
        for start, end in itertools.pairwise(cuts):
            torch.testing.assert_close(output[start:end, row], ours(x[start:end, row])[0], rtol=0, atol=1e-14)


def test_second_derivatives():
    ours, _ = made("LSTM", {"bidirectional": True})
    resets = torch.rand(4, 3) < 0.4
    x = torch.randn(4, 3, I, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(2, 3, H, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x, h, c):
        output, (h_n, c_n) = ours(x, (h, c), resets=resets)
        return output, h_n, c_n

    assert torch.autograd.gradcheck(run, (x, h, c))
    assert torch.autograd.gradgradcheck(run, (x, h, c))


@pytest.mark.parametrize("with_lengths", [False, True])
@every_kind
def test_resets_compile_into_one_graph(kind, with_lengths):
    ours, _ = made(kind, {"bidirectional": True}, torch.float32)
    torch._dynamo.reset()

    def run(x, hx, resets, lengths):
        output, state = ours(x, hx, lengths=lengths, resets=resets)
        return output, state

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (9, 6):
        x, resets = torch.randn(steps, B, I, requires_grad=True), torch.rand(steps, B) < 0.3
        hx = states(ours, dtype=torch.float32)
        lengths = torch.randint(1, steps + 1, (B,)) if with_lengths else None
        actual, expected = (call(x, hx, resets, lengths) for call in (compiled, run))
        same_bits([actual[0], *parts_of(actual[1])], [expected[0], *parts_of(expected[1])])
        same_bits(*(gradients(*each, [x, *parts_of(hx), *ours.parameters()]) for each in (actual, expected)))


MASK = torch.zeros(T, B, dtype=torch.bool).index_fill(0, torch.tensor([5]), True)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"resets": [[True]]}, TypeError, "resets: expected a Tensor, got list"),
        ({"resets": MASK.long()}, RuntimeError, r"resets: expected bool \[11, 6\], got torch.int64 .*resets.bool\(\)"),
        ({"resets": MASK.t()}, RuntimeError, r"resets: expected bool \[11, 6\], got torch.bool \[6, 11\]"),
        ({"resets": MASK[:, 0]}, RuntimeError, r"expected bool \[11, 6\], got torch.bool \[11\]"),
        ({"resets": MASK, "lengths": [T] * (B - 1)}, RuntimeError, "lengths: expected 6 lengths"),
        (
            {"resets": MASK, "lengths": [0] + [T] * (B - 1)},
            RuntimeError,
            "lengths: expected lengths from 1 to 11, .* got 0 at position 0",
        ),
        ({"resets": MASK, "lengths": [T + 1] * B}, RuntimeError, "lengths: expected lengths from 1 to 11, .* got 12"),
        ({"resets": MASK, "hx": torch.zeros(1, B, H)}, TypeError, "hx: expected a tuple"),
        (
            {"resets": MASK, "hx": (torch.zeros(1, B + 1, H), torch.zeros(1, B + 1, H))},
            RuntimeError,
            "Expected hidden",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        pymtl.LSTM(I, H)(torch.zeros(T, B, I), **arguments)


def test_inputs_that_cannot_be_reset_are_refused():
    encoder = pymtl.LSTM(I, H)
    packed = pymtl.pack(torch.zeros(T, B, I), [T] * B)
    with pytest.raises(ValueError, match="resets: expected none with a PackedSequence"):
        encoder(packed, resets=MASK)
    with pytest.raises(ValueError, match="lengths: expected none with an unbatched"):
        encoder(torch.zeros(T, I), lengths=[T], resets=MASK[:, 0])
    with pytest.raises(ValueError, match="2D or 3D"):
        encoder(torch.zeros(T), resets=MASK)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        encoder(torch.zeros(0, B, I), resets=MASK[:0])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        encoder(torch.zeros(T, B, I, dtype=torch.float64), resets=MASK)
    with pytest.raises(RuntimeError, match="input_size"):
        encoder(torch.zeros(T, B, I + 1), resets=MASK)


def test_vmap_over_the_mask_is_refused_with_the_way_out():
    module = pymtl.LSTM(I, H)
    x, resets = torch.randn(2, T, B, I), torch.rand(2, T, B) < 0.2
    with pytest.raises(RuntimeError, match=r"resets: vmap cannot map over them: .* Give one batch of all"):
        torch.func.vmap(lambda x, r: module(x, resets=r)[0])(x, resets)
    found = torch.func.vmap(lambda x: module(x, resets=resets[0])[0])(x)
    torch.testing.assert_close(found[1], module(x[1], resets=resets[0])[0])
