"""Bad input of the LSTM, the GRU and the RNN: what torch raises, naming the argument."""

import pytest
import torch
from modules import (
    KINDS,
    WITHOUT_CELLS,
    by_packing,
    draw,
    named,
    ours_of,
    packed,
    pair,
    run,
    states_of,
)
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

every_kind = pytest.mark.parametrize("kind", KINDS)
gradients_or_not = pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])


def state(batch=3, rows=2, hidden=7, **options):
    return draw(rows, batch, hidden, **options)


def unsorted():
    return pack_padded_sequence(draw(6, 3, 5), [2, 6, 1], enforce_sorted=False)


X = draw(6, 3, 5)
# Arguments that torch refuses of two directions, input size 5 and hidden size 7, and what our message says: the
# argument, what was expected, what came.
REFUSED = {
    "rank 0": ((draw(()),), "input to be 2D or 3D, got 0D"),
    "rank 1": ((draw(5),), "input to be 2D or 3D, got 1D"),
    "rank 4": ((draw(2, 3, 4, 5),), "input to be 2D or 3D, got 4D"),
    "features": ((draw(6, 3, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "features, unbatched": ((draw(6, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "features, packed": ((packed(6, 3, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "rank, packed": ((packed(6, 3, 5, 2),), "input must have 2 dimensions, got 3"),
    "float64": ((X.double(),), r"input dtype \(torch.float64\).*\(torch.float32\)"),
    "float16": ((X.half(),), r"input dtype \(torch.float16\).*\(torch.float32\)"),
    "int64": ((torch.ones(6, 3, 5, dtype=torch.int64),), r"input dtype \(torch.int64\).*\(torch.float32\)"),
    "bool": ((torch.ones(6, 3, 5, dtype=torch.bool),), r"input dtype \(torch.bool\).*\(torch.float32\)"),
    "complex": ((torch.ones(6, 3, 5, dtype=torch.complex64),), r"input dtype \(torch.complex64\)"),
    "meta input": ((X.to("meta"),), "[Ii]nput.* meta"),
    "no steps": ((draw(0, 3, 5),), "sequence length to be larger than 0"),
    "no steps, unbatched": ((draw(0, 5),), "sequence length to be larger than 0"),
    "no steps, no sequences": ((draw(0, 0, 5),), "sequence length to be larger than 0"),
    "growing batch_sizes": ((PackedSequence(draw(6, 5), torch.tensor([2, 4])),), "batch_sizes: .* got 4 at step 1"),
    "negative batch_sizes": ((PackedSequence(draw(6, 5), torch.tensor([7, -1])),), "batch_sizes: .* got -1 at step 1"),
    "int32 batch_sizes": (
        (PackedSequence(draw(6, 5), torch.tensor([4, 2], dtype=torch.int32)),),
        "batch_sizes: expected dtype Long, got Int",
    ),
}
# The same of initial states: of h0 alone, and of an LSTM's pair.
REFUSED_H0 = {
    "h0 of another batch": ((X, state(2)), r"hidden size \(2, 3, 7\), got \[2, 2, 7\]"),
    "h0 of one direction": ((X, state(rows=1)), r"hidden size \(2, 3, 7\), got \[1, 3, 7\]"),
    "h0 of another size": ((X, state(hidden=6)), r"hidden size \(2, 3, 7\), got \[2, 3, 6\]"),
    "h0 of rank 2": ((X, draw(2, 7)), "For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
    "h0 of rank 4": ((X, draw(1, 2, 3, 7)), "For batched 3-D input, hx should also be 3-D but got 4-D tensor"),
    "unbatched, h0 of rank 3": (
        (draw(6, 5), state(1)),
        "unbatched 2-D input, hx should also be 2-D but got 3-D tensor",
    ),
    "unbatched, h0 of another size": ((draw(6, 5), draw(2, 6)), r"hidden size .* got \[2, 1, 6\]"),
    "h0 float64": ((X, state().double()), "h0: expected dtype Float, got Double"),
    "h0 int64": ((X, state().long()), "h0: expected dtype Float, got Long"),
    "h0 on meta": ((X, state(device="meta")), "h0: expected a tensor on the CPU, got one on meta"),
    "packed, h0 of another batch": ((packed(6, 3, 5), state(2)), r"hidden size .* got \[2, 2, 7\]"),
    "packed, h0 float64": ((packed(6, 3, 5), state().double()), "h0: expected dtype Float, got Double"),
    "unsorted, h0 of another batch": ((unsorted(), state(2)), r"hidden size .* got \[2, 2, 7\]"),
}
REFUSED_PAIRS = {
    "h0 of another batch": ((X, (state(2), state())), r"hidden\[0\] size \(2, 3, 7\), got \[2, 2, 7\]"),
    "c0 of another batch": ((X, (state(), state(2))), r"hidden\[1\] size \(2, 3, 7\), got \[2, 2, 7\]"),
    "h0 of one direction": ((X, (state(rows=1),) * 2), r"hidden\[0\] size \(2, 3, 7\), got \[1, 3, 7\]"),
    "c0 of another size": ((X, (state(), state(hidden=6))), r"hidden\[1\] size \(2, 3, 7\), got \[2, 3, 6\]"),
    "h0 of rank 2": ((X, (draw(2, 7), state())), r"3-D but got \(2-D, 3-D\)"),
    "c0 of rank 2": ((X, (state(), draw(2, 7))), r"3-D but got \(3-D, 2-D\)"),
    "unbatched, h0 of rank 3": ((draw(6, 5), (state(1), state(1))), r"2-D but got \(3-D, 3-D\)"),
    "unbatched, h0 of another size": ((draw(6, 5), (draw(2, 6), draw(2, 7))), r"hidden\[0\] size .* got \[2, 1, 6\]"),
    "h0 float64": ((X, (state().double(), state())), "h0: expected dtype Float, got Double"),
    "c0 float64": ((X, (state(), state().double())), "c0: expected dtype Float, got Double"),
    "h0 int64": ((X, (state().long(), state())), "h0: expected dtype Float, got Long"),
    "h0 on meta": ((X, (state(device="meta"), state())), "h0: expected a tensor on the CPU, got one on meta"),
    "c0 on meta": ((X, (state(), state(device="meta"))), "c0: expected a tensor on the CPU, got one on meta"),
    "packed, h0 of another batch": ((packed(6, 3, 5), (state(2), state(2))), r"hidden\[0\] size .* got \[2, 2, 7\]"),
    "unsorted, c0 of another batch": ((unsorted(), (state(), state(2))), r"hidden\[1\] size .* got \[2, 2, 7\]"),
    "packed, h0 float64": ((packed(6, 3, 5), (state().double(),) * 2), "h0: expected dtype Float, got Double"),
}


def refused_of(kind):
    return REFUSED | (REFUSED_PAIRS if kind == "LSTM" else REFUSED_H0)


def params_of(cases_of):
    return [pytest.param(kind, *case, id=f"{kind}, {name}") for kind in KINDS for name, case in cases_of(kind).items()]


@gradients_or_not
@pytest.mark.parametrize(("kind", "arguments", "message"), params_of(refused_of))
def test_bad_input_raises_what_torch_raises_and_names_the_argument(kind, arguments, message, gradients):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    with torch.set_grad_enabled(gradients):
        expected = run(ours, X)
        with pytest.raises(Exception) as refused:  # noqa: PT011
            theirs(*arguments)
        with pytest.raises(Exception, match=message) as actual:
            ours(*arguments)
        assert actual.type is refused.type
        assert_same_bits(run(ours, X), expected)


@pytest.mark.parametrize("case", ["rank 1", "features", "float64", "h0 of another batch", "h0 of rank 2", "meta input"])
@pytest.mark.parametrize(
    ("kind", "options"), [("LSTM", {"proj_size": 3}), *((kind, {"dtype": torch.half}) for kind in KINDS)], ids=str
)
@gradients_or_not
def test_bad_input_of_torchs_own_path_raises_what_torch_raises(kind, case, options, gradients):
    ours, theirs = pair(kind, 5, 7, bidirectional=True, **options)
    arguments, _ = refused_of(kind)[case]
    with torch.set_grad_enabled(gradients):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            theirs(*arguments)
        with pytest.raises(expected.type):
            ours(*arguments)


# Where torch computes something, or stumbles over its own code.
ALSO_REFUSED = {
    "packed float64": ((packed(6, 3, 5, dtype=torch.float64),), ValueError, "input dtype"),
    "a list": (([[1.0] * 5],), TypeError, "input: expected a Tensor or a PackedSequence, got list"),
    "None": ((None,), TypeError, "input: expected a Tensor or a PackedSequence, got NoneType"),
    "batch_sizes of fewer tokens": (
        (PackedSequence(draw(6, 5), torch.tensor([3, 2])),),
        RuntimeError,
        "batch_sizes: expected a sum of 6, the tokens of input, got 5",
    ),
}
ALSO_REFUSED_H0 = {
    "a pair of states": ((X, (state(), state())), TypeError, "hx: expected a Tensor, got tuple"),
    "a number as states": ((X, 3), TypeError, "hx: expected a Tensor, got int"),
    "packed, h0 of rank 2": ((packed(6, 3, 5), draw(2, 7)), RuntimeError, "3-D but got 2-D"),
    "unsorted, h0 of more sequences": ((unsorted(), state(4)), RuntimeError, r"hidden size .*\[2, 4, 7\]"),
}
ALSO_REFUSED_PAIRS = {
    "h0 alone": ((X, state()), TypeError, r"hx: expected a tuple of two tensors \(h_0, c_0\), got a Tensor"),
    "packed, h0 of rank 2": ((packed(6, 3, 5), (draw(2, 7),) * 2), RuntimeError, r"3-D but got \(2-D, 2-D\)"),
    "unsorted, h0 of more sequences": ((unsorted(), (state(4),) * 2), RuntimeError, r"hidden\[0\] .*\[2, 4, 7\]"),
}


@gradients_or_not
@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    params_of(lambda kind: ALSO_REFUSED | (ALSO_REFUSED_PAIRS if kind == "LSTM" else ALSO_REFUSED_H0)),
)
def test_bad_input_that_torch_does_not_check_is_refused_by_name(kind, arguments, error, message, gradients):
    ours = ours_of(kind, 5, 7, bidirectional=True)
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        ours(*arguments)


@pytest.mark.parametrize("hx", [(state(),), (state(),) * 3, (), 3, (None, None)], ids=lambda hx: str(type(hx)))
@gradients_or_not
def test_initial_states_that_are_no_pair_of_tensors_are_refused(hx, gradients):
    for module in pair("LSTM", 5, 7, bidirectional=True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises((TypeError, ValueError, IndexError, AttributeError, RuntimeError)),
        ):
            module(X, hx)


@pytest.mark.parametrize("hx", [(state(), state()), [state()], 3, "abc"], ids=lambda hx: type(hx).__name__)
@pytest.mark.parametrize("kind", WITHOUT_CELLS)
def test_torchs_own_path_refuses_initial_states_that_are_no_tensor_too(kind, hx):
    for module in pair(kind, 5, 7, bidirectional=True, dtype=torch.half):
        with pytest.raises((TypeError, AttributeError)):
            module(X.half(), hx)


WRONG_WEIGHTS = {
    "float64 weight_hh": ("weight_hh_l0", lambda w: w.double(), r"weight_hh\[0\]: expected dtype Float, got Double"),
    "short bias_ih": ("bias_ih_l0", lambda w: w[:3], r"bias_ih\[0\]: expected size \[\d+\], got \[3\]"),
    "long bias_hh": ("bias_hh_l0", lambda w: torch.cat([w, w]), r"bias_hh\[0\]: expected size \[\d+\], got \[\d+\]"),
    "meta weight_hh": ("weight_hh_l0", lambda w: w.to("meta"), r"weight_hh\[0\]: .* on the CPU, got one on meta"),
    "float64 weight_ih": ("weight_ih_l0", lambda w: w.double(), r"input dtype \(torch.float32\).*\(torch.float64\)"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
@gradients_or_not
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "two directions"])
@every_kind
def test_weights_that_do_not_fit_raise_what_torch_raises(kind, bidirectional, name, change, message, gradients):
    ours, theirs = pair(kind, 5, 7, bidirectional=bidirectional)
    types = []
    for module in (ours, theirs):
        setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
        with torch.set_grad_enabled(gradients), pytest.raises(Exception) as caught:  # noqa: PT011
            module(X)
        types.append(caught.type)
        assert module is not ours or caught.match(message)
    assert types[0] is types[1]


# lengths.

BAD_LENGTHS = {
    "zero": ([6, 0, 1], "expected lengths from 1 to 6, .* got 0 at position 1"),
    "negative": ([6, 3, -1], "expected lengths from 1 to 6, .* got -1 at position 2"),
    "too long": ([7, 2, 1], "expected lengths from 1 to 6, .* got 7 at position 0"),
    "too many": ([6, 2, 1, 1], "expected 3 lengths, .* got 4"),
    "none": ([], "expected 3 lengths, .* got 0"),
    "a number": (6, "expected a 1D CPU int64 tensor, got a 0D"),
}


@gradients_or_not
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize(("lengths", "message"), BAD_LENGTHS.values(), ids=BAD_LENGTHS)
@every_kind
def test_bad_lengths_raise_what_pack_padded_sequence_raises(kind, lengths, message, as_tensor, gradients):
    ours, theirs = pair(kind, 5, 7)
    lengths = torch.tensor(lengths, dtype=torch.int64) if as_tensor else lengths
    with torch.set_grad_enabled(gradients):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            by_packing(lengths, theirs, X)
        with pytest.raises(expected.type, match=f"lengths: {message}"):
            ours(X, lengths=lengths)


ALSO_BAD_LENGTHS = {
    "too few": ([6, 2], "expected 3 lengths, .* got 2"),
    "2-D": (torch.tensor([[6, 2, 1]]), "expected a 1D CPU int64 tensor, got a 2D"),
    "float": (torch.tensor([6.0, 2.0, 1.0]), "expected a 1D CPU int64 tensor, got a .*float32"),
    "bool": (torch.tensor([True, True, True]), "expected a 1D CPU int64 tensor, got a .*bool"),
    "meta": (torch.tensor([6, 2, 1], device="meta"), "expected a 1D CPU int64 tensor, got a 1D meta"),
}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.half}], ids=["kernels", "torch's own path"])
@pytest.mark.parametrize(("lengths", "message"), ALSO_BAD_LENGTHS.values(), ids=ALSO_BAD_LENGTHS)
@gradients_or_not
@every_kind
def test_lengths_that_are_not_one_count_of_steps_for_each_sequence_are_refused(
    kind, lengths, message, options, gradients
):
    ours = ours_of(kind, 5, 7, **options)
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=f"lengths: {message}"):
        ours(X.to(ours.weight_ih_l0.dtype), lengths=lengths)


@pytest.mark.parametrize("lengths", [[6, 0, 1], [6, 3, -1], [7, 2, 1], [1, 1, 2**20]], ids=str)
@pytest.mark.parametrize("options", [{"proj_size": 3}, {"dtype": torch.half}], ids=str)
@gradients_or_not
def test_lengths_out_of_range_are_refused_on_torchs_own_path_too(lengths, options, gradients):
    ours = ours_of("LSTM", 5, 7, **options)
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError):
        ours(X.to(ours.weight_ih_l0.dtype), lengths=lengths)


@pytest.mark.parametrize("lengths", ["abc", ["a", "b", "c"], [6, None, 1]], ids=str)
@gradients_or_not
@every_kind
def test_lengths_that_are_no_numbers_raise_what_pack_padded_sequence_raises(kind, lengths, gradients):
    ours, theirs = pair(kind, 5, 7)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            by_packing(lengths, theirs, X)
        with pytest.raises(expected.type):
            ours(X, lengths=lengths)


@gradients_or_not
@every_kind
def test_lengths_with_a_packed_sequence_or_an_unbatched_input_are_refused(kind, gradients):
    ours = ours_of(kind, 5, 7)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(ValueError, match=r"lengths: .* PackedSequence"):
            ours(packed(6, 3, 5), lengths=[6, 2, 1])
        with pytest.raises(ValueError, match=r"lengths: .* unbatched"):
            ours(draw(6, 5), lengths=[6])


WITH_LENGTHS = ["rank 1", "rank 4", "features", "float64", "int64", "h0 of another batch", "h0 float64", "h0 of rank 2"]


@gradients_or_not
@pytest.mark.parametrize("case", WITH_LENGTHS)
@every_kind
def test_the_other_arguments_are_checked_with_lengths_as_without(kind, case, gradients):
    arguments, message = refused_of(kind)[case]
    ours = ours_of(kind, 5, 7, bidirectional=True)
    with torch.set_grad_enabled(gradients):
        with pytest.raises((ValueError, RuntimeError), match=message) as without:
            ours(*arguments)
        with pytest.raises(without.type, match=message):
            ours(*arguments, lengths=[6, 2, 1])


# No sequences.


@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
@every_kind
def test_an_empty_batch_gives_what_torch_gives_and_zero_gradients(kind, given):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    hx = states_of(ours, 0) if given else None
    x = draw(6, 0, 5, requires_grad=True)
    assert_same_bits(run(ours, x, hx), run(theirs, x, hx))
    assert_same_bits(run(ours, x, hx, lengths=[]), run(theirs, x, hx))
    for options in ({}, {"lengths": []}):
        results = named(*ours(x, hx, **options))
        assert_same_bits(results, named(*theirs(x, hx)))
        sum(result.sum() for result in results.values()).backward()
        assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
        assert x.grad.shape == x.shape
