from itertools import accumulate

import pytest
import torch
from longdouble import needs_long_double, token_indices
from parity import assert_parity, assert_same_bits, wide
from samples import RNNSample, random_lengths, shifted, sizes_of, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import ops, reference

KINDS = ["mean", "max"]
# lengths of the sequences, dense if they stand in a list; features; reverse
SIZES = [
    ((1,), 1, (False,)),
    ([1], 5, (True,)),
    ([1, 1, 1], 4, (False, True)),
    ([6, 6], 33, (False,)),
    ((5, 3, 3, 1), 6, (False, True)),
    ((9, 8, 2, 1, 1), 64, (False, True, False, True)),
    ([40] * 7, 34, (False, True)),
    (random_lengths(33, 50, seed=1), 128, (False, True)),
    (random_lengths(5, 300, seed=2), 7, (True,)),
    ((3000, 1200, 1), 20, (False, True)),
]


def name_of(size):
    lengths, features, reverse = size
    text = "-".join(map(str, lengths[:5])) + ("-etc" if len(lengths) > 5 else "")
    return f"{'dense' if isinstance(lengths, list) else 'packed'}-{text}-F{features}-in-{len(reverse)}"


sized = pytest.mark.parametrize("size", SIZES, ids=name_of)
each_kind = pytest.mark.parametrize("kind", KINDS)


def sample(size, dtype=torch.float32, seed=0):
    """The input, its batch_sizes and a gradient of the result."""
    lengths, features, _ = size
    generator = torch.Generator().manual_seed(seed)
    dense = isinstance(lengths, list)
    leading = (lengths[0], len(lengths)) if dense else (sum(lengths),)
    # Not centred on zero: a sum that only grows shows an error of its order.
    x = torch.rand(*leading, features, generator=generator, dtype=dtype)
    return (
        x,
        None if dense else sizes_of(lengths),
        torch.randn(len(lengths), features, generator=generator, dtype=dtype),
    )


def torch_pool(x, batch_sizes, kind):
    """Over a padded batch, as one writes it in PyTorch."""
    if batch_sizes is None:
        return x.mean(0) if kind == "mean" else x.amax(0)
    padded, lengths = pad_packed_sequence(
        PackedSequence(x, batch_sizes), padding_value=0.0 if kind == "mean" else -torch.inf
    )
    return padded.sum(0) / lengths[:, None] if kind == "mean" else padded.amax(0)


def with_gradient(function, x, seed):
    leaf = x.detach().clone().requires_grad_()
    output = function(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, seed)
    return {"output": output.detach(), "gradient": gradient}


def tokens_of(x, batch_sizes, row):
    """The tokens of one sequence as a dense batch of one."""
    if batch_sizes is None:
        return x[:, row : row + 1]
    sizes = batch_sizes.tolist()
    starts = [0, *accumulate(sizes)]
    return x[[start + row for start, count in zip(starts, sizes) if count > row]].unsqueeze(1)


# Accuracy and derivatives.


@each_kind
@sized
def test_float32_is_as_accurate_as_torch(size, kind, isa):
    x, batch_sizes, seed = sample(size)
    assert_parity(
        with_gradient(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x, seed),
        with_gradient(lambda t: torch_pool(t, batch_sizes, kind), x, seed),
        with_gradient(lambda t: torch_pool(t, batch_sizes, kind), x.double(), seed.double()),
    )


def compare_in_float64(function, size, kind):
    x, batch_sizes, seed = sample(size, torch.float64)
    lengths = torch.tensor(size[0])
    truth = {"output": wide(seed) * 0, "gradient": wide(x) * 0}
    flat, flat_gradient = wide(x).reshape(-1, size[1]), truth["gradient"].reshape(-1, size[1])
    for row, tokens in enumerate(token_indices(RNNSample(x, batch_sizes, None))):
        if kind == "mean":
            truth["output"][row] = flat[tokens].mean(0)
            flat_gradient[tokens] = wide(seed)[row] / wide(lengths)[row]
        else:
            truth["output"][row] = flat[tokens].max(0)
            flat_gradient[tokens[flat[tokens].argmax(0)], range(size[1])] = wide(seed)[row]
    theirs = with_gradient(lambda t: torch_pool(t, batch_sizes, kind), x, seed)
    assert_parity(with_gradient(lambda t: function(t, batch_sizes, kind, reverse=size[2]), x, seed), theirs, truth)


