"""Equal gradient norms, against their definition in plain steps."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from balanced import CLASSES, LENGTHS, TASKS, TOKEN_TARGETS, TOKENS, VOCABULARY, B, E, H, model_and_loss
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl.balancing import EqualNorm
from pymtl.sharing import SCHEMES

SUBSETS = [("c", "a"), TASKS, ("b",), ("a", "b"), TASKS, ("b", "c"), ("a",), TASKS, TASKS]
NUMBERS = torch.tensor([[0.5], [-1.0], [2.0], [0.1]], dtype=torch.float64)


class Plain:
    """The docstring, with all measurements kept."""

    def __init__(self, decay, every):
        self.decay, self.every = decay, every
        self.norms = {task: [] for task in TASKS}
        self.batches = dict.fromkeys(TASKS, 0)

    def scales(self, losses, states):
        for task, loss in losses.items():
            count = self.batches[task] = self.batches[task] + 1
            if count <= self.every or (count - 1) % self.every == 0:
                parts = torch.autograd.grad(loss, states[task], retain_graph=True, allow_unused=True)
                norm = torch.cat([g.flatten() for g in parts if g is not None]).norm().item()
                self.norms[task].append(norm)
        found = {task: self.norm_of(norms) for task, norms in self.norms.items() if norms}
        c = max(found.values())
        return {task: c / found[task] if task in found else 1.0 for task in TASKS}

    def norm_of(self, norms):
        means = []
        for count in range(1, len(norms) + 1):
            ages = [self.decay ** (count - 1 - i) for i in range(count)]
            means.append(sum(a * n for a, n in zip(ages, norms)) / sum(ages))
        return max(means[-1], 0.01 * max(means))


def states_and_losses(leaf, tasks=TASKS, factors=None):
    """Shared states and one of c's own; the losses are of very different sizes, and each may have a factor."""
    first, second = torch.tanh(leaf), leaf**2
    losses = {
        "a": (torch.tensor([1.0, -2.0, 0.5]).to(leaf) * first).sum() ** 2 + 0.1,
        "b": 400 * (torch.tensor([0.3, 0.1, 4.0]).to(leaf) * first).exp().mean(),
        "c": 0.01 * first.square().mean() + second.sum(),
    }
    states = {"a": [first], "b": [first], "c": [first, second]}
    return {t: states[t] for t in tasks}, {t: (factors or {}).get(t, 1.0) * losses[t] for t in tasks}


def leaf_of(step=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize(("decay", "every"), [(0.9, 10), (0.5, 1), (0.8, 2), (0.0, 3)])
@pytest.mark.parametrize("batches", [[TASKS] * 12, SUBSETS * 2], ids=["all", "some"])
def test_the_total_is_the_one_of_the_definition(decay, every, batches):
    method, plain = EqualNorm(TASKS, decay, every).double(), Plain(decay, every)
    for step, tasks in enumerate(batches):
        leaf = leaf_of(step)
        states, losses = states_and_losses(leaf, tasks)
        total = method(losses, states=states)
        scales = plain.scales(losses, states)
        torch.testing.assert_close(method.scales().tolist(), [scales[t] for t in TASKS])
        expected = sum(scales[t] * loss for t, loss in losses.items())
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in (total, expected)))


def shares(factors=None, weights=None, steps=7, every=2):
    """Each task's part in the gradient of the last total, as training with ``weights`` comes to it."""
    method = EqualNorm(TASKS, every=every).double()
    for step in range(steps):
        leaf = leaf_of(step)
        states, losses = states_and_losses(leaf, factors=factors)
        weighted = {task: (weights or {}).get(task, 1.0) * loss for task, loss in losses.items()}
        method(weighted, weights=weights, states=states)
    scales = dict(zip(TASKS, method.scales()))
    return {t: torch.autograd.grad(scales[t] * v, leaf, retain_graph=True)[0] for t, v in weighted.items()}


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_the_unit_of_a_loss_changes_no_direction(factor):
    one, other = (sum(shares(given).values()) for given in (None, {"b": factor}))
    torch.testing.assert_close(one / one.norm(), other / other.norm())


