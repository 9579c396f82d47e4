"""Attention over packed tokens, against a loop over sequences."""

import pytest
import torch
from parity import assert_parity, assert_same_bits
from samples import random_lengths, shifted, sizes_of, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

# lengths of the sequences, features, heads
SIZES = [
    ((1,), 1, 1),
    ((1, 1, 1), 4, 2),
    ((5, 3, 3, 1), 6, 3),
    ((5, 3, 3, 1), 6, 6),
    ((9, 8, 2, 1, 1), 33, 1),
    (random_lengths(33, 50, seed=1), 256, 1),
    (random_lengths(16, 20, seed=1), 256, 4),
    ((3000, 1200, 1), 20, 2),
]
sized = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"B{len(size[0])}-T{size[0][0]}-F{size[1]}-J{size[2]}")


def sample(size, dtype=torch.float32):
    """Tokens, scores, batch_sizes and a gradient of the result."""
    lengths, features, heads = size
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    count = sum(lengths)
    return make(count, features), 3 * make(count, heads), sizes_of(lengths), make(len(lengths), features)


def looped(x, scores, batch_sizes):
    """Sequence by sequence, as one writes it in PyTorch."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    found = []
    for row in range(int(batch_sizes[0])):
        own = [int(start) + row for start, size in zip(starts, batch_sizes) if size > row]
        weights = scores[own].softmax(0)
        slices = x[own].unflatten(1, (scores.shape[1], -1))
        found.append((weights.unsqueeze(-1) * slices).sum(0).flatten())
    return torch.stack(found)


def with_gradients(function, x, scores, batch_sizes, seed):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, scores)]
    output = function(*leaves, batch_sizes)
    grads = torch.autograd.grad(output, leaves, seed)
    return dict(zip(("output", "grad_input", "grad_scores"), (output.detach(), *grads)))


@sized
@pytest.mark.parametrize("function", [ops.attention_pool, reference.attention_pool], ids=["kernels", "reference"])
def test_it_is_as_accurate_as_torch(size, isa, function):
    x, scores, sizes, seed = sample(size)
    exact = with_gradients(looped, x.double(), scores.double(), sizes, seed.double())
    theirs = with_gradients(looped, x, scores, sizes, seed)
    assert_parity(with_gradients(function, x, scores, sizes, seed), theirs, exact)


@sized
def test_float64_agrees_with_torch(size, isa):
    given = sample(size, torch.float64)
    expected = with_gradients(looped, *given)
    torch.testing.assert_close(with_gradients(ops.attention_pool, *given), expected, rtol=1e-12, atol=1e-12)


@sized
def test_threads_and_other_sequences_change_no_bit(size, dtype, threads):
    x, scores, sizes, seed = sample(size, dtype)
    threads(1)
    expected = with_gradients(ops.attention_pool, x, scores, sizes, seed)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(with_gradients(ops.attention_pool, x, scores, sizes, seed), expected)
    longest = [int(start) for start in sizes.cumsum(0) - sizes]
    alone = ops.attention_pool(x[longest], scores[longest], torch.ones(len(longest), dtype=torch.int64))
    assert_same_bits({"output": alone}, {"output": expected["output"][:1]})


@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_gradcheck_and_gradgradcheck(size):
    x, scores, sizes, _ = sample(size, torch.float64)
    inputs = (x.requires_grad_(), scores.requires_grad_())
    assert gradcheck(lambda *t: ops.attention_pool(*t, sizes), inputs)
    assert gradgradcheck(lambda *t: ops.attention_pool(*t, sizes), inputs)


def test_third_derivatives_are_those_of_the_loop():
    x, scores, sizes, seed = sample(SIZES[2], torch.float64)

    def third(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, scores)]
        value = (function(*leaves, sizes) * seed).square().sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, leaves, create_graph=True))
        return torch.autograd.grad(value, leaves)

    torch.testing.assert_close(third(ops.attention_pool), third(looped))


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_opcheck(size):
    x, scores, sizes, seed = sample(size)
    inputs = [t.requires_grad_() for t in (x, scores)]
    opcheck(torch.ops.pymtl.attention_pool.default, (*inputs, sizes))
    opcheck(torch.ops.pymtl.attention_pool_backward.default, (seed.requires_grad_(), *inputs, sizes))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_scores_choose_one_token(scale, dtype):
    x, scores, sizes, seed = sample(SIZES[2], dtype)
    found = with_gradients(ops.attention_pool, x, scores * scale, sizes, seed)
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["output"], looped(x, scores * scale, sizes))


def test_a_score_that_is_no_number_spoils_its_own_head_and_sequence_only():
    x, scores, sizes, _ = sample(SIZES[2])
    expected = ops.attention_pool(x, scores, sizes)
    scores[0, 1] = torch.nan
    found = ops.attention_pool(x, scores, sizes)
    assert found[0].isnan().tolist() == [False, False, True, True, False, False]
    assert torch.equal(found[1:], expected[1:])


def test_trailing_steps_without_tokens_change_nothing():
    x, scores, sizes, seed = sample(SIZES[2])
    longer = torch.cat([sizes, sizes.new_zeros(2)])
    assert_same_bits(
        with_gradients(ops.attention_pool, x, scores, longer, seed),
        with_gradients(ops.attention_pool, x, scores, sizes, seed),
    )


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_any_layout_of_the_arguments_gives_the_same_bits(layout):
    x, scores, sizes, _ = sample(SIZES[2])
    actual = ops.attention_pool(layout(x), layout(scores), layout(sizes) if layout is not transposed else sizes)
    assert_same_bits({"output": actual}, {"output": ops.attention_pool(x, scores, sizes)})


def test_an_empty_batch_pools_to_nothing():
    x, scores = torch.randn(0, 6, requires_grad=True), torch.randn(0, 3)
    output = ops.attention_pool(x, scores, torch.zeros(2, dtype=torch.int64))
    assert output.shape == (0, 6)
    output.sum().backward()
    assert x.grad.shape == (0, 6)


X, SCORES, BATCH_SIZES, SEED = sample(SIZES[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": SCORES[:, 0]}, r"scores: expected \[tokens, heads\], got 1-D"),
        ({"scores": SCORES[:-1]}, r"scores: expected size \[12, 3\], got \[11, 3\]"),
        ({"scores": SCORES[:, :0]}, "scores: expected a number of heads that divides the 6 features, got 0"),
        ({"scores": torch.zeros(12, 4)}, "scores: expected a number of heads that divides the 6 features, got 4"),
        ({"scores": SCORES.double()}, "scores: expected dtype Float, got Double"),
        ({"input": X.half()}, "input: expected dtype Float or Double, got Half"),
        ({"input": X[None]}, r"input: expected \[tokens, features\] with batch_sizes, got 3-D"),
        ({"batch_sizes": BATCH_SIZES[:-1]}, "batch_sizes: expected a sum of 12, the tokens of input, got 11"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_refused_by_name_and_values(change, message):
    arguments = {"input": X, "scores": SCORES, "batch_sizes": BATCH_SIZES, **change}
    with pytest.raises(RuntimeError, match=message):
        ops.attention_pool(**arguments)


def test_the_backward_op_refuses_another_gradient():
    with pytest.raises(RuntimeError, match=r"grad_output: expected size \[4, 6\], got \[3, 6\]"):
        torch.ops.pymtl.attention_pool_backward(SEED[:3], X, SCORES, BATCH_SIZES)
