"""Training that is stopped, killed or shared among processes ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.__main__ import main
from pymtl.training.run import Run

SETTINGS = (
    "model.dropout=0.2",
    "training.epochs=3",
    "training.checkpoint_steps=3",
    "training.ema_decay=0.9",
    "training.schedule=linear",
    "training.warmup=0.1",
    "training.rare_word_dropout=0.5",
)
GENERATION = "tasks.tags={kind='generation',field='slots',units='tokens',max_length=9,decoder_size=8}"
VARIANTS = {
    "plain": (),
    "uncertainty weighting": ("balancing=uw",),
    "dynamic weight average": ("balancing=dwa",),
    "FAMO": ("balancing=famo",),
    "random weights": ("balancing=rlw",),
    "gradnorm": ("balancing=gradnorm",),
    "Nash-MTL": (
        "balancing={kind='gradient_aggregation',aggregator='NashMTL'}",
        "tasks.topics.kind=multilabel",
        "tasks.politeness={kind='regression',field='score'}",
    ),
    "soft sharing": ("sharing=soft",),
    "accumulation and another optimiser": ("training.accumulation=3", "training.optimizer=RMSprop", "training.l1=1e-4"),
    "characters": ("characters.kind=lstm", "characters.size=5"),
    "generation": (GENERATION,),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def tensors(module):
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("stop_in", [1, 3])
def test_a_run_stopped_within_an_epoch_ends_bit_for_bit_as_the_uninterrupted(folder, tmp_path, variant, stop_in):
    config = toy.load(folder, *SETTINGS, *variant)
    if config.training.accumulation > 1:
        config = replace(config, training=replace(config.training, checkpoint_steps=1))
    whole = toy.fitted(config, tmp_path / "whole")
    stopped = toy.trainer(config, tmp_path / "resumed", stop_in=stop_in)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    state = Run(tmp_path / "resumed").load_state()
    assert state["position"]["epoch"] == stop_in
    assert state["position"]["step"] > 0
    torch.manual_seed(99)  # whatever happened in between
    resumed = toy.trainer(config, tmp_path / "resumed", resume=True)
    resumed.fit()
    assert_same_bits(tensors(whole.model_with_loss), tensors(resumed.model_with_loss))
    best = [Run(tmp_path / name).load_model()[0].model.state_dict() for name in ("whole", "resumed")]
    assert_same_bits(*best)
    assert toy.timeless(whole.epochs) == toy.timeless(resumed.epochs)


BALANCED = ("uw", "rlw", "famo", "stch")  # in several processes by the losses of the whole batch


def command(config, run, *options):
    return [sys.executable, "-m", "pymtl", "train", str(config), "--run", str(run), "--threads", "1", *options]


def settings(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


def test_a_run_killed_again_and_again_loses_at_most_the_steps_since_its_last_state(folder, tmp_path):
    config = toy.write_files(folder)
    options = settings(*SETTINGS, "training.epochs=40", "training.patience=40", "training.checkpoint_steps=2")
    run = Run(tmp_path / "killed")
    kills, state, deadline = 0, run.path("state.pt"), time.monotonic() + 120
    while True:
        process = subprocess.Popen(
            command(config, run.folder, *options, *(["--resume"] if run.exists() else [])), stdout=subprocess.DEVNULL
        )
        before = state.stat().st_mtime_ns if state.exists() else 0
        while kills < 3 and process.poll() is None:
            # As soon as a new state is there, at whatever the process is doing then.
            if state.exists() and state.stat().st_mtime_ns > before:
                time.sleep(0.01 + 0.03 * kills)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        assert time.monotonic() < deadline
        if process.wait(timeout=60) == 0:
            break
        assert process.returncode == -signal.SIGKILL
        run.load_state()  # whole, whenever it was
    assert kills == 3
    assert subprocess.run(command(config, tmp_path / "whole", *options), stdout=subprocess.DEVNULL).returncode == 0
    whole = Run(tmp_path / "whole")
    assert_same_bits(whole.load_model()[0].model.state_dict(), run.load_model()[0].model.state_dict())
    assert toy.timeless(whole.read_metrics()) == toy.timeless(run.read_metrics())
    assert whole.read_scores() == run.read_scores()


@pytest.mark.parametrize(
    "variant",
    [
        (),
        *(("balancing=" + name,) for name in BALANCED),
        ("sharing=soft",),
        (GENERATION, "tasks.tags.decoder_dropout=0.0"),
    ],
    ids=" ".join,
)
def test_two_processes_take_the_steps_of_one(tmp_path, threads, variant):
    # Without dropout, whose masks belong to a process; every step moves the weights by the gradient itself.
    config = toy.write_files(tmp_path, toy.TOML + toy.ALL_KINDS)
    options = settings(
        "model.dropout=0.0",
        "training.optimizer=SGD",
        "training.learning_rate=0.5",
        "training.epochs=2",
        "training.batch_size=7",
        "training.clip_norm=1000",
        "tasks.slots.decoder=crf",
        *variant,
    )
    threads(1)
    assert main(["train", str(config), "--run", str(tmp_path / "one"), *options]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launch += ["--master-port", str(20_000 + os.getpid() % 20_000), "-m"]
    # torch's launcher takes --run for an option of its own: the default folder instead.
    training = ["pymtl", "train", str(config), "--threads", "1", *options]
    two = subprocess.run(launch + training, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert two.returncode == 0, two.stderr
    assert "2 processes" in two.stdout
    one, two = Run(tmp_path / "one"), Run(tmp_path / "runs" / "toy")
    for part in ("model", "joint"):
        ours, theirs = (run.load_state()[part] for run in (one, two))
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(one.read_metrics(), two.read_metrics()):
        for name, loss in a["loss"].items():
            assert b["loss"][name] == pytest.approx(loss, rel=1e-3), name
