"""The trainer and its steps, on a made-up data set that is learnt in seconds."""

import math
from dataclasses import replace

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.training.backends import Backend
from pymtl.training.batches import Encoder
from pymtl.training.data import read_records
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.run import Run
from pymtl.training.step import Step
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
    assert_same_bits(first.backend.model.state_dict(), again.backend.model.state_dict())
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
    assert_same_bits(whole.backend.model.state_dict(), resumed.backend.model.state_dict())
    metrics = [toy.timeless(Run(tmp_path / name).read_metrics()) for name in ("whole", "resumed")]
    assert metrics[0] == metrics[1]
    best = [Run(tmp_path / name).load_backend()[0].model.state_dict() for name in ("whole", "resumed")]
    assert_same_bits(*best)


def test_a_finished_run_is_resumed_for_more_epochs(config, tmp_path):
    longer = replace(config, training=replace(config.training, epochs=6))
    whole = toy.fitted(longer, tmp_path / "whole")
    toy.fitted(config, tmp_path / "resumed")
    resumed = toy.trainer(longer, tmp_path / "resumed", resume=True)
    resumed.fit()
    assert toy.timeless(resumed.epochs) == toy.timeless(whole.epochs)
    assert_same_bits(whole.backend.model.state_dict(), resumed.backend.model.state_dict())


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
        {name: p.clone() for name, p in result.backend.model.state_dict().items()}
    )
    result.fit()
    best, _, _ = Run(tmp_path).load_backend()
    assert_same_bits(best.model.state_dict(), weights[1])
    assert not torch.equal(weights[1]["embedding.weight"], weights[3]["embedding.weight"])


def test_word_dropout_replaces_tokens_but_no_padding(config, tmp_path):
    result = toy.trainer(replace(config, training=replace(config.training, word_dropout=0.5)), tmp_path)
    batch = result.encoder.batch(result.train[""], range(40))
    dropped = result._drop_words(batch, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.tokens == 0, batch.tokens == 0)
    changed = (dropped.tokens != batch.tokens)[batch.tokens != 0]
    assert (dropped.tokens[dropped.tokens != batch.tokens] == 1).all()
    assert 0.3 < changed.float().mean() < 0.7


def test_rare_words_are_dropped_more_often(config, tmp_path):
    settings = replace(config.training, word_dropout=0.0, rare_word_dropout=3.0)
    result = toy.trainer(replace(config, training=settings), tmp_path)
    tokens = [token for record in result.train[""] for token in record.tokens]
    batch = result.encoder.batch(result.train[""], range(len(result.train[""])))
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
    result.backend.model.eval()
    arguments = (config, result.vocabulary)
    assert scores_of(result.backend, result.valid, *arguments) == pytest.approx(
        scores_of(result.backend, {"": result.valid[""][::-1]}, *arguments)
    )
    assert scores_of(result.backend, result.valid, *arguments) == pytest.approx(result.epochs[-1]["valid"])


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
        sizes.append(sum(p.detach().abs().sum() for p in result.backend.model.encoder.parameters()))
    assert sizes[1] < 0.95 * sizes[0]


def test_a_score_that_validation_never_has_is_named(config, tmp_path):
    settings = replace(config.training, select_by="delta", baseline={"intent/fluency": 0.5})
    with pytest.raises(ConfigError, match=r"select_by: expected what validation scores, intent/accuracy.*fluency"):
        toy.fitted(replace(config, training=settings), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.select_by=exact_match", "tasks={score={kind='regression'}}"], "a task of classes or tags"),
        (
            ["training.select_by=delta", "training.baseline={intent=0.5}"],
            "baseline: expected scores of intent/accuracy, .*got 'intent'",
        ),
        (["training.optimizer_options={lr=0.5}"], "training.learning_rate instead of lr"),
        (["training.optimizer=Rprop", "training.weight_decay=0.1"], "training.optimizer: .*weight_decay"),
        (["training.optimizer_options={betas=[0.9]}"], "training.optimizer: "),
        (["balancing={kind='famo',least='a'}"], "balancing: least: expected float, got 'a'"),
        (["balancing=gradnorm", "sharing=soft"], "sharing: expected hard with balancing by gradnorm"),
        (["balancing=gradient_aggregation", "tasks.intent.skip=true"], "heads that read states alone"),
        (["tasks.intent.after=slots", "tasks.slots.after=intent"], "no circle of tasks"),
        (["tasks.intent.weight=inf"], "tasks.intent.weight"),
        (["warm_start={run='x',parts=['']}"], "warm_start.parts: expected names of modules"),
    ],
)
def test_settings_that_do_not_go_together_are_named(folder, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        toy.load(folder, *overrides)


# The step


def stepping(config, norm=1.0):
    """A step of a new model, and the batches it may take."""
    torch.manual_seed(0)
    train = read_records(config.path(config.data.train), config)
    vocabulary = Vocabulary.of(train, config)
    encoder = Encoder(vocabulary, config)
    settings = replace(config.training, learning_rate=0.01, clip_norm=norm)
    return Step(Backend("pymtl", config, vocabulary), settings), encoder.batch(train, range(8))


@pytest.mark.parametrize("norm", [0.01, 1.0, 100.0])
def test_a_step_clips_as_torch_does(config, norm):
    gradients = []
    for clip in (Step.clip, lambda step: torch.nn.utils.clip_grad_norm_(step.backend.model.parameters(), norm)):
        step, batch = stepping(config, norm)
        step.backend.loss(batch).total.backward()
        clip(step)
        gradients.append({name: p.grad for name, p in step.backend.model.named_parameters()})
    assert_same_bits(*gradients)


def test_a_gradient_that_is_not_finite_is_not_hidden(config):
    step, _ = stepping(config)
    for parameter in step.backend.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step.clip()
    assert all(p.grad.isnan().all() for p in step.backend.model.parameters())


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
    other = Encoder(Vocabulary.of(train, config), config).batch(train, range(8, 19))
    alone = []
    for part in (batch, other):
        step.optimizer.zero_grad()
        step.backend.loss(part).total.backward()
        alone.append({name: p.grad.clone() for name, p in step.backend.model.named_parameters()})
    step.optimizer.step = lambda: None
    step([batch, other])
    for name, p in step.backend.model.named_parameters():
        torch.testing.assert_close(p.grad, (alone[0][name] + alone[1][name]) / 2)
