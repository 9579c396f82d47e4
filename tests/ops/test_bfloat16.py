from functools import cache

import pytest
import torch
from parity import assert_same_bits
from samples import (
    ALL_OPTIONS,
    BOTH,
    RAGGED,
    RESULTS,
    B,
    RNNCase,
    RNNSample,
    backward_arguments,
    compiled,
    heads_arguments,
    random_lengths,
    random_like,
    raw_arguments,
    rnn_sample,
    rnn_weights,
    run_nn,
    run_ours,
    run_reference,
    with_gradients,
)
from torch.library import opcheck

from pymtl import ops

BF16 = torch.bfloat16
FORWARD = (False,)


def assert_parity(ours, theirs, truth):
    """The rule of parity.py with bfloat16's eps, also for gradients and results that autocast gives in float32."""
    assert ours.keys() == theirs.keys() == truth.keys()
    broken = []
    for name in ours:
        a, b, c = ours[name], theirs[name], truth[name]
        assert a.shape == b.shape == c.shape, name
        a, b, c = (t.detach().double() for t in (a, b, c))
        assert all(t.isfinite().all() for t in (a, b, c)), name
        error, allowance, size = (t.abs().max().item() if t.numel() > 0 else 0.0 for t in (a - c, b - c, c))
        bound = 2 * allowance + 4 * torch.finfo(BF16).eps * size
        if not error <= bound:
            broken.append(f"{name}: error {error:.3e} > {bound:.3e}; torch's {allowance:.3e}, largest {size:.3e}")
    assert not broken, "\n".join(broken)


def singles(results):
    """In float32, exactly: what parity.py compares by bits."""
    return {name: r.detach().float() if r.dtype == BF16 else r for name, r in results.items()}


def assert_bits(ours, expected):
    assert {name: r.dtype for name, r in ours.items()} == {name: r.dtype for name, r in expected.items()}
    assert_same_bits(singles(ours), singles(expected))


def sample_of(case):
    return rnn_sample(case, BF16)


def head_of(sample, classes=11, bias=True):
    generator = torch.Generator().manual_seed(5)
    features = len(sample.weights.reverse) * sample.weights.weight_hh[0].shape[1]
    weight = torch.randn(classes, features, generator=generator).to(BF16)
    return weight, torch.randn(classes, generator=generator).to(BF16) if bias else None


def fused(sample, head, **options):
    return ops.rnn_heads(
        sample.input, sample.batch_sizes, sample.weights, *head, h0=sample.h0, c0=sample.c0, **options
    )._asdict()


# The LSTM: accuracy.

