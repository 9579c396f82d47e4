"""Dropout of embedded tokens and states."""

import pytest
import torch
from models.test_models import LENGTHS, MIXED, VALID, VOCABULARY, B, E, H, T, batch
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

from pymtl import LSTM, ClassificationHead, MultiTaskModel, Reads, TokenClassificationHead, pack
from pymtl.sharing import HardSharing, SharedPrivate
from pymtl.training.reference_model import MultiTaskModel as ReferenceModel


def with_dropout(dropout, heads=MIXED):
    torch.manual_seed(9)
    heads = {task: make() for task, make in heads.items()}
    encoder = LSTM(E, H, 2, bidirectional=True, batch_first=True, dropout=dropout)
    return MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads, dropout)


def test_dropout_is_for_training_only_and_follows_the_seed():
    model, without = with_dropout(0.4), with_dropout(0.0)
    tokens, lengths = batch()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_same_bits(model.eval()(tokens, lengths), without(tokens, lengths))
            model.train()
            torch.manual_seed(1)
            once = model(tokens, lengths)
            assert not torch.equal(once["slots"], model(tokens, lengths)["slots"])
            torch.manual_seed(1)
            assert_same_bits(model(tokens, lengths), once)


def test_dropping_everything_leaves_the_biases():
    model = with_dropout(1.0)
    tokens, lengths = batch()
    for task, z in model(tokens, lengths).items():
        z = z[VALID] if z.dim() == 3 else z
        assert torch.equal(z, model.heads[task].bias.expand_as(z))


# One mask for all tokens of a sequence.


class Recording(LSTM):
    """Keeps what it is given; all its states are one."""

    def forward(self, *args, **kwargs):
        self.given = args[0].data
        output, state = super().forward(*args, **kwargs)
        return output._replace(data=torch.ones_like(output.data)), state


class Reading(TokenClassificationHead):
    """Keeps what it is given."""

    def forward(self, features):
        self.given = features
        return super().forward(features)


def seen(variational, training=True, dropout=0.25):
    """Of ones, what encoder and head see of each sequence: [length, features] each."""
    model = MultiTaskModel(None, Recording(E, H, batch_first=True), {"a": Reading(3)}, dropout, variational)
    packed = pack(torch.ones(B, T, E), LENGTHS, batch_first=True)
    model.train(training)(packed)
    found = []
    for data in (model.encoder.given, model.heads["a"].given):
        padded, _ = pad_packed_sequence(packed._replace(data=data.detach()), batch_first=True)
        found.append([padded[b, :length] for b, length in enumerate(LENGTHS)])
    return found


def test_variational_dropout_has_one_mask_for_all_tokens_of_a_sequence():
    torch.manual_seed(1)
    for sequences in seen(True):
        for sequence in sequences:
            assert torch.equal(sequence, sequence[:1].expand_as(sequence))
            torch.testing.assert_close(sequence[sequence != 0].unique(), torch.tensor([1 / 0.75]))
        masks = {tuple(sequence[0].tolist()) for sequence in sequences}
        assert len(masks) > 1  # each sequence its own
    of_each = [sequence for sequence in seen(False)[0] if len(sequence) > 1]
    assert not all(torch.equal(sequence, sequence[:1].expand_as(sequence)) for sequence in of_each)


def test_variational_dropout_drops_its_share():
    masks = torch.stack([sequence[0] for _ in range(200) for sequence in seen(True)[0]])
    share = (masks == 0).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / masks.numel()) ** 0.5


def test_variational_dropout_is_none_in_evaluation():
    for sequences in seen(True, training=False):
        assert all((sequence == 1).all() for sequence in sequences)


def test_variational_dropout_differentiates_through_what_it_kept():
    heads = {task: make() for task, make in MIXED.items()}
    model = MultiTaskModel(None, LSTM(E, H, batch_first=True), heads, 0.5, variational=True)
    x = torch.randn(B, T, E, requires_grad=True)
    logits = model(x, LENGTHS)
    sum(z.square().sum() for z in logits.values()).backward()
    for gradient, length in zip(x.grad, LENGTHS):
        zero = gradient[:length] == 0
        assert torch.equal(zero, zero[:1].expand_as(zero))
        assert not gradient[length:].any()
    assert 0.1 < (x.grad[:, 0] == 0).double().mean() < 0.9


def test_variational_dropout_of_an_empty_batch_is_empty():
    heads = {"a": TokenClassificationHead(3)}
    model = MultiTaskModel(None, LSTM(E, H, batch_first=True), heads, 0.5, variational=True)
    assert model(torch.zeros(0, T, E), [])["a"].shape == (0, T, 3)


# What a head expects in training is what it gets in evaluation.


def heads_of_every_pooling():
    heads = {"tokens": TokenClassificationHead(3)}
    for pooling in ("last", "mean", "max"):
        heads[pooling] = ClassificationHead(4, pooling)
        heads[f"{pooling}_and_input"] = ClassificationHead(4, pooling, reads=Reads(skip=True))
    return heads


def encoders():
    plain = LSTM(E, H, bidirectional=True, batch_first=True)
    tasks = list(heads_of_every_pooling())
    return {"plain": plain, "shared": HardSharing(tasks, E, H), "private": SharedPrivate(tasks, E, H)}


@pytest.mark.parametrize("variational", [False, True], ids=["each token", "variational"])
@pytest.mark.parametrize("encoder", ["plain", "shared", "private"])
def test_the_mean_over_masks_is_what_evaluation_gives(encoder, variational):
    torch.manual_seed(5)
    model = MultiTaskModel(None, encoders()[encoder], heads_of_every_pooling(), 0.5, variational)
    for name, weight in model.encoder.named_parameters():
        if "weight_ih" in name:  # states that do not depend on the input, whose dropout else changes them too
            nn.init.zeros_(weight)
    masks = 8000
    x, lengths = torch.randn(1, T, E).expand(masks, T, E), [T] * masks
    with torch.no_grad():
        trained, evaluated = model.train()(x, lengths), model.eval()(x[:1], [T])
    for task, values in trained.items():
        far = (values.mean(0) - evaluated[task][0]).abs() / (values.std(0) / masks**0.5)
        assert far.max() < 5, task


def test_the_mean_over_masks_of_the_plain_model_too():
    torch.manual_seed(6)
    heads = {pooling: ClassificationHead(4, pooling) for pooling in ("last", "mean", "max")}
    model = ReferenceModel(nn.Identity(), nn.LSTM(E, H, bidirectional=True, batch_first=True), heads, 0.5)
    for name, weight in model.encoder.named_parameters():
        if "weight_ih" in name:
            nn.init.zeros_(weight)
    masks = 8000
    with torch.no_grad():
        trained = model.train()(torch.randn(masks, T, E), torch.full((masks,), T))
        evaluated = model.eval()(torch.randn(1, T, E), torch.tensor([T]))
    for task, values in trained.items():
        far = (values.mean(0) - evaluated[task][0]).abs() / (values.std(0) / masks**0.5)
        assert far.max() < 5, task
