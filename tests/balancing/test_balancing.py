"""How the tasks' losses become one, against each paper's formula."""

import copy
import math

import pytest
import torch
from balanced import FORMULAS, TASKS, VALUES, filled, learned, leaves

from pymtl.balancing import DWA, GLS, IMTLL, METHODS, RLW, STCH, UW, Balancing

ORDINARY = [name for name in METHODS if name not in ("equal_norm", "gradnorm", "gradient_aggregation")]
every_subset = pytest.mark.parametrize("tasks", [TASKS, ("c", "a"), ("b",)], ids="".join)


@every_subset
@pytest.mark.parametrize(("make", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_the_total_and_its_gradients_are_the_papers(make, formula, tasks):
    method = filled(make())
    losses, mine = leaves(tasks), leaves(tasks)
    parameters = learned(method)
    total, expected = method(losses), formula(mine, parameters)
    assert total.shape == ()
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for task in tasks:
        torch.testing.assert_close(losses[task].grad, mine[task].grad)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), parameters[name].grad)


def test_a_large_loss_does_not_overflow_the_smooth_maximum():
    losses = leaves(values=(3000.0, 1.0, 2999.0))
    total = STCH(TASKS)(losses)
    assert total.item() == pytest.approx(3000 + math.log(1 + math.exp(-1)))
    total.backward()
    assert losses["b"].grad == 0
    assert float(losses["a"].grad) == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_loss_of_zero_keeps_the_geometric_mean_finite_and_differentiable():
    losses = leaves(values=(0.0, 2.0, 4.0))
    total = GLS(TASKS)(losses)
    assert total.item() == pytest.approx((1e-8 * 8) ** (1 / 3))
    total.backward()
    assert losses["a"].grad == 0
    assert float(losses["b"].grad) == pytest.approx(total.item() / 3 / 2)
    assert float(losses["c"].grad) == pytest.approx(total.item() / 3 / 4)


def test_the_minimum_of_imtl_l_scales_each_loss_to_one():
    method = IMTLL(TASKS)
    losses = {task: torch.tensor(value) for task, value in zip(TASKS, VALUES)}
    with torch.no_grad():
        method.log_scale.copy_(-torch.tensor(VALUES).log())
    method(losses).backward()
    torch.testing.assert_close(method.log_scale.grad, torch.zeros(3))


# Dynamic weight average.


def gradients(method, tasks=TASKS):
    losses = leaves(tasks)
    method(losses).backward()
    return {task: float(loss.grad) for task, loss in losses.items()}


def dwa_weights(last, before, temperature, count):
    """Equation 7, of ratios one by one; 1 where there is none."""
    ratios = [last[t] / before[t] if t in last and t in before else 1.0 for t in TASKS]
    powers = [math.exp(r / temperature) for r in ratios]
    return {t: count * p / sum(powers) for t, p in zip(TASKS, powers)}


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_dwa_weighs_by_how_the_losses_fell_in_the_last_two_epochs(temperature):
    method = DWA(TASKS, temperature)
    epochs = [{"a": 3.0, "b": 1.0, "c": 0.2}, {"a": 2.0, "b": 1.5, "c": 0.1}, {"a": 1.9, "b": 0.3, "c": 0.1}]
    for epoch in range(len(epochs) + 1):
        if epoch < 2:
            expected = dict.fromkeys(TASKS, 1.0)
        else:
            expected = dwa_weights(epochs[epoch - 1], epochs[epoch - 2], temperature, 3)
        assert gradients(method) == pytest.approx(expected, rel=1e-5)
        # A batch of some tasks weighs them as a batch of all does.
        assert gradients(method, ("c", "a")) == pytest.approx({t: expected[t] for t in ("a", "c")}, rel=1e-5)
        if epoch < len(epochs):
            method.after_epoch(epochs[epoch])


def test_dwa_takes_a_task_that_was_missing_in_an_epoch_to_have_stood_still():
    method = DWA(TASKS)
    method.after_epoch({"a": 3.0, "b": 1.0, "c": 0.2})
    method.after_epoch({"a": 2.0, "c": 0.1})
    standing = dwa_weights({"a": 2.0, "b": 1.0, "c": 0.1}, {"a": 3.0, "b": 1.0, "c": 0.2}, 2.0, 3)
    assert gradients(method) == pytest.approx(standing, rel=1e-5)
    method.after_epoch({"a": 1.0, "b": 0.4, "c": 0.3})
    back = dwa_weights({"a": 1.0, "b": 0.4, "c": 0.3}, {"a": 2.0, "b": 1.0, "c": 0.1}, 2.0, 3)
    assert gradients(method) == pytest.approx(back, rel=1e-5)


