"""Shared and private encoders, their orthogonality and the adversary, against the definitions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from schemes import (
    INPUT,
    LENGTHS,
    TASKS,
    H,
    assert_agrees,
    batch,
    directions_of,
    every_batch,
    every_depth,
    every_direction,
    finals,
    unpacked,
    walk,
)

from pymtl import ClassificationHead, LanguageModelHead, MultiTaskModel, TokenClassificationHead
from pymtl.sharing import SharedPrivate


def side_by_side(scheme, task, xs):
    """A task's states of each sequence: in each direction the shared encoder's beside its own."""
    pairs = zip(walk(scheme.parallel.encoders["shared"], xs), walk(scheme.parallel.encoders[task], xs))
    if scheme.bidirectional:
        return [torch.cat([s[:, :H], p[:, :H], s[:, H:], p[:, H:]], 1) for s, p in pairs]
    return [torch.cat([s, p], 1) for s, p in pairs]


@every_batch
@every_depth
@every_direction
def test_shared_and_private_states_stand_side_by_side_in_each_direction(bidirectional, num_layers, lengths):
    scheme = SharedPrivate(TASKS, INPUT, H, num_layers, bidirectional)

    def oracle(xs):
        return {task: side_by_side(scheme, task, xs) for task in TASKS}

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "b"])


def last_states(encoder, data, sizes):
    return finals(walk(encoder, unpacked(data, sizes)), directions_of(encoder.bidirectional))


@pytest.mark.parametrize("tasks", [None, ["b"], ["c", "a"]], ids=str)
@every_direction
def test_orthogonality_is_its_definition(bidirectional, tasks):
    scheme = SharedPrivate(TASKS, INPUT, H, 2, bidirectional, orthogonality=0.3).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    assert list(penalties) == ["orthogonality"]
    each = scheme.parallel.encoders
    shared = last_states(each["shared"], data, sizes)
    terms = []
    for task in tasks or TASKS:
        own, value = last_states(each[task], data, sizes), 0.0
        for i, j in itertools.product(range(shared.shape[1]), range(own.shape[1])):
            value = value + sum(shared[b, i] * own[b, j] for b in range(len(LENGTHS))) ** 2
        terms.append(value)
    expected = 0.3 * sum(terms) / len(terms) / len(LENGTHS) ** 2
    torch.testing.assert_close(penalties["orthogonality"], expected)
    leaves = [data, *(p for t in ("shared", *(tasks or TASKS)) for p in each[t].parameters())]
    actual = torch.autograd.grad(penalties["orthogonality"], leaves, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    torch.testing.assert_close(
        [torch.zeros(()) if g is None else g for g in actual], [torch.zeros(()) if g is None else g for g in wanted]
    )


@pytest.mark.parametrize("tasks", [["b"], ["c", "a"]], ids=str)
def test_the_adversary_descends_and_the_encoder_ascends(tasks):
    scheme = SharedPrivate(TASKS, INPUT, H, orthogonality=0.0, adversarial=0.4).double()
    data, sizes = batch()
    penalties = scheme(data, sizes, tasks).penalties
    assert list(penalties) == ["adversarial"]
    scores = F.linear(
        last_states(scheme.parallel.encoders["shared"], data, sizes),
        scheme.discriminator.weight,
        scheme.discriminator.bias,
    )
    each = [-scores.log_softmax(1)[:, TASKS.index(task)].mean() for task in tasks]
    expected = 0.4 * sum(each) / len(each)
    torch.testing.assert_close(penalties["adversarial"], expected)
    shared = [data, *scheme.parallel.encoders["shared"].parameters()]
    adversary = list(scheme.discriminator.parameters())
    ours = torch.autograd.grad(penalties["adversarial"], shared + adversary)
    plain = torch.autograd.grad(expected, shared + adversary)
    torch.testing.assert_close(ours[len(shared) :], plain[len(shared) :])
    torch.testing.assert_close(ours[: len(shared)], tuple(-g for g in plain[: len(shared)]))
    assert all(g.abs().max() > 0 for g in plain)


def test_private_encoders_hear_nothing_of_the_adversary():
    scheme = SharedPrivate(TASKS, INPUT, H, orthogonality=0.0, adversarial=0.4)
    data, sizes = batch(dtype=torch.float32)
    value = scheme(data, sizes, ["a"]).penalties["adversarial"]
    private = [p for task in TASKS for p in scheme.parallel.encoders[task].parameters()]
    grads = torch.autograd.grad(value, private, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_a_batch_of_all_tasks_has_no_adversary():
    data, sizes = batch(dtype=torch.float32)
    scheme = SharedPrivate(TASKS, INPUT, H, adversarial=0.4)
    assert set(scheme(data, sizes).penalties) == {"orthogonality"}
    assert set(scheme(data, sizes, ["c", "b", "a"]).penalties) == {"orthogonality"}
    assert set(scheme(data, sizes, ["c", "b"]).penalties) == {"orthogonality", "adversarial"}
    assert SharedPrivate(TASKS, INPUT, H).discriminator is None


# Tasks without an encoder of their own.


@every_batch
@every_direction
def test_a_task_of_the_shared_encoder_alone_has_its_states(bidirectional, lengths):
    scheme = SharedPrivate(TASKS, INPUT, H, 1, bidirectional, shared_only=["b"])
    assert set(scheme.parallel.encoders) == {"shared", "a", "c"}
    assert [scheme.features_of(task) for task in TASKS] == [
        2 * H * scheme.directions,
        H * scheme.directions,
        2 * H * scheme.directions,
    ]

    def oracle(xs):
        own = {task: side_by_side(scheme, task, xs) for task in ("a", "c")}
        return {**own, "b": walk(scheme.parallel.encoders["shared"], xs)}

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "b"])
    assert_agrees(scheme, oracle, lengths, ["b"])


def test_penalties_are_of_the_tasks_with_an_encoder_of_their_own():
    torch.manual_seed(2)
    scheme = SharedPrivate(TASKS, INPUT, H, orthogonality=0.3, shared_only=["b"]).double()
    data, sizes = batch()
    both, without = scheme(data, sizes).penalties, scheme(data, sizes, ["a", "c"]).penalties
    torch.testing.assert_close(both["orthogonality"], without["orthogonality"])
    assert scheme(data, sizes, ["b"]).penalties == {}
    assert SharedPrivate(TASKS, INPUT, H, shared_only=TASKS).double()(data, sizes).penalties == {}


def test_a_task_of_the_shared_encoder_alone_must_be_one_of_the_tasks():
    with pytest.raises(ValueError, match=r"shared_only: expected some of the tasks .*, got 'd'"):
        SharedPrivate(TASKS, INPUT, H, shared_only=["d"])
    with pytest.raises(TypeError, match="shared_only: expected a list of tasks, got 'a'"):
        SharedPrivate(TASKS, INPUT, H, shared_only="a")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_with_such_a_task_trains_every_parameter_and_keeps_its_weights(dropout):
    torch.manual_seed(3)
    heads = {"a": ClassificationHead(3, "max"), "b": LanguageModelHead(9), "c": TokenClassificationHead(4)}
    encoder = SharedPrivate(TASKS, INPUT, H, shared_only=["b"])
    model = MultiTaskModel(torch.nn.Embedding(9, INPUT), encoder, heads, dropout)
    tokens, lengths = torch.randint(1, 9, (4, 6)), [6, 2, 1, 4]
    logits = model(tokens, lengths)
    sum(values.square().sum() for values in logits.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    heads = {"a": ClassificationHead(3, "max"), "b": LanguageModelHead(9), "c": TokenClassificationHead(4)}
    other = MultiTaskModel(
        torch.nn.Embedding(9, INPUT), SharedPrivate(TASKS, INPUT, H, shared_only=["b"]), heads, dropout
    )
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for task, values in model.eval()(tokens, lengths).items():
            assert torch.equal(values, other.eval()(tokens, lengths)[task])
            assert torch.equal(values, other(tokens, lengths, [task])[task])
