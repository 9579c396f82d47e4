"""The LSTM, the GRU and the RNN alike: the same bits however the sequences come, and bfloat16."""

import copy
from functools import partial

import pytest
import torch
from modules import (
    KINDS,
    autocast,
    by_packing,
    compare,
    in_double,
    input_of,
    like,
    named,
    ours_of,
    pair,
    run,
    states_if,
    states_of,
    tuple_of,
    with_gradients,
)
from ops.test_bfloat16 import BF16, assert_bits
from ops.test_bfloat16 import assert_parity as assert_bfloat16_parity
from parity import assert_same_bits
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

import pymtl

DEEP = {"num_layers": 2, "bidirectional": True}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# The same bits however the sequences come.


@every_dtype
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, DEEP], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
@every_kind
def test_a_sequence_gives_the_same_bits_alone_with_lengths_packed_and_in_a_dense_batch(kind, given, options, dtype):
    ours = ours_of(kind, 9, 19, dtype=dtype, **options)
    sequences = [torch.randn(length, 9, dtype=dtype) for length in (9, 1, 7, 7, 3, 12, 2, 1, 5, 33, 4)]
    lengths = [len(sequence) for sequence in sequences]
    hx = states_if(given, ours, len(sequences))
    padded = pad_sequence(sequences, padding_value=torch.nan)
    with torch.no_grad():
        output, state = ours(pack_sequence(sequences, enforce_sorted=False), hx)
    together = [
        run(ours, padded, hx, lengths=lengths),
        run(ours, torch.cat([padded, torch.full_like(padded, 3.0)]), hx, lengths=lengths),
        named(pad_packed_sequence(output)[0], state),
    ]
    for b, sequence in enumerate(sequences):
        alone = run(ours, sequence, like(hx, [h[:, b] for h in tuple_of(hx)]) if given else None)
        for results in together:
            own = {name: r[: lengths[b], b] if name == "output" else r[:, b] for name, r in results.items()}
            assert_same_bits(own, alone)
    for batch in (2, 5, 8, 17):
        x = torch.randn(6, batch, 9, dtype=dtype)
        dense = run(ours, x)
        for b in range(batch):
            assert_same_bits({name: result[:, b] for name, result in dense.items()}, run(ours, x[:, b]))


@every_dtype
@every_kind
def test_training_evaluation_and_every_number_of_threads_give_the_same_bits(kind, dtype, threads):
    ours = ours_of(kind, 40, 64, dtype=dtype, **DEEP)
    x = torch.randn(80, 16, 40, dtype=dtype)
    threads(1)
    expected = run(ours, x)
    for count in (1, 2, 3):
        threads(count)
        gradients = with_gradients(ours, x)
        assert_same_bits({name: gradients[name] for name in expected}, expected)
        for module in (ours.eval(), pymtl.freeze(ours), ours.train()):
            assert_same_bits(run(module, x), expected)
            assert_same_bits(run(module, x, lengths=[80] * 16), expected)
        with torch.inference_mode():
            assert_same_bits(named(*ours(x)), expected)
        assert_same_bits(with_gradients(ours, x), gradients)


@every_dtype
@pytest.mark.parametrize("layers", [1, 2])
@every_kind
def test_chunks_with_carried_states_give_the_same_bits_as_the_whole(kind, layers, dtype):
    ours = ours_of(kind, 9, 19, num_layers=layers, dtype=dtype)
    for batch in (1, 3):
        x = torch.randn(30, batch, 9, dtype=dtype)
        expected = run(ours, x)
        for sizes in ([1] * 30, [7, 1, 20, 2], [29, 1]):
            outputs, hx = [], None
            for chunk in x.split(sizes):
                with torch.no_grad():
                    output, hx = ours(chunk, hx)
                outputs.append(output)
            assert_same_bits(named(torch.cat(outputs), hx), expected)


@every_kind
def test_twenty_runs_give_the_same_bits_gradients_included(kind, threads):
    ours = ours_of(kind, 40, 64, **DEEP)
    x = torch.randn(40, 8, 40)
    for count in (1, 2):
        threads(count)
        expected = with_gradients(ours, x)
        for _ in range(10):
            assert_same_bits(with_gradients(ours, x), expected)


