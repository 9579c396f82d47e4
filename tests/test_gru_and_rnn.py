import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from longdouble import needs_long_double
from modules import (
    KINDS,
    WEIGHT_CHANGES,
    WITHOUT_CELLS,
    by_packing,
    compare,
    fresh,
    in_double,
    input_of,
    named,
    ours_of,
    pair,
    run,
    stack_in_long_double,
    states_of,
    theirs_of,
    weight_norm,
    with_gradients,
)
from parity import assert_parity, assert_same_bits
from samples import spread
from test_ops_bfloat16 import BF16, assert_bits
from test_ops_bfloat16 import assert_parity as assert_bfloat16_parity
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

import pymtl
from pymtl import GRU, LSTM, RNN

OPTIONS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "2 layers": {"num_layers": 2},
    "3 layers, everything": {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    "dropout": {"num_layers": 3, "dropout": 0.4, "bidirectional": True},
    "dropout of all": {"num_layers": 2, "dropout": 1.0},
}
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = [4, 6, 1, 4, 2]  # of a batch of 6 steps
every_kind = pytest.mark.parametrize("kind", WITHOUT_CELLS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
both_ways = pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])


def states_if(given, module, batch=3):
    return states_of(module, batch) if given else None


# Results and gradients.


@with_and_without_states
@every_option
@every_kind
def test_a_batch_gives_torchs_results_and_gradients(kind, options, given):
    ours, theirs = pair(kind, 5, 7, **options)
    compare(ours, theirs, input_of(ours), states_if(given, ours))


@with_and_without_states
@every_option
@every_kind
def test_one_unbatched_sequence_gives_torchs_results_and_gradients(kind, options, given):
    ours, theirs = pair(kind, 4, 6, **options)
    compare(ours, theirs, input_of(ours, batch=None), states_if(given, ours, None))


@with_and_without_states
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@every_option
@every_kind
def test_a_packed_sequence_gives_torchs_results_and_gradients(kind, options, enforce_sorted, given):
    ours, theirs = pair(kind, 5, 7, **options)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    sequences = [torch.randn(length, 5) for length in lengths]
    compare(ours, theirs, pack_sequence(sequences, enforce_sorted), states_if(given, ours, len(LENGTHS)))


@with_and_without_states
@every_option
@every_kind
def test_lengths_give_what_packing_by_hand_gives(kind, options, given):
    ours, theirs = pair(kind, 5, 7, **options)
    compare(
        ours,
        theirs,
        input_of(ours, len(LENGTHS)),
        states_if(given, ours, len(LENGTHS)),
        call=lambda module, *args: module(*args, lengths=LENGTHS),
        reference=lambda *args: by_packing(LENGTHS, *args),
    )


@needs_long_double
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@with_and_without_states
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}, {"num_layers": 2, "bias": False}])
@every_kind
def test_float64_results_and_gradients_are_as_accurate_as_torchs(kind, options, given, packed):
    ours, theirs = pair(kind, 3, 5, dtype=torch.float64, **options)
    x, hx = input_of(ours), states_if(given, ours)
    x = pack_padded_sequence(x, [6, 3, 1]) if packed else x
    assert_parity(with_gradients(ours, x, hx), with_gradients(theirs, x, hx), stack_in_long_double(theirs, x, hx))


@every_kind
def test_a_real_models_size_gives_torchs_results_and_gradients(kind):
    ours, theirs = pair(kind, 100, 128, batch_first=True, **DEEP)
    compare(ours, theirs, input_of(ours, batch=8, steps=20), states_of(ours, 8))


@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 1), (128, 1000), (3000, 16)])
@every_kind
def test_extreme_sizes_are_as_accurate_as_torchs(kind, input_size, hidden_size):
    ours, theirs = pair(kind, input_size, hidden_size)
    compare(ours, theirs, torch.randn(5, 3, input_size))


@every_kind
def test_equal_seeds_drop_equal_elements_and_others_other_ones(kind):
    ours, theirs = pair(kind, 4, 64, num_layers=3, dropout=0.5, bidirectional=True)
    x = input_of(ours)
    compare(ours, theirs, x)
    assert_same_bits(with_gradients(ours, x), with_gradients(ours, x))
    assert not torch.equal(run(ours, x)["output"], run(ours, x)["output"])
    assert_same_bits(run(ours.eval(), x), run(ours, x))
    compare(ours, theirs.eval(), x)


