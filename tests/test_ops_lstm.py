from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from longdouble import lstm as lstm_in_long_double
from longdouble import needs_long_double
from parity import assert_parity, assert_same_bits
from samples import (
    BOTH,
    DTYPES,
    LSTMCase,
    LSTMSample,
    lstm_sample,
    lstm_weights,
    random_lengths,
    random_like,
    run_nn_lstm,
    run_ours,
    run_reference,
    shifted,
    sizes_of,
    spread,
    transposed,
    with_gradients,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops

F, B = False, True  # directions: forward, backward
RESULTS = ("output", "h_n", "c_n")

SMALL = [
    LSTMCase(1, 1, steps=1, batch=1, reverse=(F,)),
    LSTMCase(3, 5, reverse=(F,)),
    LSTMCase(3, 5, reverse=(B,)),
    LSTMCase(4, 3, steps=7, batch=2),
    LSTMCase(2, 9, steps=1, batch=4, h0=True, c0=True),
    LSTMCase(5, 4, lengths=(6, 3, 3, 1), bias=False),
    LSTMCase(3, 17, lengths=(4, 2, 1), h0=True, c0=True),
    LSTMCase(3, 8, lengths=(1, 1, 1), reverse=(F, B, F, B)),
    LSTMCase(2, 6, lengths=(5,), reverse=(F, F), h0=True),
    LSTMCase(2, 6, lengths=(5, 1), reverse=(B, B), c0=True),
    LSTMCase(6, 7, lengths=(9, 8, 2), scale=4.0, h0=True, c0=True),
]
MEDIUM = [
    LSTMCase(3, 64, steps=1, batch=1),
    LSTMCase(40, 64, steps=1, batch=33, reverse=(F,), h0=True, c0=True),
    LSTMCase(37, 64, steps=33, batch=1, h0=True, c0=True),
    LSTMCase(64, 64, lengths=random_lengths(16, 40, seed=1)),
    LSTMCase(24, 64, lengths=random_lengths(7, 20, seed=2), bias=False, reverse=(F,)),
    LSTMCase(16, 64, lengths=random_lengths(9, 12, seed=3), reverse=(F, B, F, B), h0=True, c0=True),
    LSTMCase(20, 33, steps=12, batch=10, reverse=(B,), scale=5.0),
    LSTMCase(100, 128, steps=16, batch=8),
    LSTMCase(50, 128, lengths=random_lengths(20, 30, seed=4), h0=True, c0=True),
    LSTMCase(300, 128, lengths=(31,), bias=False),
]
SWEEP = [
    LSTMCase(
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
# Enough work that it is shared among threads; a single sequence of it spans several blocks of the input's projection.
LONG = LSTMCase(11, 64, lengths=(230, 229, 130, 33, 8, 7, 1, 1))
RAGGED = LSTMCase(9, 19, lengths=(9, 9, 7, 6, 5, 5, 4, 3, 2, 1, 1, 1, 1))
ALL_OPTIONS = LSTMCase(5, 33, lengths=(8, 6, 6, 3, 2, 1, 1), reverse=(F, B, F, B), h0=True, c0=True)
INVARIANT = [LONG, RAGGED, ALL_OPTIONS]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def raw_arguments(sample):
    return (sample.input, sample.batch_sizes, *sample.weights, sample.h0, sample.c0)


def compare_with_nn_lstm(case, run=run_ours, through=RESULTS, dtype=torch.float32):
    sample = lstm_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    seeds = {name: seeds[name] for name in through}
    truth = (
        with_gradients(run_nn_lstm, sample.to(torch.float64), seeds)
        if dtype == torch.float32
        else lstm_in_long_double(sample, seeds)
    )
    assert_parity(with_gradients(run, sample, seeds), with_gradients(run_nn_lstm, sample, seeds), truth)


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
@pytest.mark.parametrize("case", [*SMALL, LSTMCase(13, 21, lengths=(12, 9, 4, 1))], ids=str)
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


@pytest.mark.parametrize("case", [LSTMCase(300, 256, lengths=random_lengths(8, 40, seed=5))], ids=str)
def test_float32_is_as_accurate_as_nn_lstm_at_a_real_models_size(case):
    compare_with_nn_lstm(case)


# Derivatives.

TINY = [
    LSTMCase(2, 3, steps=3, batch=2, reverse=(F,)),
    LSTMCase(2, 2, steps=2, batch=2, h0=True, c0=True),
    LSTMCase(2, 2, lengths=(3, 1), bias=False, h0=True),
    LSTMCase(2, 3, lengths=(3, 2, 1), c0=True),
    LSTMCase(1, 2, lengths=(2, 2), reverse=(F, B, F, B), h0=True, c0=True),
]
SUBSETS = [
    ["input"],
    ["h0"],
    ["c0"],
    ["weight_ih[1]"],
    ["weight_hh[0]", "c0"],
    ["bias_hh[0]"],
    ["bias_ih[1]", "input"],
]


def function_of(sample, names):
    """The op as a function of the tensors of these names, for gradcheck."""

    def run(*tensors):
        given = dict(zip(names, tensors))
        return tuple(run_ours(sample.map(lambda name, tensor: given.get(name, tensor))).values())

    leaves = sample.leaves(names).tensors()
    return run, tuple(leaves[name] for name in names)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case):
    sample = lstm_sample(case, torch.float64)
    assert gradcheck(*function_of(sample, list(sample.tensors())))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_gradcheck_where_only_some_inputs_require_a_gradient(names):
    sample = lstm_sample(LSTMCase(2, 3, lengths=(3, 1), h0=True, c0=True), torch.float64)
    assert gradcheck(*function_of(sample, names))


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradgradcheck(case):
    sample = lstm_sample(case, torch.float64)
    assert gradgradcheck(*function_of(sample, list(sample.tensors())), fast_mode=True)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_gradgradcheck_where_only_some_inputs_require_a_gradient(names):
    sample = lstm_sample(LSTMCase(2, 2, lengths=(2, 1), h0=True, c0=True), torch.float64)
    assert gradgradcheck(*function_of(sample, names))


@pytest.mark.parametrize("result", range(3), ids=RESULTS)
def test_gradgradcheck_through_one_result_alone(result):
    sample = lstm_sample(LSTMCase(2, 2, lengths=(2, 1), h0=True, c0=True), torch.float64)
    run, tensors = function_of(sample, list(sample.tensors()))
    assert gradgradcheck(lambda *t: run(*t)[result], tensors, fast_mode=True)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_gradient_has_the_same_bits_whatever_else_requires_one(names, dtype):
    sample = lstm_sample(LSTMCase(7, 20, lengths=(6, 4, 1), h0=True, c0=True), dtype)
    seeds = random_like(run_ours(sample))
    everything = with_gradients(run_ours, sample, seeds)
    some = with_gradients(run_ours, sample, seeds, names)
    assert_same_bits(some, {name: everything[name] for name in some})


def run_raw(sample):
    results = torch.ops.pymtl.lstm_training(*raw_arguments(sample))[:3]
    return dict(zip(RESULTS, results))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_raw_training_op_gives_the_same_bits(case, dtype):
    sample = lstm_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    for names in (None, ["input"], ["weight_hh[0]"]):
        assert_same_bits(with_gradients(run_raw, sample, seeds, names), with_gradients(run_ours, sample, seeds, names))


def test_an_input_that_needs_no_gradient_gets_none():
    sample = lstm_sample(ALL_OPTIONS).leaves(["weight_hh[2]"])
    run_ours(sample)["output"].sum().backward()
    gradients = {name for name, tensor in sample.tensors().items() if tensor.grad is not None}
    assert gradients == {"weight_hh[2]"}


def test_one_tensor_used_as_several_weights_gathers_all_gradients():
    weights = lstm_weights(3, 4, (F, F), dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    tied = weights.weight_ih[0].clone().requires_grad_()
    apart = [tied.detach().clone().requires_grad_() for _ in range(2)]
    ops.lstm(x, None, weights._replace(weight_ih=[tied, tied]))[0].sum().backward()
    ops.lstm(x, None, weights._replace(weight_ih=apart))[0].sum().backward()
    assert torch.equal(tied.grad, apart[0].grad + apart[1].grad)


@pytest.mark.parametrize("changed", ["input", "weight_ih[0]", "weight_hh[1]", "h0", "output"])
def test_backward_refuses_after_a_saved_tensor_was_changed_in_place(changed):
    sample = lstm_sample(ALL_OPTIONS).leaves()
    results = run_ours(sample)
    tensors = sample.tensors() | results
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results["h_n"].sum(), sample.input)


@pytest.mark.parametrize("names", [["input"], ["weight_ih[0]"], ["bias_hh[1]"], ["h0"]], ids="+".join)
def test_backward_through_the_raw_inference_ops_raises(names):
    sample = lstm_sample(ALL_OPTIONS).leaves(names)
    heads = (torch.randn(3, 4 * 33), torch.randn(3), True, True)
    results = [
        *torch.ops.pymtl.lstm_inference(*raw_arguments(sample), None),
        *torch.ops.pymtl.lstm_heads(*raw_arguments(sample), None, *heads),
    ]
    for result in results:
        with pytest.raises(RuntimeError, match="no derivative"):
            result.sum().backward()


@pytest.mark.parametrize("name", ["head_weight", "head_bias"])
def test_backward_through_the_raw_lstm_heads_to_its_heads_raises(name):
    sample = lstm_sample(RAGGED)
    head = {"head_weight": torch.randn(3, 38), "head_bias": torch.randn(3)}
    head[name].requires_grad_()
    logits = torch.ops.pymtl.lstm_heads(*raw_arguments(sample), None, *head.values(), False, False)[0]
    with pytest.raises(RuntimeError, match="no derivative"):
        logits.sum().backward()


def test_backward_through_the_raw_lstm_pack_raises():
    weights = lstm_weights(3, 4)
    weights.weight_ih[0].requires_grad_()
    packed = torch.ops.pymtl.lstm_pack(*weights)
    if packed.requires_grad:
        with pytest.raises(RuntimeError):
            packed.sum().backward()


def test_forward_mode_derivatives_raise_or_are_right():
    sample = lstm_sample(LSTMCase(3, 4), torch.float64)
    tangent = torch.randn_like(sample.input)
    _, expected = torch.func.jvp(
        lambda x: run_reference(sample.map(lambda name, t: x if name == "input" else t))["output"],
        (sample.input,),
        (tangent,),
    )
    try:
        _, actual = torch.func.jvp(lambda x: ops.lstm(x, None, sample.weights)[0], (sample.input,), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap"])
def test_functional_transforms_raise_or_are_right(transform):
    sample = lstm_sample(LSTMCase(3, 4), torch.float64)

    def loss(run, x):
        return run(sample.map(lambda name, t: x if name == "input" else t))["output"].square().sum()

    def apply(run):
        if transform == "grad":
            return torch.func.grad(lambda x: loss(run, x))(sample.input)
        if transform == "vjp":
            return torch.func.vjp(lambda x: loss(run, x), sample.input)[1](sample.input.new_ones(()))[0]
        return torch.func.vmap(lambda x: loss(run, x))(torch.stack([sample.input, 2 * sample.input]))

    try:
        actual = apply(run_ours)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(actual, apply(run_reference))


# Torch's contract for an op.

OPCHECKED = [
    LSTMCase(3, 5),
    LSTMCase(3, 5, reverse=(F,), bias=False),
    LSTMCase(3, 5, steps=1, batch=1, h0=True, c0=True),
    LSTMCase(3, 5, lengths=(4, 2, 1)),
    LSTMCase(3, 5, lengths=(4, 2, 1), h0=True, c0=True, reverse=(F, B, F, B)),
    LSTMCase(3, 5, lengths=(4, 2, 1), c0=True, bias=False),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_lstm_inference(case):
    sample = lstm_sample(case)
    opcheck(torch.ops.pymtl.lstm_inference.default, (*raw_arguments(sample), None))
    opcheck(torch.ops.pymtl.lstm_inference.default, (*raw_arguments(sample), ops.lstm_pack(sample.weights)))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_lstm_training(case):
    sample = lstm_sample(case, torch.float64 if case.h0 else torch.float32)
    opcheck(torch.ops.pymtl.lstm_training.default, raw_arguments(sample))
    opcheck(torch.ops.pymtl.lstm_training.default, raw_arguments(sample.leaves()))
    opcheck(torch.ops.pymtl.lstm_training.default, raw_arguments(sample.leaves(["weight_hh[0]"])))


def backward_arguments(sample, given=RESULTS, needs=(True,) * 5):
    output, h_n, c_n, gates, cells = torch.ops.pymtl.lstm_training(*raw_arguments(sample))
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    gradients = [torch.ones_like(results[name]) if name in given else None for name in RESULTS]
    return (*gradients, *raw_arguments(sample), output, gates, cells, list(needs))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_lstm_backward(case):
    sample = lstm_sample(case)
    opcheck(torch.ops.pymtl.lstm_backward.default, backward_arguments(sample))
    opcheck(torch.ops.pymtl.lstm_backward.default, backward_arguments(sample, given=["output"]))
    needs = (False, True, False, True, False)
    opcheck(torch.ops.pymtl.lstm_backward.default, backward_arguments(sample, given=["output"], needs=needs))


def own_derivative_arguments(case):
    """lstm_backward's arguments; those it can be differentiated by require a gradient."""
    arguments = backward_arguments(lstm_sample(case, torch.float64), needs=(True, True, True, case.bias, True))

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
    [LSTMCase(2, 3, steps=2, reverse=(F,), h0=True, c0=True), LSTMCase(2, 3, steps=1, bias=False)],
    ids=str,
)
def test_opcheck_of_lstm_backward_with_its_own_derivative(case):
    opcheck(torch.ops.pymtl.lstm_backward.default, own_derivative_arguments(case))


PACKED_OPCHECKED = [case for case in OPCHECKED if case.lengths is not None]


@pytest.mark.parametrize("case", PACKED_OPCHECKED, ids=str)
def test_opcheck_of_packed_lstm_backward_with_its_own_derivative_untraced(case):
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.pymtl.lstm_backward.default, own_derivative_arguments(case), test_utils=untraced)


@pytest.mark.xfail(
    strict=True, reason="the second derivative loops over the numbers in batch_sizes, which a tracer does not have"
)
@pytest.mark.parametrize("case", PACKED_OPCHECKED, ids=str)
def test_opcheck_of_packed_lstm_backward_with_its_own_derivative_traced(case):
    traced = ("test_aot_dispatch_dynamic",)
    opcheck(torch.ops.pymtl.lstm_backward.default, own_derivative_arguments(case), test_utils=traced)


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_lstm_heads(case):
    sample = lstm_sample(case)
    features = 5 * len(case.reverse)
    op = torch.ops.pymtl.lstm_heads.default
    opcheck(op, (*raw_arguments(sample), None, torch.randn(4, features), torch.randn(4), True, True))
    opcheck(op, (*raw_arguments(sample), None, torch.randn(4, features), None, False, True))
    opcheck(op, (*raw_arguments(sample), ops.lstm_pack(sample.weights), None, None, True, False))


@pytest.mark.parametrize("case", OPCHECKED[:2], ids=str)
def test_opcheck_of_lstm_pack(case):
    opcheck(torch.ops.pymtl.lstm_pack.default, tuple(lstm_sample(case).weights))


@pytest.mark.parametrize("case", [OPCHECKED[0], OPCHECKED[4]], ids=str)
def test_compiled_code_gives_the_same_bits(case):
    sample = lstm_sample(case)
    seeds = random_like(run_ours(sample))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, batch_sizes, w_ih, w_hh, b_ih, b_hh, h0, c0):
        return ops.lstm(x, batch_sizes, ops.LSTMWeights(w_ih, w_hh, b_ih, b_hh, list(case.reverse)), h0, c0)

    def run(s):
        return dict(zip(RESULTS, compiled(s.input, s.batch_sizes, *s.weights[:4], s.h0, s.c0)))

    assert_same_bits(with_gradients(run, sample, seeds), with_gradients(run_ours, sample, seeds))
    with torch.no_grad():
        assert_same_bits(run(sample), run_ours(sample))


# The same bits.


def sequence(sample, row):
    """One sequence of a packed batch, alone and dense."""
    sizes = sample.batch_sizes.tolist()
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    tokens = [start + row for start, size in zip(starts, sizes) if size > row]
    states = [None if s is None else s[:, row : row + 1] for s in (sample.h0, sample.c0)]
    return tokens, LSTMSample(sample.input[tokens].unsqueeze(1), None, sample.weights, *states)


def batch_of(sample, rows):
    """Some sequences of a packed batch, as a packed batch of their own, and their tokens in the old one."""
    rows = sorted(rows)
    tokens = [sequence(sample, row)[0] for row in rows]
    steps = range(max(map(len, tokens)))
    order = [t[step] for step in steps for t in tokens if len(t) > step]
    states = [None if s is None else s[:, rows] for s in (sample.h0, sample.c0)]
    return order, LSTMSample(sample.input[order], sizes_of([len(t) for t in tokens]), sample.weights, *states)


every_invariant_case = pytest.mark.parametrize("case", INVARIANT, ids=["long", "ragged", "all-options"])


@every_invariant_case
def test_a_sequence_gives_the_same_bits_alone_as_in_a_batch(case, dtype, isa):
    sample = lstm_sample(case, dtype)
    together = run_ours(sample)
    for row in range(len(case.lengths)):
        tokens, alone = sequence(sample, row)
        expected = {
            "output": together["output"][tokens].unsqueeze(1),
            "h_n": together["h_n"][:, row : row + 1],
            "c_n": together["c_n"][:, row : row + 1],
        }
        assert_same_bits(run_ours(alone), expected)


@every_invariant_case
def test_a_sequence_gives_the_same_bits_in_any_batch(case, dtype, isa):
    sample = lstm_sample(case, dtype)
    together = run_ours(sample)
    generator = torch.Generator().manual_seed(7)
    for size in range(2, len(case.lengths)):
        rows = sorted(torch.randperm(len(case.lengths), generator=generator)[:size].tolist())
        order, part = batch_of(sample, rows)
        expected = {
            "output": together["output"][order],
            "h_n": together["h_n"][:, rows],
            "c_n": together["c_n"][:, rows],
        }
        assert_same_bits(run_ours(part), expected)


@pytest.mark.parametrize("hidden_size", [19, 64])
def test_dense_and_packed_give_the_same_bits(hidden_size, dtype, isa):
    dense = lstm_sample(LSTMCase(9, hidden_size, steps=12, batch=7, h0=True, c0=True), dtype)
    packed = LSTMSample(dense.input.reshape(-1, 9), torch.full((12,), 7), dense.weights, dense.h0, dense.c0)
    expected = run_ours(dense)
    results = run_ours(packed)
    assert_same_bits(results | {"output": results["output"].reshape(12, 7, -1)}, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", [RAGGED, ALL_OPTIONS], ids=["ragged", "all-options"])
def test_longer_padding_gives_the_same_bits_and_zeros_at_padding(case, batch_first, dtype, isa):
    lengths = torch.tensor(case.lengths)[torch.randperm(len(case.lengths), generator=torch.manual_seed(3))]
    sample = lstm_sample(case, dtype)
    tight = int(lengths.max())
    found = []
    for steps in (tight, tight + 1, tight + 40):
        order = ops.packing_order(lengths, steps)
        padded = torch.full((steps, len(lengths), case.input_size), torch.nan, dtype=dtype)
        padded[:tight] = torch.randn(tight, len(lengths), case.input_size, generator=torch.manual_seed(4), dtype=dtype)
        padded = padded.transpose(0, 1) if batch_first else padded
        tokens = ops.pack(padded, order, batch_first=batch_first)
        output, h_n, c_n = ops.lstm(tokens, order.batch_sizes, sample.weights, sample.h0, sample.c0)
        output = ops.unpack(output, order, batch_first=batch_first)
        output = output.transpose(0, 1) if batch_first else output
        past = torch.arange(steps)[:, None] >= lengths
        assert not output[past].any()
        found.append({"output": output[:tight], "h_n": h_n, "c_n": c_n})
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@every_invariant_case
def test_a_sequence_cut_into_chunks_gives_the_same_bits(case, dtype, isa):
    whole = lstm_sample(LSTMCase(case.input_size, case.hidden_size, steps=23, batch=5, reverse=(F, F)), dtype)
    expected = run_ours(whole)
    outputs, h, c = [], None, None
    for chunk in whole.input.split([1, 7, 2, 13]):
        output, h, c = ops.lstm(chunk, None, whole.weights, h, c)
        outputs.append(output)
    assert_same_bits({"output": torch.cat(outputs), "h_n": h, "c_n": c}, expected)


def results_of_every_forward_op(sample):
    weights, features = sample.weights, len(sample.weights.reverse) * sample.weights.weight_hh[0].shape[1]
    generator = torch.Generator().manual_seed(9)
    head_weight = torch.randn(11, features, generator=generator, dtype=sample.input.dtype)
    fused = ops.lstm_heads(
        sample.input, sample.batch_sizes, weights, head_weight, None, mean=True, max=True, h0=sample.h0, c0=sample.c0
    )
    training = torch.ops.pymtl.lstm_training(*raw_arguments(sample))
    return (
        run_ours(sample)
        | {f"fused {name}": result for name, result in fused._asdict().items()}
        | {f"training {place}": result for place, result in enumerate(training)}
        | {"packed weights": ops.lstm_pack(weights)}
    )


@every_invariant_case
def test_any_number_of_threads_gives_the_same_bits(case, dtype, isa, threads):
    sample = lstm_sample(case, dtype)
    threads(1)
    expected = results_of_every_forward_op(sample)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(results_of_every_forward_op(sample), expected)


def test_any_number_of_threads_gives_one_dense_sequence_the_same_bits(dtype, isa, threads):
    sample = lstm_sample(LSTMCase(40, 64, steps=60, batch=1, reverse=(F,)), dtype)
    threads(1)
    expected = results_of_every_forward_op(sample)
    threads(2)
    assert_same_bits(results_of_every_forward_op(sample), expected)


@every_invariant_case
def test_twenty_runs_give_the_same_bits(case, dtype):
    sample = lstm_sample(case, dtype)
    expected = results_of_every_forward_op(sample)
    for _ in range(19):
        assert_same_bits(results_of_every_forward_op(sample), expected)


@every_invariant_case
def test_results_and_gradients_do_not_depend_on_what_memory_held_before(case, dtype, isa, filled_memory):
    sample = lstm_sample(case, dtype)
    seeds = random_like(run_ours(sample))

    def everything():
        return results_of_every_forward_op(sample) | with_gradients(run_ours, sample, seeds)

    expected = everything()
    filled_memory()
    assert_same_bits(everything(), expected)


def test_calls_from_several_threads_at_once_give_the_same_bits(dtype):
    samples = [lstm_sample(case, dtype) for case in INVARIANT]
    expected = [results_of_every_forward_op(sample) for sample in samples]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(results_of_every_forward_op, samples * 4))
    for place, results in enumerate(found):
        assert_same_bits(results, expected[place % len(samples)])


@every_invariant_case
def test_gradients_repeat_bit_for_bit(case, dtype, isa, threads):
    sample = lstm_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    for count in (1, 2):
        threads(count)
        expected = with_gradients(run_ours, sample, seeds)
        for _ in range(2):
            assert_same_bits(with_gradients(run_ours, sample, seeds), expected)


@pytest.mark.parametrize("case", INVARIANT + SMALL, ids=str)
def test_training_gives_the_bits_of_inference(case, dtype, isa):
    sample = lstm_sample(case, dtype)
    assert_same_bits(run_ours(sample.leaves()), run_ours(sample))
    with torch.no_grad():
        assert_same_bits(run_ours(sample.leaves()), run_ours(sample))


@pytest.mark.parametrize("case", INVARIANT + SMALL, ids=str)
def test_weights_packed_before_give_the_same_bits(case, dtype, isa):
    sample = lstm_sample(case, dtype)
    expected = run_ours(sample)
    packed = ops.lstm_pack(sample.weights)
    assert_same_bits(run_ours(sample, packed=packed), expected)
    # Any address will do: this one is not aligned.
    moved = torch.cat([packed.new_zeros(1), packed])[1:]
    assert_same_bits(run_ours(sample, packed=moved), expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 6, 7])
