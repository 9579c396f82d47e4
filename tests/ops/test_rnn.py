from dataclasses import replace

import pytest
import torch
from longdouble import needs_long_double
from longdouble import rnn as rnn_in_long_double
from parity import assert_parity, assert_same_bits
from samples import (
    BOTH,
    RESULTS,
    SMALL,
    B,
    F,
    RNNCase,
    RNNSample,
    backward_arguments,
    compiled,
    heads_arguments,
    random_lengths,
    random_like,
    raw_arguments,
    rnn_sample,
    run_nn,
    run_ours,
    run_reference,
    with_gradients,
)
from torch.library import opcheck

from pymtl import ops

OTHERS = ("GRU", "RNN_TANH", "RNN_RELU")
MEDIUM = [
    RNNCase(3, 64, steps=1, batch=1),
    RNNCase(40, 64, steps=1, batch=33, reverse=(F,), h0=True, c0=True),
    RNNCase(37, 64, steps=33, batch=1, h0=True, c0=True),
    RNNCase(64, 64, lengths=random_lengths(16, 40, seed=1)),
    RNNCase(24, 64, lengths=random_lengths(7, 20, seed=2), bias=False, reverse=(F,)),
    RNNCase(16, 64, lengths=random_lengths(9, 12, seed=3), reverse=(F, B, F, B), h0=True, c0=True),
    RNNCase(20, 33, steps=12, batch=10, reverse=(B,), scale=5.0),
    RNNCase(100, 128, steps=16, batch=8),
    RNNCase(50, 128, lengths=random_lengths(20, 30, seed=4), h0=True, c0=True),
    RNNCase(300, 128, lengths=(31,), bias=False),
    *(RNNCase(64, 64, lengths=random_lengths(16, 40, seed=1), h0=True, mode=mode) for mode in OTHERS),
    *(RNNCase(37, 128, steps=33, batch=1, mode=mode) for mode in OTHERS),
    *(RNNCase(300, 70, steps=12, batch=20, bias=False, mode=mode) for mode in OTHERS),
]
SWEEP = [
    RNNCase(
        input_size=H * 7 % 40 + 1,
        hidden_size=H,
        steps=4,
        batch=H % 9 + 1,
        lengths=random_lengths(H % 9 + 1, H % 5 + 1, seed=H) if H % 2 else None,
        reverse=BOTH if H % 3 else (F,),
        bias=H % 5 != 0,
        h0=H % 4 == 1,
        c0=H % 4 == 1,
    )
    for H in range(1, 68)
]
SWEEP += [replace(case, c0=False, mode=OTHERS[case.hidden_size % 3]) for case in SWEEP]


def compare_with_nn_lstm(case, run=run_ours, through=RESULTS, dtype=torch.float32):
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    seeds = {name: seeds[name] for name in through if name in seeds}
    truth = (
        with_gradients(run_nn, sample.to(torch.float64), seeds)
        if dtype == torch.float32
        else rnn_in_long_double(sample, seeds)
    )
    assert_parity(with_gradients(run, sample, seeds), with_gradients(run_nn, sample, seeds), truth)


# Accuracy.


@pytest.mark.parametrize("case", SMALL + MEDIUM, ids=str)
def test_float32_results_and_gradients_are_as_accurate_as_nn_lstm(case, isa):
    compare_with_nn_lstm(case)


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_float32_is_as_accurate_as_nn_lstm_at_every_size(case, isa):
    compare_with_nn_lstm(case)


@pytest.mark.parametrize("through", RESULTS)
@pytest.mark.parametrize("case", [SMALL[3], SMALL[6], MEDIUM[5], MEDIUM[6]], ids=str)
def test_float32_gradients_through_one_result_alone_are_as_accurate_as_nn_lstm(case, through, isa):
    compare_with_nn_lstm(case, through=[through])


@needs_long_double
@pytest.mark.parametrize("case", [*SMALL, RNNCase(13, 21, lengths=(12, 9, 4, 1))], ids=str)
def test_float64_results_and_gradients_are_as_accurate_as_nn_lstm(case, isa):
    compare_with_nn_lstm(case, dtype=torch.float64)


@needs_long_double
@pytest.mark.parametrize("through", RESULTS)
def test_float64_gradients_through_one_result_alone_are_as_accurate_as_nn_lstm(through, isa):
    compare_with_nn_lstm(SMALL[6], through=[through], dtype=torch.float64)


@needs_long_double
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_agrees_with_nn_lstm(case):
    compare_with_nn_lstm(case, run=run_reference, dtype=torch.float64)


@pytest.mark.parametrize("case", [RNNCase(300, 256, lengths=random_lengths(8, 40, seed=5))], ids=str)
def test_float32_is_as_accurate_as_nn_lstm_at_a_real_models_size(case):
    compare_with_nn_lstm(case)


