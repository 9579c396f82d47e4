"""FAMO, against algorithm 1 of its paper."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from balanced import LENGTHS, TASKS, TOKEN_TARGETS, TOKENS, B, leaves, model_and_loss
from torch import nn

from pymtl import ClassificationHead, TokenClassificationHead
from pymtl.balancing import FAMO


def test_the_weights_of_famos_losses_sum_to_one():
    method, losses = FAMO(TASKS), leaves()
    with torch.no_grad():
        method.xi.copy_(torch.tensor([0.3, -1.0, 2.0]))
    method(losses).backward()
    assert float(sum(l.grad for l in losses.values())) == pytest.approx(1.0, rel=1e-6)


class PlainFAMO:
    """Algorithm 1 of the paper, with its own Adam for xi."""

    def __init__(self, learning_rate, decay, least, dtype):
        self.xi = torch.zeros(len(TASKS), dtype=dtype, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.xi], lr=learning_rate, weight_decay=decay)
        self.least = least

    def total(self, losses):
        self.before = {task: loss.detach() for task, loss in losses.items()}
        z = F.softmax(self.xi[[TASKS.index(t) for t in losses]].detach(), -1)
        distances = torch.stack([loss - self.least for loss in losses.values()])
        c = (z / distances).sum().detach()
        return (distances.log() * z / c).sum()

    def update(self, losses):
        fell = [(self.before[t] - self.least).log() - (losses[t].detach() - self.least).log() for t in losses]
        self.optimizer.zero_grad()
        z = F.softmax(self.xi[[TASKS.index(t) for t in losses]], -1)
        z.backward(torch.stack(fell))
        self.optimizer.step()


class Bowls(nn.Module):
    """Three losses of one point, that pull apart and are never 0."""

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self):
        x, y = self.point
        return {"a": (x - 2) ** 2 + 1, "b": 3 * (y + 1) ** 2 + 0.6, "c": 0.1 * (x + y) ** 2 + 0.7}


BATCHES = [TASKS, TASKS, ("c", "a"), TASKS, ("b",), TASKS, ("a", "b"), TASKS]
OPTIONS = {"learning_rate": 0.1, "decay": 0.01, "least": 0.5}


def famo_steps(method, bowls, batches, plain=False):
    """Gradient descent with the method; the totals and points on the way."""
    way = []
    for tasks in batches:
        losses = bowls()
        total = (method.total if plain else method)({task: losses[task] for task in tasks})
        bowls.zero_grad()
        total.backward()
        with torch.no_grad():
            bowls.point -= 0.05 * bowls.point.grad
            after = bowls()
        (method.update if plain else method.after_step)({task: after[task] for task in tasks})
        way += [total.detach(), bowls.point.detach().clone(), method.xi.detach().clone()]
    return way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"learning_rate": 0.025, "decay": 1e-3, "least": 0.0}, OPTIONS], ids=["", "other"])
def test_famo_goes_the_way_of_algorithm_1(options, dtype):
    ours, bowls = FAMO(TASKS, **options).to(dtype), Bowls().to(dtype)
    theirs, twin = PlainFAMO(**options, dtype=dtype), copy.deepcopy(bowls)
    actual = famo_steps(ours, bowls, BATCHES)
    expected = famo_steps(theirs, twin, BATCHES, plain=True)
    torch.testing.assert_close(actual, expected)
    assert ours.xi.dtype == dtype
    assert ours.xi.any()


def saved_and_loaded(method):
    other = FAMO(TASKS, **OPTIONS)
    other.load_state_dict(method.state_dict())
    return other


def pickled(method):
    return pickle.loads(pickle.dumps(method))


@pytest.mark.parametrize(
    "twin",
    [
        pytest.param(saved_and_loaded, id="state"),
        pytest.param(copy.deepcopy, id="copy"),
        pytest.param(pickled, id="pickle"),
    ],
)
def test_a_twin_of_famo_goes_on_alike_and_by_itself(twin):
    method, bowls = FAMO(TASKS, **OPTIONS), Bowls()
    famo_steps(method, bowls, BATCHES[:4])
    other, others_bowls = twin(method), copy.deepcopy(bowls)
    kept = method.xi.clone()
    way = famo_steps(other, others_bowls, BATCHES[4:])
    assert torch.equal(method.xi, kept)
    for a, b in zip(way, famo_steps(method, bowls, BATCHES[4:])):
        assert torch.equal(a, b)


def test_the_state_of_famo_holds_only_what_torch_loads_safely(tmp_path):
    method, bowls = FAMO(TASKS, **OPTIONS), Bowls()
    famo_steps(method, bowls, BATCHES[:4])
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = FAMO(TASKS, **OPTIONS)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    a = famo_steps(other, copy.deepcopy(bowls), BATCHES[4:])
    for one, another in zip(a, famo_steps(method, bowls, BATCHES[4:])):
        assert torch.equal(one, another)


def test_famo_goes_on_in_float64_where_it_was_in_float32():
    method, bowls = FAMO(TASKS, **OPTIONS), Bowls()
    way = famo_steps(copy.deepcopy(method), copy.deepcopy(bowls), BATCHES)
    famo_steps(method, bowls, BATCHES[:4])
    wide = famo_steps(method.double(), bowls.double(), BATCHES[4:])
    for a, b in zip(wide, way[12:]):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)


def test_famo_still_learns_after_its_state_was_assigned():
    method, bowls = FAMO(TASKS, **OPTIONS), Bowls()
    famo_steps(method, bowls, BATCHES[:4])
    other = FAMO(TASKS, **OPTIONS)
    other.load_state_dict(copy.deepcopy(method.state_dict()), assign=True)
    a = famo_steps(other, copy.deepcopy(bowls), BATCHES[4:])
    for one, another in zip(a, famo_steps(method, bowls, BATCHES[4:])):
        assert torch.equal(one, another)


def test_the_losses_after_the_step_may_be_computed_in_inference_mode():
    moved = []
    for mode in (torch.inference_mode, torch.no_grad):
        method, losses = FAMO(TASKS), leaves()
        method(losses)
        with mode():
            method.after_step({task: (0.5 + 0.1 * k) * loss for k, (task, loss) in enumerate(losses.items())})
        moved.append(method.xi.clone())
    assert torch.equal(*moved)
    assert moved[0].any()


def test_an_evaluation_without_gradients_between_changes_nothing():
    ways = []
    for evaluating in (False, True):
        method, losses = FAMO(TASKS), leaves()
        method(losses)
        if evaluating:
            with torch.no_grad():
                method({task: 7 * loss for task, loss in losses.items()})
        method.after_step({"a": 0.5 * losses["a"], "b": losses["b"], "c": 2 * losses["c"]})
        ways.append(method.xi)
    assert torch.equal(*ways)
    assert ways[0].any()


def test_losses_after_a_step_that_nothing_came_before_move_nothing():
    method = FAMO(TASKS)
    method.after_step(leaves())
    method(leaves(("a", "b")))
    method.after_step({"c": torch.tensor(1.0)})
    assert not method.xi.any()


def test_a_task_without_a_label_leaves_famo_the_others_gradients():
    model, joint = model_and_loss({"a": ClassificationHead(3), "b": TokenClassificationHead(4)}, FAMO(["a", "b"]))
    result = joint(model(TOKENS, LENGTHS), {"a": torch.full((B,), -100), "b": TOKEN_TARGETS})
    (weight,) = torch.autograd.grad(result.total, result.per_task["b"])
    assert weight > 1e-3
