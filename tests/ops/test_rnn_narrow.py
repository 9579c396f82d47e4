"""Weights of float32 kept in bfloat16 or in 8-bit integers: the bits of rounded weights, and the plain reference's
numbers."""

from dataclasses import replace

import pytest
import torch
from parity import assert_same_bits
from samples import INVARIANT, LONG, SMALL, RNNCase, floats_of, rnn_sample, rnn_weights
from torch.library import opcheck

from pymtl import _native, ops, reference

RESULTS = ("output", "h_n", "c_n")
NARROW = [torch.int8, torch.bfloat16]
PLAIN = [case for case in SMALL if case.inputs == 1]
OPTIONS = [
    RNNCase(5, 17, lengths=(6, 3, 1), zoneout="HC", h0=True, c0=True),
    RNNCase(5, 17, lengths=(6, 3, 1), zoneout="H", mode="GRU"),
    RNNCase(5, 17, lengths=(6, 3, 1), layer_norm=True),
    RNNCase(5, 33, layer_norm=True, mode="GRU", h0=True),
    RNNCase(5, 70, layer_norm=True, mode="RNN_TANH"),
]


def rounded(weights, dtype):
    """The weights that a narrow dtype stands for."""
    make = reference.int8_weight if dtype == torch.int8 else lambda w: w.bfloat16().float()
    return weights._replace(
        weight_ih=[make(w) for w in weights.weight_ih], weight_hh=[make(w) for w in weights.weight_hh]
    )


def narrow(sample, dtype, **changes):
    sample = replace(sample, **changes)
    prepacked = ops.rnn_prepack(sample.weights, sample.norm, dtype)
    with torch.no_grad():
        results = ops.rnn(
            sample.input,
            sample.batch_sizes,
            sample.weights,
            sample.h0,
            sample.c0,
            inputs=sample.inputs,
            prepacked=prepacked,
            masks=sample.masks,
            norm=sample.norm,
        )
    return dict(zip(RESULTS, results))


def one_at_a_time(sample, dtype):
    """From step to step, each with the states that the one before gave: integers are made of the same numbers."""
    frozen = ops.RNNFrozen.of(
        [ops.rnn_prepack(sample.weights, None, dtype)],
        sample.weights.weight_hh[0].shape[1],
        sample.weights.reverse,
        sample.weights.mode,
    )
    h, c = sample.h0, sample.c0
    for x in sample.input.split(1):
        expected = dict(zip(RESULTS, reference.rnn(x, None, *rounded(sample.weights, dtype), h, c)))
        output, h, c = ops.rnn_frozen(x, None, frozen, h, c)
        c = c if sample.weights.mode == "LSTM" else None
        yield {"output": output, "h_n": h} | ({} if c is None else {"c_n": c}), expected


@pytest.mark.parametrize("case", [*SMALL, *OPTIONS[:2]], ids=str)
def test_bfloat16_gives_the_bits_of_rounded_weights(case, every_isa):
    sample = rnn_sample(case, torch.float32)
    weights = rounded(sample.weights, torch.bfloat16)
    with torch.no_grad():
        results = ops.rnn(
            sample.input,
            sample.batch_sizes,
            weights,
            sample.h0,
            sample.c0,
            inputs=sample.inputs,
            masks=sample.masks,
        )
    assert_same_bits(narrow(sample, torch.bfloat16), dict(zip(RESULTS, results)))