@needs_long_double
@each_kind
@sized
def test_float64_is_as_accurate_as_torch(size, kind, isa):
    compare_in_float64(ops.pool, size, kind)


@needs_long_double
@each_kind
@pytest.mark.parametrize("size", SIZES[:-1], ids=name_of)
def test_the_reference_agrees_with_torch(size, kind):
    compare_in_float64(reference.pool, size, kind)


@sized
def test_a_maximum_and_its_gradient_are_exact(size, dtype, isa):
    x, batch_sizes, seed = sample(size, dtype)
    ours = with_gradient(lambda t: ops.pool(t, batch_sizes, "max", reverse=size[2]), x, seed)
    theirs = with_gradient(lambda t: torch_pool(t, batch_sizes, "max"), x, seed)
    assert torch.equal(ours["output"], theirs["output"])
    assert torch.equal(ours["gradient"], theirs["gradient"])


@each_kind
@pytest.mark.parametrize("size", SIZES[:5], ids=name_of)
def test_gradcheck_and_gradgradcheck(size, kind):
    x, batch_sizes, _ = sample((size[0], 4, size[2]), torch.float64)
    x.requires_grad_()
    assert gradcheck(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x)
    assert gradgradcheck(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x)


@each_kind
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("size", SIZES[:5], ids=name_of)
def test_opcheck_of_pool(size, kind, gradient, dtype):
    x, batch_sizes, _ = sample((size[0], 4, size[2]), dtype)
    opcheck(torch.ops.pymtl.pool.default, (x.requires_grad_(gradient), batch_sizes, list(size[2]), kind))


@each_kind
@pytest.mark.parametrize("gradient", [False, True], ids=["first derivative", "second derivative"])
@pytest.mark.parametrize("size", SIZES[2:5], ids=name_of)
def test_opcheck_of_pool_backward(size, kind, gradient):
    x, batch_sizes, seed = sample(size)
    argmax = torch.ops.pymtl.pool(x, batch_sizes, list(size[2]), kind)[1]
    opcheck(
        torch.ops.pymtl.pool_backward.default,
        (seed.requires_grad_(gradient), batch_sizes, argmax, list(x.shape), kind),
    )


@each_kind
def test_forward_mode_derivatives(kind):
    x, batch_sizes, _ = sample(((5, 3, 1), 4, (False,)), torch.float64)
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(lambda t: reference.pool(t, batch_sizes, kind), (x,), (tangent,))
    _, actual = torch.func.jvp(lambda t: ops.pool(t, batch_sizes, kind), (x,), (tangent,))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reverse", [(False,), (True,)])
def test_of_equal_maxima_the_first_one_walked_gets_the_whole_gradient(reverse, dtype, isa):
    x = torch.zeros(4, 2, 5, dtype=dtype)
    x[1:3] = 1
    result = with_gradient(lambda t: ops.pool(t, None, "max", reverse=reverse), x, torch.ones(2, 5, dtype=dtype))
    expected = torch.zeros_like(x)
    expected[2 if reverse[0] else 1] = 1
    assert torch.equal(result["gradient"], expected)


# The same bits.


@each_kind
@sized
def test_a_sequence_gives_the_same_bits_alone_as_in_a_batch(size, kind, dtype, isa):
    x, batch_sizes, _ = sample(size, dtype)
    together = ops.pool(x, batch_sizes, kind, reverse=size[2])
    for row in range(len(size[0])):
        alone = ops.pool(tokens_of(x, batch_sizes, row), None, kind, reverse=size[2])
        assert_same_bits({"row": alone}, {"row": together[row : row + 1]})


@each_kind
def test_dense_and_packed_give_the_same_bits(kind, dtype, isa):
    x, _, _ = sample(([40] * 7, 34, (False, True)), dtype)
    packed = ops.pool(x.reshape(-1, 34), torch.full((40,), 7), kind, reverse=(False, True))
    assert_same_bits({"output": packed}, {"output": ops.pool(x, None, kind, reverse=(False, True))})