@pytest.mark.parametrize("change", [spread, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)])
@every_kind
def test_non_contiguous_and_expanded_input_and_states_give_the_same_bits(kind, change):
    ours, _ = pair(kind, 5, 7, bidirectional=True)
    x, h0 = input_of(ours), states_of(ours)
    expected = with_gradients(ours, x, h0)
    actual = named(*ours(change(x), change(h0)))
    assert_same_bits(actual, {name: expected[name] for name in actual})
    x, h0 = torch.randn(6, 1, 5).expand(6, 3, 5), torch.randn(1, 1, 7).expand(2, 3, 7)
    assert_same_bits(run(ours, x, h0), run(ours, x.contiguous(), h0.contiguous()))


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({}, False),
        ({"num_layers": 2, "batch_first": True}, False),
        ({"bidirectional": True}, False),
        ({}, True),
        (DEEP, True),
    ],
)
@every_kind
def test_an_output_may_be_edited_in_place(kind, options, packed):
    gradients = []
    for module in pair(kind, 5, 7, **options):
        torch.manual_seed(0)
        x = torch.randn(6, 3, 5, requires_grad=True)
        output, _ = module(pack_padded_sequence(x, [6, 4, 1]) if packed else x)
        data = output.data if packed else output
        data[2:] = 0.0
        data.square_().sum().backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    ours, theirs = gradients
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("options", [{}, DEEP], ids=str)
@every_kind
def test_torch_func_differentiates_the_module(kind, options):
    ours, theirs = pair(kind, 5, 7, **options)
    x = torch.randn(6, 3, 5)

    def gradients(module):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,))[0].square().sum())(parameters)

    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name])