@pytest.mark.parametrize("size", [0.001, 1.0, 50.0])
@pytest.mark.parametrize("case", [case for case in PLAIN if case.lengths is None], ids=str)
def test_each_step_in_int8_is_the_references(case, size, every_isa):
    if len(set(case.reverse)) > 1:
        case = replace(case, reverse=case.reverse[:1])
    sample = rnn_sample(case, torch.float32)
    shift = torch.tensor([0.0, 3.0, -3.0])[: sample.input.shape[1], None]  # rows of both signs, and of one
    sample = replace(sample, input=size * (sample.input + shift) if sample.input.shape[1] <= 3 else size * sample.input)
    if sample.h0 is not None:
        sample = replace(sample, h0=size * sample.h0)  # also far outside of what an LSTM's own states are
    for results, expected in one_at_a_time(sample, torch.int8):
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options_in_int8_are_the_references(case):
    """Of one step: later ones may round to other integers."""
    sample = rnn_sample(replace(case, lengths=None, steps=1), torch.float32)
    weights = rounded(sample.weights, torch.int8)
    gains = {}
    if sample.norm is not None:  # whose projection stays float32
        weights = weights._replace(weight_ih=sample.weights.weight_ih)
        gains = {"norm": sample.norm.within(), "gain_ih": sample.norm.gain_ih}
    expected = reference.rnn(sample.input, None, *weights, sample.h0, sample.c0, *sample.masks, **gains)
    for name, result, wanted in zip(RESULTS, narrow(sample, torch.int8).values(), expected):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=5e-6, msg=name)


def test_the_integers_are_the_same_under_every_instruction_set():
    """Those whose activations are the same bits give the same results from many steps; others differ by rounding."""
    sample = rnn_sample(RNNCase(33, 70, steps=30, batch=3), torch.float32)
    before = _native.active_isa()
    found = {}
    try:
        for isa in _native.available_isas():
            _native.force_isa(isa)
            found[isa] = narrow(sample, torch.int8)
            for results, expected in one_at_a_time(replace(sample, weights=one_direction(sample.weights)), torch.int8):
                torch.testing.assert_close(results["output"], expected["output"], rtol=3e-6, atol=2e-6)
    finally:
        _native.force_isa(before)
    for isa, results in found.items():
        for other in found:
            if floats_of(isa) == floats_of(other):
                assert_same_bits(results, found[other])


def one_direction(weights):
    return ops.RNNWeights(*(group[:1] for group in weights[:5]), weights.mode)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_a_sequence_alone_has_the_bits_it_has_in_the_batch(case, dtype, threads):
    sample = rnn_sample(case, torch.float32)
    whole = narrow(sample, dtype)
    for number in (1, 3, 8):
        threads(number)
        assert_same_bits(narrow(sample, dtype), whole)
    starts = [0, *sample.batch_sizes.cumsum(0).tolist()]
    for row in (0, len(case.lengths) - 1):
        length = case.lengths[row]
        tokens = torch.tensor([starts[t] + row for t in range(length)])
        states = {n: s if s is None else s[:, row : row + 1] for n, s in (("h0", sample.h0), ("c0", sample.c0))}
        alone = narrow(
            sample, dtype, input=sample.input[tokens], batch_sizes=torch.ones(length, dtype=torch.int64), **states
        )
        expected = {"output": whole["output"][tokens]} | {n: whole[n][:, row : row + 1] for n in ("h_n", "c_n")}
        assert_same_bits(alone, expected)


def test_teams_of_threads_give_the_bits_of_one(threads):
    sample = rnn_sample(RNNCase(40, 512, steps=20, batch=1, reverse=(False,)), torch.float32)
    threads(1)
    expected = narrow(sample, torch.int8)
    for number in (2, 3, 8):
        threads(number)
        assert_same_bits(narrow(sample, torch.int8), expected)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "h0"])
def test_a_number_that_is_not_finite_makes_its_own_sequence_nan_from_there_on(mode, bad, place, every_isa):
    sample = rnn_sample(RNNCase(7, 19, steps=6, batch=4, reverse=(False,), h0=True, mode=mode), torch.float32)
    clean = narrow(sample, torch.int8)
    spoilt = getattr(sample, place).clone()
    spoilt[3 if place == "input" else 0, 2, 1] = bad
    results = narrow(sample, torch.int8, **{place: spoilt})
    first = 3 if place == "input" else 0
    assert results["output"][first:, 2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(results["output"][:, others], clean["output"][:, others])
    assert torch.equal(results["output"][:first], clean["output"][:first])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.zero_(),
        lambda w: w[2].zero_(),
        lambda w: w[3].fill_(0.25),
        lambda w: w[4].fill_(-1e-42),
        lambda w: w[5].mul_(1e30),
        lambda w: w[6, 1:].zero_(),
    ],
    ids=["zeros", "a row of zeros", "a row of one value", "denormals", "large", "one number"],
)
def test_unusual_rows_of_weights(spoil, every_isa):
    sample = rnn_sample(RNNCase(9, 17, steps=4, batch=2, reverse=(False,)), torch.float32)
    for weight in (sample.weights.weight_ih[0], sample.weights.weight_hh[0]):
        spoil(weight)
    for results, expected in one_at_a_time(sample, torch.int8):
        assert results["output"].isfinite().all()
        torch.testing.assert_close(results["output"], expected["output"], rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-31, 3e38], ids=str)
