import copy
import pickle

import pytest
import torch
from models.test_models import MIXED, VOCABULARY, B, E, H, batch, loss_weights, models, targets_of
from parity import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, prune

import pymtl
from pymtl import LSTM, ClassificationHead, JointLoss, MultiTaskModel


def test_either_model_loads_the_others_state_dict():
    ours, plain = models()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_bits(ours.state_dict(), plain.state_dict())
    plain.encoder.reset_parameters()
    assert not any(ours.load_state_dict(plain.state_dict()))
    assert_same_bits(ours.state_dict(), plain.state_dict())


def test_copies_give_the_same_bits():
    model, _ = models()
    tokens, lengths = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(twin(tokens, lengths), model(tokens, lengths))


def test_changed_weights_are_used_by_the_next_call():
    model, _ = models()
    tokens, lengths = batch()
    with torch.no_grad():
        before = model(tokens, lengths)
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
        after = model(tokens, lengths)
    assert_same_bits(after, model(tokens, lengths))
    assert not any(torch.equal(before[task], after[task]) for task in before)


def test_losses_are_those_of_the_heads():
    model, _ = models()
    assert model.losses == {task: head.loss for task, head in model.heads.items()}
    assert list(JointLoss(loss_weights(model), model.losses).losses) == list(MIXED)


def test_training_lowers_the_loss():
    model, _ = models()
    tokens, lengths = batch()
    targets, joint = targets_of(model), JointLoss(loss_weights(model), model.losses)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    totals = []
    for _ in range(15):
        optimizer.zero_grad()
        total = joint(model(tokens, lengths), targets).total
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_only_some_parameters_trained_give_the_same_logits(gradients):
    model, _ = models()
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    for part in (model.embedding, model.encoder, model.heads):
        model.requires_grad_(False)
        assert_same_bits(model(tokens, lengths), expected)
        part.requires_grad_(True)
        with torch.set_grad_enabled(gradients):
            logits = model(tokens, lengths)
        assert_same_bits(logits, expected)
        assert logits["slots"].requires_grad == gradients


def test_a_converted_encoder_is_taken():
    theirs = nn.LSTM(E, H, bidirectional=True, batch_first=True)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), pymtl.convert(theirs), {"intent": ClassificationHead(3)})
    assert model(*batch())["intent"].shape == (B, 3)


# Weights that something computes anew.


def pruned(module, name):
    torch.manual_seed(8)
    prune.random_unstructured(module, name, amount=0.5)
    return module.get_parameter(f"{name}_orig")


def weight_normed_by_a_hook(module, name):
    torch.nn.utils.weight_norm(module, name)
    return module.get_parameter(f"{name}_g")


def weight_normed(module, name):
    parametrizations.weight_norm(module, name)
    return module.parametrizations[name].original0


COMPUTED = {f.__name__: f for f in (pruned, weight_normed_by_a_hook, weight_normed)}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("where", ["encoder", "heads.slots", "heads.intent", "embedding"])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_are_up_to_date_in_training_and_in_inference(compute, where, frozen):
    model = models()[0].eval()
    tokens, lengths = batch()
    source = compute(model.get_submodule(where), "weight_hh_l0" if where == "encoder" else "weight")
    with torch.no_grad():
        before = model(tokens, lengths)
        if frozen:
            pymtl.freeze(model)
        source.mul_(3.0)
        inference = model(tokens, lengths)
    training = model(tokens, lengths)
    changed = [task for task in before if not torch.equal(training[task], before[task])]
    assert changed == ([where[6:]] if where.startswith("heads") else list(MIXED))
    assert_same_bits(inference, training)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_the_encoders_hooks_run_in_inference_as_in_training(gradients):
    model, _ = models()
    calls = []
    model.encoder.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.encoder.register_forward_hook(lambda *_: calls.append("after"))
    with torch.set_grad_enabled(gradients):
        model(*batch())
    assert calls == ["before", "after"]


def test_a_head_of_two_tasks_is_shared():
    head = ClassificationHead(3)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), LSTM(E, H, batch_first=True), {"a": head, "b": head})
    logits = model(*batch())
    assert torch.equal(logits["a"], logits["b"])
    (gradient,) = torch.autograd.grad(logits["a"].sum(), head.bias, retain_graph=True)
    (logits["a"].sum() + logits["b"].sum()).backward()
    assert torch.equal(head.bias.grad, 2 * gradient)