@pytest.mark.parametrize("factor", [3.0, 1e-3, 1e-9])
def test_the_unit_of_a_loss_that_is_not_the_largest_changes_nothing(factor):
    torch.testing.assert_close(*(sum(shares(given).values()) for given in (None, {"c": factor})))


def test_a_weight_of_three_makes_a_tasks_share_three_times_as_large():
    one, other = shares(), shares(weights={"a": 1.0, "b": 3.0, "c": 1.0})
    torch.testing.assert_close(other, {"a": one["a"], "b": 3 * one["b"], "c": one["c"]})


def test_a_task_of_weight_zero_changes_nothing_for_the_others():
    found, without = shares(weights={"a": 1.0, "b": 0.0, "c": 2.0}), EqualNorm(TASKS, every=2).double()
    for step in range(7):
        leaf = leaf_of(step)
        states, losses = states_and_losses(leaf, ("a", "c"))
        losses["c"] = 2 * losses["c"]
        total = without(losses, weights={"c": 2.0}, states=states)
    assert not found["b"].any()
    torch.testing.assert_close(sum(found.values()), torch.autograd.grad(total, leaf)[0])


def test_a_task_alone_gives_its_own_loss():
    for tasks, method in ((("b",), EqualNorm(["b"])), (("b",), EqualNorm(TASKS))):
        for step in range(4):
            states, losses = states_and_losses(leaf_of(step), tasks)
            torch.testing.assert_close(method(losses, states=states), losses["b"], rtol=1e-6, atol=0)


def test_a_perfect_or_broken_task_is_not_measured():
    method = EqualNorm(TASKS).double()
    leaf = leaf_of()
    states, losses = states_and_losses(leaf)
    method(losses, states=states)
    before = method.norms.clone(), method.scales()
    for value in (0.0, torch.nan, torch.inf):
        states, losses = states_and_losses(leaf)
        method({"b": value * losses["b"]}, states=states)
        torch.testing.assert_close((method.norms, method.scales()), before)
    method({"b": torch.tensor(2.0, dtype=torch.float64)}, states=states)  # needs no gradient
    torch.testing.assert_close((method.norms, method.scales()), before)


HEADS = {
    "a": lambda: pymtl.ClassificationHead(3),
    "b": lambda: pymtl.TokenClassificationHead(4),
    "c": lambda: pymtl.RegressionHead(1, "mean"),
}
TARGETS = {"a": CLASSES, "b": TOKEN_TARGETS, "c": NUMBERS}


def ordinary(weights=None, **options):
    model, joint = model_and_loss(
        {task: make() for task, make in HEADS.items()}, EqualNorm(TASKS, **options), weights or dict.fromkeys(TASKS, 1)
    )
    return model, joint.double()


@pytest.mark.parametrize(("task", "nothing"), [("a", -100), ("b", -100), ("c", torch.nan)])
def test_a_batch_without_labels_of_a_task_changes_nothing_of_it(task, nothing):
    model, joint = ordinary(every=1)
    other = copy.deepcopy(joint)
    missing = {**TARGETS, task: torch.full_like(TARGETS[task], nothing)}
    left_out = {name: target for name, target in TARGETS.items() if name != task}
    for targets, same in ((missing, left_out), (TARGETS, TARGETS), (missing, left_out), (TARGETS, TARGETS)):
        found, expected = joint(model(TOKENS, LENGTHS), targets), other(model(TOKENS, LENGTHS), same)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(joint.balancing.norms, other.balancing.norms)


def test_heads_on_a_frozen_encoder_are_trained_by_the_plain_sum():
    model, joint = ordinary({"a": 1.0, "b": 2.0, "c": 1.0})
    for parameter in (*model.encoder.parameters(), *model.embedding.parameters()):
        parameter.requires_grad_(False)
    for _ in range(3):
        result = joint(model(TOKENS, LENGTHS), TARGETS)
        expected = result.per_task["a"] + 2 * result.per_task["b"] + result.per_task["c"]
        torch.testing.assert_close(result.total, expected)
        result.total.backward()
    assert all(head.weight.grad.isfinite().all() for head in model.heads.values())


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode, "eval"], ids=["no_grad", "inference", "eval"])
def test_evaluation_measures_nothing(how):
    model, joint = ordinary()
    joint(model(TOKENS, LENGTHS), TARGETS)
    before = copy.deepcopy(joint.state_dict())
    with nullcontext() if how == "eval" else how():
        joint.train(how != "eval")
        logits = model(TOKENS, LENGTHS)
        joint(logits if how == "eval" else dict(logits), TARGETS)  # states are not asked for
    assert str(before) == str(joint.state_dict())
    torch.testing.assert_close(joint.balancing.norms, before["balancing.norms"], rtol=0, atol=0)