def test_a_call_of_few_steps_gives_the_bits_of_the_same_steps_in_a_long_call(steps, batch, dtype, isa):
    whole = lstm_sample(LSTMCase(13, 37, steps=20, batch=batch, reverse=(F,)), dtype)
    output = ops.lstm(whole.input, None, whole.weights)[0]
    assert torch.equal(ops.lstm(whole.input[:steps], None, whole.weights)[0], output[:steps])


def unfused(sample, head_weight, head_bias):
    output, h_n, c_n = run_ours(sample).values()
    reverse = sample.weights.reverse
    flat = output.reshape(-1, output.shape[-1])
    logits = ops.heads(flat, head_weight, head_bias, parts=len(reverse))
    return {
        "logits": logits.reshape(*output.shape[:-1], logits.shape[-1]),
        "mean": ops.pool(output, sample.batch_sizes, "mean", reverse=reverse),
        "max": ops.pool(output, sample.batch_sizes, "max", reverse=reverse),
        "h_n": h_n,
        "c_n": c_n,
    }


@pytest.mark.parametrize(("classes", "bias"), [(1, True), (7, False), (16, True), (72, True), (300, False)])
@pytest.mark.parametrize("case", [*INVARIANT, *SMALL[::2], LSTMCase(8, 33, steps=6, batch=1)], ids=str)
def test_lstm_heads_gives_the_bits_of_lstm_then_heads_and_pool(case, classes, bias, dtype, isa):
    sample = lstm_sample(case, dtype)
    generator = torch.Generator().manual_seed(5)
    head_weight = torch.randn(classes, len(case.reverse) * case.hidden_size, generator=generator, dtype=dtype)
    head_bias = torch.randn(classes, generator=generator, dtype=dtype) if bias else None
    expected = unfused(sample, head_weight, head_bias)
    inputs = (sample.input, sample.batch_sizes, sample.weights)
    states = {"h0": sample.h0, "c0": sample.c0}
    fused = ops.lstm_heads(*inputs, head_weight, head_bias, mean=True, max=True, **states)
    assert_same_bits(fused._asdict(), expected)
    packed = ops.lstm_pack(sample.weights)
    fused = ops.lstm_heads(*inputs, head_weight, head_bias, packed=packed, **states)
    assert_same_bits({"logits": fused.logits}, {"logits": expected["logits"]})
    assert fused.mean.numel() == fused.max.numel() == 0
    pooled = ops.lstm_heads(*inputs, None, None, max=True, **states)
    assert_same_bits({"max": pooled.max, "h_n": pooled.h_n}, {k: expected[k] for k in ("max", "h_n")})
    assert pooled.logits.numel() == pooled.mean.numel() == 0


