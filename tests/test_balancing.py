"""How the tasks' losses become one, against each paper's formula written out here."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pymtl import (
    LSTM,
    ClassificationHead,
    CTCHead,
    JointLoss,
    LanguageModelHead,
    Logits,
    MultiTaskModel,
    Reads,
    TokenClassificationHead,
    language_model_targets,
    pack,
)
from pymtl.balancing import (
    DWA,
    EW,
    FAMO,
    GLS,
    IMTLL,
    METHODS,
    RLW,
    STCH,
    UW,
    Balancing,
    GradientAggregation,
    GradNorm,
)

TASKS = ("a", "b", "c")
VALUES = (0.7, 2.5, 0.05)
ORDINARY = [name for name in METHODS if name not in ("gradnorm", "gradient_aggregation")]
every_subset = pytest.mark.parametrize("tasks", [TASKS, ("c", "a"), ("b",)], ids="".join)


def leaves(tasks=TASKS, values=VALUES, dtype=torch.float64):
    """Losses that are leaves of the graph themselves."""
    of = dict(zip(TASKS, values))
    return {task: torch.tensor(of[task], dtype=dtype, requires_grad=True) for task in tasks}


def filled(method):
    """The method, with what it learns away from where it starts."""
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    return method


def learned(method):
    return {n: p.detach().double().requires_grad_() for n, p in method.named_parameters()}


# Value and gradients, by the papers.


def uncertainty(regression):
    def formula(losses, learned):
        total = 0.0
        for task, loss in losses.items():
            log_variance = learned["log_variance"][TASKS.index(task)]
            sigma = (log_variance / 2).exp()
            total = total + loss / ((2 if task in regression else 1) * sigma**2) + sigma.log()
        return total

    return formula


def imtl_l(losses, learned):
    s = learned["log_scale"]
    return sum(s[TASKS.index(task)].exp() * loss - s[TASKS.index(task)] for task, loss in losses.items())


def geometric(losses, learned):
    product = math.prod(losses.values())
    return product ** (1 / len(losses))


def tchebycheff(mu, ideal):
    return lambda losses, learned: mu * torch.log(sum(torch.exp((l - ideal) / mu) for l in losses.values()))


def famo(losses, learned):
    z = {task: 1 / len(losses) for task in losses}  # softmax of zeros
    c = 1 / sum(z[task] / loss.item() for task, loss in losses.items())
    return sum(c * z[task] * loss.log() for task, loss in losses.items())


FORMULAS = {
    "EW": (lambda: EW(TASKS), lambda losses, learned: sum(losses.values())),
    "UW": (lambda: UW(TASKS), uncertainty(())),
    "UW with regression": (lambda: UW(TASKS, regression=["c", "a"]), uncertainty(("a", "c"))),
    "DWA": (lambda: DWA(TASKS), lambda losses, learned: sum(losses.values())),
    "GLS": (lambda: GLS(TASKS), geometric),
    "IMTL-L": (lambda: IMTLL(TASKS), imtl_l),
    "STCH": (lambda: STCH(TASKS), tchebycheff(1.0, 0.0)),
    "STCH with options": (lambda: STCH(TASKS, mu=0.3, ideal=0.02), tchebycheff(0.3, 0.02)),
    "FAMO": (lambda: FAMO(TASKS), famo),
}


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


def test_the_weights_of_famos_losses_sum_to_one():
    method, losses = FAMO(TASKS), leaves()
    with torch.no_grad():
        method.xi.copy_(torch.tensor([0.3, -1.0, 2.0]))
    method(losses).backward()
    assert float(sum(l.grad for l in losses.values())) == pytest.approx(1.0, rel=1e-6)


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


def dwa_weights(last, before, temperature, count):
    """Equation 7, of ratios one by one; 1 where there is none."""
    ratios = [last[t] / before[t] if t in last and t in before else 1.0 for t in TASKS]
    powers = [math.exp(r / temperature) for r in ratios]
    return {t: count * p / sum(powers) for t, p in zip(TASKS, powers)}


def gradients(method, tasks=TASKS):
    losses = leaves(tasks)
    method(losses).backward()
    return {task: float(loss.grad) for task, loss in losses.items()}


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
        z = torch.randn(len(tasks), dtype=torch.float64)
        powers = [math.exp(x) for x in z.tolist()]
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


# FAMO.


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
    method, losses = FAMO(TASKS), leaves()
    method(losses)
    with torch.inference_mode():
        method.after_step({task: 0.5 * loss for task, loss in losses.items()})


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


# GradNorm.


def shared_and_losses(weights):
    """Shared states, and three losses of them through heads."""
    states = [torch.tanh(weights), weights**2]  # the last state is used by one task only
    heads = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0], [2.0, 2.0, 2.0]], dtype=weights.dtype)
    losses = {
        "a": (heads[0] * states[0]).sum() ** 2 + 0.1,
        "b": (heads[1] * states[0]).exp().mean() + states[1].sum(),
        "c": (heads[2] * states[0]).square().mean(),
    }
    return states, losses


def gradnorm(log_weights, losses, states, first, alpha):
    """Algorithm 1: the gradient of the weights, in plain steps."""
    leaf = log_weights.detach().clone().requires_grad_()
    weights = len(TASKS) * torch.softmax(leaf, 0)
    norms, rates = [], []
    for task, loss in losses.items():
        parts = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
        norm = torch.cat([g.flatten() for g in parts if g is not None]).norm()
        norms.append(weights[TASKS.index(task)] * norm)
        rates.append(loss.detach() / first[task])
    mean = (sum(norms) / len(norms)).detach()
    average = sum(rates) / len(rates)
    distance = sum((norm - mean * (rate / average) ** alpha).abs() for norm, rate in zip(norms, rates))
    distance.backward()
    return weights.detach(), leaf.grad, [n.item() for n in norms], [mean * (r / average) ** alpha for r in rates]


@pytest.mark.parametrize("alpha", [0.0, 1.5])
@pytest.mark.parametrize("batches", [[TASKS] * 4, [("c", "a"), TASKS, ("b",), TASKS]], ids=["all", "some"])
def test_gradnorm_moves_its_weights_as_the_algorithm_says(alpha, batches):
    method = GradNorm(TASKS, alpha).double()
    weights = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    first = {}
    for tasks in batches:
        states, losses = shared_and_losses(weights)
        losses = {task: losses[task] for task in tasks}
        for task, loss in losses.items():
            first.setdefault(task, loss.detach())
        w, of_weights, _, _ = gradnorm(method.log_weights, losses, states, first, alpha)
        expected = sum(w[TASKS.index(t)] * loss for t, loss in losses.items())
        (of_model,) = torch.autograd.grad(expected, weights, retain_graph=True)
        total = method(losses, states)
        torch.testing.assert_close(total, expected)
        method.zero_grad()
        weights.grad = None
        total.backward()
        torch.testing.assert_close(weights.grad, of_model)
        torch.testing.assert_close(method.log_weights.grad, of_weights)
        with torch.no_grad():
            method.log_weights -= 0.1 * method.log_weights.grad
            weights -= 0.01 * weights.grad
        assert method.weights().sum().item() == pytest.approx(3)
    torch.testing.assert_close(method.first, torch.stack([first[t] for t in TASKS]))


def test_gradnorm_brings_the_norms_together():
    method = GradNorm(TASKS, alpha=0.0).double()
    weights = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    states, losses = shared_and_losses(weights)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.005)
    spreads = []
    for _ in range(200):
        states, losses = shared_and_losses(weights)
        _, _, norms, _ = gradnorm(method.log_weights, losses, states, dict.fromkeys(TASKS, 1.0), 0.0)
        spreads.append(max(norms) / min(norms))
        optimizer.zero_grad()
        method(losses, states).backward()
        optimizer.step()
    assert spreads[0] > 2
    assert spreads[-1] < 1.2


def test_gradnorm_needs_states_that_all_tasks_share():
    with pytest.raises(ValueError, match="shared: GradNorm needs states that all tasks share"):
        GradNorm(TASKS)(leaves())
    with torch.no_grad():  # but not to evaluate
        assert float(GradNorm(TASKS)(leaves())) == pytest.approx(sum(VALUES))


def test_gradnorm_remembers_the_first_losses_in_its_state():
    method, other = GradNorm(TASKS), GradNorm(TASKS)
    weights = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    states, losses = shared_and_losses(weights)
    with torch.no_grad():
        method(losses, states)
    assert method.first.isnan().all()
    method(losses, states)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other.first, torch.stack([losses[t].detach() for t in TASKS]))


def test_a_batch_without_labels_is_not_gradnorms_first():
    model, joint = model_and_loss({"a": ClassificationHead(3), "b": TokenClassificationHead(4)}, GradNorm(["a", "b"]))
    joint(model(TOKENS, LENGTHS), {"a": torch.full((B,), -100), "b": TOKEN_TARGETS})
    result = joint(model(TOKENS, LENGTHS), {"a": CLASSES, "b": TOKEN_TARGETS})
    torch.testing.assert_close(joint.balancing.first[0], result.per_task["a"].detach().float())


def test_a_task_without_a_label_leaves_famo_the_others_gradients():
    model, joint = model_and_loss({"a": ClassificationHead(3), "b": TokenClassificationHead(4)}, FAMO(["a", "b"]))
    result = joint(model(TOKENS, LENGTHS), {"a": torch.full((B,), -100), "b": TOKEN_TARGETS})
    (weight,) = torch.autograd.grad(result.total, result.per_task["b"])
    assert weight > 1e-3


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


# In the joint loss.

B, T, E, H, VOCABULARY = 4, 6, 5, 6, 20
LENGTHS = [3, 6, 1, 4]
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(1, VOCABULARY, (B, T), generator=GENERATOR)
CLASSES = torch.tensor([0, 2, -100, 1])
TOKEN_TARGETS = torch.randint(4, (B, T), generator=GENERATOR)
TOKEN_TARGETS = TOKEN_TARGETS.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
WEIGHTS = {"a": 0.5, "b": 3.0, "c": 1.0}


def joint_sample():
    logits = {task: torch.randn(B, 3, dtype=torch.float64, requires_grad=True) for task in TASKS}
    return logits, {task: torch.randint(3, (B,)) for task in TASKS}


def cross_entropies(logits, targets):
    return {task: F.cross_entropy(logits[task], targets[task]) for task in targets}


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


def model_and_loss(heads, balancing, weights=None):
    torch.manual_seed(1)
    encoder = LSTM(E, H, batch_first=True, bidirectional=True)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads).double()
    return model, JointLoss(weights or dict.fromkeys(heads, 1.0), model.losses, balancing)


def test_gradnorm_reads_the_encoders_states_in_a_model():
    weights = {"a": 0.5, "b": 3.0}
    heads = {"a": ClassificationHead(3), "b": TokenClassificationHead(4)}
    model, joint = model_and_loss(heads, GradNorm(["a", "b"]), weights)
    joint.double()
    targets = {"a": CLASSES, "b": TOKEN_TARGETS}
    seen = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(TOKENS, LENGTHS)
    hook.remove()
    (output, (h_n, _)) = seen[0]
    joint(logits, targets).total.backward()
    norms = {}
    for task in targets:
        model2 = model(TOKENS, LENGTHS)
        loss = weights[task] * joint(model2, {task: targets[task]}).per_task[task]
        parts = torch.autograd.grad(loss, model2.shared, allow_unused=True)
        norms[task] = torch.cat([g.flatten() for g in parts if g is not None]).norm()
    torch.testing.assert_close(model2.shared[0], output.data)
    torch.testing.assert_close(model2.shared[1], torch.cat(tuple(h_n), 1))
    # All rates are 1 in the first step: each norm is drawn to the mean, and a softmax couples the weights.
    mean = sum(norms.values()) / 2
    sign = {task: float(torch.sign(norm - mean)) for task, norm in norms.items()}
    of_w = [sign[t] * norms[t] for t in ("a", "b")]
    expected = torch.stack([0.5 * (of_w[0] - of_w[1]), 0.5 * (of_w[1] - of_w[0])])
    torch.testing.assert_close(joint.balancing.log_weights.grad, expected)


# Gradients combined.

HEADS = {
    "classes and tokens": {"a": lambda: ClassificationHead(3), "b": lambda: TokenClassificationHead(4)},
    "two of classes": {"a": lambda: ClassificationHead(3), "b": lambda: ClassificationHead(4)},
    "classes and CTC": {"a": lambda: ClassificationHead(3), "b": lambda: CTCHead(5)},
    "three": {"a": lambda: ClassificationHead(3), "b": lambda: TokenClassificationHead(4), "c": lambda: CTCHead(5)},
    "after": {
        "a": lambda: ClassificationHead(3, reads=Reads(after="b")),
        "b": lambda: TokenClassificationHead(4),
    },
}
LABELS = torch.tensor([[1, 2], [4, -100], [3, -100], [2, 2]])


def targets_for(heads):
    found = {}
    for task, head in heads.items():
        if isinstance(head, CTCHead):
            found[task] = LABELS
        else:
            found[task] = CLASSES if head.pooling is not None else TOKEN_TARGETS
    return found


def packed_targets(targets):
    return {t: pack(y, LENGTHS, batch_first=True) if y.shape == (B, T) else y for t, y in targets.items()}


def jacobian(model, targets, weights):
    """The gradient of each task's weighted loss, each from a forward pass of its own."""
    found = {}
    for task in targets:
        twin = copy.deepcopy(model)
        logits = twin(pack(TOKENS, LENGTHS, batch_first=True))
        result = JointLoss({task: weights[task]}, {task: model.losses[task]})(
            {task: logits[task]}, {task: targets[task]}
        )
        result.total.backward()
        found[task] = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()}
    return found