@pytest.mark.parametrize(
    "signs", [torch.sign, torch.abs, lambda x: -x.abs(), torch.ones_like], ids=["both", "+", "-", "1"]
)
def test_unusual_rows_of_inputs(size, signs, every_isa):
    sample = rnn_sample(RNNCase(9, 17, steps=1, batch=2, reverse=(False,)), torch.float32)
    sample = replace(sample, input=size * signs(sample.input.clamp(-1, 1)))
    for results, expected in one_at_a_time(sample, torch.int8):
        torch.testing.assert_close(results["output"], expected["output"], rtol=3e-6, atol=2e-6)


def test_int8_weights_are_rounded_to_the_nearest_with_a_scale_for_each_row():
    weight = torch.tensor([[0.0, 254.0, -127.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-1e-3, 4e-4, 1e-3, 0.0]])
    numbers, scale = reference.int8_weight(weight)
    assert numbers.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert numbers.tolist() == [[0, 127, -64, 2], [0, 0, 0, 0], [-127, 51, 127, 0]]
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.0, 1e-3 / 127]))
    drawn = torch.randn(50, 70)
    half_steps = drawn.abs().amax(1, keepdim=True) / 254
    assert ((reference.int8_weight(drawn).dequantised() - drawn).abs() <= half_steps * 1.0001).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_of_one_sign_are_rounded_half_as_much(sign):
    both, one = torch.randn(40, 300), sign * torch.randn(40, 300).abs()
    weight = torch.randn(50, 300)
    quantised = reference.int8_weight(weight)
    error = [
        (reference.int8_linear(x, quantised) - x @ quantised.dequantised().t()).square().mean().sqrt()
        for x in (both, one)
    ]
    assert error[1] < 0.65 * error[0]


def test_a_product_in_int8_is_within_its_rounding_of_the_exact_one():
    x, weight = torch.randn(30, 70), torch.randn(40, 70)
    quantised = reference.int8_weight(weight)
    exact = x.double() @ weight.double().t()
    # Half a step of each factor, times the other.
    steps_x, steps_w = (x.amax(1) - x.amin(1)) / 510, weight.abs().amax(1) / 254
    bound = steps_x[:, None] * weight.abs().sum(1) + steps_w * x.abs().sum(1)[:, None] + 70 * steps_x[:, None] * steps_w
    error = (reference.int8_linear(x, quantised) - exact).abs()
    assert (error <= bound * 1.001).all()
    assert error.max() > bound.max() / 1000  # it is no exact product


# Heads inside the time loop, stacks, other layouts.


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_heads_inside_the_time_loop_have_the_bits_of_heads_behind_it(mode, dtype):
    sample = rnn_sample(replace(LONG, mode=mode), torch.float32)
    prepacked = ops.rnn_prepack(sample.weights, None, dtype)
    weight, bias = torch.randn(7, 128), torch.randn(7)
    fused = ops.rnn_heads(
        sample.input, sample.batch_sizes, sample.weights, weight, bias, mean=True, max=True, prepacked=prepacked
    )
    plain = narrow(sample, dtype)
    expected = ops.heads(plain["output"], weight, bias, parts=2)
    assert torch.equal(fused.logits, expected)
    assert torch.equal(fused.mean, ops.pool(plain["output"], sample.batch_sizes, "mean", reverse=[False, True]))
    assert torch.equal(fused.h_n, plain["h_n"])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_stack_gives_the_bits_of_its_layers_one_by_one(dtype):
    sample = rnn_sample(RNNCase(7, 33, lengths=(9, 9, 3, 1)), torch.float32)
    above = rnn_weights(66, 33, seed=1)
    packs = [ops.rnn_prepack(w, None, dtype) for w in (sample.weights, above)]
    stack = ops.RNNFrozen.of(packs, 33, [False, True])
    results = dict(zip(RESULTS, ops.rnn_frozen(sample.input, sample.batch_sizes, stack)))
    first = narrow(sample, dtype)
    second = narrow(replace(sample, input=first["output"], weights=above), dtype)
    states = {name: torch.cat([first[name], second[name]]) for name in ("h_n", "c_n")}
    assert_same_bits(results, {"output": second["output"], **states})