@every_kind
def test_a_gradient_penalty_is_as_accurate_as_torchs(kind):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)

    def penalty(module, x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        gradients = torch.autograd.grad(first.square().sum(), list(module.parameters()))
        return {"first": first.detach(), **dict(zip(dict(module.named_parameters()), gradients))}

    x = input_of(ours)
    assert_parity(penalty(ours, x), penalty(theirs, x), penalty(in_double(theirs), x.double()))


@every_kind
def test_a_module_compiles_whole(kind):
    torch._dynamo.reset()
    ours, _ = pair(kind, 5, 7, **DEEP)
    x, h0 = input_of(ours), states_of(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_bits(with_gradients(ours, x, h0, call=lambda _, *a: compiled(*a)), with_gradients(ours, x, h0))
    assert_same_bits(run(compiled, x), run(ours, x))


# Torch's own path.


@with_and_without_states
@pytest.mark.parametrize("options", [{}, DEEP], ids=str)
@every_kind
def test_float16_gives_exactly_torchs_results_and_gradients(kind, options, given):
    ours, theirs = pair(kind, 5, 7, dtype=torch.half, **options)
    for batch in (3, None):
        x, h0 = input_of(ours, batch), states_if(given, ours, batch)
        assert_same_bits(with_gradients(ours, x, h0), with_gradients(theirs, x, h0))
    x, h0 = input_of(ours), states_if(given, ours)
    packed = pack_padded_sequence(x, [6, 1, 4], enforce_sorted=False)
    assert_same_bits(with_gradients(ours, packed, h0), with_gradients(theirs, packed, h0))
    actual = with_gradients(ours, x, h0, call=lambda module, *args: module(*args, lengths=[2, 5, 1]))
    assert_same_bits(actual, with_gradients(theirs, x, h0, call=lambda *args: by_packing([2, 5, 1], *args)))


@every_kind
def test_the_meta_device_gives_shapes(kind):
    results = [named(*m(torch.empty(6, 3, 5, device="meta"))) for m in pair(kind, 5, 7, device="meta", **DEEP)]
    actual, expected = ({name: (r.shape, r.device, r.dtype) for name, r in r.items()} for r in results)
    assert actual == expected


# lengths.


@pytest.mark.parametrize("batch_first", [False, True])
@every_kind
def test_padding_is_zero_in_the_output_and_neither_read_nor_given_a_gradient(kind, batch_first):
    ours, _ = pair(kind, 5, 7, batch_first=batch_first, **DEEP)
    x = input_of(ours, len(LENGTHS), steps=8)
    padding = torch.arange(8).unsqueeze(0) >= torch.tensor(LENGTHS).unsqueeze(1)
    padding = padding if batch_first else padding.t()
    clean = run(ours, x, lengths=LENGTHS)
    x[padding] = torch.nan
    x.requires_grad_()
    output, h_n = ours(x, lengths=torch.tensor(LENGTHS))
    assert_same_bits(named(output, h_n), clean)
    assert (output[padding] == 0).all()
    output.sum().backward()
    assert (x.grad[padding] == 0).all()
    assert kind == "RNN relu" or (x.grad[~padding] != 0).any(-1).all()


# Construction, attributes, copies.


@every_option
@every_kind
def test_the_same_seed_draws_the_weights_of_torch_and_state_dicts_load_in_both_directions(kind, options):
    torch.manual_seed(2)
    ours = ours_of(kind, 5, 7, **options)
    torch.manual_seed(2)
    theirs = theirs_of(kind, 5, 7, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    ours.reset_parameters()
    assert not any(theirs.load_state_dict(ours.state_dict()))
    assert_same_bits(theirs.state_dict(), ours.state_dict())
    theirs.reset_parameters()
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert_same_bits(ours.state_dict(), theirs.state_dict())


@every_kind
def test_the_attributes_of_torchs_module_work(kind):
    ours, theirs = pair(kind, 5, 7, dropout=0.1, **DEEP)
    assert isinstance(ours, nn.RNNBase)
    assert repr(ours) == repr(theirs)
    assert ours.flatten_parameters() is None
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    own = {"_parameters", "training", "_flat_weights", "_flat_weight_refs"}
    for name in vars(theirs).keys() - own:
        assert getattr(ours, name) == getattr(theirs, name), name
    names = [[name for name, p in ours.named_parameters() for w in group if p is w] for group in ours.all_weights]
    assert names == [[name for name, p in theirs.named_parameters() for w in g if p is w] for g in theirs.all_weights]
    x, h0 = input_of(ours), states_of(ours)
    assert ours.check_forward_args(x, h0, None) is None
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert torch.equal(ours.permute_hidden(h0, torch.tensor([2, 0, 1])), h0[:, [2, 0, 1]])
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        ours.check_forward_args(x, h0[:1], None)


@pytest.mark.parametrize("options", [{}, DEEP, {"dtype": torch.half}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@every_kind
def test_copies_give_the_same_bits_and_share_nothing(kind, frozen, options):
    ours = ours_of(kind, 5, 7, **options).eval()
    x = input_of(ours)
    expected = run(ours, x)
    if frozen:
        pymtl.freeze(ours)
    duplicates = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
    twins = [duplicate(ours) for duplicate in duplicates]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    for twin in twins:
        assert type(twin) is type(ours)
        assert twin._snapshot is None
        assert_same_bits(run(twin, x), expected)


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


UNFIT = {
    "hidden_size 0": {"hidden_size": 0},
    "input_size -1": {"input_size": -1},
    "num_layers 0": {"num_layers": 0},
    "dropout 1.5": {"dropout": 1.5},
    "dropout True": {"dropout": True},
    "hidden_size 2.0": {"hidden_size": 2.0},
    "bias 1": {"bias": 1},
    "batch_first None": {"batch_first": None},
    "unknown": {"nonsense": 1},
    "mode": {"mode": "GRU"},
}
UNFIT_PROJECTIONS = [pytest.param({"proj_size": n}, id=f"proj_size {n}") for n in (3, 0)]


@pytest.mark.parametrize("arguments", [*(pytest.param(v, id=k) for k, v in UNFIT.items()), *UNFIT_PROJECTIONS])
@pytest.mark.parametrize("kind", ["GRU", "RNN tanh"])
def test_the_constructor_refuses_what_torchs_refuses_in_its_words(kind, arguments):
    arguments = {"input_size": 5, "hidden_size": 7, **arguments}
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs_of(kind, **arguments)
    with pytest.raises(expected.type) as actual:
        ours_of(kind, **arguments)
    if expected.type is ValueError:
        assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "", "TANH", None, 1])
def test_an_rnn_refuses_another_nonlinearity_in_torchs_words(nonlinearity):
    with pytest.raises(ValueError, match="Unknown nonlinearity") as expected:
        nn.RNN(5, 7, nonlinearity=nonlinearity)
    with pytest.raises(ValueError, match="Unknown nonlinearity") as actual:
        RNN(5, 7, nonlinearity=nonlinearity)
    assert str(actual.value) == str(expected.value)


POSITIONAL = {
    "RNN": (RNN, nn.RNN, (5, 7, 2, "relu", False, True, 0.25, True)),
    "GRU": (GRU, nn.GRU, (5, 7, 2, False, True, 0.25, True)),
}


@pytest.mark.parametrize(("ours", "theirs", "arguments"), POSITIONAL.values(), ids=POSITIONAL)
def test_arguments_by_position_mean_what_they_mean_to_torch(ours, theirs, arguments):
    for count in range(2, len(arguments) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules = ours(*arguments[:count]), theirs(*arguments[:count])
        assert repr(modules[0]) == repr(modules[1])
        assert modules[0].mode == modules[1].mode
        assert modules[0].bias == modules[1].bias


# Bad input.


def draw(*size, **options):
    return torch.randn(*size, **options)


def state(batch=3, rows=2, hidden=7, **options):
    return draw(rows, batch, hidden, **options)


def packed(*size, **options):
    return pack_padded_sequence(draw(*size, **options), [6, 2, 1])


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


# The same bits however the sequences come.


@every_dtype
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, DEEP], ids=str)
@every_kind
def test_a_sequence_gives_the_same_bits_alone_with_lengths_packed_and_in_a_dense_batch(kind, options, dtype):
    ours = ours_of(kind, 9, 19, dtype=dtype, **options)
    sequences = [torch.randn(length, 9, dtype=dtype) for length in (9, 1, 7, 7, 3, 12, 2, 1, 5, 33, 4)]
    lengths = [len(sequence) for sequence in sequences]
    h0 = states_of(ours, len(sequences))
    padded = pad_sequence(sequences, padding_value=torch.nan)
    with torch.no_grad():
        output, h_n = ours(pack_sequence(sequences, enforce_sorted=False), h0)
    together = [
        run(ours, padded, h0, lengths=lengths),
        run(ours, torch.cat([padded, torch.full_like(padded, 3.0)]), h0, lengths=lengths),
        named(pad_packed_sequence(output)[0], h_n),
    ]
    for b, sequence in enumerate(sequences):
        alone = run(ours, sequence, h0[:, b])
        for results in together:
            assert_same_bits({"output": results["output"][: lengths[b], b], "h_n": results["h_n"][:, b]}, alone)
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


@pytest.mark.parametrize("isa", pymtl._native.available_isas(), indirect=True)
@every_kind
def test_every_instruction_set_is_as_accurate_as_torch(kind, isa):
    ours, theirs = pair(kind, 9, 19, **DEEP)
    compare(ours, theirs, input_of(ours, 5), states_of(ours, 5))


# Weights are read anew by every call, frozen or not.

VISIBLE = {name: change for name, change in WEIGHT_CHANGES.items() if name != "edit_through_data"}


def fresh_after(change, theirs, x):
    """Results of a new module of ours with the weights that torch uses after ``change(theirs)``."""
    seen = {}
    call = change(theirs)
    theirs.register_forward_pre_hook(
        lambda module, _: seen.update({n: getattr(module, n).detach().clone() for n in module._flat_weights_names})
    )
    run(call, x)
    return run(fresh(theirs, seen), x.to(seen["weight_ih_l0"].dtype))


@pytest.mark.parametrize("frozen", [False, True], ids=["ordinary", "frozen"])
@pytest.mark.parametrize("change", VISIBLE.values(), ids=VISIBLE)
@every_kind
def test_a_call_uses_the_weights_that_torch_would_use(kind, change, frozen):
    ours, theirs = (module.eval() for module in pair(kind, 5, 7, bidirectional=True))
    x = input_of(ours)
    before = run(pymtl.freeze(ours) if frozen else ours, x)
    call = change(ours)
    expected = fresh_after(change, theirs, x)
    assert_same_bits(run(call, x), expected)
    if change.__name__ not in ("to_double", "to_double_and_back", "functional_double"):
        assert not torch.equal(expected["output"], before["output"])


def is_frozen(module):
    """Whether calls without gradients use a snapshot: an edit that nobody can see is not seen."""
    x = input_of(module)
    before = run(module, x)
    original = [p.data.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.data.add_(1.0)
    after = run(module, x)
    for parameter, data in zip(module.parameters(), original):
        parameter.data.copy_(data)
    return torch.equal(before["output"], after["output"])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 3, "bias": False}], ids=str)