def is_shared(name):
    return not name.startswith("heads.")


def aggregate(heads, aggregator, targets=None, weights=None, scales=None):
    """Gradients by name of the method, and those expected: torchjd's aggregator on the Jacobian made by hand."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    method = GradientAggregation(list(heads), aggregator)
    model, joint = model_and_loss(heads, method, weights)
    targets = packed_targets(targets_for(heads) if targets is None else targets)
    rows = jacobian(model, targets, {t: joint.loss_weights[t] * (scales or {}).get(t, 1.0) for t in heads})
    names = [name for name, _ in model.named_parameters() if is_shared(name)]
    matrix = torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows.values()])
    torch.manual_seed(7)
    combined = getattr(aggregation, aggregator)()(matrix)
    expected, start = {}, 0
    for name, parameter in model.named_parameters():
        if is_shared(name):
            expected[name] = combined[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        else:
            expected[name] = sum(row[name] for row in rows.values())
    torch.manual_seed(7)
    result = joint(model(pack(TOKENS, LENGTHS, batch_first=True)), targets, scales)
    joint.backward(result, model.parameters())
    actual = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return actual, expected, model


def made(heads):
    return {task: make() for task, make in heads.items()}


every_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


@every_heads
@pytest.mark.parametrize("aggregator", ["Sum", "MGDA", "PCGrad", "AlignedMTL", "Mean"])
def test_shared_parameters_get_the_aggregated_jacobian_and_heads_their_own_gradient(aggregator, heads):
    actual, expected, _ = aggregate(made(heads), aggregator)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")
        assert expected[name].any()


@every_heads
def test_upgrad_gives_torchjds_gradients(heads):
    pytest.importorskip("qpsolvers")
    pytest.importorskip("quadprog")
    actual, expected, _ = aggregate(made(heads), "UPGrad")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@every_heads
def test_the_sum_of_the_gradients_is_the_ordinary_gradient(heads):
    pytest.importorskip("torchjd")
    weights = dict(zip(heads, (0.5, 3.0, 1.0)))
    actual, _, model = aggregate(made(heads), "Sum", weights=weights)
    model.zero_grad()
    joint = JointLoss(weights, model.losses)
    total = joint(model(pack(TOKENS, LENGTHS, batch_first=True)), packed_targets(targets_for(model.heads))).total
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad)


def test_one_task_of_several_gets_its_own_gradient():
    heads = made(HEADS["classes and tokens"])
    actual, expected, model = aggregate(heads, "MGDA", targets={"b": TOKEN_TARGETS})
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
    assert model.heads["a"].weight.grad is None or not model.heads["a"].weight.grad.any()


def test_gradients_are_added_to_those_that_are_there():
    pytest.importorskip("torchjd")
    heads = made(HEADS["classes and CTC"])
    model, joint = model_and_loss(heads, GradientAggregation(list(heads), "MGDA"))
    targets = packed_targets(targets_for(heads))
    found = []
    for _ in range(2):
        joint.backward(joint(model(pack(TOKENS, LENGTHS, batch_first=True)), targets), model.parameters())
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], 2 * gradient)


def test_scales_are_in_the_combined_gradients_too():
    actual, expected, _ = aggregate(made(HEADS["classes and CTC"]), "Sum", scales={"a": 0.25, "b": 2.0})
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_penalties_join_the_combined_gradients():
    heads = made(HEADS["classes and CTC"])
    actual, _, model = aggregate(heads, "Sum")
    model.zero_grad()
    joint = JointLoss({"a": 1.0, "b": 1.0}, model.losses, GradientAggregation(["a", "b"], "Sum"))
    logits = model(pack(TOKENS, LENGTHS, batch_first=True))
    logits.penalties = {"l2": 0.5 * model.embedding.weight.square().sum()}
    joint.backward(joint(logits, packed_targets(targets_for(heads))), model.parameters())
    for name, parameter in model.named_parameters():
        extra = parameter.detach() if name == "embedding.weight" else 0.0
        torch.testing.assert_close(parameter.grad, actual[name] + extra)


def test_a_head_that_reads_the_tokens_too_is_refused():
    heads = {"a": ClassificationHead(3, reads=Reads(skip=True)), "b": CTCHead(5)}
    with pytest.raises(ValueError, match="heads that read the shared states alone"):
        aggregate(heads, "Sum")


def test_a_tied_language_model_is_refused():
    pytest.importorskip("torchjd")
    embedding = nn.Embedding(VOCABULARY, E)
    heads = {"lm": LanguageModelHead(VOCABULARY, embedding=embedding), "b": CTCHead(5)}
    encoder = LSTM(E, H, batch_first=True, bidirectional=True)
    model = MultiTaskModel(embedding, encoder, heads).double()
    tokens = pack(TOKENS, LENGTHS, batch_first=True)
    targets = {"lm": language_model_targets(tokens, VOCABULARY), "b": LABELS}
    joint = JointLoss(dict.fromkeys(heads, 1.0), model.losses, GradientAggregation(list(heads), "Sum"))
    with pytest.raises(ValueError, match="heads that read the shared states alone"):
        joint.backward(joint(model(tokens), targets), model.parameters())


def test_combining_gradients_needs_states_that_all_tasks_share():
    pytest.importorskip("torchjd")
    logits, targets = joint_sample()
    joint = JointLoss(WEIGHTS, balancing=GradientAggregation(TASKS, "Sum"))
    assert joint.combines_gradients
    result = joint(logits, targets)
    torch.testing.assert_close(result.total, sum(WEIGHTS[t] * l for t, l in cross_entropies(logits, targets).items()))
    with pytest.raises(ValueError, match="shared: gradient aggregation needs states that all tasks share"):
        joint.backward(result, [])


def test_an_unknown_aggregator_is_refused():
    with pytest.raises(ValueError, match=r"aggregator: expected one of AlignedMTL, .*, got 'nonsense'"):
        GradientAggregation(TASKS, "nonsense")
    with pytest.raises(ValueError, match="aggregator"):
        GradientAggregation(TASKS, "Aggregator")


def test_the_aggregators_options_are_passed_on():
    pytest.importorskip("torchjd")
    assert GradientAggregation(TASKS, "MGDA", epsilon=0.5).aggregator.epsilon == 0.5
