"""A stack of layers from prepacked weights, in one call."""

import pytest
import torch
from parity import assert_same_bits
from samples import BOTH, RNNCase, floats_of, rnn_sample, rnn_weights
from torch.library import opcheck

from pymtl import _native, ops

RESULTS = ("output", "h_n", "c_n")
CASES = (
    RNNCase(3, 5, lengths=(4, 2, 1)),
    RNNCase(3, 5, steps=4, batch=3),
    RNNCase(7, 33, lengths=(9, 9, 3, 1), h0=True, c0=True),
    RNNCase(1, 16, steps=1, batch=1, c0=True),
    RNNCase(7, 33, lengths=(9, 9, 3, 1), h0=True, mode="GRU"),
    RNNCase(7, 33, steps=4, batch=3, mode="RNN_TANH"),
)


def stack(case, layers, dtype=torch.float32):
    """The sample, and the weights of as many layers above each other."""
    sample = rnn_sample(case, dtype)
    features = case.hidden_size * len(case.reverse)
    above = [
        rnn_weights(features, case.hidden_size, case.reverse, dtype=dtype, seed=layer, mode=case.mode)
        for layer in range(1, layers)
    ]
    return sample, [sample.weights, *above]


def one_by_one(sample, weights, h0, c0):
    input, states = sample.input, []
    count = len(weights[0].reverse)
    for layer, own in enumerate(weights):
        part = slice(layer * count, (layer + 1) * count)
        input, *state = ops.rnn(
            input, sample.batch_sizes, own, None if h0 is None else h0[part], None if c0 is None else c0[part]
        )
        states.append(state)
    return dict(zip(RESULTS, (input, *map(torch.cat, zip(*states)))))


def frozen(weights):
    size, (first, *_) = weights[0].weight_hh[0].shape[1], weights
    return ops.RNNFrozen.of([ops.rnn_prepack(own) for own in weights], size, first.reverse, first.mode)