@each_kind
@sized
def test_steps_that_no_sequence_reaches_change_nothing(size, kind, dtype):
    x, batch_sizes, seed = sample(size, dtype)
    if batch_sizes is None:
        x, batch_sizes = x.reshape(-1, size[1]), torch.full((x.shape[0],), x.shape[1])
    longer = torch.cat([batch_sizes, torch.zeros(9, dtype=torch.int64)])
    assert_same_bits(
        with_gradient(lambda t: ops.pool(t, longer, kind, reverse=size[2]), x, seed),
        with_gradient(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x, seed),
    )


@each_kind
@sized
def test_runs_repeat_bit_for_bit_with_any_number_of_threads(size, kind, dtype, isa, threads, filled_memory):
    x, batch_sizes, seed = sample(size, dtype)

    def run():
        return with_gradient(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x, seed)

    threads(1)
    expected = run()
    for count in (1, 2, 2, 3):
        threads(count)
        assert_same_bits(run(), expected)
    filled_memory()
    assert_same_bits(run(), expected)


@each_kind
@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("size", [SIZES[3], SIZES[5]], ids=name_of)
def test_other_memory_layouts_give_the_same_bits(size, layout, kind, dtype):
    x, batch_sizes, seed = sample(size, dtype)
    assert_same_bits(
        with_gradient(lambda t: ops.pool(layout(t), batch_sizes, kind, reverse=size[2]), x, layout(seed)),
        with_gradient(lambda t: ops.pool(t, batch_sizes, kind, reverse=size[2]), x, seed),
    )
    assert_same_bits(
        {"output": ops.pool(layout(x), batch_sizes, kind, reverse=size[2])},
        {"output": ops.pool(x, batch_sizes, kind, reverse=size[2])},
    )


@each_kind
def test_an_expanded_input_gives_the_same_bits(kind, dtype):
    row = torch.randn(1, 1, 6, dtype=dtype)
    expected = ops.pool(row.repeat(3, 2, 1), None, kind)
    assert_same_bits({"output": ops.pool(row.expand(3, 2, 6), None, kind)}, {"output": expected})


@each_kind
def test_inputs_are_never_modified(kind, dtype):
    x, batch_sizes, seed = sample(SIZES[5], dtype)
    tensors = (x, batch_sizes, seed)
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    x.requires_grad_()
    torch.autograd.grad(ops.pool(x, batch_sizes, kind), x, seed)
    for tensor, (values, version) in zip(tensors, before):
        assert torch.equal(tensor, values)
        assert tensor._version == version


# Edges.


@each_kind
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_an_empty_result(kind, packed, dtype):
    x = torch.zeros((0, 6) if packed else (4, 0, 6), dtype=dtype)
    batch_sizes = torch.zeros(4, dtype=torch.int64) if packed else None
    result = with_gradient(lambda t: ops.pool(t, batch_sizes, kind), x, torch.zeros(0, 6, dtype=dtype))
    assert result["output"].shape == (0, 6)
    assert result["gradient"].shape == x.shape


@each_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=str)
def test_a_number_that_is_not_finite_stays_in_its_sequence_and_feature(value, kind, reverse, dtype, isa):
    x, batch_sizes, seed = sample(((7, 5, 2), 34, reverse), dtype)
    x[4, 20] = value  # the second token of the middle sequence
    ours = with_gradient(lambda t: ops.pool(t, batch_sizes, kind, reverse=reverse), x, seed)
    theirs = torch_pool(x, batch_sizes, kind)
    expected = torch.full((3, 34), False)
    expected[1, 20] = kind == "mean" or value != -torch.inf
    assert torch.equal(~ours["output"].isfinite(), expected)
    assert torch.equal(ours["output"].isnan(), theirs.isnan())
    assert torch.equal(ours["output"].isinf(), theirs.isinf())
    if kind == "max" and value != -torch.inf:
        assert ours["gradient"][4, 20] == seed[1, 20]
    assert ours["gradient"].isfinite().all()


