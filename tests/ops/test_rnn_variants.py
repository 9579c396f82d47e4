"""Recurrent dropout, zoneout and layer-normalised cells of the op, beside the plain recurrence in PyTorch."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from parity import assert_parity, assert_same_bits
from samples import (
    BOTH,
    RESULTS,
    B,
    F,
    RNNCase,
    backward_arguments,
    function_of,
    named,
    random_like,
    raw_arguments,
    rnn_sample,
    run_ours,
    run_reference,
    spread,
    transposed,
    with_gradients,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


def varied(base, masks=True, norms=(False, True)):
    """The case with every combination of the variants that its cell has."""
    for mode, dropout, zoneout, layer_norm in product(MODES, (False, True), ("", "h", "c", "hc", "HC"), norms):
        if mode != "LSTM":
            zoneout = zoneout.replace("c", "").replace("C", "")
        if (dropout or zoneout or layer_norm) and (masks or layer_norm):
            c0 = base.c0 and mode == "LSTM"
            yield replace(base, mode=mode, dropout=dropout, zoneout=zoneout, layer_norm=layer_norm, c0=c0)


def unique(*bases, **options):
    return list(dict.fromkeys(case for base in bases for case in varied(base, **options)))


SIZES = [
    RNNCase(3, 5, steps=4, batch=3),
    RNNCase(1, 1, steps=1, batch=1, reverse=(F,)),
    RNNCase(4, 17, lengths=(6, 3, 3, 1), h0=True, bias=False, reverse=(B,)),
    RNNCase(7, 70, lengths=(9, 8, 2), h0=True, c0=True, reverse=(F, B, F, B), inputs=2),
]
MASKED = unique(*SIZES, norms=(False,))
NORMALISED = [case for case in unique(*SIZES) if case.layer_norm]
MANY = [
    *unique(RNNCase(3, 5, steps=4, batch=3), masks=False),
    *unique(RNNCase(20, 64, lengths=(20, 8, 2), h0=True), masks=False)[::3],
    RNNCase(30, 200, lengths=(12, 5, 1), layer_norm=True),
]
LONG = RNNCase(11, 64, lengths=(230, 229, 130, 33, 8, 7, 1, 1))
INVARIANT = [
    replace(LONG, dropout=True, zoneout="hc"),
    replace(LONG, layer_norm=True, dropout=True),
    replace(LONG, mode="GRU", dropout=True, zoneout="H"),
    replace(LONG, mode="GRU", layer_norm=True),
    replace(LONG, mode="RNN_TANH", layer_norm=True, zoneout="h"),
    # Few sequences and large weights: a team shares each recurrence's units.
    RNNCase(32, 256, steps=9, batch=2, reverse=(F,), dropout=True, zoneout="hc"),
    RNNCase(32, 256, steps=9, batch=2, reverse=(B,), dropout=True, zoneout="h", mode="GRU"),
    RNNCase(32, 384, steps=9, batch=2, reverse=(F,), dropout=True, zoneout="H", mode="RNN_TANH"),
]
TINY = unique(RNNCase(2, 3, lengths=(3, 1), h0=True, c0=True), RNNCase(2, 2, steps=2, batch=2, bias=False))


# Numbers.


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masked_results_and_gradients_are_as_accurate_as_plain_pytorch(case, isa):
    sample = rnn_sample(case)
    seeds = random_like(run_ours(sample))
    truth = with_gradients(run_reference, sample.to(torch.float64), seeds)
    assert_parity(with_gradients(run_ours, sample, seeds), with_gradients(run_reference, sample, seeds), truth)


@pytest.mark.parametrize("case", MASKED + NORMALISED, ids=str)
def test_in_float64_results_and_gradients_are_those_of_plain_pytorch(case, isa):
    sample = rnn_sample(case, torch.float64)
    seeds = random_like(run_ours(sample))
    ours, expected = (with_gradients(run, sample, seeds) for run in (run_ours, run_reference))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-11 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_normalised_results_and_gradients_are_on_average_as_accurate_as_plain_pytorch(case, dtype):
    # Where a variance is small, normalising multiplies every rounding error by hundreds: in one sample either side may
    # have the better luck, but not in many.
    ratios = {}
    for seed in range(12):
        sample = rnn_sample(case, seed=seed).to(dtype)
        seeds = random_like(run_ours(sample), seed=1000 + seed)
        truth = with_gradients(run_reference, sample.to(torch.float64), seeds)
        ours, theirs = (with_gradients(run, sample, seeds) for run in (run_ours, run_reference))
        for name, value in truth.items():
            floor = torch.finfo(dtype).eps * value.abs().max().item()
            error, allowed = ((r[name].double() - value).abs().max().item() + floor for r in (ours, theirs))
            ratios.setdefault(name.split("[")[0], []).append(math.log(error / allowed))
    for name, logs in ratios.items():
        assert sum(logs) / len(logs) < math.log(2), name


@pytest.mark.parametrize("case", [case for case in MASKED if case.hidden_size in (5, 70)], ids=str)
def test_masked_bfloat16_is_as_accurate_as_plain_pytorch(case):
    sample = rnn_sample(case).to(torch.bfloat16)
    seeds = random_like(run_ours(sample))
    truth = with_gradients(run_reference, sample.to(torch.float64), seeds)
    assert_parity(with_gradients(run_ours, sample, seeds), with_gradients(run_reference, sample, seeds), truth)


def test_a_mask_of_ones_and_zoneout_of_zeros_change_no_bit():
    sample = rnn_sample(RNNCase(7, 20, lengths=(6, 4, 1), h0=True, c0=True))
    seeds = random_like(run_ours(sample))
    plain = with_gradients(run_ours, sample, seeds)
    masks = ops.RNNMasks(torch.ones(2, 3, 20), torch.zeros(11, 40), torch.zeros(40))
    assert_same_bits(with_gradients(run_ours, replace(sample, masks=masks), seeds), plain)


def test_zoneout_of_ones_keeps_the_state_and_its_gradient():
    sample = rnn_sample(RNNCase(7, 20, lengths=(6, 4, 1), h0=True, c0=True))
    sample = replace(sample, masks=ops.RNNMasks(None, torch.ones(40), torch.ones(11, 40)))
    results = run_ours(sample)
    assert torch.equal(results["h_n"], sample.h0)
    assert torch.equal(results["c_n"], sample.c0)
    gradients = with_gradients(run_ours, sample, {"h_n": torch.ones(2, 3, 20)})
    assert torch.equal(gradients["gradient of h0"], torch.ones(2, 3, 20))
    assert not gradients["gradient of weight_hh[0]"].any()


# Derivatives.


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case):
    sample = rnn_sample(case, torch.float64)
    assert gradcheck(*function_of(sample, list(sample.tensors())))


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradgradcheck(case):
    sample = rnn_sample(case, torch.float64)
    assert gradgradcheck(*function_of(sample, list(sample.tensors())), fast_mode=True)


@pytest.mark.parametrize(
    "names", [["input"], ["gain_hh[1]"], ["gain_c[0]", "h0"], ["bias_c[1]"], ["gain_ih[0]"]], ids="+".join
)
def test_gradients_where_only_some_inputs_require_one(names):
    case = RNNCase(2, 3, lengths=(3, 1), h0=True, c0=True, dropout=True, zoneout="hc", layer_norm=True)
    sample = rnn_sample(case, torch.float64)
    assert gradcheck(*function_of(sample, names))
    assert gradgradcheck(*function_of(sample, names))


@pytest.mark.parametrize("result", range(3), ids=RESULTS)
def test_gradgradcheck_through_one_result_alone(result):
    case = RNNCase(2, 2, lengths=(2, 1), h0=True, c0=True, dropout=True, zoneout="hc", layer_norm=True)
    run, tensors = function_of(sample := rnn_sample(case, torch.float64), list(sample.tensors()))
    assert gradgradcheck(lambda *t: run(*t)[result], tensors, fast_mode=True)


@pytest.mark.parametrize("case", NORMALISED[::5] + MASKED[::5], ids=str)
def test_the_raw_training_op_gives_the_same_bits(case):
    sample = rnn_sample(case)
    # The projection of a normalised layer's input is not the op's.
    sample = sample if sample.norm is None else replace(sample, input=torch.zeros_like(sample.input))
    names = ["weight_hh[0]", *(["gain_hh[0]"] if case.layer_norm else [])]
    seeds = random_like(run_ours(sample))
    raw = with_gradients(lambda s: named(s, torch.ops.pymtl.rnn_training(*raw_arguments(s))[:3]), sample, seeds, names)
    assert_same_bits(raw, with_gradients(run_ours, sample, seeds, names))


def test_masks_that_require_a_gradient_are_refused():
    sample = rnn_sample(RNNCase(3, 5, dropout=True))
    masks = sample.masks._replace(dropout=sample.masks.dropout.requires_grad_())
    with pytest.raises(RuntimeError, match="dropout: expected a mask that requires no gradient"):
        run_ours(sample, masks=masks)


# Contracts.


@pytest.mark.parametrize("case", TINY[::8], ids=str)
def test_opcheck(case):
    sample = rnn_sample(case)
    opcheck(torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), None))
    opcheck(
        torch.ops.pymtl.rnn_inference.default, (*raw_arguments(sample), ops.rnn_prepack(sample.weights, sample.norm))
    )
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample))
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample.leaves()))
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample))
    _, weight_hh, bias_ih, bias_hh, reverse, mode = sample.weights
    weight_ih, norm = raw_arguments(sample)[2], raw_arguments(sample)[-2]
    opcheck(torch.ops.pymtl.rnn_prepack.default, (weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, norm))


def only(sample, row):
    """The call with one of the sequences alone."""
    lengths = [int((sample.batch_sizes > r).sum()) for r in range(int(sample.batch_sizes[0]))]
    starts = [0, *sample.batch_sizes.cumsum(0).tolist()]
    tokens = [starts[t] + row for t in range(lengths[row])]

    def of_state(state):
        return None if state is None else state[:, row : row + 1]

    def of_tokens(mask):
        return mask if mask is None or mask.dim() == 1 else mask[tokens]

    dropout, zoneout_h, zoneout_c = sample.masks
    masks = ops.RNNMasks(of_state(dropout), of_tokens(zoneout_h), of_tokens(zoneout_c))
    alone = replace(
        sample,
        input=sample.input[tokens],
        batch_sizes=torch.ones(lengths[row], dtype=torch.int64),
        h0=of_state(sample.h0),
        c0=of_state(sample.c0),
        masks=masks,
    )
    return alone, tokens


@pytest.mark.parametrize("case", [c for c in INVARIANT if c.lengths], ids=str)
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(case, isa):
    sample = rnn_sample(case)
    together = run_ours(sample)
    for row in range(len(case.lengths)):
        alone, tokens = only(sample, row)
        expected = {name: r[tokens] if name == "output" else r[:, row : row + 1] for name, r in together.items()}
        assert_same_bits(run_ours(alone), expected)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_training_inference_prepacked_weights_and_threads_give_the_same_bits(case, isa, threads):
    sample = rnn_sample(case)
    expected = run_ours(sample)
    assert_same_bits(run_ours(sample, prepacked=ops.rnn_prepack(sample.weights, sample.norm)), expected)
    training = run_ours(sample.leaves())
    assert_same_bits(training, expected)
    seeds = random_like(expected)
    assert_same_bits(with_gradients(run_ours, sample, seeds), with_gradients(run_ours, sample, seeds))
    torch.set_num_threads(1)
    assert_same_bits(run_ours(sample), expected)


@pytest.mark.parametrize("strided", [spread, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", INVARIANT[:2], ids=str)
def test_strides_change_no_bit(case, strided):
    sample = rnn_sample(case)
    masks = ops.RNNMasks(*(None if mask is None else strided(mask) for mask in sample.masks))
    views = replace(sample.map(lambda _, tensor: strided(tensor)), masks=masks)
    assert_same_bits(run_ours(views), run_ours(sample))


# Errors.


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m, n: (m._replace(dropout=torch.ones(2, 3, 4)), n),
            r"dropout: expected size \[2, 3, 5\], got \[2, 3, 4\]",
        ),
        (lambda m, n: (m._replace(zoneout_h=torch.ones(9)), n), r"zoneout_h: expected size \[10\], got \[9\]"),
        (lambda m, n: (m._replace(zoneout_c=torch.ones(2, 3, 10)), n), r"zoneout_c: expected size \[5, 3, 10\]"),
        (
            lambda m, n: (m._replace(zoneout_c=torch.ones(10).double()), n),
            r"zoneout_c: expected dtype Float, got Double",
        ),
        (lambda m, n: (m, n._replace(gain_hh=n.gain_hh[:1])), r"gain_hh: expected 2 tensors, got 1"),
        (lambda m, n: (m, n._replace(gain_c=[])), r"gain_c: expected 2 tensors, got 0"),
        (lambda m, n: (m, n._replace(bias_c=n.bias_c[:1])), r"bias_c: expected 0 or 2 tensors, got 1"),
        (lambda m, n: (m, n._replace(gain_ih=[torch.ones(19)] * 2)), r"gain_ih\[0\]: expected size \[20\], got \[19\]"),
        (lambda m, n: (m, n._replace(gain_ih=[torch.ones(20).double()] * 2)), r"gain_ih\[0\]: expected dtype"),
        (lambda m, n: (m, n._replace(bias_c=[torch.ones(4)] * 2)), r"bias_c\[0\]: expected size \[5\], got \[4\]"),
        (lambda m, n: (m, n._replace(gain_hh=[torch.ones(19)] * 2)), r"gain_hh\[0\]: expected size \[20\], got \[19\]"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_masks_and_gains_are_refused(edit, message, training):
    sample = rnn_sample(RNNCase(3, 5, dropout=True, zoneout="hc", layer_norm=True))
    sample = sample.leaves() if training else sample
    masks, norm = edit(sample.masks, sample.norm)
    with pytest.raises(RuntimeError, match=message):
        run_ours(sample, masks=masks, norm=norm)


@pytest.mark.parametrize("mode", MODES[1:])
def test_only_an_lstm_has_zoneout_of_c_and_gains_of_c(mode):
    sample = rnn_sample(RNNCase(3, 5, mode=mode, layer_norm=True))
    with pytest.raises(
        RuntimeError, match="zoneout_c: expected None, since only an LSTM has a cell state, got a tensor"
    ):
        run_ours(sample, masks=ops.RNNMasks(zoneout_c=torch.zeros(10)))
    with pytest.raises(RuntimeError, match="gain_c: expected 0 tensors, got 1"):
        run_ours(sample, norm=sample.norm._replace(gain_c=[torch.ones(5)]))


def test_weights_packed_for_plain_cells_are_refused_by_normalised_ones():
    sample = rnn_sample(RNNCase(3, 5, layer_norm=True))
    with pytest.raises(RuntimeError, match="prepacked: expected weights prepacked for this mode"):
        run_ours(sample, prepacked=ops.rnn_prepack(sample.weights))


@pytest.mark.parametrize("reverse", [(F,), BOTH])
def test_an_empty_batch_and_no_tokens(reverse):
    case = RNNCase(3, 5, batch=0, reverse=reverse, dropout=True, zoneout="hc", layer_norm=True)
    sample = rnn_sample(case).leaves()
    results = run_ours(sample)
    assert results["output"].shape == (5, 0, 5 * len(reverse))
    results["output"].sum().backward()
    assert not sample.norm.gain_hh[0].grad.any()


def test_steps_and_sequences_without_tokens():
    sample = rnn_sample(RNNCase(3, 5, lengths=(3, 1), dropout=True, zoneout="hc", layer_norm=True))
    nothing = replace(
        sample,
        input=sample.input[:0],
        batch_sizes=torch.zeros(2, dtype=torch.int64),
        masks=ops.RNNMasks(torch.ones(2, 0, 5), torch.ones(0, 10), torch.ones(10)),
    ).leaves()
    results = run_ours(nothing)
    assert [tuple(r.shape) for r in results.values()] == [(0, 10), (2, 0, 5), (2, 0, 5)]
    results["output"].sum().backward()
    assert not nothing.weights.weight_hh[0].grad.any()
    longer = replace(sample, batch_sizes=torch.cat([sample.batch_sizes, torch.zeros(2, dtype=torch.int64)]))
    assert_same_bits(run_ours(longer), run_ours(sample))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (ops.RNNMasks(torch.ones(1, 1, 5)), r"dropout: expected size \[1, 2, 5\], got \[1, 1, 5\]"),
        (ops.RNNMasks(None, torch.ones(1, 5)), r"zoneout_h: expected size \[4, 5\], got \[1, 5\]"),
        (ops.RNNMasks(None, None, torch.ones(4)), r"zoneout_c: expected size \[5\], got \[4\]"),
    ],
)
def test_bad_masks_are_refused_within_transforms_too(masks, message):
    sample = rnn_sample(RNNCase(3, 5, lengths=(3, 1), reverse=(F,)))

    def call(x):
        return run_ours(replace(sample, input=x), masks=masks)["output"]

    for run in (call, lambda x: torch.func.vmap(call)(x.unsqueeze(0))):
        with pytest.raises(RuntimeError, match=message):
            run(sample.input)


def test_the_raw_op_refuses_masks_that_require_a_gradient():
    arguments = list(raw_arguments(rnn_sample(RNNCase(3, 5, dropout=True)).leaves()))
    arguments[10] = arguments[10].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="expected masks that require no gradient"):
        torch.ops.pymtl.rnn_training(*arguments)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weight_ih[1]": torch.ones(20, 4)}, r"weight_ih\[1\]: expected size \[20, 3\], got \[20, 4\]"),
        ({"weight_ih[0]": torch.ones(19, 3)}, r"weight_ih\[0\]: expected size \[20, 3\], got \[19, 3\]"),
        ({"weight_ih[1]": torch.ones(20, 3).double()}, r"weight_ih\[1\]: expected dtype torch.float32"),
        ({"weight_ih[0]": torch.ones(20)}, r"weight_ih and weight_hh: expected matrices with columns, got \[20\]"),
        ({"gain_ih[1]": torch.ones(20, device="meta")}, r"gain_ih\[1\]: expected a tensor on cpu, got one on meta"),
        ({"input": torch.ones(5, 3, 4)}, r"input: expected size \[5, 3, 3\], got \[5, 3, 4\]"),
        ({"input": torch.ones(())}, r"input: expected \[T, B, I\] or packed \[N, I\], got 0-D"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_projection_reads_is_refused_by_name(edit, message):
    sample = rnn_sample(RNNCase(3, 5, layer_norm=True)).map(lambda name, tensor: edit.get(name, tensor))
    with pytest.raises(RuntimeError, match=message):
        ops.rnn(sample.input, None, sample.weights, norm=sample.norm)
