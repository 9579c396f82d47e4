from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import assert_same_bits
from samples import (
    ALL_OPTIONS,
    GATES,
    INVARIANT,
    RAGGED,
    SMALL,
    B,
    F,
    RNNCase,
    RNNSample,
    named,
    random_like,
    raw_arguments,
    rnn_sample,
    rnn_weights,
    run_ours,
    shifted,
    sizes_of,
    spread,
    transposed,
    with_gradients,
)

from pymtl import ops


def sequence(sample, row):
    """One sequence of a packed batch, alone and dense."""
    sizes = sample.batch_sizes.tolist()
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    tokens = [start + row for start, size in zip(starts, sizes) if size > row]
    states = [None if s is None else s[:, row : row + 1] for s in (sample.h0, sample.c0)]
    return tokens, RNNSample(sample.input[tokens].unsqueeze(1), None, sample.weights, *states)


def batch_of(sample, rows):
    """Some sequences of a packed batch, as a packed batch of their own, and their tokens in the old one."""
    rows = sorted(rows)
    tokens = [sequence(sample, row)[0] for row in rows]
    steps = range(max(map(len, tokens)))
    order = [t[step] for step in steps for t in tokens if len(t) > step]
    states = [None if s is None else s[:, rows] for s in (sample.h0, sample.c0)]
    return order, RNNSample(sample.input[order], sizes_of([len(t) for t in tokens]), sample.weights, *states)


def states(results, rows):
    """The last states of some sequences; only an LSTM has c."""
    return {name: results[name][:, rows] for name in ("h_n", "c_n") if name in results}


every_invariant_case = pytest.mark.parametrize("case", INVARIANT, ids=str)


@every_invariant_case
def test_a_sequence_gives_the_same_bits_alone_as_in_a_batch(case, dtype, isa):
    sample = rnn_sample(case, dtype)
    together = run_ours(sample)
    for row in range(len(case.lengths)):
        tokens, alone = sequence(sample, row)
        expected = {"output": together["output"][tokens].unsqueeze(1), **states(together, [row])}
        assert_same_bits(run_ours(alone), expected)


@every_invariant_case
def test_a_sequence_gives_the_same_bits_in_any_batch(case, dtype, isa):
    sample = rnn_sample(case, dtype)
    together = run_ours(sample)
    generator = torch.Generator().manual_seed(7)
    for size in range(2, len(case.lengths)):
        rows = sorted(torch.randperm(len(case.lengths), generator=generator)[:size].tolist())
        order, part = batch_of(sample, rows)
        expected = {"output": together["output"][order], **states(together, rows)}
        assert_same_bits(run_ours(part), expected)


