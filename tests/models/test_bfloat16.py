import copy
from functools import partial

import pytest
import torch
from models.test_models import (
    BIDIRECTIONAL,
    ENCODERS,
    MIXED,
    VALID,
    batch,
    loss_weights,
    models,
    plain_loss,
    targets_of,
)
from models.test_models import results as results_of
from ops.test_bfloat16 import BF16, assert_bits, assert_parity
from torch import nn

import pymtl
from pymtl import LSTM, ClassificationHead, CRFHead, JointLoss, MultiTaskModel, TokenClassificationHead

HEADS = {
    "last": lambda: ClassificationHead(4),
    "mean": lambda: ClassificationHead(3, pooling="mean"),
    "max": lambda: ClassificationHead(5, pooling="max"),
    "slots": lambda: TokenClassificationHead(6),
}
autocast = partial(torch.autocast, "cpu", BF16)
casting = pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16", "autocast"])
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)


def bfloat16_models(autocasts, encoder=BIDIRECTIONAL, heads=HEADS):
    """Ours and the plain one, of bfloat16 weights, in float32 if they are for autocast."""
    made = [model.to(BF16) for model in models(encoder, heads)]
    return [model.float() for model in made] if autocasts else made


@casting
@every_encoder
@pytest.mark.parametrize("heads", [HEADS, MIXED], ids=["classes", "everything mixed"])
def test_logits_and_gradients_are_as_accurate_as_the_plain_models(heads, encoder, autocasts):
    # Which of nearly equal tokens is the largest is up to rounding, and with it where its gradient goes.
    heads = {task: make for task, make in heads.items() if make().pooling != "max"}
    ours, theirs = bfloat16_models(autocasts, encoder, heads)
    tokens, lengths = batch()
    targets, weights = targets_of(ours), loss_weights(ours)
    joint = JointLoss(weights, ours.losses)

    def by_torch(logits):
        logits = {task: z.double() for task, z in logits.items()}
        return plain_loss(logits, targets, ours.losses, weights)

    with autocast(enabled=autocasts):
        found = results_of(ours, tokens, lengths, lambda logits: joint(logits, targets).total)
        expected = results_of(theirs, tokens, lengths, by_torch)
    assert {found[task].dtype for task in heads} == {BF16}
    assert found["loss"].dtype == torch.float32
    for name, parameter in ours.named_parameters():
        assert found[f"gradient of {name}"].dtype == parameter.dtype
    assert_parity(found, expected, results_of(copy.deepcopy(theirs).double(), tokens, lengths, by_torch))


@casting
def test_a_few_steps_lower_every_loss(autocasts):
    model = bfloat16_models(autocasts)[0]
    tokens, lengths = batch()
    targets = targets_of(model)
    joint = JointLoss(dict.fromkeys(HEADS, 1.0), model.losses)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with autocast(enabled=autocasts):
            result = joint(model(tokens, lengths), targets)
        result.total.backward()
        optimizer.step()
        losses.append(dict(result.per_task) | {"total": result.total})
    for name in losses[0]:
        assert losses[-1][name] < 0.7 * losses[0][name], name
    assert {p.dtype for p in model.parameters()} == {torch.float32 if autocasts else BF16}


@casting
@every_encoder
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_gives_the_same_bits_fused_and_unfused(encoder, autocasts, frozen):
    model = bfloat16_models(autocasts, encoder)[0].eval()
    tokens, lengths = batch()
    with autocast(enabled=autocasts):
        unfused = model(tokens, lengths)
        if frozen:
            pymtl.freeze(model)
        with torch.no_grad():
            assert_bits(model(tokens, lengths), unfused)
    assert {logits.dtype for logits in unfused.values()} == {BF16}


def test_evaluation_after_autocast_gives_the_bits_from_before():
    model = models(heads=HEADS)[0].eval()
    tokens, lengths = batch()
    with torch.no_grad():
        expected = model(tokens, lengths)
        pymtl.freeze(model)
        with autocast():
            cast = model(tokens, lengths)
        assert_bits(model(tokens, lengths), expected)
        with autocast(), autocast(enabled=False):
            assert_bits(model(tokens, lengths), expected)
    assert not any(torch.equal(cast[task].float(), expected[task]) for task in HEADS)


def test_a_float64_model_is_unaffected_by_autocast():
    model = models(heads=HEADS)[0].double()
    tokens, lengths = batch()
    expected = model(tokens, lengths)
    with autocast():
        assert_bits(model(tokens, lengths), expected)
        with torch.no_grad():
            assert_bits(model(tokens, lengths), expected)


def tagger():
    heads = {"tags": CRFHead(5), "intent": ClassificationHead(4)}
    return MultiTaskModel(nn.Embedding(30, 9), LSTM(9, 11, bidirectional=True, batch_first=True), heads)


@casting
def test_a_crfs_loss_is_float32_and_close_to_the_float64_models(autocasts):
    model = tagger().to(BF16)
    model = model.float() if autocasts else model
    for parameter in model.heads["tags"].crf.parameters():
        nn.init.uniform_(parameter, -2.0, 2.0)
    exact = copy.deepcopy(model).double()
    tokens, lengths = batch()
    targets = {"tags": torch.randint(5, tokens.shape).masked_fill(~VALID, -100)}
    losses, gradients = [], []
    for m, casts in ((model, autocasts), (exact, False)):
        joint = JointLoss({"tags": 1.0}, {"tags": m.losses["tags"]})
        with autocast(enabled=casts):
            losses.append(joint(m(tokens, lengths, ["tags"]), targets).per_task["tags"])
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in m.named_parameters() if "intent" not in name})
    assert losses[0].dtype == torch.float32
    eps = torch.finfo(BF16).eps
    assert abs(losses[0].double() - losses[1]) <= 4 * eps * losses[1]
    for name, gradient in gradients[0].items():
        assert gradient.dtype == model.get_parameter(name).dtype
        truth = gradients[1][name]
        assert (gradient.double() - truth).abs().max() <= 4 * eps * truth.abs().max(), name


@casting
def test_a_crf_decodes_what_the_float32_model_does(autocasts):
    model = tagger().eval()
    nn.init.uniform_(model.heads["tags"].crf.transitions, -9.0, 9.0)
    model = model.to(BF16).float()
    tokens, lengths = batch()
    with torch.no_grad():
        expected = model.heads["tags"].crf.decode(model(tokens, lengths)["tags"], lengths)[0]
        model = model if autocasts else model.to(BF16)
        with autocast(enabled=autocasts):
            tags, scores = model.heads["tags"].crf.decode(model(tokens, lengths)["tags"], lengths)
    assert torch.equal(tags, expected)
    assert scores.dtype == torch.float32
