"""Copies, dtypes and frozen weights of the sharing schemes' models, and hard sharing beside a plain LSTM."""

import copy
import pickle

import pytest
import torch
from parity import assert_same_bits
from sharing_models import (
    HEADS,
    VARIANTS,
    VOCABULARY,
    E,
    H,
    batch,
    both_modes,
    close,
    every_variant,
    in_all_ways,
    joint_loss,
    model_of,
    targets,
)
from torch import nn

import pymtl
from pymtl import ClassificationHead, MultiTaskModel, TokenClassificationHead
from pymtl.sharing import HardSharing, SharingResult

# Copies.


@every_variant
@both_modes
def test_copies_give_the_same_bits(variant, gradients):
    model = model_of(variant, dtype=torch.float32)
    tokens, lengths = batch()
    loaded = model_of(variant, dtype=torch.float32, seed=1)
    assert not torch.equal(loaded(tokens, lengths)["slots"], model(tokens, lengths)["slots"])
    loaded.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(gradients):
        expected = model(tokens, lengths)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            logits = other(tokens, lengths)
            assert_same_bits(logits, expected)
            assert_same_bits(logits.penalties, expected.penalties)


def test_a_copy_is_apart():
    model = model_of("soft")
    other = copy.deepcopy(model)
    tokens, lengths = batch()
    before = model(tokens, lengths)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.mul_(2)
    assert_same_bits(model(tokens, lengths), before)
    assert not torch.equal(other(tokens, lengths)["slots"], before["slots"])


@every_variant
def test_float64_is_kept(variant):
    model = model_of(variant)
    logits = model(*batch())
    assert all(z.dtype == torch.float64 for z in logits.values())
    assert all(p.dtype == torch.float64 for p in logits.penalties.values())


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(v, d) for v in VARIANTS for d in (torch.bfloat16, torch.float32)],
)
def test_bfloat16_and_autocast_run(variant, dtype):
    tokens, lengths = batch()
    expected = model_of(variant, dtype=torch.float32)(tokens, lengths)
    model = model_of(variant, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        logits = model(tokens, lengths)
    for task, z in logits.items():
        torch.testing.assert_close(z.float(), expected[task], rtol=0, atol=0.05)  # 8 bits
    total = sum(z.float().sum() for z in logits.values()) + sum(logits.penalties.values())
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Hard sharing and a plain LSTM.


@both_modes
def test_hard_sharing_gives_the_bits_of_a_plain_lstm(gradients):
    model = model_of("hard", dtype=torch.float32)
    plain = MultiTaskModel(model.embedding, model.encoder.encoder, dict(model.heads.items()))
    tokens, lengths = batch()
    with torch.set_grad_enabled(gradients):
        logits, expected = model(tokens, lengths), plain(tokens, lengths)
    assert_same_bits(logits, expected)
    assert len(logits.shared) == len(expected.shared)


def test_hard_sharing_without_gradients_has_the_bits_of_training():
    plain = {task: HEADS[task] for task in ("intent", "slots", "score")}  # attention takes the states
    model = model_of("hard", plain, torch.float32)
    tokens, lengths = batch()
    first, *others = in_all_ways(model, tokens, lengths)
    for logits in others:
        assert_same_bits(logits, first)


class Doubled(HardSharing):
    def run(self, data, batch_sizes, tasks):
        states = super().run(data, batch_sizes, tasks).states
        return SharingResult({t: s.map(lambda x: 2 * x, with_last=True) for t, s in states.items()}, {})


class Forwarded(HardSharing):
    def forward(self, data, batch_sizes, tasks=None):
        states = super().forward(data, batch_sizes, tasks).states
        return SharingResult({t: s.map(lambda x: 2 * x, with_last=True) for t, s in states.items()}, {})


@pytest.mark.parametrize(
    "kind",
    [Doubled, Forwarded],
)
def test_a_scheme_derived_from_hard_sharing_is_run_with_and_without_gradients(kind):
    heads = {"intent": ClassificationHead(4), "slots": TokenClassificationHead(5)}
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), kind(list(heads), E, H), heads)
    first, *others = in_all_ways(model, *batch())
    for logits in others:
        close(logits, first)


@pytest.mark.parametrize("where", ["scheme", "lstm"])
def test_a_forward_hook_is_called_with_and_without_gradients(where):
    model = model_of("hard", {"slots": HEADS["slots"]})
    calls = []
    module = model.encoder if where == "scheme" else model.encoder.encoder
    module.register_forward_hook(lambda *_: calls.append(1))
    in_all_ways(model, *batch())
    assert len(calls) == 3


# Frozen, compiled.


@every_variant
def test_frozen_weights_give_the_same_bits_and_changes_are_seen(variant):
    model = model_of(variant, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"freeze: .* eval\(\) first"):
        pymtl.freeze(model)
    model.eval()
    tokens, lengths = batch()
    with torch.no_grad():
        before = model(tokens, lengths)
        assert pymtl.freeze(model) is model
        assert_same_bits(model(tokens, lengths), before)
        for parameter in model.encoder.parameters():
            parameter.mul_(0.5)
        changed = model(tokens, lengths)
        assert not torch.equal(changed["slots"], before["slots"])
        assert_same_bits(pymtl.unfreeze(model)(tokens, lengths), changed)
        assert_same_bits(copy.deepcopy(pymtl.freeze(model))(tokens, lengths), changed)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_soft_sharing_model_agrees():
    torch._dynamo.reset()
    model = model_of("soft", {task: HEADS[task] for task in ("intent", "slots")})
    compiled = torch.compile(model, backend="aot_eager")
    tokens, lengths = batch()
    found = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(tokens, lengths)
        assert list(logits.penalties) == ["l2"]
        total = joint_loss(model)(logits, targets(["intent", "slots"])).total
        total.backward()
        found.append(dict(logits) | {"total": total} | {n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])
    torch._dynamo.reset()