@every_kind
def test_a_frozen_module_gives_the_same_bits(kind, options):
    ours = ours_of(kind, 9, 19, **options).eval()
    x, h0, lengths = input_of(ours, 5), states_of(ours, 5), [6, 2, 4, 1, 3]

    def results():
        calls = {
            "dense": run(ours, x, h0),
            "lengths": run(ours, x, h0, lengths=lengths),
            "packed": run(ours, pack_padded_sequence(x, lengths, enforce_sorted=False)),
            "one step": run(ours, x[:1], h0),
            "one sequence": run(ours, x[:, 0]),
            "gradients": with_gradients(ours, x, h0),
        }
        return {f"{name}, {key}": value for name, found in calls.items() for key, value in found.items()}

    expected = results()
    assert pymtl.freeze(ours) is ours
    assert is_frozen(ours)
    assert_same_bits(results(), expected)
    pymtl.unfreeze(ours)
    assert not is_frozen(ours)


@every_kind
def test_one_changed_parameter_of_any_layer_is_noticed(kind):
    for name, _ in ours_of(kind, 5, 7, **DEEP).named_parameters():
        ours = pymtl.freeze(ours_of(kind, 5, 7, **DEEP).eval())
        with torch.no_grad():
            ours.get_parameter(name)[0] += 1
        x = input_of(ours)
        assert_same_bits(run(ours, x), run(fresh(ours), x))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@every_kind