CASES = [
    RNNCase(1, 1, steps=1, batch=1, reverse=FORWARD),
    RNNCase(1, 2, reverse=FORWARD, bias=False),
    RNNCase(2, 1, steps=1, batch=4, h0=True, c0=True),
    RNNCase(3, 2, lengths=(1, 1, 1)),
    RNNCase(2, 3, steps=2, batch=1, reverse=(B,), h0=True),
    RNNCase(3, 5, lengths=(6, 3, 3, 1), bias=False, c0=True),
    RNNCase(16, 17, steps=7, batch=5),
    RNNCase(17, 16, lengths=(9, 9, 4, 2, 1), h0=True, c0=True),
    RNNCase(33, 64, steps=3, batch=13, reverse=FORWARD),
    RNNCase(64, 33, steps=12, batch=10, reverse=(B,), scale=5.0),
    RNNCase(300, 3, steps=4, batch=2, h0=True, c0=True),
    RNNCase(3, 300, lengths=(3, 2)),
    RNNCase(5, 19, lengths=(8, 6, 6, 3, 2, 1, 1), reverse=(False, B, False, B), h0=True, c0=True),
    RNNCase(3, 16, steps=300, batch=1),
    RNNCase(17, 33, lengths=(131, 130, 4)),
    RNNCase(16, 18, steps=43, batch=3, reverse=FORWARD),  # 129 tokens: a block of 128 and one more
    RNNCase(7, 9, lengths=random_lengths(40, 20, seed=1), h0=True, c0=True, bias=False),
    RNNCase(3, 5, lengths=(6, 3, 3, 1), h0=True, mode="GRU"),
    RNNCase(17, 33, steps=40, batch=7, mode="GRU"),
    RNNCase(17, 33, steps=40, batch=7, bias=False, mode="RNN_TANH"),
    RNNCase(3, 70, lengths=(6, 3, 3, 1), h0=True, mode="RNN_RELU"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
SWEEP = [
    RNNCase(
        H * 7 % 40 + 1,
        H,
        steps=4,
        batch=H % 9 + 1,
        lengths=random_lengths(H % 9 + 1, H % 5 + 1, seed=H) if H % 2 else None,
        reverse=BOTH if H % 3 else FORWARD,
        bias=H % 5 != 0,
        h0=H % 4 == 1,
        c0=H % 4 == 1,
    )
    for H in [*range(4, 20), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 65]
]


@cache
def by_torch(case, through=RESULTS):
    """nn.LSTM in bfloat16, and the truth."""
    sample = sample_of(case)
    seeds = random_like(run_reference(sample))
    seeds = {name: seeds[name] for name in through if name in seeds}
    return (
        seeds,
        with_gradients(run_nn, sample, seeds),
        with_gradients(run_nn, sample.to(torch.float64), seeds),
    )


def compare_with_nn_lstm(case, through=RESULTS, run=run_ours):
    seeds, theirs, truth = by_torch(case, through)
    ours = with_gradients(run, sample_of(case), seeds)
    assert {result.dtype for result in ours.values()} == {BF16}
    assert_parity(ours, theirs, truth)


@every_case
def test_results_and_gradients_are_as_accurate_as_nn_lstms(case, isa):
    compare_with_nn_lstm(case)


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_every_size_is_as_accurate_as_nn_lstm(case, isa):
    compare_with_nn_lstm(case)


@pytest.mark.parametrize("through", RESULTS)
@pytest.mark.parametrize("case", [CASES[5], CASES[7], CASES[12]], ids=str)
def test_gradients_through_one_result_alone_are_as_accurate_as_nn_lstms(case, through, isa):
    compare_with_nn_lstm(case, (through,))


@every_case
def test_the_reference_is_as_accurate_as_nn_lstm(case):
    compare_with_nn_lstm(case, run=run_reference)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_weight_gradients_are_summed_in_float32_and_rounded_once(packed, isa):
    # Of weights that are zero only g has a gradient: a quarter of the output's, to the bit.
    input_size, hidden_size, batch = 5, 3, 1001
    weights = rnn_weights(input_size, hidden_size, FORWARD, dtype=BF16, scale=0.0)
    x = torch.randint(-3, 4, (batch, input_size)).to(BF16)
    sizes = torch.tensor([batch]) if packed else None
    sample = RNNSample(x if packed else x.unsqueeze(0), sizes, weights)
    seed = torch.randint(1, 9, (batch, hidden_size)).to(BF16)
    found = with_gradients(run_ours, sample, {"output": seed if packed else seed.unsqueeze(0)})
    d_gates = torch.zeros(batch, 4, hidden_size).double()
    d_gates[:, 2] = seed.double() / 4
    d_gates = d_gates.flatten(1)
    expected = {"weight_ih": d_gates.t() @ x.double(), "bias_ih": d_gates.sum(0), "bias_hh": d_gates.sum(0)}
    assert expected["bias_ih"].max() > 1000
    assert_bits(
        {name: found[f"gradient of {name}[0]"] for name in expected}, {k: v.to(BF16) for k, v in expected.items()}
    )


def test_c_is_kept_in_float32_between_steps(isa):
    weights = rnn_weights(1, 2, FORWARD, dtype=BF16, scale=0.0)
    forgets_nothing = torch.tensor([30.0, 30, 60, 60, 2**-10, 2**-10, 30, 30]).to(BF16)
    weights.bias_ih[0].copy_(forgets_nothing)
    output, _, c_n = ops.rnn(torch.zeros(512, 3, 1, dtype=BF16), None, weights)
    torch.testing.assert_close(c_n.float(), torch.full_like(c_n, 0.5).float(), rtol=2**-8, atol=0.0)
    steps = torch.arange(1, 513) * 2.0**-10
    torch.testing.assert_close(output[:, 0, 0].float(), steps.tanh(), rtol=2**-8, atol=0.0)


# Which gradients are wanted.


@pytest.mark.parametrize(
    "names",
    [["input"], ["h0", "c0"], ["weight_ih[0]"], ["weight_hh[1]", "bias_hh[0]"], ["input", "weight_hh[0]"], ["c0"]],
    ids="+".join,
)
@pytest.mark.parametrize("case", [CASES[7], ALL_OPTIONS], ids=str)
def test_a_gradient_has_the_same_bits_whatever_else_requires_one(case, names, isa):
    sample = sample_of(case)
    seeds = random_like(run_ours(sample))
    everything = with_gradients(run_ours, sample, seeds)
    some = with_gradients(run_ours, sample, seeds, names)
    assert {name for name in some if name.startswith("gradient")} == {f"gradient of {name}" for name in names}
    assert_bits(some, {name: everything[name] for name in some})


def squared_gradients(run, sample, seeds):
    """The gradients of the gradients' squares."""
    sample = sample.leaves()
    tensors = list(sample.tensors().values())
    results = run(sample)
    dtype = sample.input.dtype
    first = torch.autograd.grad(
        list(results.values()), tensors, [s.to(dtype) for s in seeds.values()], create_graph=True
    )
    second = torch.autograd.grad(sum(g.double().square().sum() for g in first), tensors)
    return dict(zip(sample.tensors(), second))


@pytest.mark.parametrize("case", [CASES[4], CASES[5], RNNCase(3, 5, h0=True, c0=True), CASES[7]], ids=str)
def test_second_derivatives_are_as_accurate_as_the_references(case):
    sample = sample_of(case)
    seeds = random_like(run_ours(sample))
    assert_parity(
        squared_gradients(run_ours, sample, seeds),
        squared_gradients(run_reference, sample, seeds),
        squared_gradients(run_nn, sample.to(torch.float64), seeds),
    )


# Nothing to do, and numbers that are not finite.


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(packed):
    sample = sample_of(RNNCase(3, 5, steps=4, batch=1))
    input = sample.input[:0, 0] if packed else sample.input[:, :0]
    sample = RNNSample(input, torch.zeros(4, dtype=torch.int64) if packed else None, sample.weights)
    leading = (0,) if packed else (4, 0)
    results = with_gradients(run_ours, sample, random_like(run_ours(sample)))
    assert [tuple(results[name].shape) for name in RESULTS] == [(*leading, 10), (2, 0, 5), (2, 0, 5)]
    assert all(result.dtype == BF16 for result in results.values())
    for name, tensor in sample.tensors().items():
        assert results[f"gradient of {name}"].shape == tensor.shape
        assert not results[f"gradient of {name}"].any()
    empty = fused(sample, head_of(sample), mean=True, max=True).values()
    assert [tuple(r.shape) for r in empty] == [(*leading, 11), (0, 10), (0, 10), (2, 0, 5), (2, 0, 5)]


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda s: s.input[3, 1].fill_(torch.inf), id="inf in the input"),
        pytest.param(lambda s: s.input[3].fill_(-torch.inf), id="-inf all over a token"),
        pytest.param(lambda s: s.input[0, 0].fill_(torch.nan), id="NaN in the input"),
        pytest.param(lambda s: s.h0[0, 1, 3].fill_(torch.inf), id="inf in h0"),
        pytest.param(lambda s: s.c0[1, 0, 2].fill_(torch.inf), id="inf in c0"),
        pytest.param(lambda s: s.weights.weight_hh[1][7, 2].fill_(torch.nan), id="NaN in weight_hh"),
        pytest.param(lambda s: s.weights.weight_ih[0][40, 0].fill_(torch.inf), id="inf in weight_ih"),
        pytest.param(lambda s: s.weights.bias_hh[0][45].fill_(-torch.inf), id="-inf in bias_hh"),
        pytest.param(lambda s: s.input.mul_(1e30), id="a huge input"),
        pytest.param(lambda s: s.weights.bias_ih[0].fill_(1e5), id="gates wide open"),
    ],
)
@pytest.mark.parametrize("hidden_size", [19, 32])
def test_inf_and_nan_come_out_where_nn_lstm_has_them_in_float32(edit, hidden_size, isa):
    case = RNNCase(4, hidden_size, lengths=(6, 5, 2), h0=True, c0=True)
    sample = sample_of(case).map(lambda _, t: t.clone())
    edit(sample)
    seeds = {name: torch.ones_like(result) for name, result in run_ours(sample).items()}
    ours = with_gradients(run_ours, sample, seeds)
    theirs = with_gradients(run_nn, sample.to(torch.float32), seeds)
    for name in ours:
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), f"{name}: NaN in different places"
        where = theirs[name].isinf()
        assert torch.equal(ours[name].float()[where], theirs[name][where]), f"{name}: inf elsewhere"
        assert torch.equal(ours[name].isinf(), where), f"{name}: inf in different places"


