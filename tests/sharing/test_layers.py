"""Schemes that share layer by layer: hierarchical, cross-stitch and task attention, against loops over sequences."""

import pytest
import torch
from schemes import INPUT, TASKS, H, assert_agrees, batch, every_batch, every_depth, every_direction, walk
from torch import nn

from pymtl.sharing import CrossStitch, HierarchicalSharing, TaskAttention

# Hierarchical.


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "no shortcut"])
@pytest.mark.parametrize("levels", [None, {"a": 2, "b": 1, "c": 2}, {"a": 1, "b": 3, "c": 3}], ids=str)
@every_direction
def test_tasks_read_their_own_layers(bidirectional, levels, shortcut):
    scheme = HierarchicalSharing(TASKS, INPUT, H, 1, bidirectional, levels=levels, shortcut=shortcut)
    levels = levels or {"a": 1, "b": 2, "c": 3}

    def oracle(xs):
        below, of_layer = xs, []
        for layer in scheme.layers:
            of_layer.append(walk(layer, below))
            below = [torch.cat([s, x], 1) for s, x in zip(of_layer[-1], xs)] if shortcut else of_layer[-1]
        return {task: of_layer[levels[task] - 1] for task in TASKS}

    assert len(scheme.layers) == scheme.num_layers == max(levels.values())
    assert_agrees(scheme, oracle)
    assert_agrees(scheme, oracle, [1, 1], ["b"])


def test_lower_tasks_do_not_run_upper_layers():
    scheme = HierarchicalSharing(TASKS, INPUT, H, num_layers=4, levels={"a": 1, "b": 3, "c": 2})
    assert len(scheme.layers) == 4
    ran = []
    for index, layer in enumerate(scheme.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index + 1))
    data, sizes = batch(dtype=torch.float32)
    for tasks, expected in ((["a"], [1]), (["c", "a"], [1, 2]), (["b"], [1, 2, 3]), (None, [1, 2, 3])):
        ran.clear()
        scheme(data, sizes, tasks)
        assert ran == expected


def test_tasks_of_one_level_share_their_states():
    data, sizes = batch(dtype=torch.float32)
    states = HierarchicalSharing(TASKS, INPUT, H, levels={"a": 2, "b": 1, "c": 2})(data, sizes).states
    assert states["a"] is states["c"]
    assert states["a"] is not states["b"]


# Cross-stitch.


@every_batch
@every_depth
@every_direction
def test_cross_stitch_units_mix_after_each_layer(bidirectional, num_layers, lengths):
    scheme = CrossStitch(TASKS, INPUT, H, num_layers, bidirectional)
    for alpha in scheme.alpha:
        nn.init.normal_(alpha)

    def oracle(xs):
        reads = dict.fromkeys(TASKS, xs)
        for layer, alpha in zip(scheme.layers, scheme.alpha):
            states = {t: walk(layer.encoders[t], reads[t]) for t in TASKS}
            reads = {
                j: [sum(alpha[row, k] * states[t][b] for k, t in enumerate(TASKS)) for b in range(len(xs))]
                for row, j in enumerate(TASKS)
            }
        return reads

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])


def test_alpha_begins_with_the_self_weight_and_rows_of_one():
    for count, weight in ((1, 0.9), (2, 0.9), (4, 0.7), (3, 1.0), (3, 0.0)):
        tasks = [f"t{k}" for k in range(count)]
        scheme = CrossStitch(tasks, INPUT, H, 2, self_weight=weight)
        assert len(scheme.alpha) == 2
        for alpha in scheme.alpha:
            torch.testing.assert_close(alpha.sum(1), torch.ones(count))
            torch.testing.assert_close(alpha.diagonal(), torch.full((count,), weight if count > 1 else 1.0))
            off = alpha[~torch.eye(count, dtype=torch.bool)]
            assert (off == off[0]).all() if count > 1 else True
        assert scheme.alpha[0] is not scheme.alpha[1]


# Task attention.


@every_batch
@every_depth
@every_direction
def test_task_attention_is_its_equation(bidirectional, num_layers, lengths):
    scheme = TaskAttention(TASKS, INPUT, H, num_layers, bidirectional)

    def oracle(xs):
        attended = {}
        for x in xs:
            below, masks = x, {}
            for index, layer in enumerate(scheme.layers):
                (h,) = walk(layer, [below])
                for task in TASKS:
                    linear = scheme.masks[task][index]
                    read = torch.cat([h, masks[task]], 1) if index > 0 else h
                    masks[task] = h / (1 + torch.exp(-(read @ linear.weight.t() + linear.bias)))
                below = h
            for task in TASKS:
                attended.setdefault(task, []).append(masks[task])
        return attended

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])