def test_lstm_heads_is_as_accurate_as_nn_lstm_and_linear(isa):
    case = LSTMCase(24, 33, lengths=random_lengths(9, 15, seed=8))
    sample = lstm_sample(case)
    head_weight, head_bias = torch.randn(13, 66), torch.randn(13)

    def theirs(dtype):
        results = run_nn_lstm(sample.to(dtype))
        logits = torch.nn.functional.linear(results["output"], head_weight.to(dtype), head_bias.to(dtype))
        return {"logits": logits, "h_n": results["h_n"], "c_n": results["c_n"]}

    fused = ops.lstm_heads(sample.input, sample.batch_sizes, sample.weights, head_weight, head_bias)._asdict()
    assert_parity({k: fused[k] for k in ("logits", "h_n", "c_n")}, theirs(torch.float32), theirs(torch.float64))


# Memory layouts.


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("case", [ALL_OPTIONS, LSTMCase(9, 19, steps=4, batch=3, h0=True, c0=True)], ids=str)
def test_other_memory_layouts_give_the_same_bits(case, layout, dtype):
    sample = lstm_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    other = {name: layout(seed) for name, seed in seeds.items()}

    def run_on_views(s):
        return run_ours(s.map(lambda _, tensor: layout(tensor)))

    expected = with_gradients(run_ours, sample, seeds)
    assert_same_bits(with_gradients(run_on_views, sample, other), expected)
    with torch.no_grad():
        assert_same_bits(run_on_views(sample), run_ours(sample))
    batch_sizes = None if sample.batch_sizes is None else spread(sample.batch_sizes.double()).long()
    heads = torch.randn(5, case.hidden_size * len(case.reverse), dtype=dtype), torch.randn(5, dtype=dtype)
    views = sample.map(lambda _, tensor: layout(tensor))
    assert_same_bits(
        ops.lstm_heads(views.input, batch_sizes, views.weights, *map(layout, heads), mean=True)._asdict(),
        ops.lstm_heads(sample.input, sample.batch_sizes, sample.weights, *heads, mean=True)._asdict(),
    )
    assert torch.equal(ops.lstm_pack(views.weights), ops.lstm_pack(sample.weights))


