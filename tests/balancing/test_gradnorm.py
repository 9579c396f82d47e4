"""GradNorm, against algorithm 1 of its paper."""

import pytest
import torch
from balanced import CLASSES, LENGTHS, TASKS, TOKEN_TARGETS, TOKENS, VALUES, B, leaves, model_and_loss

from pymtl import ClassificationHead, TokenClassificationHead
from pymtl.balancing import GradNorm


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
