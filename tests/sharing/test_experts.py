"""Mixtures of experts and their gates, against loops over sequences."""

import pytest
import torch
from schemes import INPUT, TASKS, H, assert_agrees, batch, every_batch, every_depth, every_direction, walk

from pymtl.sharing import CGC, MMoE


def softmax(scores):
    exp = (scores - scores.max(-1, keepdim=True).values).exp()
    return exp / exp.sum(-1, keepdim=True)


def mixture(gate, reads, experts):
    """For each sequence: the experts' states weighted at each token by what the gate makes of ``reads``."""
    mixed = []
    for b, x in enumerate(reads):
        weights = softmax(x @ gate.weight.t())
        assert weights.shape[1] == len(experts)
        mixed.append(sum(weights[:, e : e + 1] * states[b] for e, states in enumerate(experts)))
    return mixed


@every_batch
@every_depth
@every_direction
def test_mmoe_gates_read_the_tokens(bidirectional, num_layers, lengths):
    scheme = MMoE(TASKS, INPUT, H, num_layers, bidirectional, num_experts=4)
    assert all(gate.bias is None for gate in scheme.gates.values())

    def oracle(xs):
        experts = [walk(scheme.experts.encoders[f"expert{e}"], xs) for e in range(4)]
        return {t: mixture(scheme.gates[t], xs, experts) for t in TASKS}

    assert_agrees(scheme, oracle, lengths)
    assert_agrees(scheme, oracle, lengths, ["c", "a"])


def cgc_oracle(scheme, count):
    def oracle(xs):
        owners = (*TASKS, "shared")
        reads = dict.fromkeys(owners, xs)
        for level, gates in zip(scheme.levels, scheme.gates):
            experts = {o: [walk(level.encoders[f"{o}_expert{e}"], reads[o]) for e in range(count)] for o in owners}
            mixed = {t: mixture(gates[t], reads[t], experts[t] + experts["shared"]) for t in TASKS}
            if "shared" in gates:
                mixed["shared"] = mixture(gates["shared"], reads["shared"], [s for o in owners for s in experts[o]])
            reads = mixed
        assert "shared" not in reads  # the last level's shared experts have no mixture of their own
        return reads

    return oracle


@pytest.mark.parametrize("count", [1, 2], ids=["1 expert", "2 experts"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@every_direction
def test_cgc_experts_and_gates_read_what_the_paper_says(bidirectional, num_layers, count):
    scheme = CGC(TASKS, INPUT, H, num_layers, bidirectional, num_experts=count)
    oracle = cgc_oracle(scheme, count)
    assert_agrees(scheme, oracle)
    assert_agrees(scheme, oracle, [1], ["b", "a"])


def test_a_task_hears_only_its_own_and_the_shared_experts_in_cgc():
    for levels in (1, 2):
        scheme = CGC(TASKS, INPUT, H, levels)
        data, sizes = batch(dtype=torch.float32)
        scheme(data, sizes).states["a"].tokens.sum().backward()
        for index, level in enumerate(scheme.levels):
            of = {
                o: any(p.grad is not None and p.grad.any() for p in level.encoders[f"{o}_expert0"].parameters())
                for o in (*TASKS, "shared")
            }
            # Below the last level the shared gate passes every expert on.
            others = index + 1 < levels
            assert of == {"a": True, "b": others, "c": others, "shared": True}


def test_experts_of_names_that_run_into_each_other_stay_apart():
    # "a" + "10" and "a1" + "0" are one name.
    scheme = CGC(["a", "a1"], INPUT, H, num_experts=11)
    assert len(scheme.levels[0].encoders) == 33
    data, sizes = batch(dtype=torch.float32)
    scheme(data, sizes)