def states(sample, layers):
    return [None if s is None else torch.cat([s + k for k in range(layers)]) for s in (sample.h0, sample.c0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_the_bits_of_the_layers_one_by_one(case, layers, dtype):
    sample, weights = stack(case, layers, dtype)
    h0, c0 = states(sample, layers)
    results = ops.rnn_frozen(sample.input, sample.batch_sizes, frozen(weights), h0, c0)
    assert_same_bits(dict(zip(RESULTS, results)), one_by_one(sample, weights, h0, c0))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_empty_results(packed):
    weights = [rnn_weights(3, 5), rnn_weights(10, 5)]
    input, sizes = (torch.empty(0, 3), torch.zeros(4, dtype=torch.int64)) if packed else (torch.empty(4, 0, 3), None)
    results = ops.rnn_frozen(input, sizes, frozen(weights))
    assert [tuple(r.shape) for r in results] == [(0, 10) if packed else (4, 0, 10), (4, 0, 5), (4, 0, 5)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    sample, weights = stack(case, 2)
    arguments = (sample.input, sample.batch_sizes, *frozen(weights), *states(sample, 2))
    opcheck(torch.ops.pymtl.rnn_frozen.default, arguments)


def test_asking_the_raw_op_for_a_gradient_raises():
    x = torch.randn(4, 2, 3, requires_grad=True)
    output = torch.ops.pymtl.rnn_frozen(x, None, *frozen([rnn_weights(3, 5)]), None, None)[0]
    with pytest.raises(RuntimeError, match=r"rnn_frozen has no derivative: call pymtl\.ops\.rnn"):
        output.sum().backward()


X = torch.randn(4, 2, 3)


PACK = frozen([rnn_weights(3, 5)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers": ""},
            "layers: expected mode, hidden size, number of layers and directions as in LSTM 128 2 fr, got",
        ),
        ({"layers": "LSTM"}, "layers: expected mode, hidden size, .*, got LSTM"),
        ({"layers": "LSTM 5 1"}, "layers: expected mode, hidden size, .*, got LSTM 5 1"),
        ({"layers": "LSTM 5 1 "}, "layers: expected mode, hidden size, .*, got LSTM 5 1 "),
        ({"layers": "LSTM 5 1 fx"}, "layers: expected mode, hidden size, .*, got LSTM 5 1 fx"),
        ({"layers": "LSTM 0 1 fr"}, "layers: expected mode, hidden size, .*, got LSTM 0 1 fr"),
        ({"layers": "LSTM -5 1 fr"}, "layers: expected mode, hidden size, .*, got LSTM -5 1 fr"),
        ({"layers": "LSTM 5 0 fr"}, "layers: expected mode, hidden size, .*, got LSTM 5 0 fr"),
        ({"layers": "lstm 5 1 fr"}, "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got lstm"),
        ({"layers": "LSTM 5 1 f"}, r"prepacked\[0\]: expected weights prepacked for 1 recurrences .*, got those of 2"),
        ({"layers": "GRU 5 1 fr"}, r"prepacked\[0\]: expected weights prepacked for this mode"),
        ({"layers": "LSTM 5 2 fr"}, r"prepacked: expected size \[\d+\], got \[\d+\]"),
        ({"layers": "LSTM 20 1 fr"}, r"prepacked\[0\]: .* hidden size 20, got those of 2 of 5"),
        ({"layers": "LSTM 4000000000000000000 1 fr"}, "layers: expected sizes no larger than the"),
        ({"layers": "LSTM 5 4000000000000000000 fr"}, "layers: expected sizes no larger than the"),
        ({"input": torch.randn(4, 2, 4)}, r"prepacked: expected size "),
        ({"input": torch.randn(4, 2, 2), "layers": "LSTM 6 1 fr"}, r"prepacked\[0\]: .* hidden size 6, got .* of 5"),
        ({"input": torch.randn(4, 2, 0)}, "input: expected features, got none"),
        ({"input": X.double()}, "prepacked: expected dtype Double, got Float"),
        ({"input": X.half()}, "input: expected dtype Float, Double or BFloat16, got Half"),
        ({"h0": torch.zeros(2, 3, 5)}, r"h0: expected size \[2, 2, 5\], got \[2, 3, 5\]"),
        ({"c0": torch.zeros(4, 2, 5)}, r"c0: expected size \[2, 2, 5\], got \[4, 2, 5\]"),
        ({"batch_sizes": torch.tensor([2, 2])}, r"input: expected \[tokens, features\] with batch_sizes, got 3-D"),
        ({"prepacked": torch.zeros(3)}, "prepacked: expected weights from rnn_prepack, got something else"),
        ({"prepacked": torch.zeros(len(PACK.prepacked))}, r"prepacked\[0\]: expected weights from this version's"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_bad_input_is_refused_by_name_and_values(change, message):
    arguments = {"input": X, "batch_sizes": None, **PACK._asdict(), "h0": None, "c0": None, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymtl.rnn_frozen(**arguments)


def test_the_first_layers_of_a_stack_are_a_stack():
    weights = [rnn_weights(3, 5), rnn_weights(10, 5, seed=1), rnn_weights(10, 5, seed=2)]
    whole = frozen(weights)
    for layers in (1, 2, 3):
        own = frozen(weights[:layers])
        assert torch.equal(
            ops.rnn_frozen(X, None, whole.first(layers, len(own.prepacked)))[0], ops.rnn_frozen(X, None, own)[0]
        )


@pytest.mark.parametrize("hidden_size", [5, 16])  # of 16 units every instruction set has packs of one size
def test_weights_packed_for_other_registers_are_refused(hidden_size):
    weights = rnn_weights(16, hidden_size)
    x = torch.randn(4, 2, 16)
    before = _native.active_isa()
    packs = {}
    try:
        for isa in _native.available_isas():
            _native.force_isa(isa)
            packs[isa] = ops.rnn_prepack(weights)
        for isa in packs:
            _native.force_isa(isa)
            expected = ops.rnn(x, None, weights)[0]
            for other, prepacked in packs.items():
                calls = (
                    lambda p=prepacked: ops.rnn_frozen(x, None, ops.RNNFrozen.of([p], hidden_size, BOTH))[0],
                    lambda p=prepacked: ops.rnn(x, None, weights, prepacked=p)[0],
                )
                if floats_of(other) == floats_of(isa):
                    assert all(torch.equal(call(), expected) for call in calls)
                    continue
                for call in calls:
                    with pytest.raises(
                        RuntimeError, match=r"prepacked.*: expected weights prepacked for vectors of \d+ numbers"
                    ):
                        call()
    finally:
        _native.force_isa(before)