def test_an_empty_batch_gives_empty_results():
    stack = ops.RNNFrozen.of([ops.rnn_prepack(rnn_weights(3, 5), None, torch.int8)], 5, [False, True])
    assert [tuple(r.shape) for r in ops.rnn_frozen(torch.empty(4, 0, 3), None, stack)] == [(4, 0, 10), *[(2, 0, 5)] * 2]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_opcheck(dtype):
    sample = rnn_sample(RNNCase(3, 5, lengths=(4, 2, 1)), torch.float32)
    stack = ops.RNNFrozen.of([ops.rnn_prepack(sample.weights, None, dtype)], 5, [False, True])
    opcheck(torch.ops.pymtl.rnn_frozen.default, (sample.input, sample.batch_sizes, *stack, None, None))
    # What the integers are as floats may be NaN, which is never equal.
    comparing = () if dtype == torch.int8 else ("test_aot_dispatch_dynamic",)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", *comparing)
    opcheck(torch.ops.pymtl.rnn_prepack_narrow.default, narrow_arguments(dtype), test_utils=checks)


def narrow_arguments(dtype, **changes):
    weights = rounded(rnn_weights(3, 5), torch.int8) if dtype == torch.int8 else rnn_weights(3, 5)
    if dtype == torch.int8:
        matrices = [[w.numbers for w in group] for group in weights[:2]] + [[w.scale for w in g] for g in weights[:2]]
    else:
        matrices = [[w.bfloat16() for w in group] for group in weights[:2]] + [[], []]
    names = ("weight_ih", "weight_hh", "scale_ih", "scale_hh", "bias_ih", "bias_hh", "mode")
    arguments = dict(zip(names, (*matrices, weights.bias_ih, weights.bias_hh, weights.mode)))
    return tuple({**arguments, **changes}.values())


# What is refused.