@pytest.mark.parametrize("size", [1e3, 1e-3, 1e-30])
def test_saturated_gates_and_tiny_numbers_are_as_accurate_as_nn_lstm(size, isa):
    sample = sample_of(RNNCase(6, 19, lengths=(7, 4, 1)))
    sample = RNNSample(sample.input * size, sample.batch_sizes, sample.weights)
    seeds = random_like(run_ours(sample))
    assert_parity(
        with_gradients(run_ours, sample, seeds),
        with_gradients(run_nn, sample, seeds),
        with_gradients(run_nn, sample.to(torch.float64), seeds),
    )


def test_other_dtypes_among_bfloat16_are_refused():
    sample, single = sample_of(RAGGED), rnn_sample(RAGGED)
    with pytest.raises(RuntimeError, match=r"weight_ih\[0\]: expected dtype BFloat16, got Float"):
        ops.rnn(sample.input, sample.batch_sizes, single.weights)
    with pytest.raises(RuntimeError, match=r"prepacked: expected dtype BFloat16, got Float"):
        run_ours(sample, prepacked=ops.rnn_prepack(single.weights))
    with pytest.raises(RuntimeError, match="input: expected dtype Float, Double or BFloat16, got Half"):
        run_ours(sample.to(torch.half))
    with pytest.raises(RuntimeError, match="weight: expected dtype BFloat16, got Float"):
        ops.heads(sample.input, torch.zeros(4, 9), None)