def test_a_strided_batch_sizes_gives_the_same_bits():
    sample = lstm_sample(RAGGED)
    strided = torch.stack([sample.batch_sizes, -sample.batch_sizes], 1)[:, 0]
    assert not strided.is_contiguous()
    assert_same_bits(run_ours(LSTMSample(sample.input, strided, sample.weights)), run_ours(sample))


def test_expanded_inputs_and_weights_give_the_same_bits(dtype):
    weights = lstm_weights(4, 6, dtype=dtype)
    base = {
        "x": torch.randn(5, 1, 4, dtype=dtype),
        "bias": torch.randn(1, dtype=dtype),
        "row": torch.randn(1, 6, dtype=dtype),
        "h0": torch.randn(1, 3, 1, dtype=dtype),
    }

    def run(b, expand):
        w = weights._replace(
            bias_ih=[expand(b["bias"], 24)] * 2, weight_hh=[expand(b["row"], 24, 6), weights.weight_hh[1]]
        )
        return ops.lstm(expand(b["x"], 5, 3, 4), None, w, expand(b["h0"], 2, 3, 6), None)

    results = []
    for expand in (lambda t, *size: t.expand(size), lambda t, *size: t.expand(size).contiguous()):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
        output, h_n, c_n = run(leaves, expand)
        # The gradient of a sum is an expanded scalar.
        output.sum().backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()} | {"o": output, "h": h_n, "c": c_n})
    assert_same_bits(*results)


