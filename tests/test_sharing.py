"""The sharing schemes and encoders side by side, against loops over single sequences through torch.nn.LSTM."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_same_bits
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence

from pymtl import LSTM
from pymtl.sharing import (
    CGC,
    SCHEMES,
    CrossStitch,
    HardSharing,
    HierarchicalSharing,
    MMoE,
    ParallelLSTM,
    SharedPrivate,
    SoftSharing,
    TaskAttention,
)
from pymtl.states import States

INPUT, H = 5, 3
LENGTHS = [5, 3, 3, 1]
TASKS = ("a", "b", "c")
BATCHES = {"ragged": LENGTHS, "one sequence": [4], "one step": [1, 1, 1], "one token": [1], "equal": [3, 3]}
every_batch = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
every_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["unidirectional", "bidirectional"])
every_depth = pytest.mark.parametrize("num_layers", [1, 2], ids=["1 layer", "2 layers"])


def batch(lengths=LENGTHS, size=INPUT, dtype=torch.float64):
    """Packed random tokens, and the batch sizes."""
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
    return torch.randn(int(sizes.sum()), size, dtype=dtype, requires_grad=True), sizes


def unpacked(data, sizes):
    """A tensor for each sequence; the packed tokens by loops."""
    steps = data.split(sizes.tolist())
    return [torch.stack([step[row] for step in steps if len(step) > row]) for row in range(int(sizes[0]))]


def packed(sequences):
    longest = max(map(len, sequences))
    return torch.stack([s[t] for t in range(longest) for s in sequences if len(s) > t])


def finals(sequences, directions):
    """Each direction's own final state: the forward one's at the last token, the backward one's at the first."""
    half = sequences[0].shape[-1] // directions
    if directions == 1:
        return torch.stack([s[-1] for s in sequences])
    return torch.stack([torch.cat([s[-1, :half], s[0, half:]]) for s in sequences])


def walk(encoder, sequences):
    """What torch.nn.LSTM with the very parameters of ``encoder`` makes of each sequence alone."""
    twin = nn.LSTM(
        encoder.input_size,
        encoder.hidden_size,
        encoder.num_layers,
        encoder.bias,
        bidirectional=encoder.bidirectional,
        dtype=encoder.weight_hh_l0.dtype,
    )
    for name, parameter in encoder.named_parameters():
        setattr(twin, name, parameter)
    return [twin(s)[0] for s in sequences]


def gradients(results, leaves):
    """Of a fixed random combination of ``results``, with respect to ``leaves``."""
    generator = torch.Generator().manual_seed(5)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def assert_agrees(scheme, oracle, lengths=LENGTHS, tasks=None):
    """States, final states and all gradients of a scheme are those ``oracle`` makes of sequences."""
    scheme.double().eval()
    data, sizes = batch(lengths)
    states = scheme(data, sizes, tasks).states
    expected = oracle(unpacked(data, sizes))
    expected = {task: expected[task] for task in (tasks or scheme.tasks)}
    assert set(states) == set(expected)
    ours, theirs = [], []
    for task, sequences in expected.items():
        state = states[task]
        assert state.tokens.shape == (len(data), scheme.out_features)
        ours += [state.tokens, state.pooled("last"), state.pooled("mean"), state.pooled("max")]
        theirs += [packed(sequences), finals(sequences, scheme.directions)]
        theirs += [torch.stack([s.mean(0) for s in sequences]), torch.stack([s.amax(0) for s in sequences])]
    torch.testing.assert_close(ours, theirs)
    leaves = {"data": data} | dict(scheme.named_parameters())
    actual, wanted = (gradients(results, list(leaves.values())) for results in (ours, theirs))
    for name, a, w in zip(leaves, actual, wanted):
        zero = torch.zeros_like(leaves[name])  # no gradient and a gradient of zeros are the same here
        a, w = (zero if g is None else g for g in (a, w))
        torch.testing.assert_close(a, w, msg=lambda text, name=name: f"{name}: {text}")


def directions_of(bidirectional):
    return 2 if bidirectional else 1


# Encoders side by side.


def encoders(count=3, dtype=torch.float32, input_size=INPUT, hidden_size=7, **options):
    return {f"e{k}": LSTM(input_size, hidden_size, dtype=dtype, **options) for k in range(count)}


def alone(encoder, data, sizes):
    """Output and final states of one LSTM by itself."""
    output, (h_n, _) = encoder(PackedSequence(data, sizes))
    directions = directions_of(encoder.bidirectional)
    return output.data, torch.cat(tuple(h_n[-directions:]), dim=-1)


def side_by_side(count, options, dtype, own, names=None, lengths=LENGTHS):
    """Results and gradients of some encoders in one launch, and of each alone."""
    several = ParallelLSTM(encoders(count, dtype, **options))
    wanted = list(several.encoders if names is None else names)
    size = options.get("input_size", INPUT)
    data, sizes = batch(lengths, size, dtype)
    if own:
        data = torch.randn(len(data), len(wanted), size, dtype=dtype, requires_grad=True)
    tokens, last = several(data, sizes, names)
    found = []
    for k, name in enumerate(wanted):
        encoder, own_data = several.encoders[name], data[:, k] if own else data
        results = {"ours": (tokens[:, k], last[:, k]), "alone": alone(encoder, own_data, sizes)}
        leaves = dict(encoder.named_parameters()) | {"data": data}
        for kind, (output, final) in results.items():
            grads = dict(zip(leaves, gradients([output, final], list(leaves.values()))))
            results[kind] = {"output": output, "last": final} | {f"gradient of {n}": g for n, g in grads.items()}
            if kind == "ours":
                # The backward of one launch is asked for K times here; each time the others get zeros.
                tokens, last = several(data, sizes, names)
        found.append(results)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_depth
