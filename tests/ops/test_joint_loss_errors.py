import pytest
import torch
from losses import CE, MSE

from pymtl import ops


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
