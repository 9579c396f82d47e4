"""Hard sharing and soft sharing with its penalties, against torch.nn.LSTM and the definitions."""

import itertools

import pytest
import torch
from parity import assert_parity
from schemes import INPUT, TASKS, H, assert_agrees, batch, every_batch, every_depth, every_direction, unpacked, walk
from torch import nn

from pymtl.sharing import HardSharing, SoftSharing

# Hard.


@every_batch
@every_depth
@every_direction
def test_hard_sharing_is_one_lstm(bidirectional, num_layers, lengths):
    scheme = HardSharing(TASKS, INPUT, H, num_layers, bidirectional)
    assert_agrees(scheme, lambda xs: dict.fromkeys(TASKS, walk(scheme.encoder, xs)), lengths)


def test_hard_sharing_gives_all_tasks_the_same_object():
    scheme = HardSharing(TASKS, INPUT, H)
    data, sizes = batch(dtype=torch.float32)
    states, penalties = scheme(data, sizes, ["c", "a"])
    assert list(states) == ["c", "a"]
    assert states["a"] is states["c"]
    assert penalties == {}


# Soft.


@every_batch
@every_depth
@every_direction
def test_soft_sharing_has_an_encoder_for_each_task(bidirectional, num_layers, lengths):
    scheme = SoftSharing(TASKS, INPUT, H, num_layers, bidirectional)
    assert_agrees(scheme, lambda xs: {t: walk(scheme.parallel.encoders[t], xs) for t in TASKS}, lengths)
    assert_agrees(scheme, lambda xs: {t: walk(scheme.parallel.encoders[t], xs) for t in TASKS}, lengths, ["c", "a"])


def brute_penalty(scheme, kind, data, sizes, tasks=TASKS):
    each = scheme.parallel.encoders
    pairs = list(itertools.combinations(TASKS, 2))
    if kind == "l2":
        return sum(((p - q) ** 2).sum() for i, j in pairs for p, q in zip(each[i].parameters(), each[j].parameters()))
    if kind == "trace_norm":
        groups = zip(*(each[t].parameters() for t in TASKS))
        return sum(torch.linalg.svdvals(torch.stack([p.flatten() for p in group], 1)).sum() for group in groups)
    states = {t: torch.cat(walk(each[t], unpacked(data, sizes))) for t in tasks}
    return torch.stack([((states[i] - states[j]) ** 2).mean() for i, j in itertools.combinations(tasks, 2)]).mean()


PENALTIES = ["l2", "trace_norm", "representations"]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


@every_penalty
@every_direction
def test_soft_penalties_are_their_definitions(penalty, bidirectional):
    scheme = SoftSharing(TASKS, INPUT, H, 2, bidirectional, penalty=penalty, weight=0.7).double().train()
    data, sizes = batch()
    penalties = scheme(data, sizes).penalties
    assert list(penalties) == [penalty]
    expected = 0.7 * brute_penalty(scheme, penalty, data, sizes)
    torch.testing.assert_close(penalties[penalty], expected)
    leaves = list(scheme.parameters())
    actual = torch.autograd.grad(penalties[penalty], leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("tasks", [["a", "b"], ["c", "a"]], ids=str)
@every_penalty
def test_soft_penalties_of_some_tasks(penalty, tasks):
    """Those of parameters are of all tasks', that of states of the states there are."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=2.0).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    torch.testing.assert_close(penalties[penalty], 2 * brute_penalty(scheme, penalty, data, sizes, tasks))


def test_one_task_s_states_differ_from_none():
    data, sizes = batch()
    scheme = SoftSharing(TASKS, INPUT, H, penalty="representations").double()
    assert scheme(data, sizes, ["b"]).penalties["representations"] == 0
    for penalty in PENALTIES:
        assert SoftSharing(["a"], INPUT, H, penalty=penalty).double()(data, sizes).penalties == {}


@every_penalty
def test_the_derivatives_of_soft_penalties_pass_gradcheck(penalty):
    scheme = SoftSharing(TASKS, 2, 2, bidirectional=False, penalty=penalty, weight=1.0).double()
    data, sizes = batch([3, 1], 2)
    # gradcheck moves the parameters in place: they are not passed on.
    assert torch.autograd.gradcheck(
        lambda *_: scheme(data, sizes).penalties[penalty], tuple(scheme.parameters()), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_penalty
def test_identical_encoders_have_finite_gradients(penalty, dtype):
    scheme = SoftSharing(TASKS, INPUT, H, 2, penalty=penalty, weight=1.0).to(dtype)
    for task in TASKS[1:]:
        scheme.parallel.encoders[task].load_state_dict(scheme.parallel.encoders["a"].state_dict())
    data, sizes = batch(dtype=dtype)
    value = scheme(data, sizes).penalties[penalty]
    grads = torch.autograd.grad(value, list(scheme.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    if penalty != "trace_norm":
        assert value.abs() < 1e-10
        assert all(g is None or g.abs().max() < 1e-5 for g in grads)
        return
    # A matrix of equal columns p has one singular value, sqrt(K) |p|, whose gradient is p / (sqrt(K) |p|). The others
    # come as roots of rounding errors: up to a few sqrt(eps) of it.
    root = len(TASKS) ** 0.5
    norms = [p.norm() for p in scheme.parallel.encoders["a"].parameters()]
    torch.testing.assert_close(value, root * sum(norms), rtol=10 * torch.finfo(dtype).eps ** 0.5, atol=0)
    expected = [p / (root * p.norm()) for p in scheme.parameters()]
    torch.testing.assert_close(list(grads), expected, rtol=0, atol=10 * torch.finfo(dtype).eps ** 0.5)


@every_penalty
def test_encoders_whose_biases_are_zero_have_finite_gradients(penalty):
    """Biases that start at zero are an ordinary initialisation."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=1.0).double()
    for name, parameter in scheme.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    data, sizes = batch()
    value = scheme(data, sizes).penalties[penalty]
    assert value.isfinite()
    grads = torch.autograd.grad(value, list(scheme.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def nearly_alike(penalty, difference):
    """Encoders as training leaves them."""
    scheme = SoftSharing(TASKS, INPUT, H, penalty=penalty, weight=1.0)
    first = scheme.parallel.encoders["a"].parameters()
    for group in zip(first, *(scheme.parallel.encoders[task].parameters() for task in TASKS[1:])):
        for other in group[1:]:
            other.data = group[0].data + difference * torch.randn_like(other)
    return scheme


@pytest.mark.parametrize("penalty", ["l2", "trace_norm"])
def test_penalties_of_parameters_are_the_same_under_autocast(penalty):
    scheme = nearly_alike(penalty, 0.02)
    data, sizes = batch(dtype=torch.float32)
    leaves = list(scheme.parameters())
    expected = scheme(data, sizes).penalties[penalty]
    expected_grads = torch.autograd.grad(expected, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        value = scheme(data, sizes).penalties[penalty]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), expected_grads)


@pytest.mark.parametrize("difference", [0.1, 1e-3])
def test_the_trace_norm_of_nearly_equal_encoders_keeps_the_rule(difference):
    scheme = nearly_alike("trace_norm", difference)

    def results(value):
        leaves = dict(scheme.named_parameters())
        return {"value": value.detach()} | dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))

    def plain():
        return brute_penalty(scheme, "trace_norm", None, None)

    data, sizes = batch(dtype=torch.float32)
    ours, theirs = results(scheme(data, sizes).penalties["trace_norm"]), results(plain())
    scheme.double()
    assert_parity(ours, theirs, results(plain()))