def test_the_step_of_an_optimizer_is_noticed(kind, options):
    ours = pymtl.freeze(ours_of(kind, 5, 7).eval())
    x = input_of(ours)
    before = run(ours, x)
    for parameter in ours.parameters():
        parameter.grad = 0.5 * parameter.detach()
    torch.optim.AdamW(ours.parameters(), lr=0.5, **options).step()
    assert_same_bits(run(ours, x), run(fresh(ours), x))
    assert not torch.equal(run(ours, x)["output"], before["output"])


@every_kind
def test_freezing_in_training_mode_is_refused(kind):
    with pytest.raises(RuntimeError, match="expected a module in eval mode"):
        pymtl.freeze(nn.Sequential(ours_of(kind, 5, 7)))


@every_kind
def test_all_kinds_inside_a_module_are_frozen_and_train_thaws_them(kind):
    model = nn.ModuleDict({"a": LSTM(5, 7), "b": nn.ModuleList([ours_of(kind, 5, 7), theirs_of(kind, 5, 7)])}).eval()
    assert pymtl.freeze(model) is model
    assert is_frozen(model["b"][0])
    for drop in (nn.Module.train, nn.Module.float, lambda m: m.load_state_dict(m.state_dict()), pymtl.unfreeze):
        pymtl.freeze(model.eval())
        drop(model)
        assert not is_frozen(model["b"][0])


# convert and revert.


class NamedGRU(nn.GRU):
    """A subclass that adds, and overrides nothing of the call."""

    label = "a"

    def last(self, x):
        return self(x)[1]


class NamedRNN(nn.RNN):
    """The same for the plain network, with a constructor of its own."""

    label = "a"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"nonlinearity": "relu", **kwargs})

    def last(self, x):
        return self(x)[1]


class DoubledGRU(nn.GRU):
    """A subclass whose forward does something else."""

    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class CheckedRNN(nn.RNN):
    """A subclass that checks something else."""

    def check_hidden_size(self, hx, expected_hidden_size, msg="Expected hidden size {}, got {}"):
        pass


@both_ways
@pytest.mark.parametrize("options", [{}, {**DEEP, "dropout": 0.3}, {"batch_first": True, "bias": False}], ids=str)
@every_kind
def test_a_model_is_converted_and_reverted_with_the_same_parameters(kind, options, inplace):
    theirs = theirs_of(kind, 5, 7, **options)
    parameters = {name: id(p) for name, p in theirs.named_parameters()}
    reference = copy.deepcopy(theirs)
    original = type(theirs)
    ours = pymtl.convert(theirs, inplace)
    assert type(ours) is KINDS[kind][0]
    assert (ours is theirs) == inplace
    assert repr(ours) == repr(reference)
    assert {name: id(p) for name, p in ours.named_parameters()} == parameters
    assert vars(ours).keys() == vars(reference).keys()
    compare(ours, reference, input_of(ours), states_of(ours))
    pymtl.freeze(ours.eval())
    back = pymtl.revert(ours, inplace)
    assert type(back) is original
    assert (back is ours) == inplace
    assert {name: id(p) for name, p in back.named_parameters()} == parameters
    x = input_of(back)
    assert_same_bits(with_gradients(back.train(), x), with_gradients(reference, x))


