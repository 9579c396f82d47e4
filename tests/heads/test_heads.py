import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_same_bits
from torch import nn

from pymtl import (
    BinaryCrossEntropy,
    ClassificationHead,
    CrossEntropy,
    Head,
    MeanSquaredError,
    MultiLabelHead,
    RegressionHead,
    TokenClassificationHead,
)

EVERY = {
    "classification": lambda **options: ClassificationHead(7, **options),
    "token classification": lambda **options: TokenClassificationHead(7, **options),
    "regression": lambda **options: RegressionHead(7, **options),
    "multi-label": lambda **options: MultiLabelHead(7, **options),
}
every_head = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@every_head
def test_a_head_starts_with_the_weights_of_a_linear_layer(make):
    torch.manual_seed(4)
    head = make(in_features=12)
    torch.manual_seed(4)
    assert_same_bits(head.state_dict(), nn.Linear(12, 7).state_dict())
    torch.manual_seed(4)
    later = make()
    later.materialize(12)
    assert_same_bits(later.state_dict(), head.state_dict())
    torch.manual_seed(4)
    head.reset_parameters()
    assert_same_bits(later.state_dict(), head.state_dict())


@every_head
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_a_head_is_a_linear_layer(make, rows):
    head = make(in_features=12)
    x, seed = torch.randn(rows, 12), torch.randn(rows, 7)

    def results(function, dtype):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in head.named_parameters()}
        leaves["x"] = x.to(dtype).requires_grad_()
        output = function(leaves)
        gradients = torch.autograd.grad(output, list(leaves.values()), seed.to(dtype))
        return {"output": output.detach()} | dict(zip(leaves, gradients))

    def plain(leaves):
        return F.linear(leaves["x"], leaves["weight"], leaves["bias"])

    def ours(leaves):
        parameters = {name: leaves[name] for name in ("weight", "bias")}
        return torch.func.functional_call(head, parameters, leaves["x"])

    actual = results(ours, torch.float32)
    assert_parity(actual, results(plain, torch.float32), results(plain, torch.float64))
    with torch.no_grad():
        assert_same_bits({"output": head(x)}, {"output": actual["output"]})


def test_a_head_of_one_output_of_float64_works():
    head = RegressionHead(in_features=5).double()
    assert head(torch.randn(3, 5, dtype=torch.float64)).shape == (3, 1)


@every_head
def test_the_size_is_fixed_once_and_checked_from_then_on(make):
    head = make()
    assert isinstance(head.weight, nn.UninitializedParameter)
    head.materialize(12)
    weight = head.weight
    before = weight.clone()
    head.materialize(12)
    assert head.weight is weight
    assert torch.equal(weight, before)
    assert head.weight.shape == (7, 12)
    assert head.bias.shape == (7,)
    with pytest.raises(ValueError, match=r"encoder of 12 features, got 13"):
        head.materialize(13)


def test_each_head_knows_its_loss_and_its_pooling():
    weighted = CrossEntropy(weight=(1.0, 2.0, 3.0), label_smoothing=0.1)
    assert ClassificationHead(3).loss == TokenClassificationHead(3).loss == CrossEntropy()
    assert ClassificationHead(3, loss=weighted).loss is weighted
    assert TokenClassificationHead(3, loss=weighted).loss is weighted
    assert RegressionHead().loss == MeanSquaredError()
    assert RegressionHead().out_features == 1
    positive = BinaryCrossEntropy(weight=(1.0, 2.0))
    assert MultiLabelHead(2).loss == BinaryCrossEntropy()
    assert MultiLabelHead(2, loss=positive).loss is positive
    assert TokenClassificationHead(3).pooling is None
    for kind in (ClassificationHead, RegressionHead, MultiLabelHead):
        assert kind(2).pooling == "last"
        assert [kind(2, pooling=pooling).pooling for pooling in ("last", "mean", "max")] == ["last", "mean", "max"]


@pytest.mark.parametrize("size", [0, -1, 2.0, "3", None], ids=str)
@pytest.mark.parametrize("kind", [ClassificationHead, TokenClassificationHead, RegressionHead, MultiLabelHead])
def test_a_number_of_outputs_that_is_none_is_refused(kind, size):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected a number of outputs above 0, got {size!r}"):
        kind(size)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"pooling: expected one of .*, got 'median'"):
        ClassificationHead(3, pooling="median")
    with pytest.raises(ValueError, match=r"loss.weight: expected 3 numbers, got 2"):
        ClassificationHead(3, loss=CrossEntropy(weight=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"loss.weight: expected 2 numbers, got 3"):
        MultiLabelHead(2, loss=BinaryCrossEntropy(weight=(1.0, 2.0, 3.0)))
    head = ClassificationHead(3, in_features=5)
    with pytest.raises(RuntimeError):
        head(torch.randn(2, 6))
    with pytest.raises(RuntimeError):
        head(torch.randn(2, 5, dtype=torch.float64))


@every_head
def test_a_head_can_be_shown_copied_and_pickled(make):
    head = make(in_features=5)
    assert isinstance(head, Head)
    assert repr(head).startswith(f"{type(head).__name__}(7, pooling={head.pooling!r}")
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert_same_bits(twin.state_dict(), head.state_dict())
        assert (twin.pooling, twin.loss) == (head.pooling, head.loss)
    assert isinstance(copy.deepcopy(make()).weight, nn.UninitializedParameter)
