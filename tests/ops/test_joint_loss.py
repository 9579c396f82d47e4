import pytest
import torch
import torch.nn.functional as F
from longdouble import needs_long_double
from losses import (
    BCE,
    CE,
    LARGE,
    MIXED,
    MSE,
    SMALL,
    Sample,
    Task,
    in_long_double,
    only,
    ours,
    plain,
    sample_of,
    theirs,
    with_gradients,
)
from parity import assert_parity, assert_same_bits
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from pymtl import ops

each_task = pytest.mark.parametrize("task", SMALL + LARGE, ids=str)


# Accuracy and derivatives.


@each_task
def test_float32_is_as_accurate_as_torch(task, isa):
    s = sample_of([task])
    truth = with_gradients(theirs, s.to(torch.float64))
    assert_parity(with_gradients(ours, s), with_gradients(theirs, s), truth)


@needs_long_double
@pytest.mark.parametrize("task", SMALL, ids=str)
def test_float64_is_as_accurate_as_torch(task, isa):
    s = sample_of([task], torch.float64)
    assert_parity(with_gradients(ours, s), with_gradients(theirs, s), in_long_double(s))


@needs_long_double
@pytest.mark.parametrize("task", SMALL, ids=str)
def test_the_reference_agrees_with_torch(task):
    s = sample_of([task], torch.float64)
    assert_parity(with_gradients(plain, s), with_gradients(theirs, s), in_long_double(s))


def test_tasks_together_are_as_accurate_as_torch(isa):
    s = sample_of(MIXED)
    truth = with_gradients(theirs, s.to(torch.float64))
    assert_parity(with_gradients(ours, s), with_gradients(theirs, s), truth)


def test_a_weighted_sum_of_the_losses_has_the_weighted_gradients():
    s = sample_of(MIXED, torch.float64)
    factors = torch.tensor([0.5, -2.0, 0.0, 3.0, 1e6], dtype=torch.float64)
    leaves = [z.clone().requires_grad_() for z in s.logits]
    gradients = torch.autograd.grad(ops.joint_loss(leaves, s.targets, s.kinds, **s.others()), leaves, factors)
    alone = with_gradients(ours, s)
    for k, (gradient, factor) in enumerate(zip(gradients, factors)):
        assert torch.equal(gradient, factor * alone[f"gradient {k}"])


@pytest.mark.parametrize(
    "tasks",
    [
        [Task(CE, 3, 4)],
        [Task(CE, 4, 3, weighted=True, smoothing=0.2, ignored=0.4)],
        [Task(MSE, 3, 2, ignored=0.3)],
        [Task(BCE, 3, 2, weighted=True, ignored=0.3)],
        [Task(CE, 2, 3), Task(MSE, 2, 2), Task(BCE, 2, 1)],
    ],
    ids=lambda tasks: "+".join(map(str, tasks)),
)
def test_gradcheck_and_gradgradcheck(tasks):
    s = sample_of(tasks, torch.float64)
    leaves = tuple(z.requires_grad_() for z in s.logits)
    assert gradcheck(lambda *z: ours(z, s), leaves)
    assert gradgradcheck(lambda *z: ours(z, s), leaves)


def test_gradcheck_where_only_some_logits_require_a_gradient():
    s = sample_of([Task(CE, 2, 3), Task(MSE, 2, 2), Task(BCE, 2, 1)], torch.float64)
    s.logits[1].requires_grad_()
    assert gradcheck(lambda *z: ours(z, s), tuple(s.logits))
    assert gradgradcheck(lambda *z: ours(z, s), tuple(s.logits))


def raw_arguments(s, gradients):
    weights = [z.new_empty(0) if w is None else w for z, w in zip(s.logits, s.weights)]
    return (s.logits, s.targets, s.kinds, weights, s.ignore_index, s.label_smoothing, gradients)


def raw(logits, s):
    arguments = raw_arguments(s, True)
    return torch.ops.pymtl.joint_loss(logits, *arguments[1:])[0].unbind()


@each_task
def test_the_raw_op_gives_the_same_bits(task, dtype):
    s = sample_of([task], dtype)
    assert_same_bits(with_gradients(raw, s), with_gradients(ours, s))


def test_backward_through_the_raw_op_without_gradients_raises():
    s = sample_of(MIXED)
    s.logits[1].requires_grad_()
    losses = torch.ops.pymtl.joint_loss(*raw_arguments(s, False))[0]
    with pytest.raises(RuntimeError, match="gradients=True"):
        losses.sum().backward()


@pytest.mark.parametrize("place", ["target", "weight"])
def test_a_target_or_class_weight_that_requires_a_gradient_gets_one_or_raises(place):
    s = sample_of([Task(MSE if place == "target" else BCE, 4, 3, weighted=place == "weight")])
    leaf = (s.targets if place == "target" else s.weights)[0].requires_grad_()
    s.logits[0].requires_grad_()
    try:
        ours(s.logits, s)[0].backward()
    except RuntimeError:
        return
    assert leaf.grad is not None


def test_gradients_kept_for_a_second_derivative_have_the_first_ones_values():
    s = sample_of(MIXED, torch.float64)
    for z in s.logits[:2]:
        z.requires_grad_()
    wanted = s.logits[:2]
    expected = torch.autograd.grad(sum(ours(s.logits, s)), wanted)
    found = torch.autograd.grad(sum(ours(s.logits, s)), wanted, create_graph=True)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


