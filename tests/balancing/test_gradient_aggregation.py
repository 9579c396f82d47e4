"""Gradients of the tasks combined, against torchjd's aggregators of a Jacobian made by hand."""

import copy

import pytest
import torch
from balanced import (
    CLASSES,
    LENGTHS,
    TASKS,
    TOKEN_TARGETS,
    TOKENS,
    VOCABULARY,
    WEIGHTS,
    B,
    E,
    H,
    T,
    cross_entropies,
    joint_sample,
    model_and_loss,
)
from parity import assert_same_bits
from torch import nn

from pymtl import (
    LSTM,
    ClassificationHead,
    CTCHead,
    JointLoss,
    LanguageModelHead,
    MultiTaskModel,
    Reads,
    TokenClassificationHead,
    language_model_targets,
    pack,
)
from pymtl.balancing import GradientAggregation

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


# Nash-MTL, which goes on from the weights of the step before.


def nash_steps(joint, model, count):
    """Gradients of so many steps on batches of other tokens each."""
    pytest.importorskip("torchjd")
    targets, found = packed_targets(targets_for(model.heads)), []
    for k in range(count):
        model.zero_grad()
        joint.backward(joint(model(pack(TOKENS.roll(k, 0), LENGTHS, batch_first=True)), targets), model.parameters())
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


def test_nash_mtl_remembers_its_steps_in_its_state(tmp_path):
    pytest.importorskip("torchjd")
    heads = made(HEADS["three"])
    for before in (0, 1, 3):
        model, joint = model_and_loss(heads, GradientAggregation(list(heads), "NashMTL"))
        nash_steps(joint, model, before)
        torch.save(joint.state_dict(), tmp_path / "joint.pt")
        expected = nash_steps(joint, model, 2)
        other = JointLoss(joint.loss_weights, model.losses, GradientAggregation(list(heads), "NashMTL"))
        other.load_state_dict(torch.load(tmp_path / "joint.pt", weights_only=True))
        for actual, step in zip(nash_steps(other, model, 2), expected):
            assert_same_bits(actual, step)


def test_nash_mtl_needs_the_losses_of_all_tasks():
    pytest.importorskip("torchjd")
    heads = made(HEADS["classes and tokens"])
    model, joint = model_and_loss(heads, GradientAggregation(list(heads), "NashMTL"))
    result = joint(model(pack(TOKENS, LENGTHS, batch_first=True)), packed_targets({"b": TOKEN_TARGETS}))
    with pytest.raises(ValueError, match=r"losses: expected one of every task .* NashMTL, got none of "):
        joint.backward(result, model.parameters())


def test_options_that_are_tensors_move_with_the_module():
    balancing = GradientAggregation(["a", "b"], "UPGrad", pref_vector=[1.0, 2.0]).double()
    assert "tensor([1., 2.], dtype=torch.float64)" in repr(balancing.aggregator)
