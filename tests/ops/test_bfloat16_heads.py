from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.test_bfloat16 import BF16, assert_bits, assert_parity
from samples import shifted, sizes_of, spread, transposed
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import ops


def linear_sample(rows, features, classes, bias):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "input": torch.randn(rows, features, generator=generator),
        "weight": torch.randn(classes, features, generator=generator) / features**0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(classes, generator=generator)
    return {k: t.to(BF16) for k, t in tensors.items()}, torch.randn(rows, classes, generator=generator).to(BF16)


def gradients_of(function, tensors, seed):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(*leaves.values())
    gradients = torch.autograd.grad(output, list(leaves.values()), seed.to(output.dtype))
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients)}


def project(parts):
    return lambda input, weight, bias=None: ops.heads(input, weight, bias, parts=parts)


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("rows", "features", "classes", "parts", "bias"),
    [
        (1, 1, 1, 1, True),
        (1, 2, 3, 2, True),
        (3, 5, 1, 1, False),
        (7, 6, 2, 3, True),
        (6, 38, 17, 2, True),
        (13, 66, 16, 2, False),
        (50, 128, 79, 2, True),
        (129, 33, 7, 1, True),
        (300, 64, 300, 4, False),
        (16, 20, 3000, 1, True),
        (9, 3000, 7, 2, True),
    ],
)
def test_heads_are_as_accurate_as_linear(rows, features, classes, parts, bias, isa):
    tensors, seed = linear_sample(rows, features, classes, bias)
    ours = gradients_of(project(parts), tensors, seed)
    assert {result.dtype for result in ours.values()} == {BF16}
    assert_parity(ours, gradients_of(F.linear, tensors, seed), gradients_of(F.linear, double(tensors), seed.double()))
    wanted = tensors["weight"].clone().requires_grad_()
    project(parts)(tensors["input"], wanted, tensors.get("bias")).backward(seed)
    assert_bits({"weight": wanted.grad}, {"weight": ours["gradient of weight"]})


def test_heads_sum_in_float32_and_round_once(isa):
    tensors = {"input": (1031, 6), "weight": (5, 6), "bias": (5,)}
    tensors = {name: torch.randint(1, 5, size).to(BF16) for name, size in tensors.items()}
    seed = torch.randint(1, 5, (1031, 5)).to(BF16)
    expected = gradients_of(F.linear, double(tensors), seed)
    assert expected["gradient of bias"].min() > 1000
    ours = gradients_of(project(2), tensors, seed)
    assert_bits(ours, {name: result.to(BF16) for name, result in expected.items()})


def test_heads_second_derivatives_are_as_accurate_as_linears(isa):
    tensors, seed = linear_sample(13, 18, 7, True)

    def second(function, tensors, seed):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        first = torch.autograd.grad(function(*leaves), leaves, seed, create_graph=True)
        found = torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves[:2])
        return dict(zip(tensors, found))

    assert_parity(
        second(project(2), tensors, seed),
        second(F.linear, tensors, seed),
        second(F.linear, double(tensors), seed.double()),
    )


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_row_and_a_class_give_the_same_bits_whatever_stands_beside_them(bias, isa):
    tensors, _ = linear_sample(23, 66, 35, bias)
    x, weight, b = tensors["input"], tensors["weight"], tensors.get("bias")
    together = project(2)(x, weight, b)
    for row in range(23):
        assert torch.equal(project(2)(x[row : row + 1], weight, b), together[row : row + 1])
    for part in (slice(0, 1), slice(1, 18), slice(18, 35)):
        assert torch.equal(project(2)(x, weight[part], None if b is None else b[part]), together[:, part])


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, isa):
    tensors, seed = linear_sample(13, 18, 7, True)
    actual = gradients_of(lambda *ts: project(2)(*map(layout, ts)), tensors, layout(seed))
    assert_bits(actual, gradients_of(project(2), tensors, seed))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inf_and_nan_come_out_where_linear_has_them_in_float32(value, isa):
    tensors, seed = linear_sample(13, 18, 7, True)
    tensors["input"][3, 5] = value
    tensors["weight"][2, 17] = value
    ours = gradients_of(project(2), tensors, seed)
    theirs = gradients_of(F.linear, {name: t.float() for name, t in tensors.items()}, seed)
    for name in ours:
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name
        assert torch.equal(ours[name].isinf(), theirs[name].isinf()), name