@pytest.mark.parametrize("isa", pymtl._native.available_isas(), indirect=True)
@every_kind
def test_every_instruction_set_is_as_accurate_as_torch(kind, isa):
    ours, theirs = pair(kind, 9, 19, **DEEP)
    compare(ours, theirs, input_of(ours, 5), states_of(ours, 5))


# bfloat16 and autocast.


def in_bfloat16(kind, autocasts, **options):
    ours, theirs = (module.to(BF16) for module in pair(kind, 5, 7, **options))
    return (ours.float(), theirs.float()) if autocasts else (ours, theirs)


BFLOAT16_OPTIONS = {"plain": {}, "deep": DEEP, "no bias, batch first": {"bias": False, "batch_first": True}}


@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
@pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("options", BFLOAT16_OPTIONS.values(), ids=BFLOAT16_OPTIONS)
@every_kind
def test_bfloat16_and_autocast_are_as_accurate_as_torchs(kind, options, autocasts, given):
    ours, theirs = in_bfloat16(kind, autocasts, **options)
    x, h0 = input_of(ours), states_if(given, ours)
    x = x.to(BF16).to(x.dtype)
    h0 = like(h0, [h.to(BF16).to(h.dtype) for h in tuple_of(h0)]) if given else None

    def cast(call, *args):
        with autocast(enabled=autocasts):
            return call(*args)

    plain = partial(cast, lambda module, *args: module(*args))
    with_lengths = partial(cast, lambda module, *args: module(*args, lengths=[2, 5, 1]))
    by_hand = partial(cast, partial(by_packing, [2, 5, 1]))
    truth = in_double(theirs)
    for call, reference, exact in ((plain, plain, None), (with_lengths, by_hand, partial(by_packing, [2, 5, 1]))):
        found = with_gradients(ours, x, h0, call=call)
        expected = with_gradients(theirs, x, h0, call=reference)
        exact = with_gradients(truth, x, h0, call=exact, dtype=torch.float64)
        dtypes = {name: BF16 if name in ("output", "h_n", "c_n") else ours.weight_ih_l0.dtype for name in found}
        assert {name: result.dtype for name, result in found.items()} == dtypes
        assert_bfloat16_parity(found, expected, exact)


@pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16", "autocast"])
@every_kind
def test_bfloat16_gives_the_same_bits_alone_packed_frozen_and_on_any_threads(kind, autocasts, threads):
    ours = in_bfloat16(kind, autocasts, **DEEP)[0].eval()
    sequences = [torch.randn(length, 5).to(ours.weight_ih_l0.dtype) for length in (9, 1, 7, 7, 3, 33, 2, 4)]
    lengths = [len(s) for s in sequences]
    padded = pad_sequence(sequences, padding_value=torch.nan)
    with torch.autocast("cpu", BF16, enabled=autocasts), torch.no_grad():
        together = run(ours, padded, lengths=lengths)
        assert together["output"].dtype == BF16
        for b, sequence in enumerate(sequences):
            alone = {n: r[: lengths[b], b] if n == "output" else r[:, b] for n, r in together.items()}
            assert_bits(run(ours, sequence), alone)
        for count in (1, 2):
            threads(count)
            for module in (pymtl.freeze(ours), pymtl.unfreeze(ours)):
                output, state = module(pack_sequence(sequences, enforce_sorted=False))
                assert_bits(named(pad_packed_sequence(output)[0], state), together)


@every_kind
def test_autocast_gives_the_bits_of_bfloat16(kind):
    half, _ = in_bfloat16(kind, False, **DEEP)
    single = copy.deepcopy(half).float()
    x, h0 = input_of(half), states_of(half)
    with torch.autocast("cpu", BF16):
        assert_bits(run(single, x.float(), like(h0, [h.float() for h in tuple_of(h0)])), run(half, x, h0))
        assert_bits(run(single, x, h0), run(half, x, h0))
    with pytest.raises(ValueError, match="input dtype"):
        half(x.float())


@every_kind
def test_float16_autocast_gives_exactly_torchs_results(kind):
    ours, theirs = pair(kind, 5, 7, **DEEP)
    x = input_of(ours)
    # oneDNN knows float16 on few CPUs.
    with torch.autocast("cpu", torch.float16), torch.backends.mkldnn.flags(enabled=False):
        assert_same_bits(run(ours, x), run(theirs, x))