def test_inputs_are_never_modified(dtype):
    sample = lstm_sample(ALL_OPTIONS, dtype)
    seeds = random_like(run_ours(sample))
    head_weight, head_bias = torch.randn(5, 132, dtype=dtype), torch.randn(5, dtype=dtype)
    tensors = sample.tensors() | seeds | {"head_weight": head_weight, "head_bias": head_bias}
    tensors |= {"batch_sizes": sample.batch_sizes, "packed": ops.lstm_pack(sample.weights)}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
    run_ours(sample, packed=tensors["packed"])
    ops.lstm_heads(
        sample.input, sample.batch_sizes, sample.weights, head_weight, head_bias, mean=True, h0=sample.h0, c0=sample.c0
    )
    leaves = sample.map(lambda _, tensor: tensor.requires_grad_())
    results = run_ours(leaves)
    torch.autograd.grad(list(results.values()), list(leaves.tensors().values()), list(seeds.values()))
    for name, (values, version) in before.items():
        assert torch.equal(tensors[name], values), name
        assert tensors[name]._version == version, name


# What is refused.


def call_lstm(sample, **options):
    return ops.lstm(sample.input, sample.batch_sizes, sample.weights, sample.h0, sample.c0, **options)


def call_lstm_with_gradient(sample, **options):
    differentiable = sample.input if sample.input.is_floating_point() else sample.weights.weight_hh[0]
    differentiable.requires_grad_()
    return call_lstm(sample, **options)