def test_training_that_is_resumed_goes_on_bit_for_bit():
    def take(method, steps):
        totals = []
        for step in steps:
            states, losses = states_and_losses(leaf_of(step, torch.float32), SUBSETS[step % len(SUBSETS)])
            totals.append(method(losses, states=states))
        return totals

    whole = EqualNorm(TASKS, every=3)
    expected = take(whole, range(20))
    for stop in (1, 5, 8, 13):
        stopped, resumed = EqualNorm(TASKS, every=3), EqualNorm(TASKS, every=3)
        take(stopped, range(stop))
        file = io.BytesIO()
        torch.save(stopped.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(torch.stack(expected[stop:]), torch.stack(take(resumed, range(stop, 20))))
        assert resumed.get_extra_state() == whole.get_extra_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_total_has_the_losses_dtype(dtype):
    model, joint = ordinary()
    model.to(dtype)
    for _ in range(2):
        result = joint(model(TOKENS, LENGTHS), {**TARGETS, "c": NUMBERS.to(dtype)})
        assert result.total.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        result.total.backward()
    assert joint.balancing.scales().isfinite().all()


def test_what_does_not_fit_is_refused():
    model, joint = ordinary()
    with pytest.raises(ValueError, match=r"EqualNorm needs the states .* 'a' .* pass that output to the loss"):
        joint(dict(model(TOKENS, LENGTHS)), TARGETS)
    states, losses = states_and_losses(leaf_of())
    with pytest.raises(KeyError, match="unknown task 'b'"):
        EqualNorm(["a", "c"])(losses, states=states)
    every = [{"every": value} for value in (0, -3, 2.5, True)] + [{"floor": value} for value in (0, 1.1)]
    for wrong in ({"decay": -0.1}, {"decay": 1.0}, {"decay": float("nan")}, *every):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a (whole )?number"):
            EqualNorm(TASKS, **wrong)


def norms_of(result, logits, scales):
    """Of each task's part in the total, at the states that its head reads."""
    found = []
    for scale, (task, loss) in zip(scales, result.weighted.items()):
        parts = torch.autograd.grad(scale * loss, logits.states[task], retain_graph=True, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in parts if g is not None]).norm())
    return torch.stack(found)


@pytest.mark.parametrize("scheme", ["hard", "shared_private", "mmoe", "soft", "cross_stitch"])
@pytest.mark.parametrize("after", [None, "b"])
def test_norms_are_equal_under_each_sharing_scheme(scheme, after):
    heads = {task: make() for task, make in HEADS.items()}
    heads["a"] = pymtl.ClassificationHead(3, reads=pymtl.Reads(after=after)) if after else heads["a"]
    encoder = SCHEMES[scheme](list(TASKS), E, H)
    model = pymtl.MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads, dropout=0.2).double()
    joint = pymtl.JointLoss(dict.fromkeys(TASKS, 1.0), model.losses, EqualNorm(TASKS)).double()
    logits = model(TOKENS, LENGTHS)
    result = joint(logits, TARGETS)
    norms = norms_of(result, logits, joint.balancing.scales())
    torch.testing.assert_close(norms, norms[:1].expand(3))
    assert joint.balancing.scales().min().item() == 1
    result.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