@pytest.mark.parametrize("hidden_size", [19, 64])
def test_dense_and_packed_give_the_same_bits(hidden_size, dtype, isa):
    dense = rnn_sample(RNNCase(9, hidden_size, steps=12, batch=7, h0=True, c0=True), dtype)
    packed = RNNSample(dense.input.reshape(-1, 9), torch.full((12,), 7), dense.weights, dense.h0, dense.c0)
    expected = run_ours(dense)
    results = run_ours(packed)
    assert_same_bits(results | {"output": results["output"].reshape(12, 7, -1)}, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", [RAGGED, ALL_OPTIONS], ids=["ragged", "all-options"])
def test_longer_padding_gives_the_same_bits_and_zeros_at_padding(case, batch_first, dtype, isa):
    lengths = torch.tensor(case.lengths)[torch.randperm(len(case.lengths), generator=torch.manual_seed(3))]
    sample = rnn_sample(case, dtype)
    tight = int(lengths.max())
    found = []
    for steps in (tight, tight + 1, tight + 40):
        order = ops.packing_order(lengths, steps)
        padded = torch.full((steps, len(lengths), case.input_size), torch.nan, dtype=dtype)
        padded[:tight] = torch.randn(tight, len(lengths), case.input_size, generator=torch.manual_seed(4), dtype=dtype)
        padded = padded.transpose(0, 1) if batch_first else padded
        tokens = ops.pack(padded, order, batch_first=batch_first)
        output, h_n, c_n = ops.rnn(tokens, order.batch_sizes, sample.weights, sample.h0, sample.c0)
        output = ops.unpack(output, order, batch_first=batch_first)
        output = output.transpose(0, 1) if batch_first else output
        past = torch.arange(steps)[:, None] >= lengths
        assert not output[past].any()
        found.append({"output": output[:tight], "h_n": h_n, "c_n": c_n})
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@every_invariant_case
def test_a_sequence_cut_into_chunks_gives_the_same_bits(case, dtype, isa):
    shape = RNNCase(case.input_size, case.hidden_size, steps=23, batch=5, reverse=(F, F), mode=case.mode)
    whole = rnn_sample(shape, dtype)
    outputs, h, c = [], None, None
    for chunk in whole.input.split([1, 7, 2, 13]):
        output, h, c = ops.rnn(chunk, None, whole.weights, h, c if case.mode == "LSTM" else None)
        outputs.append(output)
    assert_same_bits(named(whole, (torch.cat(outputs), h, c)), run_ours(whole))


def results_of_every_forward_op(sample):
    weights, features = sample.weights, len(sample.weights.reverse) * sample.weights.weight_hh[0].shape[1]
    generator = torch.Generator().manual_seed(9)
    head_weight = torch.randn(11, features, generator=generator, dtype=sample.input.dtype)
    fused = ops.rnn_heads(
        sample.input, sample.batch_sizes, weights, head_weight, None, mean=True, max=True, h0=sample.h0, c0=sample.c0
    )
    training = torch.ops.pymtl.rnn_training(*raw_arguments(sample))
    return (
        run_ours(sample)
        | {f"fused {name}": result for name, result in fused._asdict().items()}
        | {f"training {place}": result for place, result in enumerate(training)}
        | {"prepacked weights": ops.rnn_prepack(weights)}
    )


@every_invariant_case
def test_any_number_of_threads_gives_the_same_bits(case, dtype, isa, threads):
    sample = rnn_sample(case, dtype)
    threads(1)
    expected = results_of_every_forward_op(sample)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(results_of_every_forward_op(sample), expected)


@pytest.mark.parametrize("mode", GATES)
def test_any_number_of_threads_gives_one_dense_sequence_the_same_bits(mode, dtype, isa, threads):
    sample = rnn_sample(RNNCase(40, 128, steps=60, batch=1, reverse=(F,), mode=mode), dtype)
    threads(1)
    expected = results_of_every_forward_op(sample)
    threads(2)
    assert_same_bits(results_of_every_forward_op(sample), expected)


@every_invariant_case
def test_twenty_runs_give_the_same_bits(case, dtype):
    sample = rnn_sample(case, dtype)
    expected = results_of_every_forward_op(sample)
    for _ in range(19):
        assert_same_bits(results_of_every_forward_op(sample), expected)


@every_invariant_case
def test_results_and_gradients_do_not_depend_on_what_memory_held_before(case, dtype, isa, filled_memory):
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))

    def everything():
        return results_of_every_forward_op(sample) | with_gradients(run_ours, sample, seeds)

    expected = everything()
    filled_memory()
    assert_same_bits(everything(), expected)


def test_calls_from_several_threads_at_once_give_the_same_bits(dtype):
    samples = [rnn_sample(case, dtype) for case in INVARIANT]
    expected = [results_of_every_forward_op(sample) for sample in samples]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(results_of_every_forward_op, samples * 4))
    for place, results in enumerate(found):
        assert_same_bits(results, expected[place % len(samples)])


@every_invariant_case
def test_gradients_repeat_bit_for_bit(case, dtype, isa, threads):
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    for count in (1, 2):
        threads(count)
        expected = with_gradients(run_ours, sample, seeds)
        for _ in range(2):
            assert_same_bits(with_gradients(run_ours, sample, seeds), expected)


@pytest.mark.parametrize("case", INVARIANT + SMALL, ids=str)
def test_training_gives_the_bits_of_inference(case, dtype, isa):
    sample = rnn_sample(case, dtype)
    assert_same_bits(run_ours(sample.leaves()), run_ours(sample))
    with torch.no_grad():
        assert_same_bits(run_ours(sample.leaves()), run_ours(sample))


@pytest.mark.parametrize("case", INVARIANT + SMALL, ids=str)
def test_weights_packed_before_give_the_same_bits(case, dtype, isa):
    sample = rnn_sample(case, dtype)
    expected = run_ours(sample)
    prepacked = ops.rnn_prepack(sample.weights)
    assert_same_bits(run_ours(sample, prepacked=prepacked), expected)
    # Any address will do: this one is not aligned.
    moved = torch.cat([prepacked.new_zeros(1), prepacked])[1:]
    assert_same_bits(run_ours(sample, prepacked=moved), expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 6, 7])
@pytest.mark.parametrize("mode", GATES)
def test_a_call_of_few_steps_gives_the_bits_of_the_same_steps_in_a_long_call(mode, steps, batch, dtype, isa):
    whole = rnn_sample(RNNCase(13, 37, steps=20, batch=batch, reverse=(F,), mode=mode), dtype)
    output = ops.rnn(whole.input, None, whole.weights)[0]
    assert torch.equal(ops.rnn(whole.input[:steps], None, whole.weights)[0], output[:steps])


