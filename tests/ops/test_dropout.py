import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_bits
from samples import spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

SHAPES = [(), (1,), (3,), (0,), (0, 5), (7, 5), (4, 1, 6), (130, 257)]
shaped = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_bits(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)


def sample(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=dtype), random_bits(torch.Size(shape).numel())


@shaped
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.999, 1.0])
def test_the_op_and_the_reference_give_the_same_bits(shape, p, dtype, isa):
    x, bits = sample(shape, dtype)
    ours = {"output": torch.ops.pymtl.dropout(x, bits, p)}
    assert_same_bits(ours, {"output": reference.dropout(x, bits, p)})


@shaped
def test_non_contiguous_inputs_give_the_same_bits(shape, dtype):
    x, bits = sample(shape, dtype)
    expected = {"output": torch.ops.pymtl.dropout(x, bits, 0.4)}
    for other in (spread(x), transposed(x)) if x.dim() else (spread(x),):
        assert_same_bits({"output": torch.ops.pymtl.dropout(other, bits, 0.4)}, expected)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_share_of_p_is_dropped_and_the_others_are_scaled(p, dtype):
    torch.manual_seed(5)
    count = 200_000
    y = ops.dropout(torch.ones(count, dtype=dtype), p)
    kept = y != 0
    # Five standard deviations of a share of this many.
    assert abs(kept.double().mean() - (1 - p)) <= 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p) if p < 1 else 0.0), rtol=2e-4, atol=0)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(6)
    kept = (ops.dropout(torch.ones(400_000), 0.5) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 16):
        correlation = 4 * (kept[:-distance] * kept[distance:]).mean()
        assert abs(correlation) <= 5 / 400_000**0.5, distance


def test_torch_s_seed_rules():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = ops.dropout(x, 0.5), ops.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, ops.dropout(x, 0.5))
    assert not torch.equal(first, second)


def test_the_number_of_threads_does_not_matter(dtype):
    x, bits = sample((300, 301), dtype)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(torch.ops.pymtl.dropout(x, bits, 0.3))
        torch.set_num_threads(before)
    assert_same_bits({"output": results[1]}, {"output": results[0]})
    assert_same_bits({"output": results[2]}, {"output": results[0]})


def test_nan_and_infinity_propagate_as_in_torch():
    x, bits = sample((64,))
    x[::2], x[1::4] = torch.inf, torch.nan
    y = torch.ops.pymtl.dropout(x, bits, 0.5)
    dropped = reference.dropout(torch.ones(64), bits, 0.5) == 0
    assert y[dropped & ~x.isfinite()].isnan().all()  # zero times infinity
    assert torch.equal(y[~dropped].isinf(), x[~dropped].isinf())


def test_the_gradient_has_the_mask_of_the_output(dtype):
    x, _ = sample((50, 7), dtype)
    x = x.abs() + 1
    x.requires_grad_()
    y = ops.dropout(x, 0.4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, y.detach() / x.detach())
    assert torch.equal(grad == 0, y == 0)


def test_gradcheck_and_gradgradcheck():
    x, bits = sample((5, 7), torch.float64)
    x.requires_grad_()
    assert gradcheck(lambda x: torch.ops.pymtl.dropout(x, bits, 0.3), x)
    assert gradgradcheck(lambda x: torch.ops.pymtl.dropout(x, bits, 0.3), x)

    def seeded(x):
        torch.manual_seed(0)
        return ops.dropout(x, 0.3)

    assert gradcheck(seeded, x)
    assert gradgradcheck(seeded, x)


@pytest.mark.parametrize("requires_grad", [False, True])
@shaped
def test_opcheck(shape, requires_grad, dtype):
    x, bits = sample(shape, dtype)
    opcheck(torch.ops.pymtl.dropout.default, (x.requires_grad_(requires_grad), bits, 0.25))


def test_compiled_it_drops_a_share_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.dropout(x, 0.3), fullgraph=True, backend="aot_eager")
    y = compiled(torch.ones(100_000, requires_grad=True))
    assert abs((y == 0).double().mean() - 0.3) < 0.01
    assert y.requires_grad


def test_in_functional_transforms_it_is_torch_s_own():
    def seeded(function):
        torch.manual_seed(4)
        return torch.func.grad(lambda x: function(x, 0.5).sum())(torch.ones(20, dtype=torch.float64))

    assert torch.equal(seeded(ops.dropout), seeded(F.dropout))


def test_a_default_device_does_not_matter():
    x = torch.ones(5)
    with torch.device("meta"):
        assert ops.dropout(x, 0.5).device.type == "cpu"


# Bad input.


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_probability_out_of_range(p):
    with pytest.raises(RuntimeError, match="p: expected a probability from 0 to 1"):
        ops.dropout(torch.ones(3), p)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bool])
def test_other_dtypes(dtype):
    with pytest.raises(RuntimeError, match="input: expected dtype Float or Double"):
        ops.dropout(torch.ones(3, dtype=dtype), 0.5)


def test_bits_of_another_size_or_dtype():
    x = torch.ones(9)
    with pytest.raises(RuntimeError, match=r"bits: expected size \[3\], got \[2\]"):
        torch.ops.pymtl.dropout(x, random_bits(8), 0.5)
    with pytest.raises(RuntimeError, match="bits: expected dtype Long, got Int"):
        torch.ops.pymtl.dropout(x, random_bits(9).int(), 0.5)


def test_tensors_on_another_device():
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|CPU"):
        torch.ops.pymtl.dropout(torch.ones(4), torch.zeros(1, dtype=torch.int64, device="meta"), 0.5)
