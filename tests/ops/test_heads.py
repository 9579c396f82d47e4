import itertools

import pytest
import torch
import torch.nn.functional as F
from longdouble import needs_long_double
from parity import assert_parity, assert_same_bits, wide
from samples import shifted, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

# rows, features, classes, parts, bias
SIZES = [
    (1, 1, 1, 1, True),
    (1, 2, 3, 2, True),
    (3, 5, 1, 1, False),
    (7, 6, 2, 3, True),
    (6, 38, 17, 2, True),
    (13, 66, 16, 2, False),
    (5, 128, 33, 4, True),
    (50, 128, 79, 2, True),
    (33, 512, 7, 2, True),
    (100, 256, 300, 4, False),
    (16, 20, 3000, 1, True),  # long sums, forward and back
    (9, 3000, 7, 2, True),
]
sized = pytest.mark.parametrize(
    ("rows", "features", "classes", "parts", "bias"),
    [pytest.param(*s, id=f"{s[0]}x{s[1]}-to-{s[2]}-in-{s[3]}" + ("" if s[4] else "-nobias")) for s in SIZES],
)


def sample(rows, features, classes, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "input": torch.randn(rows, features, generator=generator, dtype=dtype),
        "weight": torch.randn(classes, features, generator=generator, dtype=dtype) / features**0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(classes, generator=generator, dtype=dtype)
    return tensors, torch.randn(rows, classes, generator=generator, dtype=dtype)


def with_gradients(function, tensors, seed):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves["input"], leaves["weight"], leaves.get("bias"))
    gradients = torch.autograd.grad(output, list(leaves.values()), seed)
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients)}


def doubled(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


# Accuracy and derivatives.


@sized
def test_float32_is_as_accurate_as_linear(rows, features, classes, parts, bias, isa):
    tensors, seed = sample(rows, features, classes, bias)
    ours = with_gradients(lambda *t: ops.heads(*t, parts=parts), tensors, seed)
    assert_parity(
        ours, with_gradients(F.linear, tensors, seed), with_gradients(F.linear, doubled(tensors), seed.double())
    )


def compare_in_float64(function, rows, features, classes, parts, bias):
    tensors, seed = sample(rows, features, classes, bias, torch.float64)
    x, w, s = wide(tensors["input"]), wide(tensors["weight"]), wide(seed)
    truth = {"output": x @ w.T, "gradient of input": s @ w, "gradient of weight": s.T @ x}
    if bias:
        truth["output"] = truth["output"] + wide(tensors["bias"])
        truth["gradient of bias"] = s.sum(0)
    ours = with_gradients(lambda *t: function(*t, parts=parts), tensors, seed)
    assert_parity(ours, with_gradients(F.linear, tensors, seed), truth)


@needs_long_double
@sized
def test_float64_is_as_accurate_as_linear(rows, features, classes, parts, bias, isa):
    compare_in_float64(ops.heads, rows, features, classes, parts, bias)


@needs_long_double
@sized
def test_the_reference_agrees_with_linear(rows, features, classes, parts, bias):
    compare_in_float64(reference.heads, rows, features, classes, parts, bias)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "input weight", "input weight bias"])
def test_gradcheck_and_gradgradcheck(wanted):
    tensors, _ = sample(3, 4, 5, dtype=torch.float64)
    leaves = [tensor.requires_grad_(name in wanted.split()) for name, tensor in tensors.items()]
    assert gradcheck(lambda *t: ops.heads(*t, parts=2), leaves)
    assert gradgradcheck(lambda *t: ops.heads(*t, parts=2), leaves)