@every_direction
def test_encoders_side_by_side_give_the_bits_of_each_alone(bidirectional, num_layers, own, dtype, threads):
    options = {"bidirectional": bidirectional, "num_layers": num_layers}
    for count in (1, 2):
        threads(count)
        for results in side_by_side(3, options, dtype, own):
            assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_batch
def test_the_bits_are_the_same_in_every_batch(lengths, own):
    for results in side_by_side(2, {"bidirectional": True, "num_layers": 2}, torch.float32, own, lengths=lengths):
        assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize("names", [["e1"], ["e2", "e0"], ("e0", "e1", "e2")], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_some_of_the_encoders_run_in_the_order_asked_for(names, own):
    for results in side_by_side(3, {"bidirectional": True, "num_layers": 2}, torch.float32, own, names):
        assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {}),
        (3, {"bias": False, "num_layers": 2, "bidirectional": True}),
        (2, {"input_size": 70, "hidden_size": 90, "num_layers": 2, "bidirectional": True}),
        (3, {"input_size": 300, "hidden_size": 33}),
    ],
    ids=["one encoder", "no bias", "large", "wide input"],
)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_the_bits_are_the_same_at_every_size(count, options, own, threads):
    # Many tokens and wide layers: weight gradients are large matrix products.
    for number in (1, 2):
        threads(number)
        for results in side_by_side(count, options, torch.float32, own, lengths=[40, 31, 31, 12, 5, 1, 1]):
            assert_same_bits(results["ours"], results["alone"])


def test_gradients_of_all_encoders_together_are_those_of_each_alone():
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=True, num_layers=2))
    data, sizes = batch()
    tokens, last = several(data, sizes)
    each = [alone(e, data, sizes) for e in several.encoders.values()]
    theirs = [torch.stack([t for t, _ in each], 1), torch.stack([f for _, f in each], 1)]
    leaves = dict(several.named_parameters())
    ours = dict(zip(leaves, gradients([tokens, last], list(leaves.values()))))
    assert_same_bits(ours, dict(zip(leaves, gradients(theirs, list(leaves.values())))))
    # An input that all of them read gets a sum of gradients, whose order is free.
    several_grad = gradients(several(data, sizes), [data])
    theirs = [torch.stack(parts, 1) for parts in zip(*(alone(e, data, sizes) for e in several.encoders.values()))]
    torch.testing.assert_close(several_grad, gradients(theirs, [data]))


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_depth
@every_direction
def test_encoders_side_by_side_are_torch_s_over_single_sequences(bidirectional, num_layers, own):
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=bidirectional, num_layers=num_layers))
    data, sizes = batch()
    if own:
        data = torch.randn(len(data), 3, INPUT, dtype=data.dtype, requires_grad=True)
    tokens, last = several(data, sizes)
    theirs = []
    for k, encoder in enumerate(several.encoders.values()):
        theirs.append(walk(encoder, unpacked(data[:, k] if own else data, sizes)))
    expected = torch.stack([packed(s) for s in theirs], 1)
    expected_last = torch.stack([finals(s, directions_of(bidirectional)) for s in theirs], 1)
    torch.testing.assert_close([tokens, last], [expected, expected_last])
    leaves = [data, *several.parameters()]
    torch.testing.assert_close(gradients([tokens, last], leaves), gradients([expected, expected_last], leaves))


def test_without_gradients_the_bits_are_the_same():
    several = ParallelLSTM(encoders(2, bidirectional=True, num_layers=2))
    data, sizes = batch(dtype=torch.float32)
    with_gradients = several(data, sizes)
    with torch.no_grad():
        assert_same_bits(several(data, sizes)._asdict(), with_gradients._asdict())
    with torch.inference_mode():
        assert_same_bits(several(data, sizes)._asdict(), with_gradients._asdict())


def test_states_are_named_and_hold_the_final_states():
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=True))
    data, sizes = batch()
    for names in (None, ["e2", "e1"]):
        states = several.states(data, sizes, names)
        assert list(states) == (names or ["e0", "e1", "e2"])
        for name, state in states.items():
            sequences = walk(several.encoders[name], unpacked(data, sizes))
            torch.testing.assert_close(state.tokens, packed(sequences))
            torch.testing.assert_close(state.pooled("last"), finals(sequences, 2))


def doubled(module, arguments, result):
    output, state = result
    return output._replace(data=2 * output.data), (3 * state[0], state[1])


def no_gradient(module, grads):
    return tuple(0 * g for g in grads)


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_an_encoder_with_a_forward_hook_is_called(own):
    several = ParallelLSTM(encoders(3, bidirectional=True, num_layers=2))
    data, sizes = batch(dtype=torch.float32)
    if own:
        data = torch.randn(len(data), 3, INPUT)
    before = several(data, sizes)
    several.encoders["e1"].register_forward_hook(doubled)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            tokens, last = several(data, sizes)
        assert_same_bits({"t": tokens[:, ::2], "l": last[:, ::2]}, {"t": before[0][:, ::2], "l": before[1][:, ::2]})
        assert_same_bits({"t": tokens[:, 1], "l": last[:, 1]}, {"t": 2 * before[0][:, 1], "l": 3 * before[1][:, 1]})
    tokens, _ = several(data, sizes, ["e0", "e2"] if not own else None)
    assert tokens.shape[1] == (3 if own else 2)


