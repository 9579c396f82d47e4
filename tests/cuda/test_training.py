"""Training on a GPU; cuda_on_host runs it on the CPU, through the CUDA kernels."""

from dataclasses import replace

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl import CTCLoss
from pymtl.training.run import Run
from pymtl.training.step import MovingAverage
from pymtl.training.trainer import batches_of, evaluate

pytestmark = pytest.mark.cuda


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("seqeval")  # scores tags
    return toy.load(tmp_path / "data", toml=toy.TOML + toy.ALL_KINDS)


def shorter(config, **settings):
    return replace(config, training=replace(config.training, **settings))


def test_a_run_learns_and_its_weights_score_the_same_on_the_cpu(config, tmp_path, gpu):
    result = toy.fitted(shorter(config, epochs=8), tmp_path / "run", device=gpu.type)
    assert all(parameter.device.type == gpu.type for parameter in result.model_with_loss.parameters())
    losses = [epoch["loss"]["total"] for epoch in result.epochs]
    assert losses[-1] < 0.4 * losses[0]
    best = max(result.epochs, key=lambda epoch: epoch["selection"])
    assert best["valid"]["intent/accuracy"] >= 0.8
    trained, saved, vocabulary = Run(tmp_path / "run").load_model()
    valid = toy.read_sets(saved)[1]
    scores = evaluate(trained, batches_of(result.batcher, valid), valid, saved, vocabulary)
    assert scores == pytest.approx(best["valid"], abs=1e-4)


@pytest.mark.parametrize("checkpoint_steps", [0, 1], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted(checkpoint_steps, config, tmp_path, gpu):
    config = shorter(config, epochs=2, checkpoint_steps=checkpoint_steps)
    whole = toy.fitted(config, tmp_path / "whole", device=gpu.type)
    with pytest.raises(KeyboardInterrupt):
        toy.trainer(config, tmp_path / "resumed", stop_in=2, device=gpu.type).fit()
    resumed = toy.trainer(config, tmp_path / "resumed", resume=True, device=gpu.type)
    resumed.fit()
    assert_same_bits(whole.model_with_loss.model.state_dict(), resumed.model_with_loss.model.state_dict())
    assert toy.timeless(whole.epochs) == toy.timeless(resumed.epochs)


@pytest.mark.parametrize("backend", ["pymtl", "reference"])
def test_every_kind_of_pooling_trains_in_either_backend(backend, config, tmp_path, gpu):
    result = toy.fitted(shorter(config, epochs=1), tmp_path / "run", backend, gpu.type)
    assert set(result.epochs[0]["loss"]) == {"total", "intent", "slots", "topics", "politeness"}


def test_ctc_takes_labels_where_the_logits_are(gpu):
    logits, labels = torch.randn(3, 9, 5), torch.tensor([[1, 2, -100], [-100, -100, -100], [4, 4, 3]])
    expected = CTCLoss()(logits, labels)
    assert CTCLoss()(logits.to(gpu), labels.to(gpu)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_averaging_the_weights_waits_for_nothing(real_gpu):
    model = torch.nn.Linear(2, 3, device=real_gpu)
    averaged = MovingAverage(model, decay=0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            averaged.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(averaged.module.weight, model.weight)