# Autocast.


def results_of_ops(sample, head):
    """Results and gradients of the LSTM and the heads, and those of the fused op."""
    leaves = sample.leaves()
    output, h_n, c_n = run_ours(leaves).values()
    weight, bias = (t.detach().clone().requires_grad_() for t in head)
    logits = ops.heads(output, weight, bias)
    named = leaves.tensors() | {"head_weight": weight, "head_bias": bias}
    sums = logits.double().square().sum() + h_n.double().sum() + c_n.double().sum()
    gradients = torch.autograd.grad(sums, list(named.values()))
    with torch.no_grad():
        found = fused(sample, head, mean=True, max=True)
    return {"output": output, "logits": logits, **found}, dict(zip(named, gradients))


def test_autocast_gives_the_bits_of_bfloat16_and_float32_gradients():
    sample = sample_of(ALL_OPTIONS)
    head = head_of(sample)
    results, gradients = results_of_ops(sample, head)
    with torch.autocast("cpu", BF16):
        found, found_gradients = results_of_ops(sample.to(torch.float32), [t.float() for t in head])
    assert_bits(found, results)
    assert_bits(found_gradients, {name: g.float() for name, g in gradients.items()})


def test_autocast_leaves_float64_as_it_is():
    sample = rnn_sample(RAGGED, torch.float64)
    head = [t.double() for t in head_of(sample)]
    expected = results_of_ops(sample, head)
    with torch.autocast("cpu", BF16):
        found = results_of_ops(sample, head)
    for a, b in zip(found, expected):
        assert_bits(a, b)


# Torch's contract for an op.

OPCHECKED = [
    RNNCase(3, 5, reverse=FORWARD, bias=False),
    RNNCase(3, 5, lengths=(4, 2, 1), h0=True, c0=True, reverse=(False, B, False, B)),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case):
    sample = sample_of(case)
    head = head_of(sample, classes=4)
    opcheck(torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), None))
    opcheck(torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), ops.rnn_prepack(sample.weights)))
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample))
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample.leaves()))
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample))
    needs = (False, True, False, case.bias, False)
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample, given=["output"], needs=needs))
    opcheck(torch.ops.pymtl.rnn_heads.default, (*heads_arguments(sample), None, *head, True, True))
    opcheck(torch.ops.pymtl.rnn_prepack.default, (*sample.weights, None))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_compiled_code_gives_the_same_bits(case):
    run, sample = compiled(case), sample_of(case)
    seeds = random_like(run_ours(sample))

    assert_bits(with_gradients(run, sample, seeds), with_gradients(run_ours, sample, seeds))
    with torch.no_grad():
        assert_bits(run(sample), run_ours(sample))