def test_a_pruned_encoder_s_mask_counts():
    several = ParallelLSTM(encoders(2))
    data, sizes = batch(dtype=torch.float32)
    prune.l1_unstructured(several.encoders["e0"], "weight_ih_l0", amount=0.5)
    several.encoders["e0"].weight_ih_l0_orig.data.mul_(2)
    tokens, last = several(data, sizes)
    for k, encoder in enumerate(several.encoders.values()):
        assert_same_bits(dict(zip("tl", (tokens[:, k], last[:, k]))), dict(zip("tl", alone(encoder, data, sizes))))


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_another_dtype_autocast_and_projections_take_torch_s_path(own):
    cases = {
        "bfloat16": (encoders(2, torch.bfloat16, bidirectional=True, num_layers=2), torch.bfloat16, False),
        "autocast": (encoders(2, bidirectional=True), torch.float32, True),
        "projections": (encoders(2, bidirectional=True, num_layers=2, proj_size=4), torch.float32, False),
    }
    for name, (made, dtype, autocast) in cases.items():
        several = ParallelLSTM(made)
        data, sizes = batch(dtype=dtype)
        if own:
            data = torch.randn(len(data), 2, INPUT, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tokens, last = several(data, sizes)
            for k, encoder in enumerate(several.encoders.values()):
                output, final = alone(encoder, data[:, k] if own else data, sizes)
                assert torch.equal(tokens[:, k], output), name
                assert torch.equal(last[:, k], final), name


def test_encoders_of_different_dtypes_are_refused_as_one_alone_would():
    several = ParallelLSTM({"a": LSTM(INPUT, H), "b": LSTM(INPUT, H, dtype=torch.float64)})
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"dtype|float"):
        several(data, sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": INPUT + 1},
        {"hidden_size": H + 1},
        {"num_layers": 2},
        {"bias": False},
        {"dropout": 0.3},
        {"bidirectional": True},
        {"proj_size": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_encoders_of_different_architectures_are_refused(change):
    sizes = {"input_size": INPUT, "hidden_size": H}
    with pytest.raises(ValueError, match=r"encoders\['other'\]: expected the sizes of the first"):
        ParallelLSTM({"first": LSTM(**sizes), "other": LSTM(**(sizes | change))})


def test_what_is_no_encoder_is_refused():
    with pytest.raises(ValueError, match="encoders: expected at least one"):
        ParallelLSTM({})
    with pytest.raises(TypeError, match=r"encoders\['b'\]: expected a pymtl.LSTM, got LSTM"):
        ParallelLSTM({"a": LSTM(INPUT, H), "b": nn.LSTM(INPUT, H)})


def test_inputs_that_do_not_fit_are_refused():
    several = ParallelLSTM(encoders(3))
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="data: expected 3 inputs, one for each encoder, got 2"):
        several(torch.randn(len(data), 2, INPUT), sizes)
    with pytest.raises(KeyError):
        several(data, sizes, ["unknown"])
    for wrong in (torch.randn(len(data), 3 * INPUT), torch.randn(len(data), INPUT + 1)):
        with pytest.raises(RuntimeError, match="input"):
            several(wrong, sizes)
    with pytest.raises(RuntimeError, match="input"):
        several(torch.randn(len(data), 3, INPUT + 1), sizes)


def test_dropout_between_layers_is_for_training_only():
    several = ParallelLSTM(encoders(2, bidirectional=True, num_layers=2, dropout=0.5))
    data, sizes = batch(dtype=torch.float32)
    several.eval()
    for k, encoder in enumerate(several.encoders.values()):
        results = several(data, sizes)
        expected = alone(encoder, data, sizes)
        assert_same_bits(dict(zip("tl", (r[:, k] for r in results))), dict(zip("tl", expected)))
    evaluated = several(data, sizes)
    several.train()
    torch.manual_seed(1)
    once, again = several(data, sizes), several(data, sizes)
    assert not torch.equal(once.tokens, again.tokens)
    assert not torch.equal(once.tokens, evaluated.tokens)
    torch.manual_seed(1)
    assert_same_bits(several(data, sizes)._asdict(), once._asdict())


def test_dropping_everything_gives_the_second_layer_zeros():
    several = ParallelLSTM(encoders(2, torch.float64, bidirectional=True, num_layers=2, dropout=1.0)).train()
    data, sizes = batch()
    tokens, last = several(data, sizes)
    for k, encoder in enumerate(several.encoders.values()):
        second = LSTM(2 * 7, 7, bidirectional=True, dtype=torch.float64)
        second.load_state_dict({n.replace("_l1", "_l0"): p for n, p in encoder.state_dict().items() if "_l1" in n})
        sequences = walk(second, [s.new_zeros(len(s), 14) for s in unpacked(data, sizes)])
        torch.testing.assert_close(tokens[:, k], packed(sequences))
        torch.testing.assert_close(last[:, k], finals(sequences, 2))


def test_each_encoder_drops_other_states():
    made = encoders(2, num_layers=2, dropout=0.5)
    made["e1"].load_state_dict(made["e0"].state_dict())
    data, sizes = batch(dtype=torch.float32)
    tokens, _ = ParallelLSTM(made).train()(data, sizes)
    assert not torch.equal(tokens[:, 0], tokens[:, 1])


def test_an_empty_batch_of_encoders_gives_empty_states():
    several = ParallelLSTM(encoders(2, bidirectional=True))
    tokens, last = several(torch.zeros(0, INPUT), torch.zeros(4, dtype=torch.int64))
    assert tokens.shape == (0, 2, 14)
    assert last.shape == (0, 2, 14)


# States.


@every_batch
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("trailing", [0, 2], ids=["", "trailing zeros"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_pooling_of_derived_states_is_that_of_each_sequence(lengths, directions, trailing, fused):
    data, sizes = batch(lengths, 6)
    sequences = unpacked(data, sizes)
    states = States(data, torch.cat([sizes, sizes.new_zeros(trailing)]), directions, fused=fused)
    expected = {
        "last": finals(sequences, directions),
        "mean": torch.stack([s.mean(0) for s in sequences]),
        "max": torch.stack([s.amax(0) for s in sequences]),
    }
    for kind, value in expected.items():
        if fused or trailing == 0 or kind == "last":
            torch.testing.assert_close(states.pooled(kind), value)
            torch.testing.assert_close(gradients([states.pooled(kind)], [data]), gradients([value], [data]))
            assert states.pooled(kind) is states.pooled(kind)
    assert torch.equal(states.rows(), torch.tensor([b for t in range(max(lengths)) for b in range(int(sizes[t]))]))


def test_a_given_final_state_is_kept_and_mapped_where_asked_for():
    data, sizes = batch(size=6)
    last = torch.randn(len(LENGTHS), 6, dtype=data.dtype)
    states = States.of(data, sizes, 2, last)
    assert states.pooled("last") is last
    assert len(states.tensors()) == 2
    both = states.map(lambda x: 2 * x, with_last=True)
    assert torch.equal(both.tokens, 2 * data)
    assert torch.equal(both.pooled("last"), 2 * last)
    tokens_only = states.map(lambda x: 2 * x, with_last=False)
    torch.testing.assert_close(tokens_only.pooled("last"), finals(unpacked(2 * data, sizes), 2))
    derived = States.of(data, sizes, 2)
    derived.pooled("last")
    assert len(derived.tensors()) == 1


# Hard.


@every_batch
@every_depth
@every_direction
def test_hard_sharing_is_one_lstm(bidirectional, num_layers, lengths):
    scheme = HardSharing(TASKS, INPUT, H, num_layers, bidirectional)
    assert_agrees(scheme, lambda xs: dict.fromkeys(TASKS, walk(scheme.encoder, xs)), lengths)


def test_hard_sharing_gives_all_tasks_the_same_object():
    scheme = HardSharing(TASKS, INPUT, H)
    data, sizes = batch(dtype=torch.float32)
    states, penalties = scheme(data, sizes, ["c", "a"])
    assert list(states) == ["c", "a"]
    assert states["a"] is states["c"]
    assert penalties == {}


# Soft.


@every_batch
@every_depth
@every_direction
def test_soft_sharing_has_an_encoder_for_each_task(bidirectional, num_layers, lengths):
    scheme = SoftSharing(TASKS, INPUT, H, num_layers, bidirectional)
    assert_agrees(scheme, lambda xs: {t: walk(scheme.parallel.encoders[t], xs) for t in TASKS}, lengths)
    assert_agrees(scheme, lambda xs: {t: walk(scheme.parallel.encoders[t], xs) for t in TASKS}, lengths, ["c", "a"])


def brute_penalty(scheme, kind, data, sizes, tasks=TASKS):
    each = scheme.parallel.encoders
    pairs = list(itertools.combinations(TASKS, 2))
    if kind == "l2":
        return sum(((p - q) ** 2).sum() for i, j in pairs for p, q in zip(each[i].parameters(), each[j].parameters()))
    if kind == "trace_norm":
        groups = zip(*(each[t].parameters() for t in TASKS))
        return sum(torch.linalg.svdvals(torch.stack([p.flatten() for p in group], 1)).sum() for group in groups)
    states = {t: torch.cat(walk(each[t], unpacked(data, sizes))) for t in tasks}
    return torch.stack([((states[i] - states[j]) ** 2).mean() for i, j in itertools.combinations(tasks, 2)]).mean()


PENALTIES = ["l2", "trace_norm", "representations"]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


@every_penalty
@every_direction
def test_soft_penalties_are_their_definitions(penalty, bidirectional):
    scheme = SoftSharing(TASKS, INPUT, H, 2, bidirectional, penalty=penalty, weight=0.7).double().train()
    data, sizes = batch()
    penalties = scheme(data, sizes).penalties
    assert list(penalties) == [penalty]
    expected = 0.7 * brute_penalty(scheme, penalty, data, sizes)
    torch.testing.assert_close(penalties[penalty], expected)
    leaves = list(scheme.parameters())
    actual = torch.autograd.grad(penalties[penalty], leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("tasks", [["a", "b"], ["c", "a"]], ids=str)
@every_penalty
def test_soft_penalties_of_some_tasks(penalty, tasks):
    """Those of parameters are of all tasks', that of states of the states there are."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=2.0).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    torch.testing.assert_close(penalties[penalty], 2 * brute_penalty(scheme, penalty, data, sizes, tasks))


def test_one_task_s_states_differ_from_none():
    data, sizes = batch()
    scheme = SoftSharing(TASKS, INPUT, H, penalty="representations").double()
    assert scheme(data, sizes, ["b"]).penalties["representations"] == 0
    for penalty in PENALTIES:
        assert SoftSharing(["a"], INPUT, H, penalty=penalty).double()(data, sizes).penalties == {}


@every_penalty
def test_the_derivatives_of_soft_penalties_pass_gradcheck(penalty):
    scheme = SoftSharing(TASKS, 2, 2, bidirectional=False, penalty=penalty, weight=1.0).double()
    data, sizes = batch([3, 1], 2)
    # gradcheck moves the parameters in place: they are not passed on.
    assert torch.autograd.gradcheck(
        lambda *_: scheme(data, sizes).penalties[penalty], tuple(scheme.parameters()), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_penalty
def test_identical_encoders_have_finite_gradients(penalty, dtype):
    scheme = SoftSharing(TASKS, INPUT, H, 2, penalty=penalty, weight=1.0).to(dtype)
    for task in TASKS[1:]:
        scheme.parallel.encoders[task].load_state_dict(scheme.parallel.encoders["a"].state_dict())
    data, sizes = batch(dtype=dtype)
    value = scheme(data, sizes).penalties[penalty]
    grads = torch.autograd.grad(value, list(scheme.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    if penalty != "trace_norm":
        assert value.abs() < 1e-10
        assert all(g is None or g.abs().max() < 1e-5 for g in grads)
        return
    # A matrix of equal columns p has one singular value, sqrt(K) |p|, whose gradient is p / (sqrt(K) |p|). The others
    # come as roots of rounding errors: up to a few sqrt(eps) of it.
    root = len(TASKS) ** 0.5
    norms = [p.norm() for p in scheme.parallel.encoders["a"].parameters()]
    torch.testing.assert_close(value, root * sum(norms), rtol=10 * torch.finfo(dtype).eps ** 0.5, atol=0)
    expected = [p / (root * p.norm()) for p in scheme.parameters()]
    torch.testing.assert_close(list(grads), expected, rtol=0, atol=10 * torch.finfo(dtype).eps ** 0.5)


@pytest.mark.parametrize(
    "penalty",
    [
        "l2",
        "trace_norm",
        "representations",
    ],
)
def test_encoders_whose_biases_are_zero_have_finite_gradients(penalty):
    """Biases that start at zero are an ordinary initialisation."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=1.0).double()
    for name, parameter in scheme.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    data, sizes = batch()
    value = scheme(data, sizes).penalties[penalty]
    assert value.isfinite()
    grads = torch.autograd.grad(value, list(scheme.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def nearly_alike(penalty, difference):
    """Encoders as training leaves them."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=1.0)
    first = scheme.parallel.encoders["a"].parameters()
    for group in zip(first, *(scheme.parallel.encoders[task].parameters() for task in TASKS[1:])):
        for other in group[1:]:
            other.data = group[0].data + difference * torch.randn_like(other)
    return scheme


@pytest.mark.parametrize("penalty", ["l2", pytest.param("trace_norm")])
def test_penalties_of_parameters_are_the_same_under_autocast(penalty):
    scheme = nearly_alike(penalty, 0.02)
    data, sizes = batch(dtype=torch.float32)
    leaves = list(scheme.parameters())
    expected = scheme(data, sizes).penalties[penalty]
    expected_grads = torch.autograd.grad(expected, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        value = scheme(data, sizes).penalties[penalty]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), expected_grads)


@pytest.mark.parametrize("difference", [0.1, 1e-3])
def test_the_trace_norm_of_nearly_equal_encoders_keeps_the_rule(difference):
    scheme = nearly_alike("trace_norm", difference)

    def results(value):
        leaves = dict(scheme.named_parameters())
        return {"value": value.detach()} | dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))

    def plain():
        return brute_penalty(scheme, "trace_norm", None, None)

    data, sizes = batch(dtype=torch.float32)
    ours, theirs = results(scheme(data, sizes).penalties["trace_norm"]), results(plain())
    scheme.double()
    assert_parity(ours, theirs, results(plain()))


# Shared and private.


@every_batch
@every_depth
@every_direction
def test_shared_and_private_states_stand_side_by_side_in_each_direction(bidirectional, num_layers, lengths):
    scheme = SharedPrivate(TASKS, INPUT, H, num_layers, bidirectional)

    def oracle(xs):
        shared = walk(scheme.parallel.encoders["shared"], xs)
        states = {}
        for task in TASKS:
            pairs = zip(shared, walk(scheme.parallel.encoders[task], xs))
            if bidirectional:
                states[task] = [torch.cat([s[:, :H], p[:, :H], s[:, H:], p[:, H:]], 1) for s, p in pairs]
            else:
                states[task] = [torch.cat([s, p], 1) for s, p in pairs]
        return states

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "b"])


def last_states(encoder, data, sizes):
    return finals(walk(encoder, unpacked(data, sizes)), directions_of(encoder.bidirectional))


@pytest.mark.parametrize("tasks", [None, ["b"], ["c", "a"]], ids=str)
@every_direction
def test_orthogonality_is_its_definition(bidirectional, tasks):
    scheme = SharedPrivate(TASKS, INPUT, H, 2, bidirectional, orthogonality=0.3).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    assert list(penalties) == ["orthogonality"]
    each = scheme.parallel.encoders
    shared = last_states(each["shared"], data, sizes)
    terms = []
    for task in tasks or TASKS:
        own, value = last_states(each[task], data, sizes), 0.0
        for i, j in itertools.product(range(shared.shape[1]), range(own.shape[1])):
            value = value + sum(shared[b, i] * own[b, j] for b in range(len(LENGTHS))) ** 2
        terms.append(value)
    expected = 0.3 * sum(terms) / len(terms) / len(LENGTHS) ** 2
    torch.testing.assert_close(penalties["orthogonality"], expected)
    leaves = [data, *(p for t in ("shared", *(tasks or TASKS)) for p in each[t].parameters())]
    actual = torch.autograd.grad(penalties["orthogonality"], leaves, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    torch.testing.assert_close(
        [torch.zeros(()) if g is None else g for g in actual], [torch.zeros(()) if g is None else g for g in wanted]
    )


@pytest.mark.parametrize("tasks", [["b"], ["c", "a"]], ids=str)
def test_the_adversary_descends_and_the_encoder_ascends(tasks):
    scheme = SharedPrivate(TASKS, INPUT, H, orthogonality=0.0, adversarial=0.4).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    assert list(penalties) == ["adversarial"]
    scores = F.linear(
        last_states(scheme.parallel.encoders["shared"], data, sizes),
        scheme.discriminator.weight,
        scheme.discriminator.bias,
    )
    each = [-scores.log_softmax(1)[:, TASKS.index(task)].mean() for task in tasks]
    expected = 0.4 * sum(each) / len(each)
    torch.testing.assert_close(penalties["adversarial"], expected)
    shared = [data, *scheme.parallel.encoders["shared"].parameters()]
    adversary = list(scheme.discriminator.parameters())
    ours = torch.autograd.grad(penalties["adversarial"], shared + adversary)
    plain = torch.autograd.grad(expected, shared + adversary)
    torch.testing.assert_close(ours[len(shared) :], plain[len(shared) :])
    torch.testing.assert_close(ours[: len(shared)], tuple(-g for g in plain[: len(shared)]))
    assert all(g.abs().max() > 0 for g in plain)


def test_private_encoders_hear_nothing_of_the_adversary():
    scheme = SharedPrivate(TASKS, INPUT, H, orthogonality=0.0, adversarial=0.4)
    data, sizes = batch(dtype=torch.float32)
    value = scheme(data, sizes, ["a"]).penalties["adversarial"]
    private = [p for task in TASKS for p in scheme.parallel.encoders[task].parameters()]
    grads = torch.autograd.grad(value, private, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_a_batch_of_all_tasks_has_no_adversary():
    data, sizes = batch(dtype=torch.float32)
    scheme = SharedPrivate(TASKS, INPUT, H, adversarial=0.4)
    assert set(scheme(data, sizes).penalties) == {"orthogonality"}
    assert set(scheme(data, sizes, ["c", "b", "a"]).penalties) == {"orthogonality"}
    assert set(scheme(data, sizes, ["c", "b"]).penalties) == {"orthogonality", "adversarial"}
    assert SharedPrivate(TASKS, INPUT, H).discriminator is None


# Hierarchical.


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "no shortcut"])
@pytest.mark.parametrize("levels", [None, {"a": 2, "b": 1, "c": 2}, {"a": 1, "b": 3, "c": 3}], ids=str)
@every_direction
def test_tasks_read_their_own_layers(bidirectional, levels, shortcut):
    scheme = HierarchicalSharing(TASKS, INPUT, H, 1, bidirectional, levels=levels, shortcut=shortcut)
    levels = levels or {"a": 1, "b": 2, "c": 3}

    def oracle(xs):
        below, of_layer = xs, []
        for layer in scheme.layers:
            of_layer.append(walk(layer, below))
            below = [torch.cat([s, x], 1) for s, x in zip(of_layer[-1], xs)] if shortcut else of_layer[-1]
        return {task: of_layer[levels[task] - 1] for task in TASKS}

    assert len(scheme.layers) == scheme.num_layers == max(levels.values())
    assert_agrees(scheme, oracle)
    assert_agrees(scheme, oracle, [1, 1], ["b"])


def test_lower_tasks_do_not_run_upper_layers():
    scheme = HierarchicalSharing(TASKS, INPUT, H, num_layers=4, levels={"a": 1, "b": 3, "c": 2})
    assert len(scheme.layers) == 4
    ran = []
    for index, layer in enumerate(scheme.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index + 1))
    data, sizes = batch(dtype=torch.float32)
    for tasks, expected in ((["a"], [1]), (["c", "a"], [1, 2]), (["b"], [1, 2, 3]), (None, [1, 2, 3])):
        ran.clear()
        scheme(data, sizes, tasks)
        assert ran == expected


def test_tasks_of_one_level_share_their_states():
    data, sizes = batch(dtype=torch.float32)
    states = HierarchicalSharing(TASKS, INPUT, H, levels={"a": 2, "b": 1, "c": 2})(data, sizes).states
    assert states["a"] is states["c"]
    assert states["a"] is not states["b"]


# Cross-stitch.


@every_batch
@every_depth
@every_direction
def test_cross_stitch_units_mix_after_each_layer(bidirectional, num_layers, lengths):
    scheme = CrossStitch(TASKS, INPUT, H, num_layers, bidirectional)
    for alpha in scheme.alpha:
        nn.init.normal_(alpha)

    def oracle(xs):
        reads = dict.fromkeys(TASKS, xs)
        for layer, alpha in zip(scheme.layers, scheme.alpha):
            states = {t: walk(layer.encoders[t], reads[t]) for t in TASKS}
            reads = {
                j: [sum(alpha[row, k] * states[t][b] for k, t in enumerate(TASKS)) for b in range(len(xs))]
                for row, j in enumerate(TASKS)
            }
        return reads

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])


def test_alpha_begins_with_the_self_weight_and_rows_of_one():
    for count, weight in ((1, 0.9), (2, 0.9), (4, 0.7), (3, 1.0), (3, 0.0)):
        tasks = [f"t{k}" for k in range(count)]
        scheme = CrossStitch(tasks, INPUT, H, 2, self_weight=weight)
        assert len(scheme.alpha) == 2
        for alpha in scheme.alpha:
            torch.testing.assert_close(alpha.sum(1), torch.ones(count))
            torch.testing.assert_close(alpha.diagonal(), torch.full((count,), weight if count > 1 else 1.0))
            off = alpha[~torch.eye(count, dtype=torch.bool)]
            assert (off == off[0]).all() if count > 1 else True
        assert scheme.alpha[0] is not scheme.alpha[1]


# Mixtures of experts.


def softmax(scores):
    exp = (scores - scores.max(-1, keepdim=True).values).exp()
    return exp / exp.sum(-1, keepdim=True)


def mixture(gate, reads, experts):
    """For each sequence: the experts' states weighted at each token by what the gate makes of ``reads``."""
    mixed = []
    for b, x in enumerate(reads):
        weights = softmax(x @ gate.weight.t())
        assert weights.shape[1] == len(experts)
        mixed.append(sum(weights[:, e : e + 1] * states[b] for e, states in enumerate(experts)))
    return mixed


@every_batch
@every_depth
@every_direction
def test_mmoe_gates_read_the_tokens(bidirectional, num_layers, lengths):
    scheme = MMoE(TASKS, INPUT, H, num_layers, bidirectional, num_experts=4)
    assert all(gate.bias is None for gate in scheme.gates.values())

    def oracle(xs):
        experts = [walk(scheme.experts.encoders[f"expert{e}"], xs) for e in range(4)]
        return {t: mixture(scheme.gates[t], xs, experts) for t in TASKS}

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])


def cgc_oracle(scheme, count):
    def oracle(xs):
        owners = (*TASKS, "shared")
        reads = dict.fromkeys(owners, xs)
        for level, gates in zip(scheme.levels, scheme.gates):
            experts = {o: [walk(level.encoders[f"{o}_expert{e}"], reads[o]) for e in range(count)] for o in owners}
            mixed = {t: mixture(gates[t], reads[t], experts[t] + experts["shared"]) for t in TASKS}
            if "shared" in gates:
                mixed["shared"] = mixture(gates["shared"], reads["shared"], [s for o in owners for s in experts[o]])
            reads = mixed
        assert "shared" not in reads  # the last level's shared experts have no mixture of their own
        return reads

    return oracle


@pytest.mark.parametrize("count", [1, 2], ids=["1 expert", "2 experts"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@every_direction
def test_cgc_experts_and_gates_read_what_the_paper_says(bidirectional, num_layers, count):
    scheme = CGC(TASKS, INPUT, H, num_layers, bidirectional, num_experts=count)
    oracle = cgc_oracle(scheme, count)
    assert_agrees(scheme, oracle)
    assert_agrees(scheme, oracle, [1], ["b", "a"])


def test_a_task_hears_only_its_own_and_the_shared_experts_in_cgc():
    for levels in (1, 2):
        scheme = CGC(TASKS, INPUT, H, levels)
        data, sizes = batch(dtype=torch.float32)
        scheme(data, sizes).states["a"].tokens.sum().backward()
        for index, level in enumerate(scheme.levels):
            of = {
                o: any(p.grad is not None and p.grad.any() for p in level.encoders[f"{o}_expert0"].parameters())
                for o in (*TASKS, "shared")
            }
            # Below the last level the shared gate passes every expert on.
            others = index + 1 < levels
            assert of == {"a": True, "b": others, "c": others, "shared": True}


def test_experts_of_names_that_run_into_each_other_stay_apart():
    # "a" + "10" and "a1" + "0" are one name.
    scheme = CGC(["a", "a1"], INPUT, H, num_experts=11)
    assert len(scheme.levels[0].encoders) == 33
    data, sizes = batch(dtype=torch.float32)
    scheme(data, sizes)


# Task attention.


@every_batch
@every_depth
@every_direction
def test_task_attention_is_its_equation(bidirectional, num_layers, lengths):
    scheme = TaskAttention(TASKS, INPUT, H, num_layers, bidirectional)

    def oracle(xs):
        attended = {}
        for x in xs:
            below, masks = x, {}
            for index, layer in enumerate(scheme.layers):
                (h,) = walk(layer, [below])
                for task in TASKS:
                    linear = scheme.masks[task][index]
                    read = torch.cat([h, masks[task]], 1) if index > 0 else h
                    masks[task] = h / (1 + torch.exp(-(read @ linear.weight.t() + linear.bias)))
                below = h
            for task in TASKS:
                attended.setdefault(task, []).append(masks[task])
        return attended

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])


# What all have in common.

EVERY = {
    "hard": {},
    "soft": {"weight": 0.1},
    "shared_private": {"adversarial": 0.1},
    "hierarchical": {},
    "cross_stitch": {},
    "mmoe": {},
    "cgc": {},
    "task_attention": {},
}
every_scheme = pytest.mark.parametrize("name", EVERY)


def test_every_scheme_is_tested():
    assert list(EVERY) == list(SCHEMES)


@every_scheme
@every_depth
@every_direction
def test_separate_directions_read_one_side_only(name, num_layers, bidirectional):
    """The claim is tight: where it is denied, a half does read the other side."""
    scheme = SCHEMES[name](TASKS, INPUT, H, num_layers, bidirectional).double().eval()
    data, sizes = batch([5])
    changed = data.detach().clone()
    changed[2] += 1
    before, after = (scheme(x, sizes).states for x in (data, changed))
    half = scheme.out_features // scheme.directions
    for task in TASKS:
        a, b = before[task].tokens, after[task].tokens
        same = torch.equal(a[:2, :half], b[:2, :half])
        if bidirectional:
            same = same and torch.equal(a[3:, half:], b[3:, half:])
        assert same == scheme.separates_directions(task)


@every_scheme
def test_dropout_is_between_layers_and_in_training_only(name):
    data, sizes = batch(dtype=torch.float32)
    for num_layers in (1, 2):
        levels = {"levels": dict.fromkeys(TASKS, num_layers)} if name == "hierarchical" else {}
        torch.manual_seed(0)
        scheme = SCHEMES[name](TASKS, INPUT, H, num_layers, dropout=0.5, **levels)
        torch.manual_seed(0)
        without = SCHEMES[name](TASKS, INPUT, H, num_layers, **levels)
        for task in TASKS:
            expected = without(data, sizes).states[task].tokens
            assert torch.equal(scheme.eval()(data, sizes).states[task].tokens, expected)
            assert torch.equal(scheme.train()(data, sizes).states[task].tokens, expected) == (num_layers == 1)


@every_scheme
def test_penalties_are_for_training_with_gradients(name):
    scheme = SCHEMES[name](TASKS, INPUT, H, **EVERY[name])
    data, sizes = batch(dtype=torch.float32)
    expected = {"soft": {"l2"}, "shared_private": {"orthogonality", "adversarial"}}.get(name, set())
    penalties = scheme.train()(data, sizes, ["a", "b"]).penalties
    assert set(penalties) == expected
    assert all(p.shape == () and p.requires_grad for p in penalties.values())
    assert scheme.eval()(data, sizes, ["a", "b"]).penalties == {}
    with torch.no_grad():
        assert scheme.train()(data, sizes, ["a", "b"]).penalties == {}


@pytest.mark.parametrize(("name", "option"), [("soft", "weight"), ("shared_private", "orthogonality")], ids=str)
def test_a_weight_of_zero_asks_for_no_penalty(name, option):
    data, sizes = batch(dtype=torch.float32)
    assert SCHEMES[name](TASKS, INPUT, H, **{option: 0})(data, sizes).penalties == {}


@every_scheme
def test_names_and_numbers_that_do_not_fit_are_refused(name):
    make = SCHEMES[name]
    refused = [
        (([], INPUT, H), {}, "tasks: expected at least one name"),
        ((["a", "a"], INPUT, H), {}, "tasks: expected at least one name, all different"),
        ((["a.b"], INPUT, H), {}, "tasks: .* got 'a.b'"),
        ((["a", ""], INPUT, H), {}, "tasks: .* got ''"),
        ((["a", "keys"], INPUT, H), {}, "tasks: .* got 'keys'"),
        ((TASKS, INPUT, H), {"dropout": 1.5}, "dropout: .* got 1.5"),
        ((TASKS, INPUT, H), {"dropout": float("nan")}, "dropout"),
        ((TASKS, INPUT, 0), {}, "hidden_size"),
    ]
    if name != "hierarchical":
        refused.append(((TASKS, INPUT, H), {"num_layers": 0}, "num_layers: .* got 0"))
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            make(*arguments, **options)


def test_no_layers_are_refused_where_no_level_asks_for_them():
    """A hierarchy's levels ask for layers of their own."""
    assert HierarchicalSharing(TASKS, INPUT, H, num_layers=0).num_layers == 3


@pytest.mark.parametrize("word", ["training", "_modules"])
@pytest.mark.parametrize("name", EVERY)
def test_a_task_called_as_what_modules_hold_is_refused(name, word):
    with pytest.raises(ValueError, match=f"tasks: expected names fit for modules, got '{word}'"):
        SCHEMES[name]([word, "b"], INPUT, H)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftSharing(TASKS, INPUT, H, penalty="l1"), "penalty: expected one of .*, got 'l1'"),
        (lambda: SoftSharing(TASKS, INPUT, H, weight=-1), "weight: .* got -1"),
        (lambda: SoftSharing(TASKS, INPUT, H, weight=float("nan")), "weight: .* got nan"),
        (lambda: SharedPrivate(TASKS, INPUT, H, orthogonality=-0.1), "orthogonality: .* got -0.1"),
        (lambda: SharedPrivate(TASKS, INPUT, H, adversarial=-0.1), "adversarial: .* got -0.1"),
        (lambda: SharedPrivate(["a", "shared"], INPUT, H), "tasks: expected other names than 'shared'"),
        (lambda: CGC(["a", "shared"], INPUT, H), "tasks: expected other names than 'shared'"),
        (lambda: CGC(TASKS, INPUT, H, num_experts=0), "num_experts: .* got 0"),
        (lambda: MMoE(TASKS, INPUT, H, num_experts=0), "num_experts: .* got 0"),
        (lambda: CrossStitch(TASKS, INPUT, H, self_weight=1.1), "self_weight: .* got 1.1"),
        (lambda: CrossStitch(TASKS, INPUT, H, self_weight=float("nan")), "self_weight: .* got nan"),
        (lambda: HierarchicalSharing(TASKS, INPUT, H, levels={"a": 1}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(TASKS, INPUT, H, levels={}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(["a"], INPUT, H, levels={"a": 1, "z": 2}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(["a", "b"], INPUT, H, levels={"a": 0, "b": 1}), "levels: .* from 1, got"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_scheme
def test_an_unknown_task_is_refused_by_name(name):
    scheme = SCHEMES[name](TASKS, INPUT, H)
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises(KeyError, match=r"tasks: unknown task 'z', expected one of \['a', 'b', 'c'\]"):
        scheme(data, sizes, ["a", "z"])