def test_forward_mode_derivatives():
    s = sample_of([Task(CE, 4, 3)], torch.float64)
    tangent = torch.randn(4, 3, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda z: theirs([z], s)[0], (s.logits[0],), (tangent,))
    _, actual = torch.func.jvp(lambda z: ours([z], s)[0], (s.logits[0],), (tangent,))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functional_transforms(transform):
    s = sample_of([Task(CE, 4, 3)], torch.float64)
    given = s.logits[0] if transform is torch.func.grad else torch.stack([s.logits[0], 2 * s.logits[0]])
    actual = transform(lambda z: ours([z], s)[0])(given)
    torch.testing.assert_close(actual, transform(lambda z: theirs([z], s)[0])(given))


@pytest.mark.parametrize("wanted", [(), (0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["losses", "losses and gradients"])
def test_opcheck(gradients, wanted, dtype):
    s = sample_of([Task(CE, 4, 3, weighted=True, smoothing=0.1, ignored=0.2), Task(MSE, 5, 2), Task(BCE, 6, 2)], dtype)
    for k in wanted:
        s.logits[k].requires_grad_()
    if not gradients and wanted:
        # Its backward raises, as it should; the rest of the contract holds.
        untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(torch.ops.pymtl.joint_loss.default, raw_arguments(s, False), test_utils=untraced)
    else:
        opcheck(torch.ops.pymtl.joint_loss.default, raw_arguments(s, gradients))


# Tasks without labels, and labels at the edge.


@pytest.mark.parametrize("kind", [CE, MSE, BCE])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_a_task_without_a_label_gives_zero_and_no_gradient(kind, weighted, dtype, isa):
    s = sample_of([Task(kind, 5, 4, weighted=weighted, ignored=1.1), Task(CE, 3, 2)], dtype)
    results = with_gradients(ours, s)
    assert results["loss 0"] == 0
    assert torch.equal(results["gradient 0"], torch.zeros(5, 4, dtype=dtype))
    alone = with_gradients(ours, only(s, 1))
    assert_same_bits(
        {name: results[f"{name} 1"] for name in ("loss", "gradient")},
        {n: alone[f"{n} 0"] for n in ("loss", "gradient")},
    )


@pytest.mark.parametrize("kind", [CE, MSE, BCE])
def test_no_rows_give_zero(kind, dtype):
    results = with_gradients(ours, sample_of([Task(kind, 0, 4)], dtype))
    assert results["loss 0"] == 0
    assert results["gradient 0"].shape == (0, 4)


@pytest.mark.parametrize("kind", [CE, MSE, BCE])
def test_logits_of_rows_without_a_label_do_not_matter(kind, dtype, isa):
    s = sample_of([Task(kind, 6, 4)], dtype)
    s.targets[0][2] = -100 if kind == CE else torch.nan
    clean = with_gradients(ours, s)
    s.logits[0][2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    assert_same_bits(with_gradients(ours, s), clean)


def test_a_class_that_stands_for_no_label_is_left_out(dtype):
    z = torch.randn(4, 3, dtype=dtype)
    losses = ops.joint_loss([z], [torch.tensor([0, 2, 0, 1])], [CE], ignore_index=[0])
    expected = ops.joint_loss([z[[1, 3]]], [torch.tensor([2, 1])], [CE])
    assert_same_bits({"loss": losses}, {"loss": expected})


# Numbers that are large or not finite.


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(size, dtype, isa):
    z = torch.tensor([[size, -size, 0.0], [-size, 0.0, size], [size, size, size]], dtype=dtype)
    y = torch.tensor([0, 2, 1])
    yes = F.one_hot(y, 3).to(dtype)
    s = Sample([z, z], [y, yes], [CE, BCE], [None, None], [-100, -100], [0.0, 0.0])
    results = with_gradients(ours, s)
    assert all(value.isfinite().all() for value in results.values())
    assert_parity(results, with_gradients(theirs, s), with_gradients(theirs, s.to(torch.float64)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at_target", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_inf_and_nan_is_torchs(value, at_target, smoothing, dtype, isa):
    s = sample_of([Task(CE, 4, 19, smoothing=smoothing)], dtype)
    target = int(s.targets[0][1])
    s.logits[0][1, target if at_target else (target + 1) % 19] = value
    results, expected = with_gradients(ours, s), with_gradients(theirs, s)
    for name in results:
        assert torch.equal(results[name].isnan(), expected[name].isnan()), name
        assert torch.equal(results[name].isinf(), expected[name].isinf()), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [MSE, BCE])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_the_other_losses_are_finite_where_torchs_are(value, kind, target, dtype, isa):
    s = sample_of([Task(kind, 4, 3)], dtype)
    s.logits[0][1, 2] = value
    s.targets[0][1, 2] = target
    results, expected = with_gradients(ours, s), with_gradients(theirs, s)
    assert results["loss 0"].isfinite() == expected["loss 0"].isfinite()
    assert_same_bits({"finite": results["gradient 0"].isfinite()}, {"finite": expected["gradient 0"].isfinite()})
    assert torch.equal(results["gradient 0"].isnan(), expected["gradient 0"].isnan())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same_gradients(reentrant):
    logits, targets = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))

    def losses(z):
        return ops.joint_loss([z, 2 * z], [targets, targets], ["cross_entropy"] * 2)

    (expected,) = torch.autograd.grad(losses(logits).sum(), logits)
    checkpoint(losses, logits, use_reentrant=reentrant).sum().backward()
    assert torch.equal(logits.grad, expected)
