import pytest
import torch
from modules import (
    WITHOUT_CELLS,
    by_packing,
    draw,
    ours_of,
    packed,
    pair,
    run,
)
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

every_kind = pytest.mark.parametrize("kind", WITHOUT_CELLS)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])

# Bad input.


def state(batch=3, rows=2, hidden=7, **options):
    return draw(rows, batch, hidden, **options)


def unsorted():
    return pack_padded_sequence(draw(6, 3, 5), [2, 6, 1], enforce_sorted=False)


X = draw(6, 3, 5)
# Arguments that torch refuses of two directions, input size 5 and hidden size 7, and what our message says.
REFUSED = {
    "rank 0": ((draw(()),), "input to be 2D or 3D, got 0D"),
    "rank 1": ((draw(5),), "input to be 2D or 3D, got 1D"),
    "rank 4": ((draw(2, 3, 4, 5),), "input to be 2D or 3D, got 4D"),
    "features": ((draw(6, 3, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "features, unbatched": ((draw(6, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "features, packed": ((packed(6, 3, 4),), r"input.size\(-1\).* Expected 5, got 4"),
    "rank, packed": ((packed(6, 3, 5, 2),), "input must have 2 dimensions, got 3"),
    "float64": ((X.double(),), r"input dtype \(torch.float64\).*\(torch.float32\)"),
    "int64": ((torch.ones(6, 3, 5, dtype=torch.int64),), r"input dtype \(torch.int64\).*\(torch.float32\)"),
    "complex": ((torch.ones(6, 3, 5, dtype=torch.complex64),), r"input dtype \(torch.complex64\)"),
    "meta input": ((X.to("meta"),), "[Ii]nput.* meta"),
    "no steps": ((draw(0, 3, 5),), "sequence length to be larger than 0"),
    "no steps, unbatched": ((draw(0, 5),), "sequence length to be larger than 0"),
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
    "growing batch_sizes": ((PackedSequence(draw(6, 5), torch.tensor([2, 4])),), "batch_sizes: .* got 4 at step 1"),
    "int32 batch_sizes": (
        (PackedSequence(draw(6, 5), torch.tensor([4, 2], dtype=torch.int32)),),
        "batch_sizes: expected dtype Long, got Int",
    ),
}
gradients_or_not = pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])


@gradients_or_not
@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
@every_kind
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


# Where torch computes something, or stumbles over its own code.
ALSO_REFUSED = {
    "packed float64": ((packed(6, 3, 5, dtype=torch.float64),), ValueError, "input dtype"),
    "a list": (([[1.0] * 5],), TypeError, "input: expected a Tensor or a PackedSequence, got list"),
    "None": ((None,), TypeError, "input: expected a Tensor or a PackedSequence, got NoneType"),
    "a pair of states": ((X, (state(), state())), TypeError, "hx: expected a Tensor, got tuple"),
    "a number as states": ((X, 3), TypeError, "hx: expected a Tensor, got int"),
    "packed, h0 of rank 2": ((packed(6, 3, 5), draw(2, 7)), RuntimeError, "3-D but got 2-D"),
    "unsorted, h0 of more sequences": ((unsorted(), state(4)), RuntimeError, r"hidden size .*\[2, 4, 7\]"),
    "batch_sizes of fewer tokens": (
        (PackedSequence(draw(6, 5), torch.tensor([3, 2])),),
        RuntimeError,
        "batch_sizes: expected a sum of 6, the tokens of input, got 5",
    ),
}


@gradients_or_not
@pytest.mark.parametrize(("arguments", "error", "message"), ALSO_REFUSED.values(), ids=ALSO_REFUSED)
@every_kind
def test_bad_input_that_torch_does_not_check_is_refused_by_name(kind, arguments, error, message, gradients):
    ours = ours_of(kind, 5, 7, bidirectional=True)
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        ours(*arguments)


@pytest.mark.parametrize("hx", [(state(), state()), [state()], 3, "abc"], ids=lambda hx: type(hx).__name__)
@every_kind
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
@every_kind
def test_weights_that_do_not_fit_raise_what_torch_raises(kind, name, change, message):
    ours, theirs = pair(kind, 5, 7)
    types = []
    for module in (ours, theirs):
        setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
        with pytest.raises(Exception) as caught:  # noqa: PT011
            module(X)
        types.append(caught.type)
        assert module is not ours or caught.match(message)
    assert types[0] is types[1]


BAD_LENGTHS = {
    "zero": [6, 0, 1],
    "negative": [6, 3, -1],
    "too long": [7, 2, 1],
    "too many": [6, 2, 1, 1],
    "none": [],
    "a number": 6,
}


@pytest.mark.parametrize("lengths", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
@every_kind
def test_bad_lengths_raise_what_pack_padded_sequence_raises(kind, lengths):
    ours, theirs = pair(kind, 5, 7)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        by_packing(lengths, theirs, X)
    with pytest.raises(expected.type, match="lengths: expected"):
        ours(X, lengths=lengths)
    with pytest.raises(ValueError, match=r"lengths: .* PackedSequence"):
        ours(packed(6, 3, 5), lengths=[6, 2, 1])
    with pytest.raises(ValueError, match=r"lengths: .* unbatched"):
        ours(draw(6, 5), lengths=[6])


@pytest.mark.parametrize("case", ["features", "float64", "h0 of another batch", "h0 float64", "h0 of rank 2"])
@every_kind
def test_the_other_arguments_are_checked_with_lengths_as_without(kind, case):
    arguments, message = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ours_of(kind, 5, 7, bidirectional=True)(*arguments, lengths=[6, 2, 1])


@with_and_without_states
@every_kind
def test_an_empty_batch_gives_what_torch_gives_and_zero_gradients(kind, given):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    h0 = state(0) if given else None
    x = draw(6, 0, 5, requires_grad=True)
    assert_same_bits(run(ours, x, h0), run(theirs, x, h0))
    assert_same_bits(run(ours, x, h0, lengths=[]), run(theirs, x, h0))
    output, h_n = ours(x, h0)
    (output.sum() + h_n.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
    assert x.grad.shape == x.shape