def test_dwa_gives_a_task_that_came_late_no_ratio_until_its_third_epoch():
    method = DWA(TASKS)
    method.after_epoch({"a": 3.0, "c": 0.2})
    method.after_epoch({"a": 2.0, "b": 5.0, "c": 0.1})
    expected = dwa_weights({"a": 2.0, "c": 0.1}, {"a": 3.0, "c": 0.2}, 2.0, 3)
    assert gradients(method) == pytest.approx(expected, rel=1e-5)


def test_dwa_remembers_its_epochs_in_its_state():
    method, other = DWA(TASKS), DWA(TASKS)
    for epoch in ({"a": 3.0, "b": 1.0, "c": 0.2}, {"a": 1.0, "b": 1.0, "c": 0.4}):
        method.after_epoch(epoch)
    other.load_state_dict(method.state_dict())
    assert gradients(other) == gradients(method) == gradients(copy.deepcopy(method))
    other.after_epoch({"a": 1.0, "b": 1.0, "c": 1.0})
    assert gradients(other) != gradients(method)


# Random loss weighting.


def test_random_weights_are_softmaxes_of_normal_draws_of_torchs_seed():
    for tasks in (TASKS, ("c", "a")):
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        powers = [math.exp(x) for x in torch.randn(len(tasks), generator=own, dtype=torch.float64).tolist()]
        torch.manual_seed(3)
        expected = {t: len(tasks) * p / sum(powers) for t, p in zip(tasks, powers)}
        assert gradients(RLW(TASKS), tasks) == pytest.approx(expected)


def test_random_weights_are_one_on_average_and_sum_to_the_number_of_tasks():
    method = RLW(TASKS)
    drawn = [gradients(method) for _ in range(2000)]
    assert all(sum(weights.values()) == pytest.approx(3) for weights in drawn)
    for task in TASKS:
        assert sum(weights[task] for weights in drawn) / len(drawn) == pytest.approx(1.0, abs=0.06)
    assert gradients(method, ("b",)) == {"b": 1.0}


def test_random_weights_are_their_own_and_go_on_from_their_state():
    method, other = RLW(TASKS), RLW(TASKS)
    gradients(method)
    other.load_state_dict(method.state_dict())
    expected = [gradients(method) for _ in range(3)]
    torch.manual_seed(99)
    torch.randn(7)  # whatever another process draws
    assert [gradients(other) for _ in range(3)] == expected


# What all have in common.


@pytest.mark.parametrize("name", ORDINARY)
def test_every_method_takes_float32_and_float64_and_gives_the_same_kind(name):
    for dtype in (torch.float32, torch.float64):
        losses = leaves(dtype=dtype)
        total = METHODS[name](TASKS)(losses)
        assert total.dtype == dtype
        total.backward()
        assert all(loss.grad.isfinite() and loss.grad > 0 for loss in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_unknown_tasks_and_bad_names_are_refused(name):
    pytest.importorskip("torchjd")
    options = {"aggregator": "Sum"} if name == "gradient_aggregation" else {}
    method = METHODS[name](TASKS, **options)
    assert isinstance(method, Balancing)
    assert method.tasks == TASKS
    with pytest.raises(KeyError, match=r"losses: unknown task 'd', expected one of \['a', 'b', 'c'\]"):
        method({"a": torch.tensor(1.0), "d": torch.tensor(1.0)})
    for tasks in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="tasks: expected at least one name, all different"):
            METHODS[name](tasks, **options)
    assert "tasks=['a', 'b', 'c']" in repr(method)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="regression: unknown task 'd'"):
        UW(TASKS, regression=["d"])
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            DWA(TASKS, temperature=wrong)
        with pytest.raises(ValueError, match="mu"):
            STCH(TASKS, mu=wrong)


@pytest.mark.parametrize("name", ["uw", "imtl_l", "gradnorm"])
def test_what_is_learned_is_saved_and_loaded(name):
    method, other = filled(METHODS[name](TASKS)), METHODS[name](TASKS)
    other.load_state_dict(method.state_dict())
    assert list(method.parameters())
    for a, b in zip(method.parameters(), other.parameters()):
        assert torch.equal(a, b)
