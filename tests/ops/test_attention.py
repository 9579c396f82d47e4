"""Attention of queries over the tokens of sequences, against a loop over queries."""

import pytest
import torch
from parity import assert_parity, assert_same_bits
from samples import random_lengths, shifted, sizes_of, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

# lengths of the sequences, queries, their size, the values', heads, whether scores are additive
SIZES = [
    ((1,), 1, 1, 1, 1, False),
    ((1,), 3, 2, 3, 1, True),
    ((5, 3, 3, 1), 9, 6, 9, 3, False),
    ((5, 3, 3, 1), 9, 6, 9, 3, True),
    ((4, 2), 5, 4, 2, 2, True),
    ((9, 8, 2, 1, 1), 20, 33, 17, 1, False),
    ((9, 8, 2, 1, 1), 20, 33, 17, 1, True),
    (random_lengths(33, 50, seed=1), 400, 64, 128, 4, False),
    (random_lengths(16, 20, seed=1), 100, 64, 64, 2, True),
    ((3000, 1200, 1), 7, 20, 6, 2, False),
]


def name_of(size):
    lengths, queries, keys, values, heads, additive = size
    kind = "additive" if additive else "product"
    return f"B{len(lengths)}-T{lengths[0]}-M{queries}-D{keys}-F{values}-J{heads}-{kind}"


sized = pytest.mark.parametrize("size", SIZES, ids=name_of)
small = pytest.mark.parametrize("size", SIZES[:5], ids=name_of)
LEAVES = ("query", "key", "value", "score")


def sample(size, dtype=torch.float32):
    """The arguments by name, and gradients of the results."""
    lengths, queries, keys, values, heads, additive = size
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    count = sum(lengths)
    arguments = {
        "query": make(queries, keys),
        "key": make(count, keys),
        "value": make(count, values),
        "sequences": torch.randint(len(lengths), (queries,), generator=generator),
        "batch_sizes": sizes_of(lengths),
        "heads": heads,
        "score": make(keys) if additive else None,
    }
    return arguments, (make(queries, values), make(queries, heads, lengths[0]))


