"""Balancing inside of the joint loss: what is weighted first, balanced then and added last."""

import pytest
import torch
from balanced import FORMULAS, TASKS, WEIGHTS, cross_entropies, filled, joint_sample, learned

from pymtl import JointLoss, Logits
from pymtl.balancing import DWA, EW, STCH, UW


def joint_formulas():
    return {name: pair for name, pair in FORMULAS.items() if name != "STCH with options"}


@pytest.mark.parametrize(("make", "formula"), joint_formulas().values(), ids=joint_formulas())
def test_the_joint_loss_weighs_first_balances_then_and_adds_penalties_last(make, formula):
    joint = JointLoss(WEIGHTS, balancing=filled(make()))
    logits, targets = joint_sample()
    penalty = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    given = Logits(logits)
    given.penalties = {"l2": penalty, "other": 2 * penalty}
    result = joint(given, targets)
    losses = cross_entropies(logits, targets)
    torch.testing.assert_close(result.per_task, losses)
    weighted = {task: WEIGHTS[task] * loss for task, loss in losses.items()}
    expected = formula(weighted, learned(joint.balancing)) + 3 * penalty
    torch.testing.assert_close(result.total, expected)
    assert result.penalties == given.penalties
    inputs = [*logits.values(), penalty]
    wanted = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(torch.autograd.grad(result.total, inputs, retain_graph=True), wanted)
    joint.backward(result, joint.parameters())
    torch.testing.assert_close(tuple(leaf.grad for leaf in inputs), wanted)
    assert not joint.combines_gradients


@pytest.mark.parametrize(("make", "formula"), joint_formulas().values(), ids=joint_formulas())
def test_scales_are_a_further_factor_of_a_task(make, formula):
    joint = JointLoss(WEIGHTS, balancing=filled(make()))
    logits, targets = joint_sample()
    targets.pop("c")
    result = joint(logits, targets, {"b": 0.25, "c": 9.0})
    losses = cross_entropies(logits, targets)
    torch.testing.assert_close(result.per_task, losses)
    weighted = {"a": 0.5 * losses["a"], "b": 0.75 * losses["b"]}
    torch.testing.assert_close(result.total, formula(weighted, learned(joint.balancing)))


def test_scales_are_a_further_factor_of_the_plain_sum_too():
    logits, targets = joint_sample()
    losses = cross_entropies(logits, targets)
    total = JointLoss(WEIGHTS)(logits, targets, {"b": 0.25}).total
    torch.testing.assert_close(total, 0.5 * losses["a"] + 0.75 * losses["b"] + losses["c"])


def test_the_ideal_point_is_of_the_weighted_losses():
    joint = JointLoss(WEIGHTS, balancing=STCH(TASKS, mu=0.5, ideal=0.3))
    logits, targets = joint_sample()
    losses = cross_entropies(logits, targets)
    expected = 0.5 * sum(torch.exp((WEIGHTS[t] * losses[t] - 0.3) / 0.5) for t in TASKS).log()
    torch.testing.assert_close(joint(logits, targets).total, expected)


def test_the_order_of_the_methods_tasks_does_not_matter():
    logits, targets = joint_sample()
    totals = []
    for tasks in (TASKS, ("c", "a", "b")):
        method = UW(tasks, regression=["a"])
        with torch.no_grad():
            method.log_variance.copy_(torch.tensor([{"a": 0.1, "b": -1.0, "c": 2.0}[t] for t in tasks]))
        totals.append(JointLoss(WEIGHTS, balancing=method)(logits, targets).total)
    torch.testing.assert_close(*totals)


def test_what_a_method_learns_is_the_joint_losss_to_learn_and_to_save():
    joint = JointLoss(WEIGHTS, balancing=UW(TASKS))
    assert [name for name, _ in joint.named_parameters()] == ["balancing.log_variance"]
    assert set(joint.state_dict()) == {"balancing.log_variance"}
    assert not list(JointLoss(WEIGHTS, balancing=DWA(TASKS)).parameters())
    assert not list(JointLoss(WEIGHTS).parameters())
    logits, targets = joint_sample()
    optimizer = torch.optim.SGD(joint.parameters(), lr=0.1)
    joint(logits, targets).total.backward()
    optimizer.step()
    losses = cross_entropies(logits, targets)
    expected = [0.1 * (WEIGHTS[task] * losses[task].item() - 0.5) for task in TASKS]
    assert joint.balancing.log_variance.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_method_of_other_tasks_is_refused():
    for tasks in (["a", "b"], ["a", "b", "c", "d"], ["a", "b", "d"]):
        with pytest.raises(ValueError, match="balancing: expected the tasks"):
            JointLoss(WEIGHTS, balancing=EW(tasks))
