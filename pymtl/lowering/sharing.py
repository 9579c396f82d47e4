"""Instructions of what the tasks share: from the tokens' features to the states that each task's head reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pymtl.lowering.checks import refuse
from pymtl.lowering.program import Buffer, Program
from pymtl.lowering.recurrent import lower_parallel, lower_recurrent
from pymtl.recurrent import Recurrent
from pymtl.sharing import (
    CGC,
    CrossStitch,
    HardSharing,
    HierarchicalSharing,
    MMoE,
    ParallelLSTM,
    SharedPrivate,
    Sharing,
    SoftSharing,
    TaskAttention,
)
from pymtl.sharing.experts import SHARED

AT = "encoder"  # where the tensors' names begin


class States(NamedTuple):
    """A task's states of the tokens. The directions' halves stand side by side; ``parts``: in how many parts a product
    with them is summed."""

    tokens: Buffer
    directions: int
    parts: int = 1

    def pooled(self, program: Program, kind: str) -> Buffer:
        return program.pool(self.tokens, kind, [False, True][: self.directions])


def lower_encoder(program: Program, encoder: Recurrent | Sharing, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    """The states of each task."""
    if isinstance(encoder, Recurrent):
        return _of_layers(program, encoder, x, tasks, AT)
    lower = _SCHEMES.get(type(encoder))
    if lower is None:
        raise refuse(encoder, AT, "a pymtl.LSTM, GRU or RNN, or one of pymtl.sharing's schemes")
    return lower(program, encoder, x, tasks)


def _of_layers(program: Program, layers: Recurrent, x: Buffer, tasks: Sequence[str], at: str) -> dict[str, States]:
    directions = 2 if layers.bidirectional else 1
    states = States(lower_recurrent(program, layers, x, at), directions, directions)
    return dict.fromkeys(tasks, states)


def _hard(program: Program, scheme: HardSharing, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    return _of_layers(program, scheme.encoder, x, tasks, f"{AT}.encoder")


def _encoders(parallel: ParallelLSTM, at: str, names: Sequence[str]) -> dict[str, Recurrent]:
    return {f"{at}.encoders.{name}": parallel.encoders[name] for name in names}


def _slices(program: Program, x: Buffer, names: Sequence[str]) -> dict[str, Buffer]:
    """The columns of each of those that stand side by side."""
    width = x.width // len(names)
    return {name: program.columns([(x, k * width, width)]) for k, name in enumerate(names)}


def _soft(program: Program, scheme: SoftSharing, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    states = lower_parallel(program, _encoders(scheme.parallel, f"{AT}.parallel", tasks), x)
    return {task: States(own, scheme.directions) for task, own in _slices(program, states, tasks).items()}


def _shared_private(program: Program, scheme: SharedPrivate, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    private = [task for task in tasks if task in scheme.private]
    names = [SHARED, *private]
    states = lower_parallel(program, _encoders(scheme.parallel, f"{AT}.parallel", names), x)
    width = states.width // len(names)
    half = width // scheme.directions
    found = {}
    for task in tasks:
        own = [0, names.index(task)] if task in private else [0]
        # The directions' halves together again.
        columns = [(states, k * width + d * half, half) for d in range(scheme.directions) for k in own]
        found[task] = States(program.columns(columns), scheme.directions)
    return found


def _hierarchical(program: Program, scheme: HierarchicalSharing, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    of_level = {}
    below = x
    for level in range(1, max(scheme.levels[task] for task in tasks) + 1):
        states = lower_recurrent(program, scheme.layers[level - 1], below, f"{AT}.layers.{level - 1}")
        of_level[level] = States(states, scheme.directions)
        below = program.beside([states, x]) if scheme.shortcut else states
    return {task: of_level[scheme.levels[task]] for task in tasks}


def _cross_stitch(program: Program, scheme: CrossStitch, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    for index, (layer, alpha) in enumerate(zip(scheme.layers, scheme.alpha)):
        encoders = _encoders(layer, f"{AT}.layers.{index}", scheme.tasks)
        states = lower_parallel(program, encoders, x, own_inputs=index > 0)
        weights = program.tensor(f"{AT}.alpha.{index}", alpha)
        x = program.emit("mix", [states], "tokens", states.width, weights=weights)
    slices = _slices(program, x, scheme.tasks)
    return {task: States(slices[task], scheme.directions) for task in tasks}


def _mixed(program: Program, x: Buffer, gate: Buffer, name: str, module: object) -> Buffer:
    """The experts' states in ``x``, side by side, weighted by the softmax of a gate that reads ``gate``."""
    weights = program.softmax(program.linear(gate, name, module.weight, module.bias))
    return program.emit("mix", [x, weights], "tokens", x.width // weights.width)


def _mmoe(program: Program, scheme: MMoE, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    names = list(scheme.experts.encoders)
    states = lower_parallel(program, _encoders(scheme.experts, f"{AT}.experts", names), x)
    return {
        task: States(_mixed(program, states, x, f"{AT}.gates.{task}", scheme.gates[task]), scheme.directions)
        for task in tasks
    }


def _cgc(program: Program, scheme: CGC, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    count = scheme.num_experts
    owners = (*scheme.tasks, SHARED)
    inputs = dict.fromkeys(owners, x)
    for level, (experts, gates) in enumerate(zip(scheme.levels, scheme.gates)):
        encoders = _encoders(experts, f"{AT}.levels.{level}", list(experts.encoders))
        read = x if level == 0 else program.beside([inputs[owner] for owner in owners for _ in range(count)])
        states = lower_parallel(program, encoders, read, own_inputs=level > 0)
        width = count * (states.width // len(encoders))
        first = {owner: k * width for k, owner in enumerate(owners)}
        last = level + 1 == len(scheme.levels)
        mixtures = {}
        for task in tasks if last else scheme.tasks:
            both = program.columns([(states, first[owner], width) for owner in (task, SHARED)])
            mixtures[task] = _mixed(program, both, inputs[task], f"{AT}.gates.{level}.{task}", gates[task])
        if not last:
            name = f"{AT}.gates.{level}.{SHARED}"
            mixtures[SHARED] = _mixed(program, states, inputs[SHARED], name, gates[SHARED])
        inputs = mixtures
    return {task: States(inputs[task], scheme.directions) for task in tasks}


def _task_attention(program: Program, scheme: TaskAttention, x: Buffer, tasks: Sequence[str]) -> dict[str, States]:
    attended: dict[str, Buffer] = {}
    for index, layer in enumerate(scheme.layers):
        x = lower_recurrent(program, layer, x, f"{AT}.layers.{index}")
        for task in tasks:
            read = program.beside([x, attended[task]]) if task in attended else x
            mask = scheme.masks[task][index]
            weights = program.linear(read, f"{AT}.masks.{task}.{index}", mask.weight, mask.bias)
            attended[task] = program.emit("multiply", [program.activation(weights, "sigmoid"), x], "tokens", x.width)
    return {task: States(attended[task], scheme.directions) for task in tasks}


_SCHEMES: dict[type[Sharing], Callable[..., dict[str, States]]] = {
    HardSharing: _hard,
    SoftSharing: _soft,
    SharedPrivate: _shared_private,
    HierarchicalSharing: _hierarchical,
    CrossStitch: _cross_stitch,
    MMoE: _mmoe,
    CGC: _cgc,
    TaskAttention: _task_attention,
}
