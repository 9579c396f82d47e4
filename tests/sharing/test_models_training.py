"""Models of the sharing schemes in training: gradients, penalties and dropout."""

import pytest
import torch
from parity import assert_same_bits
from sharing_models import (
    KINDS,
    LENGTHS,
    TASKS,
    VALID,
    VARIANTS,
    B,
    H,
    batch,
    close,
    every_variant,
    joint_loss,
    model_of,
    targets,
)

from pymtl import ClassificationHead, Reads, TokenClassificationHead
from pymtl.balancing import Balancing


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    tokens, lengths = batch()
    joint(model(tokens, lengths), targets()).total.backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The adversary hears of batches of some tasks.
    assert missing == ({f"encoder.discriminator.{n}" for n in ("weight", "bias")} if "private" in variant else set())
    joint(model(tokens, lengths, tasks=["intent"]), targets(["intent"])).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@every_variant
def test_penalties_are_for_training_with_gradients_and_join_the_total(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    names = {"soft": [VARIANTS[variant][1].get("penalty", "l2")], "shared_private": ["orthogonality", "adversarial"]}
    tokens, lengths = batch()
    for tasks in (TASKS, ["slots", "tone"]):
        logits = model.train()(tokens, lengths, tasks=tasks)
        expected = [n for n in names.get(KINDS[variant], []) if n != "adversarial" or len(tasks) < 4]
        assert list(logits.penalties) == expected
        result = joint(logits, targets(tasks))
        assert result.penalties is logits.penalties
        weighted = sum((0.5 + TASKS.index(t)) * value for t, value in result.per_task.items())
        torch.testing.assert_close(result.total, weighted + sum(logits.penalties.values()))
        if expected:
            ours = torch.autograd.grad(result.total, list(model.parameters()), allow_unused=True, retain_graph=True)
            bare = torch.autograd.grad(
                weighted + sum(logits.penalties.values()), list(model.parameters()), allow_unused=True
            )
            torch.testing.assert_close([g for g in ours if g is not None], [g for g in bare if g is not None])
        assert model.eval()(tokens, lengths, tasks=tasks).penalties == {}
        with torch.no_grad():
            assert model.train()(tokens, lengths, tasks=tasks).penalties == {}


def test_a_task_that_another_reads_after_counts_as_the_batchs_for_the_adversary():
    heads = {
        "slots": lambda: TokenClassificationHead(5),
        "intent": lambda: ClassificationHead(4, reads=Reads(after="slots")),
    }
    model = model_of("shared_private", heads)
    tokens, lengths = batch()
    assert "adversarial" in model(tokens, lengths, tasks=["slots"]).penalties
    assert "adversarial" not in model(tokens, lengths, tasks=["intent"]).penalties


@every_variant
def test_shared_are_the_states_that_all_tasks_read(variant):
    model = model_of(variant)
    tokens, lengths = batch()
    logits = model(tokens, lengths)
    assert (len(logits.shared) > 0) == (variant == "hard")
    if variant == "hard":
        assert [tuple(t.shape) for t in logits.shared] == [(sum(LENGTHS), 2 * H), (B, 2 * H)]
        for task in TASKS:
            grads = torch.autograd.grad(logits[task].sum(), logits.shared, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.any() for g in grads)
    if variant == "hierarchical":
        logits = model(tokens, lengths, tasks=["intent", "score"])  # of one level
    else:
        logits = model(tokens, lengths, tasks=["slots"])
    assert torch.autograd.grad(sum(z.sum() for z in logits.values()), logits.shared[:1])[0].any()
    assert joint_loss(model)(logits, targets(list(logits))).shared is logits.shared


class Aside(Balancing):
    """A method with a backward pass of its own."""

    combines_gradients = True

    def total(self, values, tasks, shared):
        return values.sum()

    def backward(self, losses, shared, parameters):
        sum(losses.values()).backward()


@pytest.mark.parametrize("tasks", [TASKS, ["intent", "slots"], ["slots"]], ids=["all", "two", "one"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if KINDS[v] in ("soft", "shared_private")])
def test_penalties_join_what_combines_gradients(variant, tasks):
    model = model_of(variant)
    tokens, lengths = batch()
    found = []
    for balancing in (None, Aside(TASKS)):
        model.zero_grad()
        joint = joint_loss(model, balancing)
        joint.backward(joint(model(tokens, lengths, tasks=tasks), targets(tasks)), model.parameters())
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


@every_variant
def test_dropout_follows_the_seed_and_stops_in_evaluation(variant):
    model, without = model_of(variant, dropout=0.4), model_of(variant)
    tokens, lengths = batch()
    close(model.eval()(tokens, lengths), without(tokens, lengths))
    model.train()
    torch.manual_seed(1)
    once = model(tokens, lengths)
    assert not torch.equal(once["slots"], model(tokens, lengths)["slots"])
    torch.manual_seed(1)
    assert_same_bits(model(tokens, lengths), once)


@every_variant
def test_dropping_everything_leaves_the_biases(variant):
    model = model_of(variant, dropout=1.0)
    for task, z in model(*batch()).items():
        z = z[VALID] if z.dim() == 3 else z
        assert torch.equal(z, model.heads[task].bias.expand_as(z))


@pytest.mark.parametrize("variant", ["soft", "hard", "cross_stitch"])
def test_a_few_steps_of_training_lower_the_loss(variant):
    model = model_of(variant)
    joint = joint_loss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tokens, lengths = batch()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        total = joint(model(tokens, lengths), targets()).total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]