def call_lstm_heads(sample, **options):
    return ops.lstm_heads(
        sample.input, sample.batch_sizes, sample.weights, None, None, mean=True, h0=sample.h0, c0=sample.c0, **options
    )


DENSE = LSTMCase(3, 5, steps=4, batch=2, h0=True, c0=True)
PACKED = LSTMCase(3, 5, lengths=(4, 2), h0=True, c0=True)


def change(**fields):
    """An edit of a sample: each field replaced by a function of it."""

    def edit(sample):
        values = {}
        for name, function in fields.items():
            if name in sample.weights._fields:
                weights = values.get("weights", sample.weights)
                values["weights"] = weights._replace(**{name: function(list(getattr(weights, name)))})
            else:
                values[name] = function(getattr(sample, name))
        return LSTMSample(**(vars(sample) | values))

    return edit


def put(place, function):
    """An edit of one element of a list."""
    return lambda items: [function(item) if i == place else item for i, item in enumerate(items)]


REFUSED = [
    ("dense input of rank 1", DENSE, change(input=lambda x: x[0, 0]), r"input: expected \[steps.*got 1-D"),
    ("dense input of rank 2", DENSE, change(input=lambda x: x[0]), r"input: expected \[steps.*got 2-D"),
    ("dense input of rank 4", DENSE, change(input=lambda x: x[None]), r"input: expected \[steps.*got 4-D"),
    ("packed input of rank 1", PACKED, change(input=lambda x: x[:, 0]), r"input: expected \[tokens.*got 1-D"),
    ("packed input of rank 3", PACKED, change(input=lambda x: x[None]), r"input: expected \[tokens.*got 3-D"),
    (
        "dense input of another width",
        DENSE,
        change(input=lambda x: x[..., :2]),
        r"input: expected size \[4, 2, 3\], got \[4, 2, 2\]",
    ),
    (
        "packed input of another width",
        PACKED,
        change(input=lambda x: x.repeat(1, 2)),
        r"input: expected size \[6, 3\], got \[6, 6\]",
    ),
    ("no steps", DENSE, change(input=lambda x: x[:0]), r"input: expected sequence length to be larger than 0"),
    ("integer input", DENSE, change(input=lambda x: x.long()), r"input: expected dtype Float or Double, got Long"),
    ("half input", DENSE, change(input=lambda x: x.half()), r"input: expected dtype Float or Double, got Half"),
    (
        "bfloat16 input",
        DENSE,
        change(input=lambda x: x.bfloat16()),
        r"input: expected dtype Float or Double, got BFloat16",
    ),
    (
        "double input to float weights",
        DENSE,
        change(input=lambda x: x.double()),
        r"weight_ih\[0\]: expected dtype Double, got Float",
    ),
    (
        "batch_sizes of too small a sum",
        PACKED,
        change(batch_sizes=lambda b: b[:-1]),
        r"batch_sizes: expected a sum of 6.*got 5",
    ),
    (
        "batch_sizes of too large a sum",
        PACKED,
        change(batch_sizes=lambda b: b + 1),
        r"batch_sizes: expected a sum of 6.*got 10",
    ),
    (
        "batch_sizes that increase",
        PACKED,
        change(batch_sizes=lambda b: b.flip(0)),
        r"batch_sizes: expected sizes that never increase.*got 2 at step 2",
    ),
    (
        "negative batch_sizes",
        PACKED,
        change(batch_sizes=lambda b: torch.tensor([4, 3, -1])),
        r"batch_sizes:.*not negative, got -1 at step 2",
    ),
    (
        "int32 batch_sizes",
        PACKED,
        change(batch_sizes=lambda b: b.int()),
        r"batch_sizes: expected dtype Long, got Int",
    ),
    (
        "batch_sizes of rank 2",
        PACKED,
        change(batch_sizes=lambda b: b[None]),
        r"batch_sizes: expected one dimension, got 2",
    ),
    (
        "batch_sizes of rank 0",
        PACKED,
        change(batch_sizes=lambda b: b[0]),
        r"batch_sizes: expected one dimension, got 0",
    ),
    ("empty batch_sizes", PACKED, change(batch_sizes=lambda b: b[:0]), r"batch_sizes: expected at least one step"),
    (
        "h0 of another batch",
        DENSE,
        change(h0=lambda h: h[:, :1]),
        r"h0: expected size \[2, 2, 5\], got \[2, 1, 5\]",
    ),
    (
        "h0 without the recurrences",
        DENSE,
        change(h0=lambda h: h[0]),
        r"h0: expected size \[2, 2, 5\], got \[2, 5\]",
    ),
    (
        "c0 of another width",
        PACKED,
        change(c0=lambda c: c[..., :4]),
        r"c0: expected size \[2, 2, 5\], got \[2, 2, 4\]",
    ),
    ("double h0", DENSE, change(h0=lambda h: h.double()), r"h0: expected dtype Float, got Double"),
    ("half c0", PACKED, change(c0=lambda c: c.half()), r"c0: expected dtype Float, got Half"),
    (
        "no weights",
        DENSE,
        change(
            weight_ih=lambda w: [],
            weight_hh=lambda w: [],
            bias_ih=lambda w: [],
            bias_hh=lambda w: [],
            reverse=lambda r: [],
        ),
        r"weight_ih: expected at least one recurrence, got none",
    ),
    ("a weight_hh missing", DENSE, change(weight_hh=lambda w: w[:1]), r"weight_hh: expected 2 tensors, got 1"),
    ("a weight_ih missing", DENSE, change(weight_ih=lambda w: w[:1]), r"weight_hh: expected 1 tensors, got 2"),
    ("a bias_ih missing", DENSE, change(bias_ih=lambda b: b[:1]), r"bias_ih: expected 2 tensors or none, got 1"),
    ("bias_hh missing", DENSE, change(bias_hh=lambda b: []), r"bias_hh: expected 2 tensors, got 0"),
    ("a flag missing", DENSE, change(reverse=lambda r: r[:1]), r"reverse: expected 2 flags, got 1"),
    (
        "biases of uneven numbers",
        DENSE,
        change(bias_ih=lambda b: [*b, b[0]], bias_hh=lambda b: b[:1]),
        r"bias_ih: expected 2 tensors or none, got 3",
    ),
    (
        "a weight_ih of another height",
        DENSE,
        change(weight_ih=put(1, lambda w: w[:-1])),
        r"weight_ih\[1\]: expected size \[20, 3\], got \[19, 3\]",
    ),
    (
        "a weight_ih of another width",
        DENSE,
        change(weight_ih=put(1, lambda w: w[:, :2])),
        r"weight_ih\[1\]: expected size \[20, 3\], got \[20, 2\]",
    ),
    (
        "a weight_hh of another size",
        DENSE,
        change(weight_hh=put(1, lambda w: w[:, :2])),
        r"weight_hh\[1\]: expected size \[20, 5\], got \[20, 2\]",
    ),
    (
        "a weight_ih of rank 1",
        DENSE,
        change(weight_ih=put(0, lambda w: w[0])),
        r"weight_ih and weight_hh: expected matrices, got 1-D and 2-D",
    ),
    (
        "a bias_ih of another size",
        DENSE,
        change(bias_ih=put(0, lambda b: b[:5])),
        r"bias_ih\[0\]: expected size \[20\], got \[5\]",
    ),
    (
        "a double bias_hh",
        DENSE,
        change(bias_hh=put(1, lambda b: b.double())),
        r"bias_hh\[1\]: expected dtype Float, got Double",
    ),
    (
        "weights without columns",
        DENSE,
        change(weight_ih=lambda ws: [w[:, :0] for w in ws]),
        r"weight_ih and weight_hh: expected sizes above zero, got 0 and 5",
    ),
]


