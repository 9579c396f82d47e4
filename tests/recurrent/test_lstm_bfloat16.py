import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from modules import (
    autocast,
    by_packing,
    data_of,
    input_of,
    lstm_pair,
    named,
    run,
    saved_and_loaded,
    seeds_for,
    states_if,
    states_of,
    with_data,
    with_gradients,
)
from ops.test_bfloat16 import BF16, assert_bits, assert_parity
from samples import spread, transposed
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import pymtl
from pymtl import LSTM

DEEP = {"num_layers": 2, "bidirectional": True}
OPTIONS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "2 layers": {"num_layers": 2},
    "no bias": {"bias": False, "bidirectional": True},
    "batch first": {**DEEP, "batch_first": True},
    "everything": {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.5, "bidirectional": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
LENGTHS = [4, 6, 1, 4, 2]
casting = pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16", "autocast"])


def pair(input_size=5, hidden_size=7, *, autocasts=False, **options):
    """Ours and nn.LSTM, of bfloat16 weights, in float32 if they are for autocast."""
    ours, theirs = (module.to(BF16) for module in lstm_pair(input_size, hidden_size, **options))
    return (ours.float(), theirs.float()) if autocasts else (ours, theirs)


def plain(module, *args):
    return module(*args)


def compare(ours, theirs, input, hx=None, *, call=plain, reference=plain):
    """Holds results and gradients to the rule; float32 modules run under autocast."""
    autocasts = ours.weight_ih_l0.dtype == torch.float32
    input = with_data(input, data_of(input).to(BF16).to(ours.weight_ih_l0.dtype))
    hx = None if hx is None else tuple(h.to(BF16).to(h.dtype) for h in hx)

    def cast(call, *args):
        with autocast(enabled=autocasts):
            return call(*args)

    found = with_gradients(ours, input, hx, call=partial(cast, call))
    expected = with_gradients(theirs, input, hx, call=partial(cast, reference))
    truth = with_gradients(copy.deepcopy(theirs).double(), input, hx, call=reference, dtype=torch.float64)
    dtypes = {name: BF16 if name in ("output", "h_n", "c_n") else ours.weight_ih_l0.dtype for name in found}
    assert {name: result.dtype for name, result in found.items()} == dtypes
    assert_parity(found, expected, truth)


# Accuracy.


@casting
@with_and_without_states
@every_option
@pytest.mark.parametrize("batch", [3, 1, None], ids=["a batch", "a batch of one", "unbatched"])
def test_results_and_gradients_are_as_accurate_as_nn_lstms(options, given, batch, autocasts):
    ours, theirs = pair(autocasts=autocasts, **options)
    compare(ours, theirs, input_of(ours, batch), states_if(given, ours, batch))


@casting
@with_and_without_states
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@every_option
def test_packed_sequences_are_as_accurate_as_nn_lstms(options, enforce_sorted, given, autocasts):
    ours, theirs = pair(autocasts=autocasts, **options)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    packed = pack_sequence([torch.randn(length, 5) for length in lengths], enforce_sorted)
    compare(ours, theirs, packed, states_if(given, ours, len(LENGTHS)))


@casting
@with_and_without_states
@every_option
def test_lengths_are_as_accurate_as_packing_by_hand(options, given, autocasts):
    ours, theirs = pair(autocasts=autocasts, **options)
    hx = states_if(given, ours, len(LENGTHS))
    compare(
        ours,
        theirs,
        input_of(ours, len(LENGTHS)),
        hx,
        call=lambda module, *args: module(*args, lengths=LENGTHS),
        reference=partial(by_packing, LENGTHS),
    )


@casting
@pytest.mark.parametrize(
    ("input_size", "hidden_size", "batch", "steps"),
    [(1, 1, 1, 1), (2, 3, 2, 1), (3, 2, 5, 4), (17, 16, 13, 10), (16, 33, 3, 43), (300, 64, 4, 7), (3, 64, 1, 300)],
)
def test_every_size_is_as_accurate_as_nn_lstm(input_size, hidden_size, batch, steps, autocasts, isa):
    ours, theirs = pair(input_size, hidden_size, autocasts=autocasts, bidirectional=True)
    compare(ours, theirs, input_of(ours, batch, steps), states_of(ours, batch))


def test_float32_weights_of_any_value_are_as_accurate_under_autocast_as_nn_lstms():
    ours, theirs = lstm_pair(17, 33, **DEEP)
    compare(ours, theirs, input_of(ours, 9, 20), states_of(ours, 9))


# The same bits.


@casting
def test_runs_threads_and_layouts_give_the_same_bits(autocasts, threads, isa):
    ours, _ = pair(9, 19, autocasts=autocasts, **DEEP)
    x, hx = input_of(ours, 5, 31), states_of(ours, 5)
    with autocast(enabled=autocasts):
        threads(1)
        results = run(ours, x, hx)
        for count in (1, 2):
            threads(count)
            assert_bits(run(ours, x, hx), results)
            expected = with_gradients(ours, x, hx)
            assert_bits({name: expected[name] for name in results}, results)
            assert_bits(with_gradients(ours, x, hx), expected)
        for change in (spread, transposed):
            assert_bits(run(ours, change(x), tuple(map(change, hx))), results)


@casting
def test_a_sequence_gives_the_same_bits_alone_with_lengths_and_packed(autocasts, isa):
    ours, _ = pair(9, 19, autocasts=autocasts, **DEEP)
    sequences = [torch.randn(length, 9).to(ours.weight_ih_l0.dtype) for length in (9, 1, 7, 7, 3, 33, 2, 4)]
    padded = nn.utils.rnn.pad_sequence(sequences, padding_value=torch.nan)
    with autocast(enabled=autocasts), torch.no_grad():
        together = run(ours, padded, lengths=[len(s) for s in sequences])
        packed, state = ours(pack_sequence(sequences, enforce_sorted=False))
        assert_bits(named(nn.utils.rnn.pad_packed_sequence(packed)[0], state), together)
        for b, sequence in enumerate(sequences):
            expected = {name: together[name][:, b] for name in ("h_n", "c_n")}
            assert_bits(run(ours, sequence), {"output": together["output"][: len(sequence), b], **expected})


def test_autocast_gives_the_bits_of_bfloat16_and_float32_gradients():
    half, _ = pair(**DEEP)
    single = copy.deepcopy(half).float()
    x, hx = input_of(half), states_of(half)
    expected = with_gradients(half, x, hx)
    seeds = list(seeds_for({name: expected[name] for name in ("output", "h_n", "c_n")}).values())
    leaves = [t.float().requires_grad_() for t in (x, *hx)]
    with autocast():
        output, state = single(leaves[0], tuple(leaves[1:]))
        assert_bits(run(single, x, hx), run(half, x, hx))
        assert_bits(run(half, x.float()), run(half, x))
    found = named(output, state)
    torch.autograd.backward(list(found.values()), seeds)
    found |= {f"gradient of {n}": t.grad for n, t in zip(("input", "h0", "c0"), leaves)}
    found |= {f"gradient of {n}": p.grad for n, p in single.named_parameters()}
    singles = {name: t.float() if name.startswith("gradient") else t for name, t in expected.items()}
    assert_bits(found, singles)


@casting
@every_option
def test_frozen_modules_give_the_same_bits(options, autocasts):
    ours = pair(autocasts=autocasts, **options)[0].eval()
    x, hx = input_of(ours), states_of(ours)

    def results():
        outside = run(ours, x, hx) | {f"{n} of one step": r for n, r in run(ours, x[:, :1]).items()}
        with autocast():
            inside = run(ours, x, hx)
        return outside | {f"{n} under autocast": r for n, r in inside.items()}

    expected = results()
    assert expected["output under autocast"].dtype == BF16
    for context in (nullcontext(), autocast()):
        with context:
            pymtl.freeze(ours)
        assert_bits(results(), expected)
        pymtl.unfreeze(ours)
    with torch.no_grad():
        pymtl.freeze(ours).weight_hh_l0.mul_(2)
    changed = results()
    pymtl.unfreeze(ours)
    assert_bits(changed, results())
    assert not torch.equal(changed["output under autocast"], expected["output under autocast"])


def test_compiled_modules_give_the_same_bits():
    torch._dynamo.reset()
    ours, _ = pair(**DEEP)
    x, hx = input_of(ours), states_of(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    call = {"call": lambda _, *args: compiled(*args)}
    assert_bits(with_gradients(ours, x, hx, **call), with_gradients(ours, x, hx))
    single = copy.deepcopy(ours).float()
    compiled = torch.compile(single, fullgraph=True, backend="aot_eager")
    with autocast():
        assert_bits(run(compiled, x.float()), run(single, x.float()))


# Which gradients are wanted.


@casting
@pytest.mark.parametrize("wanted", ["input", "weight_hh_l0", "bias_ih_l1", "weight_ih_l0_reverse"])
def test_one_gradient_alone_has_the_bits_it_has_among_all(wanted, autocasts):
    ours, _ = pair(autocasts=autocasts, **DEEP)
    x = input_of(ours)

    def gradients():
        output, (h_n, c_n) = ours(x)
        return output.double().sum() + h_n.double().sum() + c_n.double().square().sum()

    leaves = {"input": x.requires_grad_()} | dict(ours.named_parameters())
    with autocast(enabled=autocasts):
        expected = dict(zip(leaves, torch.autograd.grad(gradients(), list(leaves.values()))))[wanted]
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        (found,) = torch.autograd.grad(gradients(), leaves[wanted])
    assert_bits({wanted: found}, {wanted: expected})


@casting
def test_a_gradient_penalty_is_as_accurate_as_nn_lstms_in_float64(autocasts):
    ours, theirs = pair(**DEEP, autocasts=autocasts)

    def penalty(module, input, cell=plain):
        x = input.detach().requires_grad_()
        output, _ = cell(module, x)
        (first,) = torch.autograd.grad(output.double().square().sum(), x, create_graph=True)
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(first.double().square().sum(), list(parameters.values()))
        return dict(zip(parameters, gradients))

    def by_reference(module, x):
        for layer in range(module.num_layers):
            x, h_n, c_n = pymtl.reference.rnn(x, None, *module.layer_weights(layer))
        return x, (h_n, c_n)

    x = input_of(ours)
    truth = penalty(copy.deepcopy(theirs).double(), x.double())
    theirs = penalty(copy.deepcopy(ours).to(BF16), x.to(BF16), by_reference)
    with autocast(enabled=autocasts):
        assert_parity(penalty(ours, x), theirs, truth)


@casting
def test_checkpointing_gives_the_same_gradients(autocasts):
    ours, _ = pair(**DEEP, autocasts=autocasts)
    x = input_of(ours)
    with autocast(enabled=autocasts):
        expected = with_gradients(ours, x)
        found = with_gradients(ours, x, call=lambda m, *args: checkpoint(m, *args, use_reentrant=False))
    assert_bits(found, expected)


# Autocast.


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_float64_modules_and_regions_without_autocast_are_unaffected(packed):
    ours, _ = lstm_pair(5, 7, **DEEP)
    x = pack_sequence(list(torch.randn(3, 6, 5))) if packed else input_of(ours)
    expected = with_gradients(ours, x)
    with autocast(), autocast(enabled=False):
        assert_bits(with_gradients(ours, x), expected)
    with torch.autocast("cpu", torch.float16), autocast():
        assert run(ours, x)["output"].dtype == BF16
    ours, x = ours.double(), with_data(x, x.data.double())
    expected = with_gradients(ours, x)
    with autocast():
        assert_bits(with_gradients(ours, x), expected)


@with_and_without_states
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_float16_autocast_gives_exactly_nn_lstms_results_and_gradients(packed, given):
    ours, theirs = lstm_pair(5, 7, **DEEP)
    x = pack_sequence(list(torch.randn(3, 6, 5))) if packed else input_of(ours)
    hx = states_if(given, ours)
    # oneDNN knows float16 on few CPUs.
    with torch.autocast("cpu", torch.float16), torch.backends.mkldnn.flags(enabled=False):
        expected = with_gradients(theirs, x, hx)
        assert_bits(with_gradients(ours, x, hx), expected)
        assert_bits(run(pymtl.freeze(ours.eval()), x, hx), run(theirs.eval(), x, hx))
    assert not torch.equal(expected["output"].float(), run(ours, x, hx)["output"])


def test_weights_edited_within_autocast_are_seen():
    ours, _ = lstm_pair(5, 7, **DEEP)
    x = input_of(ours)
    optimizer = torch.optim.SGD(ours.parameters(), 1.0)
    with autocast():
        ours(x)[0].float().square().sum().backward()
        before = run(ours, x)
        optimizer.step()
        after = run(ours, x)
        assert_bits(run(copy.deepcopy(ours), x), after)
    assert not torch.equal(before["output"], after["output"])


# What else is done with modules.


@casting
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(packed, autocasts):
    ours, _ = pair(autocasts=autocasts, **DEEP)
    x = torch.zeros(6, 0, 5, dtype=ours.weight_ih_l0.dtype)
    x = PackedSequence(x[0], torch.zeros(6, dtype=torch.int64)) if packed else x
    with autocast(enabled=autocasts):
        results = with_gradients(ours, x)
    leading = (0,) if packed else (6, 0)
    assert [tuple(results[n].shape) for n in ("output", "h_n", "c_n")] == [(*leading, 14), (4, 0, 7), (4, 0, 7)]
    assert {results[n].dtype for n in ("output", "h_n", "c_n")} == {BF16}
    for name, parameter in ours.named_parameters():
        gradient = results[f"gradient of {name}"]
        assert gradient.dtype == parameter.dtype
        assert not gradient.any()


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, pymtl.convert],
    ids=["deepcopy", "pickle", "save", "convert"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_of_a_bfloat16_module_give_the_same_bits(duplicate, frozen):
    ours, theirs = (module.eval() for module in pair(**DEEP))
    x = input_of(ours)
    expected = run(ours, x)
    if frozen:
        pymtl.freeze(ours)
    twin = duplicate(theirs if duplicate is pymtl.convert else ours)
    assert type(twin) is LSTM
    assert {p.dtype for p in twin.parameters()} == {BF16}
    assert_bits(run(twin, x), expected)
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
    assert_bits(run(twin, x), expected)


def test_a_module_turned_into_bfloat16_is_one_made_in_bfloat16():
    single, _ = lstm_pair(5, 7, **DEEP)
    pymtl.freeze(single.eval())
    turned = single.to(BF16)
    made = LSTM(5, 7, **DEEP, dtype=BF16)
    assert not any(made.load_state_dict(turned.state_dict()))
    theirs = nn.LSTM(5, 7, **DEEP, dtype=BF16)
    assert not any(theirs.load_state_dict(made.state_dict()))
    assert_bits(theirs.state_dict(), turned.state_dict())
    x = input_of(turned)
    assert_bits(with_gradients(turned, x), with_gradients(made, x))
    with pytest.raises(ValueError, match="input dtype"):
        turned(x.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@casting
def test_nan_comes_out_where_nn_lstm_has_it_in_float32(value, autocasts, isa):
    ours, theirs = pair(autocasts=autocasts, **DEEP)
    x = input_of(ours)
    x[3, 1, 2] = value
    with autocast(enabled=autocasts):
        found = with_gradients(ours, x)
    expected = with_gradients(theirs.float(), x.float())
    for name in found:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
