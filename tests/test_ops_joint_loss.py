from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from longdouble import binary_cross_entropy, cross_entropy, mean_squared_error, needs_long_double
from parity import assert_parity, assert_same_bits
from samples import DTYPES, shifted, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

CE, MSE, BCE = "cross_entropy", "mean_squared_error", "binary_cross_entropy"


@dataclass(frozen=True)
class Task:
    kind: str
    rows: int
    classes: int
    weighted: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # the share of targets that are no label
    ignore_index: int = -100
    scale: float = 1.0

    def __str__(self):
        name = {CE: "ce", MSE: "mse", BCE: "bce"}[self.kind]
        options = [
            text
            for text, given in [
                ("weighted", self.weighted),
                (f"smoothing{self.smoothing:g}", self.smoothing),
                (f"ignored{self.ignored:g}", self.ignored),
                (f"index{self.ignore_index}", self.ignore_index != -100),
                (f"scale{self.scale:g}", self.scale != 1),
            ]
            if given
        ]
        return "-".join([name, f"{self.rows}x{self.classes}", *options])


@dataclass(frozen=True)
class Sample:
    """The arguments of a call, one entry for each task."""

    logits: list
    targets: list
    kinds: list
    weights: list
    ignore_index: list
    label_smoothing: list

    def others(self):
        return {
            "weights": self.weights,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    def to(self, dtype):
        def convert(tensor):
            return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor

        return Sample(
            [convert(z) for z in self.logits],
            [convert(y) for y in self.targets],
            self.kinds,
            [convert(w) for w in self.weights],
            self.ignore_index,
            self.label_smoothing,
        )


def sample_of(tasks, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, targets, weights = [], [], []
    for task in tasks:
        size = (task.rows, task.classes)
        logits.append(task.scale * torch.randn(size, generator=generator, dtype=dtype))
        if task.kind == CE:
            target = torch.randint(task.classes, (task.rows,), generator=generator)
            target[torch.rand(task.rows, generator=generator) < task.ignored] = task.ignore_index
        else:
            target = torch.rand(size, generator=generator, dtype=dtype)
            if task.kind == BCE:
                target = torch.where(torch.rand(size, generator=generator) < 0.3, target, target.round())
            gone = torch.rand(size, generator=generator)
            target[gone < task.ignored] = torch.nan
            if task.kind == BCE:
                target[gone < task.ignored / 2] = task.ignore_index
        targets.append(target)
        weights.append(0.1 + torch.rand(task.classes, generator=generator, dtype=dtype) if task.weighted else None)
    return Sample(
        logits,
        targets,
        [task.kind for task in tasks],
        weights,
        [task.ignore_index for task in tasks],
        [task.smoothing for task in tasks],
    )


def only(s, k):
    """One task of a sample."""
    return Sample(*([column[k]] for column in vars(s).values()))


def ours(logits, s):
    return ops.joint_loss(logits, s.targets, s.kinds, **s.others()).unbind()


def plain(logits, s):
    return reference.joint_loss(logits, s.targets, s.kinds, *s.others().values()).unbind()


def theirs(logits, s):
    """One torch loss after another, on the entries that have a label."""
    losses = []
    for z, y, kind, weight, ignored, smoothing in zip(logits, s.targets, s.kinds, *s.others().values()):
        if kind == CE:
            loss = F.cross_entropy(z, y, weight=weight, ignore_index=ignored, label_smoothing=smoothing)
        elif kind == MSE:
            labelled = ~y.isnan()
            loss = F.mse_loss(z[labelled], y[labelled])
        else:
            labelled = ~y.isnan() & (y != ignored)
            weight = None if weight is None else weight.expand_as(y)[labelled]
            loss = F.binary_cross_entropy_with_logits(z[labelled], y[labelled], pos_weight=weight)
        losses.append(loss)
    return losses


def with_gradients(function, s):
    """Each task's loss and the gradient of that loss alone."""
    leaves = [z.detach().clone().requires_grad_() for z in s.logits]
    losses = function(leaves, s)
    results = {f"loss {k}": loss.detach() for k, loss in enumerate(losses)}
    for k, (loss, leaf) in enumerate(zip(losses, leaves)):
        (results[f"gradient {k}"],) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return results


def in_long_double(s):
    results = {}
    for k, (z, y, kind, weight, ignored, smoothing) in enumerate(
        zip(s.logits, s.targets, s.kinds, *s.others().values())
    ):
        if kind == CE:
            loss, gradient = cross_entropy(z, y, weight, ignored, smoothing)
        elif kind == MSE:
            loss, gradient = mean_squared_error(z, y)
        else:
            loss, gradient = binary_cross_entropy(z, y, weight, ignored)
        results |= {f"loss {k}": loss, f"gradient {k}": gradient}
    return results


SMALL = [
    Task(CE, 1, 1),
    Task(CE, 1, 2),
    Task(CE, 3, 5),
    Task(CE, 7, 17, weighted=True),
    Task(CE, 9, 16, smoothing=0.1),
    Task(CE, 12, 33, weighted=True, smoothing=0.3, ignored=0.4),
    Task(CE, 12, 4, ignored=0.3, ignore_index=2),
    Task(CE, 5, 6, smoothing=1.0),
    Task(CE, 8, 6, scale=30.0),
    Task(MSE, 1, 1),
    Task(MSE, 6, 5, ignored=0.4),
    Task(MSE, 40, 3, scale=100.0),
    Task(BCE, 1, 1),
    Task(BCE, 6, 5, weighted=True, ignored=0.4),
    Task(BCE, 30, 7, scale=40.0),
    Task(BCE, 9, 3, ignored=0.5, ignore_index=-1),
]
LARGE = [
    Task(CE, 1000, 72, ignored=0.3),
    Task(CE, 500, 79, weighted=True, smoothing=0.1, ignored=0.5),
    Task(CE, 20, 5000),
    Task(CE, 65, 7),
    Task(CE, 5000, 2, weighted=True),
    Task(MSE, 700, 3, ignored=0.2),
    Task(BCE, 300, 20, weighted=True, ignored=0.2),
]
MIXED = [
    Task(CE, 16, 7),
    Task(CE, 300, 72, weighted=True, smoothing=0.1, ignored=0.3),
    Task(MSE, 16, 1),
    Task(BCE, 16, 9, weighted=True, ignored=0.1),
    Task(CE, 130, 5, ignored=0.2, ignore_index=-1),
]
each_task = pytest.mark.parametrize("task", SMALL + LARGE, ids=str)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


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


def test_forward_mode_derivatives_raise_or_are_right():
    s = sample_of([Task(CE, 4, 3)], torch.float64)
    tangent = torch.randn(4, 3, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda z: theirs([z], s)[0], (s.logits[0],), (tangent,))
    try:
        _, actual = torch.func.jvp(lambda z: ours([z], s)[0], (s.logits[0],), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functional_transforms_raise_or_are_right(transform):
    s = sample_of([Task(CE, 4, 3)], torch.float64)
    given = s.logits[0] if transform is torch.func.grad else torch.stack([s.logits[0], 2 * s.logits[0]])
    try:
        actual = transform(lambda z: ours([z], s)[0])(given)
    except (RuntimeError, NotImplementedError):
        return
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


# The same bits.


def test_a_tasks_loss_has_the_same_bits_whatever_tasks_stand_beside_it(dtype, isa):
    together = with_gradients(ours, sample_of(MIXED, dtype))
    s = sample_of(MIXED, dtype)
    for k in range(len(MIXED)):
        assert_same_bits(
            with_gradients(ours, only(s, k)), {"loss 0": together[f"loss {k}"], "gradient 0": together[f"gradient {k}"]}
        )


def test_a_loss_has_the_same_bits_with_and_without_a_gradient(dtype, isa):
    s = sample_of(MIXED, dtype)
    losses = dict(enumerate(ours(s.logits, s)))
    leaves = [z.clone().requires_grad_() for z in s.logits]
    assert_same_bits(dict(enumerate(ours(leaves, s))), losses)
    with torch.no_grad():
        assert_same_bits(dict(enumerate(ours(leaves, s))), losses)


@pytest.mark.parametrize("tasks", [MIXED, *([task] for task in LARGE)], ids=lambda tasks: "+".join(map(str, tasks)))
def test_runs_repeat_bit_for_bit_with_any_number_of_threads(tasks, dtype, isa, threads, filled_memory):
    s = sample_of(tasks, dtype)
    threads(1)
    expected = with_gradients(ours, s)
    for count in (1, 2, 2, 3):
        threads(count)
        assert_same_bits(with_gradients(ours, s), expected)
    filled_memory()
    assert_same_bits(with_gradients(ours, s), expected)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, dtype):
    s = sample_of(MIXED, dtype)
    views = Sample(
        s.logits,
        [layout(y) for y in s.targets],
        s.kinds,
        [None if w is None else layout(w) for w in s.weights],
        s.ignore_index,
        s.label_smoothing,
    )
    assert_same_bits(with_gradients(lambda z, v: ours([layout(t) for t in z], v), views), with_gradients(ours, s))


def test_columns_of_stacked_logits_give_the_same_bits(dtype):
    tasks = [Task(CE, 40, 7), Task(CE, 40, 72, weighted=True), Task(MSE, 40, 3), Task(BCE, 40, 5)]
    s = sample_of(tasks, dtype)
    widths = [task.classes for task in tasks]
    stacked = torch.cat(s.logits, 1).requires_grad_()
    losses = ours(stacked.split(widths, 1), s)
    (gradient,) = torch.autograd.grad(sum(losses), stacked)
    expected = with_gradients(ours, s)
    assert_same_bits(
        {f"loss {k}": loss for k, loss in enumerate(losses)}
        | {f"gradient {k}": part for k, part in enumerate(gradient.split(widths, 1))},
        expected,
    )


def test_expanded_logits_targets_and_weights_give_the_same_bits(dtype):
    z, w = torch.randn(1, 5, dtype=dtype), torch.rand(1, dtype=dtype)
    y = torch.tensor([3])
    expanded = ops.joint_loss([z.expand(6, 5)], [y.expand(6)], [CE], weights=[w.expand(5)])
    copied = ops.joint_loss([z.repeat(6, 1)], [y.repeat(6)], [CE], weights=[w.repeat(5)])
    assert_same_bits({"loss": expanded}, {"loss": copied})


def test_inputs_are_never_modified(dtype):
    s = sample_of(MIXED, dtype)
    tensors = [*s.logits, *s.targets, *(w for w in s.weights if w is not None)]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    for z in s.logits:
        z.requires_grad_()
    torch.autograd.grad(sum(ours(s.logits, s)), s.logits)
    for tensor, (values, version) in zip(tensors, before):
        assert_same_bits({"values": tensor}, {"values": values})
        assert tensor._version == version


# What is refused.


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("bad", [3, 4, -1, -99, 10**12])
def test_a_class_out_of_range_is_an_index_error(bad, gradient):
    z = torch.randn(3, 3, requires_grad=gradient)
    good = torch.tensor([0, 1, 2])
    with pytest.raises(IndexError, match=rf"targets\[1\]: expected classes from 0 to 2 .*-100, got {bad} at row 2"):
        ops.joint_loss([z, z], [good, torch.tensor([0, -100, bad])], [CE, CE])


REFUSED = [
    ("an unknown kind", {"kinds": [CE, "hinge"]}, r"kinds: expected 'cross_entropy'.*got 'hinge'"),
    ("a kind too few", {"kinds": [CE]}, r"kinds: expected 2 names, got 1"),
    ("a target too few", {"targets": [torch.tensor([0, 1])]}, r"targets: expected 2 tensors, got 1"),
    ("an ignore_index too many", {"ignore_index": [-100] * 3}, r"ignore_index: expected 2 numbers, got 3"),
    ("a label_smoothing too few", {"label_smoothing": [0.1]}, r"label_smoothing: expected 2 numbers, got 1"),
    ("a negative label_smoothing", {"label_smoothing": [-0.1, 0.0]}, r"label_smoothing.*-0.1"),
    ("a label_smoothing above one", {"label_smoothing": [1.5, 0.0]}, r"label_smoothing.*1.5"),
    (
        "logits of rank 1",
        {"logits": [torch.zeros(2), torch.zeros(2, 4)]},
        r"logits\[0\]: expected \[rows, classes\], got 1-D",
    ),
    (
        "logits of rank 3",
        {"logits": [torch.zeros(2, 3), torch.zeros(2, 4, 1)]},
        r"logits\[1\]: expected \[rows, classes\], got 3-D",
    ),
    (
        "half logits",
        {"logits": [torch.zeros(2, 3).half(), torch.zeros(2, 4)]},
        r"logits\[0\]: expected dtype Float or Double, got Half",
    ),
    (
        "integer logits",
        {"logits": [torch.zeros(2, 3).long(), torch.zeros(2, 4)]},
        r"logits\[0\]: expected dtype Float or Double, got Long",
    ),
    (
        "logits of two dtypes",
        {"logits": [torch.zeros(2, 3), torch.zeros(2, 4).double()]},
        r"logits\[1\]: expected dtype Float, got Double",
    ),
    (
        "int32 classes",
        {"targets": [torch.tensor([0, 1]).int(), torch.zeros(2, 4)]},
        r"targets\[0\]: expected dtype Long, got Int",
    ),
    (
        "float classes",
        {"targets": [torch.tensor([0.0, 1.0]), torch.zeros(2, 4)]},
        r"targets\[0\]: expected dtype Long, got Float",
    ),
    (
        "a class too few",
        {"targets": [torch.tensor([0]), torch.zeros(2, 4)]},
        r"targets\[0\]: expected size \[2\], got \[1\]",
    ),
    (
        "classes of rank 2",
        {"targets": [torch.zeros(2, 3).long(), torch.zeros(2, 4)]},
        r"targets\[0\]: expected size \[2\], got \[2, 3\]",
    ),
    (
        "values of another size",
        {"targets": [torch.tensor([0, 1]), torch.zeros(2, 3)]},
        r"targets\[1\]: expected size \[2, 4\], got \[2, 3\]",
    ),
    (
        "double values",
        {"targets": [torch.tensor([0, 1]), torch.zeros(2, 4).double()]},
        r"targets\[1\]: expected dtype Float, got Double",
    ),
    (
        "weights of another size",
        {"weights": [torch.ones(4), None]},
        r"weights\[0\]: expected size \[3\], got \[4\]",
    ),
    (
        "double weights",
        {"weights": [torch.ones(3).double(), None]},
        r"weights\[0\]: expected dtype Float, got Double",
    ),
    (
        "targets on another device",
        {"targets": [torch.tensor([0, 1], device="meta"), torch.zeros(2, 4)]},
        r"targets\[0\]: expected .* CPU",
    ),
    (
        "weights on another device",
        {"weights": [torch.ones(3, device="meta"), None]},
        r"weights\[0\]: expected .* CPU",
    ),
    ("no tasks", {"logits": [], "targets": [], "kinds": []}, r"logits: expected at least one task, got none"),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("changes", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_bad_input_is_refused_by_name_and_values(changes, message, gradient):
    arguments = {
        "logits": [torch.zeros(2, 3), torch.zeros(2, 4)],
        "targets": [torch.tensor([0, 1]), torch.zeros(2, 4)],
        "kinds": [CE, MSE],
    } | changes
    if gradient:
        arguments["logits"] = [z.detach().requires_grad_() if z.is_floating_point() else z for z in arguments["logits"]]
    with pytest.raises(RuntimeError, match=message):
        ops.joint_loss(**arguments)


def test_a_weight_too_few_is_refused():
    with pytest.raises((RuntimeError, ValueError), match=r"weights|zip"):
        ops.joint_loss([torch.zeros(2, 3)] * 2, [torch.tensor([0, 1])] * 2, [CE, CE], weights=[torch.ones(3)])