def unfused(sample, head_weight, head_bias):
    results = run_ours(sample)
    output = results["output"]
    reverse = sample.weights.reverse
    flat = output.reshape(-1, output.shape[-1])
    logits = ops.heads(flat, head_weight, head_bias, parts=len(reverse))
    return {
        "logits": logits.reshape(*output.shape[:-1], logits.shape[-1]),
        "mean": ops.pool(output, sample.batch_sizes, "mean", reverse=reverse),
        "max": ops.pool(output, sample.batch_sizes, "max", reverse=reverse),
        **{name: results.get(name, results["h_n"][:0]) for name in ("h_n", "c_n")},
    }


@pytest.mark.parametrize(("classes", "bias"), [(1, True), (7, False), (16, True), (72, True), (300, False)])
@pytest.mark.parametrize("case", [*INVARIANT, *SMALL[::2], RNNCase(8, 33, steps=6, batch=1)], ids=str)
def test_rnn_heads_gives_the_bits_of_lstm_then_heads_and_pool(case, classes, bias, dtype, isa):
    sample = rnn_sample(case, dtype)
    generator = torch.Generator().manual_seed(5)
    head_weight = torch.randn(classes, len(case.reverse) * case.hidden_size, generator=generator, dtype=dtype)
    head_bias = torch.randn(classes, generator=generator, dtype=dtype) if bias else None
    expected = unfused(sample, head_weight, head_bias)
    inputs = (sample.input, sample.batch_sizes, sample.weights)
    states = {"h0": sample.h0, "c0": sample.c0}
    fused = ops.rnn_heads(*inputs, head_weight, head_bias, mean=True, max=True, **states)
    assert_same_bits(fused._asdict(), expected)
    prepacked = ops.rnn_prepack(sample.weights)
    fused = ops.rnn_heads(*inputs, head_weight, head_bias, prepacked=prepacked, **states)
    assert_same_bits({"logits": fused.logits}, {"logits": expected["logits"]})
    assert fused.mean.numel() == fused.max.numel() == 0
    pooled = ops.rnn_heads(*inputs, None, None, max=True, **states)
    assert_same_bits({"max": pooled.max, "h_n": pooled.h_n}, {k: expected[k] for k in ("max", "h_n")})
    assert pooled.logits.numel() == pooled.mean.numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [RAGGED, ALL_OPTIONS], ids=["ragged", "all-options"])
def test_a_number_that_is_not_finite_stays_in_its_sequence(case, value, dtype, isa):
    sample = rnn_sample(case, dtype)
    hit = 2
    tokens, _ = sequence(sample, hit)
    spoilt = sample.input.clone()
    spoilt[tokens[1], 0] = value
    spoilt_sample = RNNSample(spoilt, sample.batch_sizes, sample.weights, sample.h0, sample.c0)
    clean, dirty = (results_of_every_forward_op(s) for s in (sample, spoilt_sample))
    others = torch.ones(len(sample.input), dtype=torch.bool)
    others[tokens] = False
    rows = torch.ones(len(case.lengths), dtype=torch.bool)
    rows[hit] = False
    for name in ("output", "fused logits"):
        assert_same_bits({name: dirty[name][others]}, {name: clean[name][others]})
    for name in ("h_n", "c_n", "fused h_n"):
        assert_same_bits({name: dirty[name][:, rows]}, {name: clean[name][:, rows]})
    for name in ("fused mean", "fused max"):
        assert_same_bits({name: dirty[name][rows]}, {name: clean[name][rows]})
    if value != value:
        # Forward recurrences are NaN from the second token on, backward ones up to it.
        assert dirty["h_n"][:, hit].isnan().all()
        assert dirty["fused mean"][hit].isnan().all()
        assert dirty["fused max"][hit].isnan().all()
        assert dirty["output"][tokens[0], : case.hidden_size].isfinite().all()
        assert dirty["output"][tokens[2], : case.hidden_size].isnan().all()
        assert dirty["output"][tokens[2], case.hidden_size : 2 * case.hidden_size].isfinite().all()