@both_ways
def test_every_kind_inside_a_model_is_converted_at_once(inplace):
    model = nn.ModuleDict({name.replace(" ", "_"): theirs_of(name, 5, 7) for name in KINDS})
    model["block"] = nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 5))
    model["cell"] = nn.GRUCell(5, 5)
    fast = pymtl.convert(model, inplace)
    kinds = {"LSTM": LSTM, "GRU": GRU, "RNN_tanh": RNN, "RNN_relu": RNN}
    assert {name: type(fast[name]) for name in kinds} == kinds
    assert type(fast["block"][1]) is GRU
    assert type(fast["cell"]) is nn.GRUCell
    assert fast["RNN_relu"].nonlinearity == "relu"
    back = pymtl.revert(fast, inplace)
    assert [type(m) for m in back.modules()] == [
        type(m) for m in (model if inplace else copy.deepcopy(model)).modules()
    ]
    assert {type(m) for m in back.modules()}.isdisjoint(kinds.values())


@both_ways
@pytest.mark.parametrize("kind", [NamedGRU, NamedRNN])
def test_a_subclass_that_only_adds_is_converted_with_what_it_adds(kind, inplace):
    model = kind(5, 7, bidirectional=True)
    model.label = "b"
    reference = copy.deepcopy(model)
    x = input_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = pymtl.convert(model, inplace)
    assert isinstance(fast, pymtl.recurrent.Recurrent)
    assert isinstance(fast, kind)
    assert type(fast).__name__ == kind.__name__
    assert_same_bits(run(fast, x), run(fresh(reference), x))
    assert_same_bits(run(fast, x, lengths=[1, 6, 3]), run(fresh(reference), x, lengths=[1, 6, 3]))
    for duplicate in (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded):
        twin = duplicate(fast)
        assert type(twin) is type(fast)
        assert twin.label == "b"
        assert torch.equal(twin.last(x), fast.last(x))
        assert type(pymtl.revert(twin)) is kind
    back = pymtl.revert(fast, inplace)
    assert type(back) is kind
    assert_same_bits(run(back, x), run(reference, x))


@both_ways
def test_a_subclass_that_overrides_the_checks_is_left_alone_and_named(inplace):
    model = nn.ModuleDict({"mine": CheckedRNN(5, 7), "plain": nn.RNN(5, 7)})
    expected = run(model["mine"], X)
    with pytest.warns(UserWarning, match=r"mine \(CheckedRNN\)"):
        fast = pymtl.convert(model, inplace)
    assert [type(m) for m in fast.values()] == [CheckedRNN, RNN]
    assert_same_bits(run(fast["mine"], X), expected)


@both_ways
def test_a_subclass_with_a_forward_of_its_own_reaches_the_kernels_through_it(inplace):
    model = DoubledGRU(5, 7)
    reference = copy.deepcopy(model)
    fast = pymtl.convert(model, inplace)
    assert isinstance(fast, GRU)
    assert isinstance(fast, DoubledGRU)
    assert_same_bits(run(fast, X), run(fresh(reference), 2 * X))
    back = pymtl.revert(fast, inplace)
    assert type(back) is DoubledGRU
    assert_same_bits(run(back, X), run(reference, X))


def test_a_subclass_of_ours_written_by_hand_is_not_reverted_but_named():
    class Mine(GRU):
        pass

    model = nn.ModuleDict({"mine": Mine(5, 7), "plain": RNN(5, 7)})
    with pytest.warns(UserWarning, match=r"mine \(Mine\)"):
        back = pymtl.revert(model)
    assert [type(m) for m in back.values()] == [Mine, nn.RNN]


def normed(module):
    return weight_norm(parametrizations.orthogonal(module, "weight_ih_l0"))


@both_ways
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("kind", [*WITHOUT_CELLS, NamedGRU], ids=str)
def test_a_parametrised_module_is_converted_and_reverted(kind, trained, inplace):
    plain = kind(5, 7) if isinstance(kind, type) else theirs_of(kind, 5, 7)
    original = type(plain)
    model = normed(plain)
    reference = copy.deepcopy(model)
    parametrised = type(model)
    x = torch.randn(6, 3, 5)
    if trained:
        with_gradients(model, x)
    fast = pymtl.convert(model, inplace)
    assert isinstance(fast, pymtl.recurrent.Recurrent)
    assert parametrize.is_parametrized(fast, "weight_hh_l0")
    compare(fast, reference, x)
    with torch.no_grad():
        for module in {id(m): m for m in (fast, reference)}.values():
            module.parametrizations.weight_hh_l0.original0.mul_(3.0)
    compare(fast, reference, x)
    back = pymtl.revert(fast, inplace)
    assert type(back) is parametrised
    assert_same_bits(with_gradients(back, x), with_gradients(reference, x))
    again = pymtl.convert(back, inplace)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        for module in (again, reference):
            parametrize.remove_parametrizations(module, name)
    compare(again, reference, x)
    assert type(pymtl.revert(again, inplace)) is original