def test_rnn_heads_is_as_accurate_as_nn_lstm_and_linear(isa):
    case = RNNCase(24, 33, lengths=random_lengths(9, 15, seed=8))
    sample = rnn_sample(case)
    head_weight, head_bias = torch.randn(13, 66), torch.randn(13)

    def theirs(dtype):
        results = run_nn(sample.to(dtype))
        logits = torch.nn.functional.linear(results["output"], head_weight.to(dtype), head_bias.to(dtype))
        return {"logits": logits, "h_n": results["h_n"], "c_n": results["c_n"]}

    fused = ops.rnn_heads(sample.input, sample.batch_sizes, sample.weights, head_weight, head_bias)._asdict()
    assert_parity({k: fused[k] for k in ("logits", "h_n", "c_n")}, theirs(torch.float32), theirs(torch.float64))


# Torch's contract for an op.

OPCHECKED = [
    RNNCase(3, 5),
    RNNCase(3, 5, reverse=(F,), bias=False),
    RNNCase(3, 5, steps=1, batch=1, h0=True, c0=True),
    RNNCase(3, 5, lengths=(4, 2, 1)),
    RNNCase(3, 5, lengths=(4, 2, 1), h0=True, c0=True, reverse=(F, B, F, B)),
    RNNCase(3, 5, lengths=(4, 2, 1), c0=True, bias=False),
    RNNCase(3, 5, lengths=(4, 2, 1), reverse=(F, B, F, B), inputs=2),
    RNNCase(3, 5, mode="GRU"),
    RNNCase(3, 5, lengths=(4, 2, 1), h0=True, mode="GRU"),
    RNNCase(3, 5, lengths=(4, 2, 1), bias=False, mode="RNN_TANH"),
    RNNCase(3, 5, h0=True, mode="RNN_RELU"),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_rnn_inference(case):
    sample = rnn_sample(case)
    opcheck(torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), None))
    opcheck(torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), ops.rnn_prepack(sample.weights)))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_rnn_training(case):
    sample = rnn_sample(case, torch.float64 if case.h0 else torch.float32)
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample))
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample.leaves()))
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample.leaves(["weight_hh[0]"])))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_rnn_backward(case):
    sample = rnn_sample(case)
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample))
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample, given=["output"]))
    needs = (False, True, False, True, False)
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample, given=["output"], needs=needs))


def own_derivative_arguments(case):
    """rnn_backward's arguments; those it can be differentiated by require a gradient."""
    arguments = backward_arguments(rnn_sample(case, torch.float64), needs=(True, True, True, case.bias, True))

    def leaf(value, wanted):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_(wanted)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [leaf(v, wanted) for v in value]
        return value

    # Neither output, gates nor cells: they are functions of the other arguments.
    return tuple(leaf(value, wanted=place < 12) for place, value in enumerate(arguments))


@pytest.mark.parametrize(
    "case",
    [RNNCase(2, 3, steps=2, reverse=(F,), h0=True, c0=True), RNNCase(2, 3, steps=1, bias=False)],
    ids=str,
)
def test_opcheck_of_rnn_backward_with_its_own_derivative(case):
    opcheck(torch.ops.pymtl.rnn_backward.default, own_derivative_arguments(case))


PACKED_OPCHECKED = [case for case in OPCHECKED if case.lengths is not None]


@pytest.mark.parametrize("case", PACKED_OPCHECKED, ids=str)
def test_opcheck_of_packed_rnn_backward_with_its_own_derivative_untraced(case):
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.pymtl.rnn_backward.default, own_derivative_arguments(case), test_utils=untraced)


@pytest.mark.xfail(
    strict=True, reason="the second derivative loops over the numbers in batch_sizes, which a tracer does not have"
)
@pytest.mark.parametrize("case", PACKED_OPCHECKED, ids=str)
def test_opcheck_of_packed_rnn_backward_with_its_own_derivative_traced(case):
    traced = ("test_aot_dispatch_dynamic",)
    opcheck(torch.ops.pymtl.rnn_backward.default, own_derivative_arguments(case), test_utils=traced)


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_rnn_heads(case):
    sample = rnn_sample(case)
    features = 5 * len(case.reverse)
    op = torch.ops.pymtl.rnn_heads.default
    opcheck(op, (*heads_arguments(sample), None, torch.randn(4, features), torch.randn(4), True, True))
    opcheck(op, (*heads_arguments(sample), None, torch.randn(4, features), None, False, True))
    opcheck(op, (*heads_arguments(sample), ops.rnn_prepack(sample.weights), None, None, True, False))


@pytest.mark.parametrize("case", OPCHECKED[:2], ids=str)
def test_opcheck_of_rnn_prepack(case):
    opcheck(torch.ops.pymtl.rnn_prepack.default, (*rnn_sample(case).weights, None))


@pytest.mark.parametrize("case", [OPCHECKED[0], OPCHECKED[4], *OPCHECKED[-3:]], ids=str)
def test_compiled_code_gives_the_same_bits(case):
    run, sample = compiled(case), rnn_sample(case)
    seeds = random_like(run_ours(sample))

    assert_same_bits(with_gradients(run, sample, seeds), with_gradients(run_ours, sample, seeds))
    with torch.no_grad():
        assert_same_bits(run(sample), run_ours(sample))


# Nothing to do.