def test_threads_and_runs_give_the_same_bits(isa, threads):
    tensors, seed = linear_sample(301, 128, 79, True)
    threads(1)
    expected = project(2)(*tensors.values())
    for count in (1, 2):
        threads(count)
        first = gradients_of(project(2), tensors, seed)
        assert_bits({"output": first["output"]}, {"output": expected})
        assert_bits(gradients_of(project(2), tensors, seed), first)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_opcheck_of_heads(rows):
    tensors, seed = linear_sample(rows, 6, 4, True)
    opcheck(torch.ops.pymtl.heads.default, (*(t.requires_grad_() for t in tensors.values()), 2))
    arguments = [t.detach().requires_grad_() for t in (seed, tensors["input"], tensors["weight"])]
    opcheck(torch.ops.pymtl.heads_backward.default, (*arguments, [True, False, True]))


# Pooling.


def pool_by_torch(batch_sizes, kind, x):
    if batch_sizes is None:
        return x.mean(0) if kind == "mean" else x.amax(0)
    filler = 0.0 if kind == "mean" else -torch.inf
    padded, lengths = pad_packed_sequence(PackedSequence(x, batch_sizes), padding_value=filler)
    return padded.sum(0) / lengths[:, None] if kind == "mean" else padded.amax(0)


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("lengths", [(1,), (5, 5, 5), (301, 301)], ids=str)
def test_pooling_of_equal_lengths_is_as_accurate_as_torch(lengths, packed, kind, isa):
    compare_pooling(lengths, packed, kind)


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (300, 129, 1)], ids=str)
def test_pooling_of_ragged_lengths_is_as_accurate_as_torch(lengths, kind, isa):
    compare_pooling(lengths, True, kind)


def compare_pooling(lengths, packed, kind):
    sizes, features = sizes_of(lengths), 6
    x = torch.rand(sum(lengths), features)
    starts = sizes.cumsum(0) - sizes
    for row, length in enumerate(lengths):
        x[starts[torch.randint(length, (features,))] + row, range(features)] += 1  # no ties: torch shares a gradient
    x = x.to(BF16)
    if not packed:
        x, sizes = x.view(lengths[0], len(lengths), features), None
    seed = torch.randn(len(lengths), features).to(BF16)
    ours = gradients_of(lambda t: ops.pool(t, sizes, kind), {"input": x}, seed)
    assert {result.dtype for result in ours.values()} == {BF16}
    theirs = gradients_of(partial(pool_by_torch, sizes, kind), {"input": x}, seed)
    assert_parity(ours, theirs, gradients_of(partial(pool_by_torch, sizes, kind), {"input": x.double()}, seed))


def test_a_mean_is_summed_in_float32_and_rounded_once(isa):
    x = torch.cat([torch.full((1000, 3), 1.0), torch.full((1000, 3), 2.0)]).to(BF16)
    assert_bits({"mean": ops.pool(x, torch.ones(2000).long(), "mean")}, {"mean": torch.full((1, 3), 1.5).to(BF16)})


def test_the_gradient_of_a_maximum_goes_to_one_of_equal_tokens(isa):
    x = torch.ones(9, 4, dtype=BF16, requires_grad=True)
    ops.pool(x, torch.tensor([2, 2, 2, 1, 1, 1]), "max").backward(torch.full((2, 4), 3.0).to(BF16))
    assert x.grad.dtype == BF16
    assert torch.equal(x.grad.sum(0), torch.full((4,), 6.0).to(BF16))
    assert torch.equal((x.grad != 0).sum(0), torch.full((4,), 2))


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling_nothing_gives_nothing(kind):
    for input, sizes in ((torch.zeros(0, 4), torch.zeros(3).long()), (torch.zeros(3, 0, 4), None)):
        pooled = ops.pool(input.to(BF16), sizes, kind)
        assert pooled.shape == (0, 4)
        assert pooled.dtype == BF16