@every_kind
def test_a_frozen_parametrised_module_sees_changes(kind):
    ours, theirs = pair(kind, 5, 7)
    ours, theirs = normed(ours).eval(), normed(theirs).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 3, 5)
    pymtl.freeze(ours)
    with torch.no_grad():
        for module in (ours, theirs):
            module.parametrizations.weight_hh_l0.original0.mul_(3.0)
    assert_same_bits(run(ours, x), run(fresh(theirs), x))


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
    x, h0 = (None if t is None else t.to(BF16).to(t.dtype) for t in (x, h0))

    def cast(call, *args):
        with torch.autocast("cpu", BF16, enabled=autocasts):
            return call(*args)

    plain = partial(cast, lambda module, *args: module(*args))
    with_lengths = partial(cast, lambda module, *args: module(*args, lengths=[2, 5, 1]))
    by_hand = partial(cast, partial(by_packing, [2, 5, 1]))
    truth = in_double(theirs)
    for call, reference, exact in ((plain, plain, None), (with_lengths, by_hand, partial(by_packing, [2, 5, 1]))):
        found = with_gradients(ours, x, h0, call=call)
        expected = with_gradients(theirs, x, h0, call=reference)
        exact = with_gradients(truth, x, h0, call=exact, dtype=torch.float64)
        dtypes = {name: BF16 if name in ("output", "h_n") else ours.weight_ih_l0.dtype for name in found}
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
            alone = {"output": together["output"][: lengths[b], b], "h_n": together["h_n"][:, b]}
            assert_bits(run(ours, sequence), alone)
        for count in (1, 2):
            threads(count)
            for module in (pymtl.freeze(ours), pymtl.unfreeze(ours)):
                output, h_n = module(pack_sequence(sequences, enforce_sorted=False))
                assert_bits(named(pad_packed_sequence(output)[0], h_n), together)


@every_kind
def test_autocast_gives_the_bits_of_bfloat16(kind):
    half, _ = in_bfloat16(kind, False, **DEEP)
    single = copy.deepcopy(half).float()
    x, h0 = input_of(half), states_of(half)
    with torch.autocast("cpu", BF16):
        assert_bits(run(single, x.float(), h0.float()), run(half, x, h0))
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


# Models.


@every_kind
def test_a_multi_task_model_refuses_an_encoder_without_cells_by_name(kind):
    encoder = pymtl.convert(theirs_of(kind, 5, 7, bidirectional=True, batch_first=True))
    with pytest.raises(TypeError, match=rf"encoder: expected a pymtl.LSTM .*, got {type(encoder).__name__}"):
        pymtl.MultiTaskModel(nn.Embedding(20, 5), encoder, {"slots": pymtl.TokenClassificationHead(3)})


@pytest.mark.parametrize("frozen", [False, True])
@every_kind
def test_heads_fused_into_the_last_layer_give_the_bits_of_the_parts(kind, frozen):
    ours = ours_of(kind, 9, 19, **DEEP).eval()
    if frozen:
        pymtl.freeze(ours)
    packed = pack_sequence([torch.randn(length, 9) for length in (9, 7, 4, 1)])
    weight, bias = torch.randn(6, 38), torch.randn(6)
    with torch.no_grad():
        fused = ours.forward_heads(packed.data, packed.batch_sizes, weight, bias, mean=True, max=True)
        output, h_n = ours(packed)
        expected = {
            "logits": pymtl.ops.heads(output.data, weight, bias, parts=2),
            "mean": pymtl.ops.pool(output.data, packed.batch_sizes, "mean", reverse=[False, True]),
            "max": pymtl.ops.pool(output.data, packed.batch_sizes, "max", reverse=[False, True]),
            "h_n": h_n[-2:],
        }
    assert_same_bits({name: getattr(fused, name) for name in expected}, expected)