def test_a_maximum_of_minus_infinities_is_minus_infinity(dtype, isa):
    x = torch.full((3, 2, 5), -torch.inf, dtype=dtype)
    result = with_gradient(lambda t: ops.pool(t, None, "max"), x, torch.ones(2, 5, dtype=dtype))
    assert torch.equal(result["output"], x[0])
    assert result["gradient"].sum() == 10


PACKED_INPUT, SIZES_OF_INPUT = torch.zeros(6, 4), torch.tensor([3, 2, 1])
REFUSED = [
    ("dense input of rank 2", {"batch_sizes": None}, r"input: expected \[steps, batch, features\].*got 2-D"),
    ("packed input of rank 3", {"input": torch.zeros(6, 1, 4)}, r"input: expected \[tokens, features\].*got 3-D"),
    ("packed input of rank 0", {"input": torch.tensor(1.0)}, r"input: expected \[tokens, features\].*got 0-D"),
    (
        "no steps",
        {"input": torch.zeros(0, 3, 4), "batch_sizes": None},
        r"input: expected sequence length.*larger than 0",
    ),
    ("integer input", {"input": torch.zeros(6, 4).long()}, r"input: expected dtype Float or Double, got Long"),
    ("half input", {"input": torch.zeros(6, 4).half()}, r"input: expected dtype Float or Double, got Half"),
    ("sum too small", {"batch_sizes": torch.tensor([3, 2])}, r"batch_sizes: expected a sum of 6.*got 5"),
    ("sum too large", {"batch_sizes": torch.tensor([3, 3, 1])}, r"batch_sizes: expected a sum of 6.*got 7"),
    ("increasing", {"batch_sizes": torch.tensor([2, 3, 1])}, r"batch_sizes:.*never increase.*got 3 at step 1"),
    ("negative", {"batch_sizes": torch.tensor([4, 3, -1])}, r"batch_sizes:.*not negative, got -1 at step 2"),
    ("int32 batch_sizes", {"batch_sizes": SIZES_OF_INPUT.int()}, r"batch_sizes: expected dtype Long, got Int"),
    ("batch_sizes of rank 2", {"batch_sizes": SIZES_OF_INPUT[None]}, r"batch_sizes: expected one dimension, got 2"),
    ("empty batch_sizes", {"batch_sizes": SIZES_OF_INPUT[:0]}, r"batch_sizes: expected at least one step, got none"),
    ("batch_sizes on another device", {"batch_sizes": SIZES_OF_INPUT.to("meta")}, r"batch_sizes: expected .* CPU"),
    ("unknown kind", {"kind": "sum"}, r"kind: expected 'mean' or 'max', got 'sum'"),
    ("no flags", {"reverse": []}, r"reverse: expected a number of flags that divides the 4 features, got 0"),
    ("flags that do not divide", {"reverse": [False] * 3}, r"reverse: .*divides the 4 features, got 3"),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("changes", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_bad_input_is_refused_by_name_and_values(changes, message, gradient):
    arguments = {"input": PACKED_INPUT, "batch_sizes": SIZES_OF_INPUT, "kind": "mean", "reverse": [False]} | changes
    if gradient and arguments["input"].is_floating_point():
        arguments["input"] = arguments["input"].detach().requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        ops.pool(**arguments)


def test_raw_pool_backward_refuses_bad_arguments():
    good = [torch.ones(3, 4), SIZES_OF_INPUT, torch.zeros(3, 4, dtype=torch.int64), [6, 4], "max"]
    for place, value, message in [
        (0, torch.ones(2, 4), r"grad_output: expected size \[3, 4\], got \[2, 4\]"),
        (0, torch.ones(3, 4).half(), r"grad_output: expected dtype Float or Double, got Half"),
        (2, torch.zeros(0, 4, dtype=torch.int64), r"argmax: expected size \[3, 4\], got \[0, 4\]"),
        (2, torch.zeros(3, 4), r"argmax: expected dtype Long, got Float"),
        (2, torch.full((3, 4), 6), r"argmax: expected tokens below 6, got 6"),
        (2, torch.full((3, 4), -1), r"argmax: expected tokens below 6, got -1"),
        (3, [], r"size: expected the size of the pooled input, got none"),
        (4, "sum", r"kind: expected 'mean' or 'max', got 'sum'"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pymtl.pool_backward(*good[:place], value, *good[place + 1 :])