def empty(packed, dtype):
    """A batch of no sequences."""
    sample = rnn_sample(RNNCase(3, 5, steps=4, batch=1), dtype)
    if packed:
        return RNNSample(sample.input[:0, 0], torch.zeros(4, dtype=torch.int64), sample.weights)
    return RNNSample(sample.input[:, :0], None, sample.weights)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_empty_results(packed, dtype):
    sample = empty(packed, dtype)
    leading = (0,) if packed else (4, 0)
    results = run_ours(sample)
    assert [tuple(r.shape) for r in results.values()] == [(*leading, 10), (2, 0, 5), (2, 0, 5)]
    assert all(r.dtype == dtype for r in results.values())
    fused = ops.rnn_heads(
        sample.input, sample.batch_sizes, sample.weights, torch.ones(7, 10, dtype=dtype), None, mean=True, max=True
    )
    assert [tuple(r.shape) for r in fused] == [(*leading, 7), (0, 10), (0, 10), (2, 0, 5), (2, 0, 5)]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_the_weights_a_zero_gradient(packed, dtype):
    sample = empty(packed, dtype)
    results = with_gradients(run_ours, sample, random_like(run_ours(sample)))
    for name, tensor in sample.tensors().items():
        gradient = results[f"gradient of {name}"]
        assert gradient.shape == tensor.shape
        assert not gradient.any()


# Numbers that are not finite.


def unusual(edit, dtype):
    sample = rnn_sample(RNNCase(4, 19, lengths=(6, 5, 2), h0=True, c0=True), dtype).map(lambda _, t: t.clone())
    edit(sample)
    return sample


def gradient_pattern(run, sample):
    seeds = {name: torch.ones_like(result) for name, result in run(sample).items()}
    return with_gradients(run, sample, seeds)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda s: s.input[3, 1].fill_(torch.inf), id="inf in the input"),
        pytest.param(lambda s: s.input[3].fill_(-torch.inf), id="-inf all over a token"),
        pytest.param(lambda s: s.input[0, 0].fill_(torch.nan), id="NaN in the input"),
        pytest.param(lambda s: s.h0[0, 1, 3].fill_(torch.inf), id="inf in h0"),
        pytest.param(lambda s: s.c0[1, 0, 2].fill_(torch.inf), id="inf in c0"),
        pytest.param(lambda s: s.c0[0, 2].fill_(-torch.inf), id="-inf in c0"),
        pytest.param(lambda s: s.weights.weight_hh[1][7, 2].fill_(torch.nan), id="NaN in weight_hh"),
        pytest.param(lambda s: s.weights.weight_ih[0][40, 0].fill_(torch.inf), id="inf in weight_ih"),
        pytest.param(lambda s: s.weights.bias_ih[0][5].fill_(torch.inf), id="inf in bias_ih"),
        pytest.param(lambda s: s.weights.bias_hh[0][45].fill_(-torch.inf), id="-inf in bias_hh"),
        pytest.param(lambda s: s.input.mul_(1e30), id="a huge input"),
        pytest.param(lambda s: s.weights.bias_ih[0].fill_(1e5), id="gates wide open"),
        pytest.param(lambda s: s.weights.bias_ih[0].fill_(-1e5), id="gates shut"),
    ],
)
def test_inf_and_nan_come_out_where_nn_lstm_has_them(edit, dtype, isa):
    sample = unusual(edit, dtype)
    ours, theirs = gradient_pattern(run_ours, sample), gradient_pattern(run_nn, sample)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), f"{name}: NaN in different places"
        where = theirs[name].isinf()
        assert torch.equal(ours[name].isinf(), where), f"{name}: inf in different places"
        assert torch.equal(ours[name][where], theirs[name][where]), f"{name}: inf of another sign"


@pytest.mark.parametrize("size", [1e3, 1e-3, 1e-30])
def test_saturated_gates_and_tiny_numbers_are_as_accurate_as_nn_lstm(size, isa):
    if isa == "baseline" and size == 1e3:
        pytest.skip("without fused multiply-adds large products round twice, beside an nn.LSTM that has them")
    sample = rnn_sample(RNNCase(6, 19, lengths=(7, 4, 1)))
    sample = RNNSample(sample.input * size, sample.batch_sizes, sample.weights)
    seeds = random_like(run_ours(sample))
    assert_parity(
        with_gradients(run_ours, sample, seeds),
        with_gradients(run_nn, sample, seeds),
        with_gradients(run_nn, sample.to(torch.float64), seeds),
    )


def test_the_ops_take_their_arguments_in_the_order_of_their_one_list():
    from pymtl.ops.rnn_arguments import RNNArguments

    def names(op):
        return [argument.name for argument in op.default._schema.arguments]

    fields = list(RNNArguments._fields)
    assert names(torch.ops.pymtl.rnn_training) == fields
    assert names(torch.ops.pymtl.rnn_inference) == [*fields, "prepacked"]
    assert names(torch.ops.pymtl.rnn_backward)[3:-4] == fields
    assert names(torch.ops.pymtl.rnn_heads)[:10] == fields[:10]