@pytest.mark.parametrize("call", [call_lstm, call_lstm_with_gradient, call_lstm_heads])
@pytest.mark.parametrize(("case", "edit", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_bad_input_is_refused_by_name_and_values(case, edit, message, call):
    with pytest.raises(RuntimeError, match=message):
        call(edit(lstm_sample(case)))


@pytest.mark.parametrize("call", [call_lstm, call_lstm_with_gradient, call_lstm_heads])
@pytest.mark.parametrize(
    ("name", "case", "edit"),
    [
        pytest.param("batch_sizes", PACKED, change(batch_sizes=lambda b: b.to("meta")), id="batch_sizes"),
        pytest.param("h0", DENSE, change(h0=lambda h: h.to("meta")), id="h0"),
        pytest.param("c0", PACKED, change(c0=lambda c: c.to("meta")), id="c0"),
        pytest.param("weight_ih", DENSE, change(weight_ih=put(1, lambda w: w.to("meta"))), id="weight_ih"),
        pytest.param("bias_hh", DENSE, change(bias_hh=put(0, lambda b: b.to("meta"))), id="bias_hh"),
    ],
)
def test_an_argument_on_another_device_is_refused_by_name(name, case, edit, call):
    with pytest.raises(RuntimeError, match=name):
        call(edit(lstm_sample(case)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_weight": torch.zeros(10)}, r"head_weight: expected a matrix, got 1-D"),
        ({"head_weight": torch.zeros(4, 9)}, r"head_weight: expected size \[4, 10\], got \[4, 9\]"),
        ({"head_weight": torch.zeros(4, 10).double()}, r"head_weight: expected dtype Float, got Double"),
        (
            {"head_weight": torch.zeros(4, 10), "head_bias": torch.zeros(3)},
            r"head_bias: expected size \[4\], got \[3\]",
        ),
        ({"head_bias": torch.zeros(3)}, r"head_bias: expected size \[0\], got \[3\]"),
    ],
    ids=["vector", "width", "dtype", "bias size", "bias alone"],
)
def test_bad_heads_are_refused_by_name_and_values(options, message):
    sample = lstm_sample(DENSE)
    options = {"head_weight": None, "head_bias": None} | options
    with pytest.raises(RuntimeError, match=message):
        ops.lstm_heads(sample.input, None, sample.weights, **options)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p[:-1], r"packed.*expected size \[\d+\], got \[\d+\]"),
        (lambda p: p[None], r"packed.*expected size \[\d+\], got \[1, \d+\]"),
        (lambda p: p.double(), r"packed.*expected dtype Float, got Double"),
    ],
    ids=["size", "rank", "dtype"],
)
@pytest.mark.parametrize("call", [call_lstm, call_lstm_heads])
def test_packed_weights_that_do_not_fit_are_refused(edit, message, call):
    sample = lstm_sample(DENSE)
    with pytest.raises(RuntimeError, match=message):
        call(sample, packed=edit(ops.lstm_pack(sample.weights)))