W, H = torch.zeros(20, 3, dtype=torch.int8), torch.zeros(20, 5, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_hh": [H.float()] * 2}, r"weight_hh: expected dtype Char \(int8\) or BFloat16, got Float"),
        ({"weight_hh": [H.flatten()] * 2}, "weight_hh: expected matrices with columns"),
        ({"weight_hh": [H, H[:19]]}, r"weight_hh\[1\]: expected size \[20, 5\], got \[19, 5\]"),
        ({"weight_ih": [W]}, "weight_ih: expected 2 tensors, got 1"),
        ({"weight_ih": [W, W.bfloat16()]}, r"weight_ih\[1\]: expected dtype Char, got BFloat16"),
        ({"weight_ih": [W[:, :0]] * 2}, "weight_ih: expected matrices with columns"),
        ({"scale_ih": []}, "scale_ih: expected 2 tensors, got 0"),
        ({"scale_hh": [torch.zeros(19)] * 2}, r"scale_hh\[0\]: expected size \[20\], got \[19\]"),
        ({"scale_hh": [torch.zeros(20).double()] * 2}, r"scale_hh\[0\]: expected dtype Float, got Double"),
        ({"bias_ih": [torch.zeros(20)]}, "bias_ih: expected 2 tensors, got 1"),
        ({"bias_hh": []}, "bias_hh: expected 2 tensors, got 0"),
        ({"mode": "lstm"}, "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got lstm"),
        (
            {"weight_ih": [torch.zeros(20, 65537, dtype=torch.int8)] * 2},
            "weight_ih and weight_hh: expected at most 65536 columns of 8-bit numbers, got 65537",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_the_op_refuses_bad_input_by_name(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymtl.rnn_prepack_narrow(*narrow_arguments(torch.int8, **changes))


def test_bfloat16_has_no_scales():
    arguments = list(narrow_arguments(torch.bfloat16))
    arguments[2] = [torch.zeros(20)] * 2
    with pytest.raises(RuntimeError, match="scale_ih: expected 0 tensors, got 2"):
        torch.ops.pymtl.rnn_prepack_narrow(*arguments)


def test_another_dtype_is_a_value_error_and_weights_of_another_a_runtime_error():
    weights = rnn_weights(3, 5)
    with pytest.raises(ValueError, match=r"dtype: expected torch.int8, torch.bfloat16 or the weights' own"):
        ops.rnn_prepack(weights, None, torch.float16)
    for dtype in NARROW:
        message = rf"weight_ih\[0\]: expected a matrix of torch.float32 with columns to keep in {dtype}"
        with pytest.raises(RuntimeError, match=message):
            ops.rnn_prepack(rnn_weights(3, 5, dtype=torch.float64), None, dtype)
    for bad in (float("inf"), float("nan")):
        weights.weight_hh[1][2, 3] = bad
        with pytest.raises(ValueError, match=r"weight_hh\[1\]: expected finite numbers"):
            ops.rnn_prepack(weights, None, torch.int8)


def test_layers_of_two_formats_in_one_stack_are_refused():
    first, second = rnn_weights(3, 5), rnn_weights(10, 5)
    one, other = (ops.rnn_prepack(w, None, d) for w, d in ((first, torch.int8), (second, torch.bfloat16)))
    same = ops.rnn_prepack(second, None, torch.int8)
    size = len(one) + len(same)
    mixed = torch.cat([one, other, torch.zeros(size)])[:size]
    with pytest.raises(RuntimeError, match=r"prepacked\[1\]: expected weights in the format of the first layer's"):
        ops.rnn_frozen(torch.randn(2, 1, 3), None, ops.RNNFrozen(mixed, "LSTM 5 2 fr"))


# The width of registers, and the order in which integers are packed for them.
INTEGERS = {
    "baseline": (128, "pairs"),
    "avx2": (256, "fours"),
    "avx2_vnni": (256, "fours"),
    "avx512": (512, "fours"),
    "avx512_vnni": (512, "fours"),
    "avx512_bf16": (512, "fours"),
    "amx": (512, "fours"),
    "neon": (128, "fours"),
    "neon_dotprod": (128, "fours"),
}


def test_integers_packed_for_other_instructions_are_refused():
    weights = rnn_weights(3, 16)
    before = _native.active_isa()
    x = torch.randn(2, 1, 3)
    packs = {}
    try:
        for isa in _native.available_isas():
            _native.force_isa(isa)
            packs[isa] = ops.RNNFrozen.of([ops.rnn_prepack(weights, None, torch.int8)], 16, [False, True])
        for isa in packs:
            _native.force_isa(isa)
            expected = ops.rnn_frozen(x, None, packs[isa])[0]
            for other, frozen in packs.items():
                if INTEGERS[other] == INTEGERS[isa]:
                    assert torch.equal(ops.rnn_frozen(x, None, frozen)[0], expected)
                    continue
                with pytest.raises(
                    RuntimeError, match=r"prepacked\[0\]: expected (weights prepacked for vectors|8-bit)"
                ):
                    ops.rnn_frozen(x, None, frozen)
    finally:
        _native.force_isa(before)


def test_the_raw_op_has_no_derivative():
    weights = [w.requires_grad_() for w in rnn_weights(3, 5).bias_ih]
    arguments = list(narrow_arguments(torch.bfloat16))
    arguments[4] = weights
    prepacked = torch.ops.pymtl.rnn_prepack_narrow(*arguments)
    with pytest.raises(RuntimeError, match="rnn_prepack_narrow has no derivative"):
        prepacked.sum().backward()
