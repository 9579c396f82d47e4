"""Trains recurrent PPO of sb3-contrib as it is, and with its LSTMs and its loop over steps replaced by pymtl's.

    python examples/third_party/recurrent_ppo.py [--steps N] [--json FILE]

The task is CartPole without its velocities: a policy has to remember. The policies of sb3-contrib run an LSTM a step at
a time wherever an episode begins, to clear its states there; `pymtl.LSTM(x, states, resets=begins)` takes all steps in
one call. Seeds, weights and environments are the same, so the numbers are, up to rounding: for the parameters after the
first update the largest difference is printed. Later a rounded probability may choose another action, and the two go
ways of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

import pymtl
from pymtl.benchmark import results
from pymtl.commands import positive

States = tuple[Tensor, Tensor]


class ResettingPolicy(RecurrentActorCriticPolicy):
    """The policy of sb3-contrib with pymtl's LSTMs: all steps of a batch in one call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        pymtl.convert(self, inplace=True)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: pymtl.LSTM
    ) -> tuple[Tensor, States]:
        sequences = lstm_states[0].shape[1]  # features [B * T, F] of them, one sequence after the other
        x = features.view(sequences, -1, lstm.input_size).transpose(0, 1)
        begins = episode_starts.view(sequences, -1).transpose(0, 1).bool()
        output, states = lstm(x, lstm_states, resets=begins)
        return output.transpose(0, 1).flatten(0, 1), states


class Positions(gymnasium.ObservationWrapper):
    """Of CartPole the position and the angle alone."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = gymnasium.spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


class Clock(BaseCallback):
    """Seconds of acting, and the parameters after the first update."""

    def __init__(self) -> None:
        super().__init__()
        self.acting = 0.0
        self.first: list[Tensor] | None = None
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._rollouts += 1
        if self._rollouts == 2:
            self.first = [parameter.detach().clone() for parameter in self.model.policy.parameters()]
        self._started = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.acting += time.perf_counter() - self._started


def train(policy: type[RecurrentActorCriticPolicy], steps: int, hidden: int) -> tuple[dict[str, float], list[Tensor]]:
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=1, wrapper_class=Positions)
    model = RecurrentPPO(
        policy,
        envs,
        n_steps=128,
        batch_size=256,
        n_epochs=10,
        learning_rate=1e-3,
        seed=1,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": hidden},
    )
    clock = Clock()
    started = time.perf_counter()
    model.learn(steps, callback=clock)
    seconds = time.perf_counter() - started
    assert clock.first is not None
    rewards = [episode["r"] for episode in model.ep_info_buffer]
    row = {
        "reward": float(np.mean(rewards)),
        "acting": clock.acting,
        "learning": seconds - clock.acting,
        "steps a second": model.num_timesteps / seconds,
    }
    return row, clock.first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=20_000, metavar="N", help="of all environments (20,000)")
    parser.add_argument("--hidden", type=positive, default=256, metavar="H", help="units of each LSTM (256)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of torch and pymtl (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine, versions and date")
    arguments = parser.parse_args()
    if arguments.steps <= 1024:
        parser.error("--steps: expected more than 1024, the steps of one update")
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows, firsts = {}, []
    for name, policy in (("sb3-contrib", RecurrentActorCriticPolicy), ("pymtl, resets", ResettingPolicy)):
        with console.status(f"{name}: {arguments.steps} steps"):
            rows[name], first = train(policy, arguments.steps, arguments.hidden)
        firsts.append(first)
    apart = max(float((ours - theirs).abs().max()) for theirs, ours in zip(*firsts, strict=True))
    table = Table(title=f"CartPole without velocities, {arguments.steps} steps, H = {arguments.hidden}")
    table.add_column("policy")
    for heading in ("mean reward, last 100 episodes", "acting, s", "learning, s", "steps a second"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['reward']:.0f}",
            *(f"{row[k]:.1f}" for k in ("acting", "learning")),
            f"{row['steps a second']:.0f}",
        )
    console.print(table)
    console.print(f"parameters after the first update: at most {apart:.1e} apart", highlight=False)
    if arguments.json:
        version = importlib.metadata.version("sb3-contrib")
        results.write(
            results.stamped(
                rows=rows,
                difference=apart,
                steps=arguments.steps,
                hidden=arguments.hidden,
                package=f"sb3-contrib {version}",
            ),
            arguments.json,
        )


if __name__ == "__main__":
    main()