def test_lstm_pack_refuses_bad_weights():
    weights = lstm_weights(3, 5)
    with pytest.raises(RuntimeError, match=r"weight_hh: expected 2 tensors, got 1"):
        ops.lstm_pack(weights._replace(weight_hh=weights.weight_hh[:1]))
    with pytest.raises(RuntimeError, match=r"weight_ih\[1\]: expected size \[20, 3\], got \[20, 2\]"):
        ops.lstm_pack(weights._replace(weight_ih=[weights.weight_ih[0], weights.weight_ih[1][:, :2]]))
    half = ops.LSTMWeights(*([w.half() for w in group] for group in weights[:4]), weights.reverse)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected dtype Float or Double, got Half"):
        ops.lstm_pack(half)


def test_raw_lstm_backward_refuses_bad_arguments():
    arguments = list(backward_arguments(lstm_sample(PACKED)))
    for place, value, message in [
        (0, torch.ones(6, 9), r"grad_output: expected size \[6, 10\], got \[6, 9\]"),
        (1, torch.ones(2, 2, 4), r"grad_h_n: expected size \[2, 2, 5\], got \[2, 2, 4\]"),
        (2, torch.ones(2, 2, 5).double(), r"grad_c_n: expected dtype Float, got Double"),
        (12, torch.ones(6, 5), r"output: expected size \[6, 10\], got \[6, 5\]"),
        (13, torch.ones(2, 6, 19), r"gates: expected size \[2, 6, 20\], got \[2, 6, 19\]"),
        (14, torch.ones(2, 5, 5), r"cells: expected size \[2, 6, 5\], got \[2, 5, 5\]"),
        (15, [True] * 4, r"needs: expected 5 flags, got 4"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pymtl.lstm_backward(*arguments[:place], value, *arguments[place + 1 :])


# Nothing to do.


def empty(packed, dtype):
    """A batch of no sequences."""
    sample = lstm_sample(LSTMCase(3, 5, steps=4, batch=1), dtype)
    if packed:
        return LSTMSample(sample.input[:0, 0], torch.zeros(4, dtype=torch.int64), sample.weights)
    return LSTMSample(sample.input[:, :0], None, sample.weights)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_empty_results(packed, dtype):
    sample = empty(packed, dtype)
    leading = (0,) if packed else (4, 0)
    results = run_ours(sample)
    assert [tuple(r.shape) for r in results.values()] == [(*leading, 10), (2, 0, 5), (2, 0, 5)]
    assert all(r.dtype == dtype for r in results.values())
    fused = ops.lstm_heads(
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [RAGGED, ALL_OPTIONS], ids=["ragged", "all-options"])
def test_a_number_that_is_not_finite_stays_in_its_sequence(case, value, dtype, isa):
    sample = lstm_sample(case, dtype)
    hit = 2
    tokens, _ = sequence(sample, hit)
    spoilt = sample.input.clone()
    spoilt[tokens[1], 0] = value
    spoilt_sample = LSTMSample(spoilt, sample.batch_sizes, sample.weights, sample.h0, sample.c0)
    clean, dirty = (results_of_every_forward_op(s) for s in (sample, spoilt_sample))
    others = torch.ones(len(sample.input), dtype=torch.bool)
    others[tokens] = False
    rows = torch.ones(len(case.lengths), dtype=torch.bool)
    rows[hit] = False
    for name in ("output", "fused logits"):
        assert_same_bits({name: dirty[name][others]}, {name: clean[name][others]})
    for name in ("h_n", "c_n", "fused h_n"):
        assert_same_bits({name: dirty[name][:, rows]}, {name: clean[name][:, rows]})
    for name in ("fused mean", "fused max"):
        assert_same_bits({name: dirty[name][rows]}, {name: clean[name][rows]})
    if value != value:
        # Forward recurrences are NaN from the second token on, backward ones up to it.
        assert dirty["h_n"][:, hit].isnan().all()
        assert dirty["fused mean"][hit].isnan().all()
        assert dirty["fused max"][hit].isnan().all()
        assert dirty["output"][tokens[0], : case.hidden_size].isfinite().all()
        assert dirty["output"][tokens[2], : case.hidden_size].isnan().all()
        assert dirty["output"][tokens[2], case.hidden_size : 2 * case.hidden_size].isfinite().all()


def unusual(edit, dtype):
    sample = lstm_sample(LSTMCase(4, 19, lengths=(6, 5, 2), h0=True, c0=True), dtype).map(lambda _, t: t.clone())
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
    ours, theirs = gradient_pattern(run_ours, sample), gradient_pattern(run_nn_lstm, sample)
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
    sample = lstm_sample(LSTMCase(6, 19, lengths=(7, 4, 1)))
    sample = LSTMSample(sample.input * size, sample.batch_sizes, sample.weights)
    seeds = random_like(run_ours(sample))
    assert_parity(
        with_gradients(run_ours, sample, seeds),
        with_gradients(run_nn_lstm, sample, seeds),
        with_gradients(run_nn_lstm, sample.to(torch.float64), seeds),
    )