# Memory layouts.


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("case", [ALL_OPTIONS, RNNCase(9, 19, steps=4, batch=3, h0=True, c0=True)], ids=str)
def test_other_memory_layouts_give_the_same_bits(case, layout, dtype):
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    other = {name: layout(seed) for name, seed in seeds.items()}

    def run_on_views(s):
        return run_ours(s.map(lambda _, tensor: layout(tensor)))

    expected = with_gradients(run_ours, sample, seeds)
    assert_same_bits(with_gradients(run_on_views, sample, other), expected)
    with torch.no_grad():
        assert_same_bits(run_on_views(sample), run_ours(sample))
    batch_sizes = None if sample.batch_sizes is None else spread(sample.batch_sizes.double()).long()
    heads = torch.randn(5, case.hidden_size * len(case.reverse), dtype=dtype), torch.randn(5, dtype=dtype)
    views = sample.map(lambda _, tensor: layout(tensor))
    assert_same_bits(
        ops.rnn_heads(views.input, batch_sizes, views.weights, *map(layout, heads), mean=True)._asdict(),
        ops.rnn_heads(sample.input, sample.batch_sizes, sample.weights, *heads, mean=True)._asdict(),
    )
    assert torch.equal(ops.rnn_prepack(views.weights), ops.rnn_prepack(sample.weights))


def test_a_strided_batch_sizes_gives_the_same_bits():
    sample = rnn_sample(RAGGED)
    strided = torch.stack([sample.batch_sizes, -sample.batch_sizes], 1)[:, 0]
    assert not strided.is_contiguous()
    assert_same_bits(run_ours(RNNSample(sample.input, strided, sample.weights)), run_ours(sample))


def test_expanded_inputs_and_weights_give_the_same_bits(dtype):
    weights = rnn_weights(4, 6, dtype=dtype)
    base = {
        "x": torch.randn(5, 1, 4, dtype=dtype),
        "bias": torch.randn(1, dtype=dtype),
        "row": torch.randn(1, 6, dtype=dtype),
        "h0": torch.randn(1, 3, 1, dtype=dtype),
    }

    def run(b, expand):
        w = weights._replace(
            bias_ih=[expand(b["bias"], 24)] * 2, weight_hh=[expand(b["row"], 24, 6), weights.weight_hh[1]]
        )
        return ops.rnn(expand(b["x"], 5, 3, 4), None, w, expand(b["h0"], 2, 3, 6), None)

    results = []
    for expand in (lambda t, *size: t.expand(size), lambda t, *size: t.expand(size).contiguous()):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
        output, h_n, c_n = run(leaves, expand)
        # The gradient of a sum is an expanded scalar.
        output.sum().backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()} | {"o": output, "h": h_n, "c": c_n})
    assert_same_bits(*results)


def test_inputs_are_never_modified(dtype):
    sample = rnn_sample(ALL_OPTIONS, dtype)
    seeds = random_like(run_ours(sample))
    head_weight, head_bias = torch.randn(5, 132, dtype=dtype), torch.randn(5, dtype=dtype)
    tensors = sample.tensors() | seeds | {"head_weight": head_weight, "head_bias": head_bias}
    tensors |= {"batch_sizes": sample.batch_sizes, "prepacked": ops.rnn_prepack(sample.weights)}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
    run_ours(sample, prepacked=tensors["prepacked"])
    ops.rnn_heads(
        sample.input, sample.batch_sizes, sample.weights, head_weight, head_bias, mean=True, h0=sample.h0, c0=sample.c0
    )
    leaves = sample.map(lambda _, tensor: tensor.requires_grad_())
    results = run_ours(leaves)
    torch.autograd.grad(list(results.values()), list(leaves.tensors().values()), list(seeds.values()))
    for name, (values, version) in before.items():
        assert torch.equal(tensors[name], values), name
        assert tensors[name]._version == version, name


@pytest.mark.parametrize("inputs", [2, 4])
def test_encoders_side_by_side_give_the_bits_they_give_alone(inputs, dtype, isa):
    case = RNNCase(7, 19, lengths=(9, 9, 7, 5, 2, 1), reverse=(F, B) * inputs, inputs=inputs)
    sample = rnn_sample(case, dtype)
    seeds = random_like(run_ours(sample))
    together = with_gradients(run_ours, sample, seeds)
    for p in range(inputs):
        pair, columns = slice(2 * p, 2 * p + 2), slice(7 * p, 7 * p + 7)
        weights = ops.RNNWeights(*(group[pair] for group in sample.weights[:5]))
        alone = RNNSample(sample.input[:, columns].contiguous(), sample.batch_sizes, weights)
        own = {"output": seeds["output"][:, 38 * p : 38 * p + 38], "h_n": seeds["h_n"][pair], "c_n": seeds["c_n"][pair]}
        expected = with_gradients(run_ours, alone, own)
        part = {"output": together["output"][:, 38 * p : 38 * p + 38]}
        part |= {name: together[name][pair] for name in ("h_n", "c_n")}
        part["gradient of input"] = together["gradient of input"][:, columns]
        for name in expected.keys() - part.keys():
            field, g = name[:-1].split("[")
            part[name] = together[f"{field}[{int(g) + 2 * p}]"]
        assert_same_bits(part, expected)