def looped(query, key, value, sequences, batch_sizes, heads, score):
    """Query by query, as one writes it in PyTorch."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    contexts, every = [], []
    for q, row in zip(query, sequences.tolist()):
        own = [int(start) + row for start, size in zip(starts, batch_sizes) if size > row]
        parts, weights = [], []
        for j in range(heads):
            keys, values = (t[own].unflatten(1, (heads, -1))[:, j] for t in (key, value))
            mine = q.unflatten(0, (heads, -1))[j]
            mixed = None if score is None else torch.tanh(mine + keys)
            scores = keys @ mine if score is None else mixed @ score.unflatten(0, (heads, -1))[j]
            weights.append(torch.nn.functional.pad(scores.softmax(0), (0, len(batch_sizes) - len(own))))
            parts.append(weights[-1][: len(own)] @ values)
        contexts.append(torch.cat(parts))
        every.append(torch.stack(weights))
    return torch.stack(contexts), torch.stack(every)


def with_gradients(function, arguments, seeds):
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in LEAVES if arguments[n] is not None}
    outputs = function(**{**arguments, **leaves})
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    found = {f"grad_{name}": grad for name, grad in zip(leaves, grads)}
    return {"context": outputs[0].detach(), "weights": outputs[1].detach(), **found}


def wide(arguments, seeds):
    other = {n: t.double() if n in LEAVES and t is not None else t for n, t in arguments.items()}
    return other, tuple(seed.double() for seed in seeds)


@sized
@pytest.mark.parametrize("function", [ops.attend, reference.attend], ids=["kernels", "reference"])
def test_it_is_as_accurate_as_torch(size, isa, function):
    given = sample(size)
    exact = with_gradients(looped, *wide(*given))
    assert_parity(with_gradients(function, *given), with_gradients(looped, *given), exact)


@sized
def test_float64_agrees_with_torch(size, isa):
    given = sample(size, torch.float64)
    expected = with_gradients(looped, *given)
    torch.testing.assert_close(with_gradients(ops.attend, *given), expected, rtol=1e-12, atol=1e-12)


@sized
def test_threads_and_other_queries_change_no_bit(size, dtype, threads):
    arguments, seeds = sample(size, dtype)
    threads(1)
    expected = with_gradients(ops.attend, arguments, seeds)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(with_gradients(ops.attend, arguments, seeds), expected)
    row = int(arguments["sequences"][-1])
    sizes = arguments["batch_sizes"]
    starts = sizes.cumsum(0) - sizes
    own = [int(start) + row for start, size_ in zip(starts, sizes) if size_ > row]
    alone = {
        **arguments,
        "query": arguments["query"][-1:],
        "sequences": torch.zeros(1, dtype=torch.int64),
        "key": arguments["key"][own],
        "value": arguments["value"][own],
        "batch_sizes": torch.ones(len(own), dtype=torch.int64),
    }
    context, weights = ops.attend(**alone)
    assert_same_bits({"context": context}, {"context": expected["context"][-1:]})
    assert_same_bits({"weights": weights}, {"weights": expected["weights"][-1:, :, : len(own)]})
    assert (expected["weights"][-1, :, len(own) :] == 0).all()


def leaves_of(arguments):
    names = [name for name in LEAVES if arguments[name] is not None]
    return names, tuple(arguments[name].requires_grad_() for name in names)


@small
def test_gradcheck_and_gradgradcheck(size):
    arguments, _ = sample(size, torch.float64)
    names, leaves = leaves_of(arguments)
    call = lambda *t: ops.attend(**{**arguments, **dict(zip(names, t))})  # noqa: E731
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@small
@pytest.mark.parametrize("which", [0, 1], ids=["context", "weights"])
def test_either_result_may_be_differentiated_alone(size, which):
    arguments, seeds = sample(size, torch.float64)
    names, leaves = leaves_of(arguments)
    grads = [
        torch.autograd.grad(function(**arguments)[which], leaves, seeds[which], allow_unused=True)
        for function in (ops.attend, looped)
    ]
    for name, ours, theirs in zip(names, *grads):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, msg=name)
    call = lambda *t: ops.attend(**{**arguments, **dict(zip(names, t))})[which]  # noqa: E731
    assert gradgradcheck(call, leaves)


@small
def test_opcheck(size):
    arguments, seeds = sample(size)
    leaves_of(arguments)
    opcheck(torch.ops.pymtl.attend.default, tuple(arguments.values()))
    with torch.no_grad():
        weights = ops.attend(**arguments)[1]
    opcheck(torch.ops.pymtl.attend_backward.default, (*seeds, *arguments.values(), weights))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_scores_choose_one_token(scale, dtype):
    arguments, seeds = sample(SIZES[2], dtype)
    arguments["query"] = arguments["query"] * scale
    found = with_gradients(ops.attend, arguments, seeds)
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["context"], looped(**arguments)[0])


def test_a_number_that_is_none_spoils_its_own_head_and_sequence_only():
    arguments, _ = sample(SIZES[2])
    expected = ops.attend(**arguments)[0]
    arguments["key"][0, 2] = torch.nan  # of the first sequence's first token, the second head
    found = ops.attend(**arguments)[0]
    first = arguments["sequences"] == 0
    assert found[first].isnan().all(0).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert torch.equal(found[~first], expected[~first])


def test_trailing_steps_without_tokens_change_nothing():
    arguments, seeds = sample(SIZES[2])
    sizes = arguments["batch_sizes"]
    longer = {**arguments, "batch_sizes": torch.cat([sizes, sizes.new_zeros(2)])}
    found = with_gradients(ops.attend, longer, (seeds[0], torch.nn.functional.pad(seeds[1], (0, 2))))
    found["weights"] = found["weights"][..., :-2]
    assert_same_bits(found, with_gradients(ops.attend, arguments, seeds))


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_any_layout_of_the_arguments_gives_the_same_bits(layout):
    arguments, _ = sample(SIZES[3])
    other = {n: layout(t) if n in LEAVES else t for n, t in arguments.items()}
    found, expected = ops.attend(**other), ops.attend(**arguments)
    assert_same_bits(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize("function", [ops.attend, reference.attend], ids=["kernels", "reference"])
def test_no_query_and_no_sequence(function):
    arguments, _ = sample(SIZES[3])
    none = {"query": arguments["query"][:0], "sequences": arguments["sequences"][:0]}
    names, leaves = leaves_of({**arguments, **none})
    context, weights = function(**{**arguments, **none, **dict(zip(names, leaves))})
    assert context.shape == (0, 9)
    assert weights.shape == (0, 3, 5)
    assert all(g is None or (g == 0).all() for g in torch.autograd.grad(context.sum(), leaves, allow_unused=True))
    empty = {"key": arguments["key"][:0], "value": arguments["value"][:0], "batch_sizes": arguments["batch_sizes"][:0]}
    context, weights = function(**{**arguments, **none, **empty})
    assert context.shape == (0, 9)
    assert weights.shape == (0, 3, 0)


def test_other_dtypes_are_computed_in_float32():
    arguments, _ = sample(SIZES[3])
    half = {n: t.bfloat16() if n in LEAVES else t for n, t in arguments.items()}
    context, weights = ops.attend(**half)
    expected, same = ops.attend(**{n: t.float() if n in LEAVES else t for n, t in half.items()})
    assert context.dtype == torch.bfloat16
    assert torch.equal(context, expected.bfloat16())
    assert torch.equal(weights, same)


def test_transforms_and_the_compiler_take_it():
    arguments, seeds = sample(SIZES[3], torch.float64)
    names, leaves = leaves_of(arguments)
    call = lambda *t: (ops.attend(**{**arguments, **dict(zip(names, t))})[0] * seeds[0]).sum()  # noqa: E731
    expected = torch.autograd.grad(call(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(call, argnums=tuple(range(len(leaves))))(*leaves), expected)
    _, tangent = torch.func.jvp(call, leaves, tuple(torch.ones_like(t) for t in leaves))
    torch.testing.assert_close(tangent, sum(g.sum() for g in expected))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


ARGUMENTS, SEEDS = sample(SIZES[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": ARGUMENTS["query"][0]}, "query: expected two dimensions, got 1"),
        ({"key": ARGUMENTS["key"][:-1]}, r"key: expected size \[12, 6\], got \[11, 6\]"),
        ({"value": ARGUMENTS["value"][:-1]}, r"value: expected size \[12, 9\], got \[11, 9\]"),
        ({"key": ARGUMENTS["key"][:, :3]}, r"key: expected size \[12, 6\], got \[12, 3\]"),
        ({"score": ARGUMENTS["score"][:3]}, r"score: expected size \[6\], got \[3\]"),
        ({"heads": 0}, "heads: expected a divisor of 6 and 9 features, got 0"),
        ({"heads": 2}, "heads: expected a divisor of 6 and 9 features, got 2"),
        ({"sequences": ARGUMENTS["sequences"] + 2}, "sequences: expected numbers below 4, how many there are, got"),
        ({"sequences": ARGUMENTS["sequences"] - 4}, "sequences: expected numbers below 4, how many there are, got -"),
        ({"sequences": ARGUMENTS["sequences"][:-1]}, r"sequences: expected size \[9\], got \[8\]"),
        ({"sequences": ARGUMENTS["sequences"].int()}, "sequences: expected dtype Long, got Int"),
        ({"batch_sizes": ARGUMENTS["batch_sizes"].flip(0)}, "batch_sizes: expected sizes that never increase"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_refused_by_name_and_values(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.attend(**{**ARGUMENTS, **change})


def test_the_backward_op_refuses_another_gradient():
    weights = ops.attend(**ARGUMENTS)[1]
    with pytest.raises(RuntimeError, match=r"grad_context: expected size \[9, 9\], got \[8, 9\]"):
        torch.ops.pymtl.attend_backward(SEEDS[0][:-1], SEEDS[1], *ARGUMENTS.values(), weights)
