from dataclasses import replace

import pytest
import torch
from samples import RNNCase, RNNSample, backward_arguments, rnn_sample, rnn_weights

from pymtl import ops


def call_lstm(sample, **options):
    return ops.rnn(sample.input, sample.batch_sizes, sample.weights, sample.h0, sample.c0, **options)


def call_lstm_with_gradient(sample, **options):
    differentiable = sample.input if sample.input.is_floating_point() else sample.weights.weight_hh[0]
    differentiable.requires_grad_()
    return call_lstm(sample, **options)


def call_rnn_heads(sample, **options):
    return ops.rnn_heads(
        sample.input, sample.batch_sizes, sample.weights, None, None, mean=True, h0=sample.h0, c0=sample.c0, **options
    )


DENSE = RNNCase(3, 5, steps=4, batch=2, h0=True, c0=True)
PACKED = RNNCase(3, 5, lengths=(4, 2), h0=True, c0=True)


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
        return RNNSample(**(vars(sample) | values))

    return edit


def put(place, function):
    """An edit of one element of a list."""
    return lambda items: [function(item) if i == place else item for i, item in enumerate(items)]


REFUSED = [
    ("an unknown mode", DENSE, change(weights=lambda w: w._replace(mode="QRNN")), r"mode: expected .*got QRNN"),
    (
        "weights of another mode",
        replace(DENSE, c0=False),
        change(weights=lambda w: w._replace(mode="GRU")),
        r"weight_ih\[0\]: expected size \[15, 3\], got \[20, 3\]",
    ),
    (
        "c of a GRU",
        replace(DENSE, mode="GRU"),
        change(),
        r"c0: expected None, since only an LSTM has a cell state, got a tensor",
    ),
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
    ("integer input", DENSE, change(input=lambda x: x.long()), r"expected dtype Float, Double or BFloat16, got Long"),
    ("half input", DENSE, change(input=lambda x: x.half()), r"expected dtype Float, Double or BFloat16, got Half"),
    (
        "bfloat16 input to float weights",
        DENSE,
        change(input=lambda x: x.bfloat16()),
        r"weight_ih\[0\]: expected dtype BFloat16, got Float",
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


@pytest.mark.parametrize("call", [call_lstm, call_lstm_with_gradient, call_rnn_heads])
@pytest.mark.parametrize(("case", "edit", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_bad_input_is_refused_by_name_and_values(case, edit, message, call):
    with pytest.raises(RuntimeError, match=message):
        call(edit(rnn_sample(case)))


@pytest.mark.parametrize("call", [call_lstm, call_lstm_with_gradient, call_rnn_heads])
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
        call(edit(rnn_sample(case)))


@pytest.mark.parametrize(
    ("inputs", "width", "message"),
    [
        (2, 1, r"input: expected size \[6, 6\], got \[6, 3\]"),
        (1, 2, r"input: expected size \[6, 3\], got \[6, 6\]"),
        (2, 4, r"input: expected size \[6, 6\], got \[6, 12\]"),
        (3, 3, r"inputs: expected a number that divides the 2 recurrences, got 3"),
        (0, 1, r"inputs: expected a number that divides the 2 recurrences, got 0"),
    ],
)
def test_inputs_side_by_side_must_be_as_many_as_said(inputs, width, message):
    sample = rnn_sample(PACKED)
    with pytest.raises(RuntimeError, match=message):
        ops.rnn(sample.input.repeat(1, width), sample.batch_sizes, sample.weights, inputs=inputs)


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
    sample = rnn_sample(DENSE)
    options = {"head_weight": None, "head_bias": None} | options
    with pytest.raises(RuntimeError, match=message):
        ops.rnn_heads(sample.input, None, sample.weights, **options)


def with_word(prepacked, place, value):
    """With another word in the header."""
    other = prepacked.clone()
    other.view(torch.int32)[place] = value
    return other


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p[:-1], r"prepacked.*expected size \[\d+\], got \[\d+\]"),
        (lambda p: p[None], r"prepacked: expected weights from rnn_prepack, got something else"),
        (lambda p: p.double(), r"prepacked.*expected dtype Float, got Double"),
        (
            torch.zeros_like,
            r"prepacked: expected weights from this version's rnn_prepack of dtype Float, got something else",
        ),
        (lambda p: with_word(p, 0, 1), r"prepacked: expected weights from this version's rnn_prepack"),
        (lambda p: with_word(p, 1, 2), r"prepacked: expected weights from this version's rnn_prepack"),
        (lambda p: with_word(p, 2, 9), r"prepacked: expected weights from this version's rnn_prepack"),
        (lambda p: with_word(p, 3, 1), r"prepacked: expected weights prepacked for vectors of \d+ numbers, .* for 1"),
        (lambda p: with_word(p, 4, 1), r"prepacked: expected weights prepacked for this mode"),
        (lambda p: with_word(p, 5, 7), r"prepacked: expected weights prepacked for 2 recurrences .*, got those of 7"),
        (lambda p: with_word(p, 6, 7), r"prepacked: .* hidden size \d+, got those of 2 of 7"),
    ],
    ids=["size", "rank", "dtype", "zeros", "version", "header's dtype", "scheme", "lanes", "cell", "count", "hidden"],
)
@pytest.mark.parametrize("call", [call_lstm, call_rnn_heads])
def test_prepacked_weights_that_do_not_fit_are_refused(edit, message, call):
    sample = rnn_sample(DENSE)
    with pytest.raises(RuntimeError, match=message):
        call(sample, prepacked=edit(ops.rnn_prepack(sample.weights)))


def test_rnn_pack_refuses_bad_weights():
    weights = rnn_weights(3, 5)
    with pytest.raises(RuntimeError, match=r"weight_hh: expected 2 tensors, got 1"):
        ops.rnn_prepack(weights._replace(weight_hh=weights.weight_hh[:1]))
    with pytest.raises(RuntimeError, match=r"weight_ih\[1\]: expected size \[20, 3\], got \[20, 2\]"):
        ops.rnn_prepack(weights._replace(weight_ih=[weights.weight_ih[0], weights.weight_ih[1][:, :2]]))
    half = ops.RNNWeights(*([w.half() for w in group] for group in weights[:4]), weights.reverse)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected dtype Float, Double or BFloat16, got Half"):
        ops.rnn_prepack(half)


def test_raw_rnn_backward_refuses_bad_arguments():
    arguments = list(backward_arguments(rnn_sample(PACKED)))
    for place, value, message in [
        (0, torch.ones(6, 9), r"grad_output: expected size \[6, 10\], got \[6, 9\]"),
        (1, torch.ones(2, 2, 4), r"grad_h_n: expected size \[2, 2, 5\], got \[2, 2, 4\]"),
        (2, torch.ones(2, 2, 5).double(), r"grad_c_n: expected dtype Float, got Double"),
        (13, torch.ones(2, 2, 4), r"dropout: expected size \[2, 2, 5\], got \[2, 2, 4\]"),
        (14, torch.ones(11), r"zoneout_h: expected size \[10\], got \[11\]"),
        (15, torch.ones(5, 10), r"zoneout_c: expected size \[6, 10\], got \[5, 10\]"),
        (16, [torch.ones(20)], r"norm: expected none with weight_ih, got 1"),
        (18, torch.ones(6, 5), r"output: expected size \[6, 10\], got \[6, 5\]"),
        (19, torch.ones(2, 6, 19), r"gates: expected size \[2, 6, 20\], got \[2, 6, 19\]"),
        (20, torch.ones(2, 5, 5), r"cells: expected size \[2, 6, 5\], got \[2, 5, 5\]"),
        (21, [True] * 4, r"needs: expected 5 flags, got 4"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pymtl.rnn_backward(*arguments[:place], value, *arguments[place + 1 :])