@pytest.mark.parametrize("scheme", ["hard", "shared_private"])
def test_norms_are_equal_with_losses_of_whole_sequences_and_language_models(scheme):
    heads = {"tags": pymtl.CRFHead(4), "sounds": pymtl.CTCHead(5), "words": pymtl.LanguageModelHead(VOCABULARY, 8)}
    encoder = SCHEMES[scheme](list(heads), E, H)
    model = pymtl.MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads).double()
    joint = pymtl.JointLoss(dict.fromkeys(heads, 1.0), model.losses, EqualNorm(list(heads))).double()
    tokens, tags = (
        pack_padded_sequence(x, torch.tensor(LENGTHS), True, enforce_sorted=False) for x in (TOKENS, TOKEN_TARGETS)
    )
    targets = {"tags": tags, "sounds": torch.tensor([[1, 2], [3, 4], [1, -100], [2, -100]])}
    targets["words"] = pymtl.language_model_targets(tokens, VOCABULARY)
    logits = model(tokens)
    result = joint(logits, targets)
    norms = norms_of(result, logits, joint.balancing.scales())
    torch.testing.assert_close(norms, norms[:1].expand(3))
    result.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def in_parts(works):
    """Runs each part in a thread of its own; they meet where a mean is asked for."""
    barrier, given = threading.Barrier(len(works), timeout=10), {}

    def run(rank, work):
        def mean(tensor):
            given[rank] = tensor
            barrier.wait()
            found = torch.stack(list(given.values())).mean(0)
            barrier.wait()
            return found

        try:
            return work(mean)
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(works)) as pool:
        done = [pool.submit(run, *each) for each in enumerate(works)]
    for error in (each.exception() for each in done):
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [each.result() for each in done]


def labels_in(task, target):
    return int((~target.isnan() if task == "c" else target != -100).sum())


def assert_parts_are_as_the_whole(sequence, every=2):
    """Two processes as the trainer has them, against one: the gradients and the weights of each batch. As its batches,
    a part has no target of a task that none of its records has a label of."""
    model, joint = ordinary({"a": 1.0, "b": 2.0, "c": 0.5}, every=every)
    joints = [copy.deepcopy(joint) for _ in range(2)]
    for targets in sequence:
        counts = {t: labels_in(t, y) for t, y in targets.items()}
        works = []
        for rank, own in enumerate(joints):
            rows = list(range(B))[rank::2]
            mine = {t: y[rows] for t, y in targets.items()}
            scales = {t: 2 * labels_in(t, y) / (counts[t] or 1) for t, y in mine.items()}
            mine = {t: y for t, y in mine.items() if labels_in(t, y) or not counts[t]}
            logits = model(TOKENS[rows], [LENGTHS[row] for row in rows], list(mine))
            mine = {t: y[:, : logits[t].shape[1]] if t == "b" else y for t, y in mine.items()}
            works.append(lambda mean, own=own, given=(logits, mine, scales): own(*given, mean).total)
        total = joint(model(TOKENS, LENGTHS), targets).total
        parts = in_parts(works)
        for own, part in zip(joints, parts):
            torch.testing.assert_close(own.balancing.scales(), joint.balancing.scales())
            torch.testing.assert_close(part, total)
        parameters = list(model.encoder.parameters())
        expected = torch.autograd.grad(total, parameters)
        torch.testing.assert_close(torch.autograd.grad(sum(parts) / 2, parameters), expected)


def test_two_halves_of_a_batch_weigh_as_the_whole():
    assert_parts_are_as_the_whole([TARGETS] * 5)


def test_a_half_without_a_label_of_a_task_weighs_as_the_whole():
    partial = {**TARGETS, "c": NUMBERS.masked_fill(torch.arange(B).unsqueeze(1) % 2 == 0, torch.nan)}
    assert_parts_are_as_the_whole([TARGETS, partial, partial])


def test_a_task_that_has_been_learned_does_not_take_over():
    method = EqualNorm(["a", "b"]).double()
    for step in range(300):
        state = torch.ones(3, dtype=torch.float64, requires_grad=True)
        losses = {"a": state.sum(), "b": 0.9**step * state.square().sum()}
        total = method(losses, states={"a": [state], "b": [state]})
    assert total.isfinite()
    torch.testing.assert_close(method.scales()[1].item(), (3**0.5) / (0.01 * method.largest[1].item()))
    assert method.scales()[0] == 1


def test_the_first_steps_of_a_task_that_learns_fast_are_followed():
    method = EqualNorm(["a", "b"]).double()
    for step in range(81):
        state = torch.ones(3, dtype=torch.float64, requires_grad=True)
        losses = {"a": state.sum(), "b": 0.97**step * state.sum()}
        method(losses, states={"a": [state], "b": [state]})
    assert 0.4 < method.scales()[1].item() * 0.97**80 < 2.5
