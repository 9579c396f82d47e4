import pytest
import torch
from ops.test_bfloat16 import CASES, assert_bits, fused, head_of, sample_of
from samples import (
    ALL_OPTIONS,
    BOTH,
    INVARIANT,
    RAGGED,
    RNNCase,
    RNNSample,
    random_like,
    raw_arguments,
    run_ours,
    run_reference,
    shifted,
    spread,
    transposed,
    with_gradients,
)

from pymtl import ops


def unfused(sample, head):
    results = run_ours(sample)
    output = results["output"]
    reverse = sample.weights.reverse
    logits = ops.heads(output.flatten(0, -2), *head, parts=len(reverse))
    return {
        "logits": logits.reshape(*output.shape[:-1], logits.shape[-1]),
        **{kind: ops.pool(output, sample.batch_sizes, kind, reverse=reverse) for kind in ("mean", "max")},
        **{name: results.get(name, results["h_n"][:0]) for name in ("h_n", "c_n")},
    }


@pytest.mark.parametrize(("classes", "bias"), [(1, True), (7, False), (72, True)])
@pytest.mark.parametrize("case", [*INVARIANT, *CASES], ids=str)
def test_rnn_heads_gives_the_bits_of_lstm_then_heads_and_pool(case, classes, bias, isa):
    sample = sample_of(case)
    head = head_of(sample, classes, bias)
    expected = unfused(sample, head)
    assert_bits(fused(sample, head, mean=True, max=True), expected)
    logits = fused(sample, head, prepacked=ops.rnn_prepack(sample.weights))["logits"]
    assert_bits({"logits": logits}, {"logits": expected["logits"]})
    pooled = fused(sample, (None, None), max=True)
    assert_bits({"max": pooled["max"]}, {"max": expected["max"]})


@pytest.mark.parametrize("case", [*INVARIANT, *CASES], ids=str)
def test_training_and_weights_packed_before_give_the_same_bits(case, isa):
    sample = sample_of(case)
    expected = run_ours(sample)
    prepacked = ops.rnn_prepack(sample.weights)
    assert_bits(run_ours(sample, prepacked=prepacked), expected)
    assert_bits(run_ours(sample, prepacked=torch.cat([prepacked.new_zeros(1), prepacked])[1:]), expected)
    assert_bits(run_ours(sample.leaves()), expected)


def everything(sample):
    """The results of every op of the LSTM and all gradients."""
    seeds = random_like(run_reference(sample))
    training = torch.ops.pymtl.rnn_training(*raw_arguments(sample))
    return (
        with_gradients(run_ours, sample, seeds)
        | {f"fused {name}": result for name, result in fused(sample, head_of(sample), mean=True, max=True).items()}
        | {"gates": training[3], "cells": training[4]}
    )


def forward_only(results):
    return {name: result for name, result in results.items() if not name.startswith("gradient")}


@pytest.mark.parametrize("case", [CASES[14], RAGGED, ALL_OPTIONS, RNNCase(40, 64, steps=60, batch=1)], ids=str)
def test_runs_and_numbers_of_threads_give_the_same_bits(case, isa, threads):
    sample = sample_of(case)
    threads(1)
    alone = everything(sample)
    for count in (1, 2):
        threads(count)
        expected = everything(sample)
        assert_bits(forward_only(expected), forward_only(alone))
        assert_bits(everything(sample), expected)


@pytest.mark.parametrize("case", [CASES[14], RAGGED, ALL_OPTIONS, CASES[0], CASES[3]], ids=str)
def test_results_and_gradients_do_not_depend_on_what_memory_held_before(case, isa, filled_memory):
    sample = sample_of(case)
    expected = everything(sample)
    filled_memory()
    assert_bits(everything(sample), expected)


@pytest.mark.parametrize("case", [RAGGED, ALL_OPTIONS], ids=["ragged", "all-options"])
def test_a_sequence_gives_the_same_bits_alone_as_in_a_batch(case, isa):
    sample = sample_of(case)
    together = run_ours(sample)
    sizes = sample.batch_sizes.tolist()
    for row, length in enumerate(case.lengths):
        tokens = [sum(sizes[:t]) + row for t in range(length)]
        states = [None if s is None else s[:, row : row + 1] for s in (sample.h0, sample.c0)]
        alone = run_ours(RNNSample(sample.input[tokens].unsqueeze(1), None, sample.weights, *states))
        expected = {name: together[name][:, row : row + 1] for name in ("h_n", "c_n") if name in together}
        assert_bits(alone, {"output": together["output"][tokens].unsqueeze(1), **expected})


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("case", [ALL_OPTIONS, RNNCase(9, 19, steps=4, h0=True, c0=True)], ids=str)
def test_other_memory_layouts_give_the_same_bits(case, layout, isa):
    sample = sample_of(case)
    seeds = random_like(run_ours(sample))
    views = sample.map(lambda _, tensor: layout(tensor))
    other = {name: layout(seed) for name, seed in seeds.items()}
    laid_out = with_gradients(lambda s: run_ours(s.map(lambda _, t: layout(t))), sample, other)
    assert_bits(laid_out, with_gradients(run_ours, sample, seeds))
    head = head_of(sample)
    assert_bits(fused(views, [layout(t) for t in head], mean=True), fused(sample, head, mean=True))
    assert torch.equal(ops.rnn_prepack(views.weights), ops.rnn_prepack(sample.weights))


def test_encoders_side_by_side_give_the_bits_they_give_alone(isa):
    sample = sample_of(RNNCase(7, 19, lengths=(9, 9, 7, 5, 2, 1), reverse=BOTH * 2, inputs=2))
    together = with_gradients(run_ours, sample, random_like(run_ours(sample)))
    for p, (pair, columns, states) in enumerate(zip(*([slice(n * p, n * p + n) for p in (0, 1)] for n in (2, 7, 38)))):
        weights = ops.RNNWeights(*(group[pair] for group in sample.weights[:5]))
        alone = RNNSample(sample.input[:, columns].contiguous(), sample.batch_sizes, weights)
        seeds = random_like(run_ours(sample))
        own = {name: seed[:, states] if name == "output" else seed[pair] for name, seed in seeds.items()}
        found = with_gradients(run_ours, alone, own)
        assert torch.equal(found["output"], together["output"][:, states])
        assert torch.equal(found["gradient of input"], together["gradient of input"][:, columns])
        for g in (0, 1):
            name = "gradient of weight_hh[{}]".format
            assert torch.equal(found[name(g)], together[name(g + 2 * p)])