def test_gradcheck_and_gradgradcheck_without_bias():
    tensors, _ = sample(3, 4, 5, bias=False, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert gradcheck(lambda x, w: ops.heads(x, w, None), leaves)
    assert gradgradcheck(lambda x, w: ops.heads(x, w, None), leaves)


@sized
def test_the_raw_op_gives_the_same_bits(rows, features, classes, parts, bias, dtype):
    tensors, seed = sample(rows, features, classes, bias, dtype)
    assert_same_bits(
        with_gradients(lambda *t: torch.ops.pymtl.heads(*t, parts), tensors, seed),
        with_gradients(lambda *t: ops.heads(*t, parts=parts), tensors, seed),
    )


@pytest.mark.parametrize("wanted", [(), ("input",), ("weight",), ("bias",), ("input", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_opcheck(rows, wanted):
    tensors, _ = sample(rows, 6, 4, dtype=torch.float32 if rows % 2 else torch.float64)
    leaves = [tensor.requires_grad_(name in wanted) for name, tensor in tensors.items()]
    opcheck(torch.ops.pymtl.heads.default, (*leaves, 2))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_opcheck_of_the_gradients(rows, needs):
    tensors, seed = sample(rows, 6, 4, dtype=torch.float32 if rows % 2 else torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (seed, tensors["input"], tensors["weight"])]
    if not any(needs):
        arguments = [tensor.detach() for tensor in arguments]
    opcheck(torch.ops.pymtl.heads_backward.default, (*arguments, list(needs)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_output": torch.zeros(5, 3)}, r"grad_output: expected size \[5, 4\], got \[5, 3\]"),
        ({"grad_output": torch.zeros(5, 4).double()}, "grad_output: expected dtype Float, got Double"),
        ({"input": torch.zeros(5)}, r"input: expected \[rows, features\], got 1-D"),
        ({"weight": torch.zeros(4, 7)}, r"input: expected size \[5, 7\], got \[5, 6\]"),
        ({"needs": [True, True]}, "needs: expected 3 flags, got 2"),
    ],
)
def test_bad_input_of_the_gradients_is_refused(changes, message):
    tensors, seed = sample(5, 6, 4)
    arguments = {"grad_output": seed, "input": tensors["input"], "weight": tensors["weight"], "needs": [True] * 3}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymtl.heads_backward(**(arguments | changes))


def test_opcheck_without_bias():
    tensors, _ = sample(5, 6, 4, bias=False)
    opcheck(torch.ops.pymtl.heads.default, (tensors["input"].requires_grad_(), tensors["weight"], None, 1))


def test_forward_mode_derivatives():
    tensors, _ = sample(3, 4, 5, dtype=torch.float64)
    _, weight, bias = tensors.values()
    tangent = torch.randn(3, 4, dtype=torch.float64)
    _, actual = torch.func.jvp(lambda x: ops.heads(x, weight, bias), (tensors["input"],), (tangent,))
    torch.testing.assert_close(actual, tangent @ weight.T)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functional_transforms(transform):
    tensors, _ = sample(3, 4, 5, dtype=torch.float64)
    x, weight, bias = tensors.values()
    given = x if transform is torch.func.grad else torch.stack([x, 2 * x])
    actual = transform(lambda t: ops.heads(t, weight, bias).square().sum())(given)
    torch.testing.assert_close(actual, transform(lambda t: F.linear(t, weight, bias).square().sum())(given))


# The same bits.


@sized
def test_a_row_gives_the_same_bits_alone_as_among_others(rows, features, classes, parts, bias, dtype, isa):
    tensors, _ = sample(rows, features, classes, bias, dtype)
    x, w, b = tensors["input"], tensors["weight"], tensors.get("bias")
    together = ops.heads(x, w, b, parts=parts)
    for row in range(0, rows, max(1, rows // 8)):
        assert_same_bits({"row": ops.heads(x[row : row + 1], w, b, parts=parts)}, {"row": together[row : row + 1]})
    generator = torch.Generator().manual_seed(3)
    for count in {1, 2, rows // 2, rows - 1} - {0}:
        some = torch.randperm(rows, generator=generator)[:count]
        assert_same_bits({"rows": ops.heads(x[some], w, b, parts=parts)}, {"rows": together[some]})


@sized
def test_a_class_gives_the_same_bits_whatever_heads_stand_beside_it(rows, features, classes, parts, bias, dtype, isa):
    tensors, _ = sample(rows, features, classes, bias, dtype)
    x, w, b = tensors["input"], tensors["weight"], tensors.get("bias")
    together = ops.heads(x, w, b, parts=parts)
    cut = classes // 3
    for part in (slice(0, cut), slice(cut, classes)):
        alone = ops.heads(x, w[part], None if b is None else b[part], parts=parts)
        assert_same_bits({"logits": alone}, {"logits": together[:, part]})


@sized
def test_any_number_of_threads_gives_the_same_bits(rows, features, classes, parts, bias, dtype, isa, threads):
    tensors, _ = sample(rows, features, classes, bias, dtype)
    arguments = (tensors["input"], tensors["weight"], tensors.get("bias"))
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append({"output": ops.heads(*arguments, parts=parts)})
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@sized
def test_runs_repeat_bit_for_bit(rows, features, classes, parts, bias, dtype, filled_memory):
    tensors, seed = sample(rows, features, classes, bias, dtype)

    def run():
        return with_gradients(lambda *t: ops.heads(*t, parts=parts), tensors, seed)

    expected = run()
    for _ in range(19):
        assert_same_bits(run(), expected)
    filled_memory()
    assert_same_bits(run(), expected)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, dtype):
    tensors, _ = sample(9, 38, 17, dtype=dtype)
    views = [layout(tensor) for tensor in tensors.values()]
    assert_same_bits({"output": ops.heads(*views, parts=2)}, {"output": ops.heads(*tensors.values(), parts=2)})


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_gradients_of_other_memory_layouts_have_the_same_bits(layout, dtype):
    tensors, seed = sample(9, 38, 17, dtype=dtype)
    ours = with_gradients(lambda *t: ops.heads(*map(layout, t), parts=2), tensors, layout(seed))
    assert_same_bits(ours, with_gradients(lambda *t: ops.heads(*t, parts=2), tensors, seed))


@sized
def test_gradients_do_not_depend_on_the_number_of_threads(rows, features, classes, parts, bias, dtype, isa, threads):
    tensors, seed = sample(rows, features, classes, bias, dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(with_gradients(lambda *t: ops.heads(*t, parts=parts), tensors, seed))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_gradients_of_many_rows_are_as_accurate_as_linear(isa):
    tensors, seed = sample(3000, 20, 9)
    ours = with_gradients(ops.heads, tensors, seed)
    assert_parity(
        ours, with_gradients(F.linear, tensors, seed), with_gradients(F.linear, doubled(tensors), seed.double())
    )


def test_expanded_inputs_give_the_same_bits(dtype):
    row, bias = torch.randn(1, 8, dtype=dtype), torch.randn(1, dtype=dtype)
    weight = torch.randn(1, 8, dtype=dtype)
    expanded = ops.heads(row.expand(6, 8), weight.expand(3, 8), bias.expand(3))
    copied = ops.heads(row.repeat(6, 1), weight.repeat(3, 1), bias.repeat(3))
    assert_same_bits({"output": expanded}, {"output": copied})


def test_inputs_are_never_modified(dtype):
    tensors, seed = sample(9, 38, 17, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    before = [(t.detach().clone(), t._version) for t in (*leaves, seed)]
    torch.autograd.grad(ops.heads(*leaves, parts=2), leaves, seed)
    for tensor, (values, version) in zip((*leaves, seed), before):
        assert torch.equal(tensor, values)
        assert tensor._version == version


# Edges.


@pytest.mark.parametrize(("rows", "classes"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do_gives_empty_results_and_zero_gradients(rows, classes, dtype):
    tensors, seed = sample(rows, 6, classes, dtype=dtype)
    results = with_gradients(ops.heads, tensors, seed)
    assert results["output"].shape == (rows, classes)
    for name, tensor in tensors.items():
        gradient = results[f"gradient of {name}"]
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_stays_in_its_row(value, dtype, isa):
    tensors, _ = sample(9, 38, 17, dtype=dtype)
    x, w, b = tensors.values()
    clean = ops.heads(x, w, b, parts=2)
    spoilt = x.clone()
    spoilt[4, 20] = value
    dirty = ops.heads(spoilt, w, b, parts=2)
    others = torch.arange(9) != 4
    assert_same_bits({"others": dirty[others]}, {"others": clean[others]})
    expected = F.linear(spoilt, w, b)[4]
    torch.testing.assert_close(dirty[4], expected, rtol=0, atol=0, equal_nan=True)


REFUSED = [
    ("input of rank 1", {"input": torch.zeros(6)}, r"input: expected \[rows, features\], got 1-D"),
    ("input of rank 3", {"input": torch.zeros(2, 5, 6)}, r"input: expected \[rows, features\], got 3-D"),
    ("input of another width", {"input": torch.zeros(5, 7)}, r"input: expected size \[5, 6\], got \[5, 7\]"),
    ("integer input", {"input": torch.zeros(5, 6).long()}, r"expected dtype Float, Double or BFloat16, got Long"),
    ("half input", {"input": torch.zeros(5, 6).half()}, r"input: expected dtype Float, Double or BFloat16, got Half"),
    ("weight of rank 1", {"weight": torch.zeros(6)}, r"weight: expected \[classes, features\], got 1-D"),
    ("double weight", {"weight": torch.zeros(4, 6).double()}, r"weight: expected dtype Float, got Double"),
    ("bias of another size", {"bias": torch.zeros(5)}, r"bias: expected size \[4\], got \[5\]"),
    ("bias of rank 2", {"bias": torch.zeros(1, 4)}, r"bias: expected size \[4\], got \[1, 4\]"),
    ("half bias", {"bias": torch.zeros(4).half()}, r"bias: expected dtype Float, got Half"),
    ("parts that do not divide", {"parts": 4}, r"parts: expected a divisor of the 6 features, got 4"),
    ("no parts", {"parts": 0}, r"parts: expected a divisor of the 6 features, got 0"),
    ("negative parts", {"parts": -1}, r"parts: expected a divisor of the 6 features, got -1"),
    ("weight on another device", {"weight": torch.zeros(4, 6, device="meta")}, r"weight: expected .* CPU"),
    ("bias on another device", {"bias": torch.zeros(4, device="meta")}, r"bias: expected .* CPU"),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("changes", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_bad_input_is_refused_by_name_and_values(changes, message, gradient):
    tensors, _ = sample(5, 6, 4)
    arguments = tensors | {"parts": 1} | changes
    if gradient:
        arguments = {
            name: value.detach().requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in arguments.items()
        }
    with pytest.raises(RuntimeError, match=message):
        ops.heads(**arguments)
