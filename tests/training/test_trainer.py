"""The trainer and its steps, on a made-up data set that is learnt in seconds."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.training.batches import Batcher
from pymtl.training.data import read_records
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.run import Run
from pymtl.training.step import MovingAverage, Step
from pymtl.training.trainer import test_scores as scores_of
from pymtl.training.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the toy data."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def config(folder):
    return toy.load(folder)


def test_training_lowers_the_loss_and_learns_the_task(config, tmp_path):
    result = toy.fitted(replace(config, training=replace(config.training, epochs=8)), tmp_path)
    losses = [epoch["loss"]["total"] for epoch in result.epochs]
    assert losses[-1] < 0.2 * losses[0]
    assert result.epochs[-1]["valid"]["intent/accuracy"] >= 0.9
    assert result.epochs[-1]["valid"]["slots/f1"] >= 0.9
    assert result.progress.records == result.epochs


def test_one_model_learns_all_four_kinds_of_task(folder, tmp_path):
    config = toy.load(folder, "model.dropout=0.0", "training.epochs=10", toml=toy.TOML + toy.ALL_KINDS)
    result = toy.fitted(config, tmp_path)
    valid = result.epochs[-1]["valid"]
    correlations = {"politeness/r2", "politeness/pearson", "politeness/spearman"}
    assert set(valid) == {"intent/accuracy", "intent/macro_f1", "slots/f1", "topics/f1", "exact_match"} | correlations
    assert min(value for name, value in valid.items()) >= 0.8
    assert set(result.epochs[-1]["loss"]) == {"total", "intent", "slots", "topics", "politeness"}


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(config, tmp_path):
    first, again = (toy.fitted(config, tmp_path / name) for name in ("first", "again"))
    assert_same_bits(first.model_with_loss.model.state_dict(), again.model_with_loss.model.state_dict())
    assert toy.timeless(first.epochs) == toy.timeless(again.epochs)
    other = toy.fitted(replace(config, seed=4), tmp_path / "other")
    assert toy.timeless(first.epochs) != toy.timeless(other.epochs)


@pytest.mark.parametrize("backend", ["pymtl", "reference"])
def test_an_interrupted_and_resumed_run_ends_bit_for_bit_as_the_uninterrupted(config, tmp_path, backend):
    whole = toy.fitted(config, tmp_path / "whole", backend)
    interrupted = toy.trainer(config, tmp_path / "resumed", backend, stop_in=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit()
    assert len(Run(tmp_path / "resumed").read_metrics()) == 2
    resumed = toy.trainer(config, tmp_path / "resumed", backend, resume=True)
    resumed.fit()
    assert_same_bits(whole.model_with_loss.model.state_dict(), resumed.model_with_loss.model.state_dict())
    metrics = [toy.timeless(Run(tmp_path / name).read_metrics()) for name in ("whole", "resumed")]
    assert metrics[0] == metrics[1]
    best = [Run(tmp_path / name).load_model()[0].model.state_dict() for name in ("whole", "resumed")]
    assert_same_bits(*best)


def test_a_finished_run_is_resumed_for_more_epochs(config, tmp_path):
    longer = replace(config, training=replace(config.training, epochs=6))
    whole = toy.fitted(longer, tmp_path / "whole")
    toy.fitted(config, tmp_path / "resumed")
    resumed = toy.trainer(longer, tmp_path / "resumed", resume=True)
    resumed.fit()
    assert toy.timeless(resumed.epochs) == toy.timeless(whole.epochs)
    assert_same_bits(whole.model_with_loss.model.state_dict(), resumed.model_with_loss.model.state_dict())


def test_a_resumed_run_lists_every_epoch_even_where_the_last_line_was_not_written(config, tmp_path):
    whole = toy.fitted(config, tmp_path)
    Run(tmp_path).write_metrics(whole.epochs[:-1])
    toy.trainer(config, tmp_path, resume=True).fit()
    assert Run(tmp_path).read_metrics() == whole.epochs


def test_a_state_whose_epochs_are_something_else_is_a_run_error(config, tmp_path):
    whole = toy.fitted(config, tmp_path)
    whole.run.save_state({**whole.run.load_state(), "epochs": [{}]})
    with pytest.raises(RunError, match=r"state\.pt"):
        toy.trainer(config, tmp_path, resume=True).fit()


def with_scores(monkeypatch, values):
    """Lets the validation of epoch k score ``values[k]``."""
    remaining = iter(values)
    monkeypatch.setattr("pymtl.training.trainer.evaluate", lambda *_: {"intent/accuracy": next(remaining)})


def test_training_stops_after_patience_epochs_without_a_better_score(config, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.5, 0.5, 0.4, 0.9])
    config = replace(config, training=replace(config.training, epochs=9, patience=2))
    assert [epoch["epoch"] for epoch in toy.fitted(config, tmp_path).epochs] == [1, 2, 3, 4]


def test_the_weights_of_the_best_epoch_are_kept_the_first_of_equals(config, tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.1, 0.5, 0.4, 0.5])
    result = toy.trainer(config, tmp_path)
    weights = []
    result.progress.epoch = lambda _: weights.append(
        {name: p.clone() for name, p in result.model_with_loss.model.state_dict().items()}
    )
    result.fit()
    best, _, _ = Run(tmp_path).load_model()
    assert_same_bits(best.model.state_dict(), weights[1])
    assert not torch.equal(weights[1]["embedding.weight"], weights[3]["embedding.weight"])


def test_word_dropout_replaces_tokens_but_no_padding(config, tmp_path):
    result = toy.trainer(replace(config, training=replace(config.training, word_dropout=0.5)), tmp_path)
    batch = result.batcher.batch(result.train[""], range(40))
    dropped = result._drop_words(batch, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.tokens == 0, batch.tokens == 0)
    changed = (dropped.tokens != batch.tokens)[batch.tokens != 0]
    assert (dropped.tokens[dropped.tokens != batch.tokens] == 1).all()
    assert 0.3 < changed.float().mean() < 0.7


def test_rare_words_are_dropped_more_often(config, tmp_path):
    settings = replace(config.training, word_dropout=0.0, rare_word_dropout=3.0)
    result = toy.trainer(replace(config, training=settings), tmp_path)
    tokens = [token for record in result.train[""] for token in record.tokens]
    batch = result.batcher.batch(result.train[""], range(len(result.train[""])))
    generator = torch.Generator().manual_seed(0)
    rounds = 200
    dropped = sum((result._drop_words(batch, generator).tokens != batch.tokens).double() for _ in range(rounds))
    for word in ("please", "sushi"):
        count = tokens.count(word)
        share = dropped[batch.tokens == result.vocabulary.tokens.index(word)].mean() / rounds
        expected = 3 / (3 + count)
        # Five standard deviations of a share of this many.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / (rounds * count)) ** 0.5


def test_a_task_labelled_in_few_records_trains(folder, tmp_path):
    config = toy.load(folder, "training.epochs=2", toml=toy.TOML + toy.ALL_KINDS)
    records = [dict(record) for record in toy.requests(60)]
    for record in records[3:]:
        record["slots"] = record["score"] = None
    toy.write_lines(tmp_path / "few.jsonl", records)
    config = replace(config, data=replace(config.data, train=str(tmp_path / "few.jsonl")))
    result = toy.fitted(config, tmp_path / "run")
    assert all(math.isfinite(value) for epoch in result.epochs for value in epoch["loss"].values())


def test_scores_do_not_depend_on_the_order_of_the_records(config, tmp_path):
    result = toy.fitted(replace(config, training=replace(config.training, epochs=2)), tmp_path)
    result.model_with_loss.model.eval()
    arguments = (config, result.vocabulary)
    assert scores_of(result.model_with_loss, result.valid, *arguments) == pytest.approx(
        scores_of(result.model_with_loss, {"": result.valid[""][::-1]}, *arguments)
    )
    assert scores_of(result.model_with_loss, result.valid, *arguments) == pytest.approx(result.epochs[-1]["valid"])


def test_tensorboard_gets_every_epoch(config, tmp_path):
    settings = replace(config.training, tensorboard=True, epochs=3)
    result = toy.fitted(replace(config, training=settings), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for part in ("loss", "valid"):
        for name in result.epochs[0][part]:
            values = [(event.step, event.value) for event in events.Scalars(f"{part}/{name}")]
            assert values == [(epoch["epoch"], pytest.approx(epoch[part][name], rel=1e-6)) for epoch in result.epochs]


@pytest.mark.parametrize("option", ["weight_decay", "l1"])
def test_regularisation_keeps_weights_small(config, tmp_path, option):
    sizes = []
    for value in (0.0, 0.01):
        settings = replace(config.training, **{option: value}, epochs=2)
        result = toy.fitted(replace(config, training=settings), tmp_path / f"{value}")
        sizes.append(sum(p.detach().abs().sum() for p in result.model_with_loss.model.encoder.parameters()))
    assert sizes[1] < 0.95 * sizes[0]


def test_a_score_that_validation_never_has_is_named(config, tmp_path):
    settings = replace(config.training, select_by="delta", baseline={"intent/fluency": 0.5})
    with pytest.raises(ConfigError, match=r"select_by: expected what validation scores, intent/accuracy.*fluency"):
        toy.fitted(replace(config, training=settings), tmp_path)


@pytest.mark.parametrize("method", ["gradnorm", "gradient_aggregation"])
def test_balancing_by_gradients_of_states_is_refused_in_several_processes(folder, tmp_path, monkeypatch, method):
    pytest.importorskip("torchjd")
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr("pymtl.training.trainer._accelerator", lambda *_: two)
    with pytest.raises(ConfigError, match=f"balancing: expected another method than {method} with several processes"):
        toy.trainer(toy.load(folder, f"balancing={method}"), tmp_path)


def test_another_device_than_the_one_asked_for_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="--device: expected cuda, accelerate was told to use cpu"):
        toy.trainer(config, tmp_path, device="cuda")
    toy.trainer(config, tmp_path)


def test_mixed_precision_trains_with_combined_gradients(folder, tmp_path):
    pytest.importorskip("torchjd")
    settings = ("training.precision=bf16", "training.epochs=6", "model.dropout=0.0")
    result = toy.fitted(toy.load(folder, "balancing=gradient_aggregation", *settings), tmp_path)
    losses = [epoch["loss"]["total"] for epoch in result.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in result.model_with_loss.model.parameters())


def test_some_of_several_numbers_may_be_missing_in_training(tmp_path):
    tasks = '[tasks.scores]\nkind = "regression"\nnum_targets = 2\npooling = "mean"\n'
    config = toy.load(tmp_path, "training.epochs=1", toml=toy.TOML + tasks)
    for name in ("train", "valid", "test"):
        lines = [
            {**line, "scores": [line["score"] if i % 3 else None, len(line["tokens"]) if i % 3 != 1 else None]}
            for i, line in enumerate(toy.requests(30))
        ]
        toy.write_lines(tmp_path / f"{name}.jsonl", lines)
    epoch = toy.fitted(config, tmp_path / "run").epochs[-1]
    assert 0 < epoch["loss"]["scores"] < math.inf
    assert epoch["valid"]["scores/r2"] <= 1


@pytest.mark.parametrize("sharing", ["hard", "soft"])
def test_dropout_may_have_one_mask_for_a_sentence(folder, tmp_path, sharing):
    config = toy.load(folder, "model.variational=true", "model.dropout=0.3", "training.epochs=6", f"sharing={sharing}")
    result = toy.fitted(config, tmp_path)
    assert result.model_with_loss.model.variational
    assert result.epochs[-1]["loss"]["total"] < 0.7 * result.epochs[0]["loss"]["total"]
    with pytest.raises(
        ConfigError, match=r"backend 'reference': expected sharing = .hard., balancing = .ew., plain dropout"
    ):
        toy.trainer(config, tmp_path / "plain", "reference")


# The step


def stepping(config, norm=1.0):
    """A step of a new model, and the batches it may take."""
    torch.manual_seed(0)
    train = read_records(config.path(config.data.train), config)
    vocabulary = Vocabulary.of(train, config)
    batcher = Batcher(vocabulary, config)
    settings = replace(config.training, learning_rate=0.01, clip_norm=norm)
    return Step(ModelWithLoss("pymtl", config, vocabulary), settings), batcher.batch(train, range(8))


@pytest.mark.parametrize("norm", [0.01, 1.0, 100.0])
def test_a_step_clips_as_torch_does(config, norm):
    gradients = []
    for clip in (Step.clip, lambda step: torch.nn.utils.clip_grad_norm_(step.model_with_loss.model.parameters(), norm)):
        step, batch = stepping(config, norm)
        step.model_with_loss.loss(batch).total.backward()
        clip(step)
        gradients.append({name: p.grad for name, p in step.model_with_loss.model.named_parameters()})
    assert_same_bits(*gradients)


def test_a_gradient_that_is_not_finite_is_not_hidden(config):
    step, _ = stepping(config)
    for parameter in step.model_with_loss.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step.clip()
    assert all(p.grad.isnan().all() for p in step.model_with_loss.model.parameters())


def test_the_learning_rate_follows_its_schedule(config, tmp_path):
    settings = replace(config.training, epochs=2, schedule="linear", warmup=0.25)
    result = toy.trainer(replace(config, training=settings), tmp_path)
    rates = []
    step = result.step.optimizer.step
    result.step.optimizer.step = lambda: (rates.append(result.step.optimizer.param_groups[0]["lr"]), step())
    result.fit()
    rising, total = round(0.25 * len(rates)), len(rates)
    assert rates[:rising] == pytest.approx([0.02 * (i + 1) / rising for i in range(rising)])
    assert rates[rising:] == pytest.approx([0.02 * (1 - i / (total - rising)) for i in range(total - rising)])


def test_accumulated_batches_give_the_mean_of_their_gradients(config):
    config = replace(config, model=replace(config.model, dropout=0.0))
    step, batch = stepping(config, norm=1e6)
    train = read_records(config.path(config.data.train), config)
    other = Batcher(Vocabulary.of(train, config), config).batch(train, range(8, 19))
    alone = []
    for part in (batch, other):
        step.optimizer.zero_grad()
        step.model_with_loss.loss(part).total.backward()
        alone.append({name: p.grad.clone() for name, p in step.model_with_loss.model.named_parameters()})
    step.optimizer.step = lambda: None
    step([batch, other])
    for name, p in step.model_with_loss.model.named_parameters():
        torch.testing.assert_close(p.grad, (alone[0][name] + alone[1][name]) / 2)


def test_the_moving_average_forgets_the_first_weights_soon():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    averaged = MovingAverage(model, decay=0.5)
    expected = None
    for count in range(9):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randint(9, tensor.shape))
        share = min(0.5, (1 + count) / (10 + count))
        now = model[0].weight.detach().clone()
        expected = now if expected is None else share * expected + (1 - share) * now
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged.module[0].weight, expected, rtol=1e-6, atol=1e-6)
        for name, buffer in averaged.module.named_buffers():
            assert torch.equal(buffer, model.get_buffer(name))
    assert averaged.n_averaged == 9
