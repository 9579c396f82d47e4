"""The LSTM, the GRU and the RNN alike: results, gradients, construction, copies."""

import copy
import pickle
import warnings

import pytest
import torch
from longdouble import needs_long_double
from modules import (
    KINDS,
    by_packing,
    compare,
    in_double,
    input_of,
    like,
    named,
    ours_of,
    pair,
    run,
    saved_and_loaded,
    stack_in_long_double,
    states_if,
    states_of,
    theirs_of,
    tuple_of,
    with_gradients,
)
from parity import assert_parity, assert_same_bits
from samples import spread
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

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
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])


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


@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 1), (128, 1000), (3000, 16), (5000, 8)])
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
    actual = named(*ours(change(x), like(h0, map(change, tuple_of(h0)))))
    assert_same_bits(actual, {name: expected[name] for name in actual})
    x = torch.randn(6, 1, 5).expand(6, 3, 5)
    h0 = like(h0, [torch.randn(1, 1, 7).expand(2, 3, 7) for _ in tuple_of(h0)])
    contiguous = like(h0, [h.contiguous() for h in tuple_of(h0)])
    for options in ({}, {"lengths": [6, 2, 3]}):
        assert_same_bits(run(ours, x, h0, **options), run(ours, x.contiguous(), contiguous, **options))


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
        with torch.backends.mkldnn.flags(enabled=False):  # with it, nn.LSTM's output may not be edited
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
    output, state = ours(x, lengths=torch.tensor(LENGTHS))
    assert_same_bits(named(output, state), clean)
    assert (output[padding] == 0).all()
    output.sum().backward()
    assert (x.grad[padding] == 0).all()
    assert kind == "RNN relu" or (x.grad[~padding] != 0).any(-1).all()


@every_kind
def test_lengths_may_be_a_tensor_a_list_or_a_tuple_in_any_order(kind):
    ours, _ = pair(kind, 5, 7, bidirectional=True, batch_first=True)
    x = input_of(ours, len(LENGTHS))
    expected = run(ours, x, lengths=LENGTHS)
    assert_same_bits(run(ours, x, lengths=torch.tensor(LENGTHS)), expected)
    assert_same_bits(run(ours, x, lengths=tuple(LENGTHS)), expected)
    order = [3, 0, 4, 2, 1]
    shuffled = run(ours, x[order], lengths=[LENGTHS[b] for b in order])
    in_order = {name: e[order] if name == "output" else e[:, order] for name, e in expected.items()}
    assert_same_bits(shuffled, in_order)


@every_kind
def test_steps_beyond_the_longest_sequence_are_kept_as_padding(kind):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    x = input_of(ours, batch=3, steps=9)
    output, _ = ours(x, lengths=[2, 4, 3])
    assert output.shape == (9, 3, 14)
    assert (output[4:] == 0).all()
    call = {"call": lambda m, *args: m(*args, lengths=[2, 4, 3]), "reference": lambda *a: by_packing([2, 4, 3], *a)}
    compare(ours, theirs, x, **call)


@every_kind
def test_a_default_device_does_not_matter(kind):
    module = ours_of(kind, 5, 7)
    x = torch.randn(6, 3, 5)
    expected, _ = module(x, lengths=[6, 4, 1])
    with torch.device("meta"):
        assert torch.equal(module(x, lengths=[6, 4, 1])[0], expected)


# Construction, attributes, copies.


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"dtype": torch.half}], ids=[*OPTIONS, "float16"])
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
    permuted = tuple_of(ours.permute_hidden(h0, torch.tensor([2, 0, 1])))
    assert all(torch.equal(p, h[:, [2, 0, 1]]) for p, h in zip(permuted, tuple_of(h0), strict=True))
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size"):
        ours.check_forward_args(x, like(h0, [h[:1] for h in tuple_of(h0)]), None)


@pytest.mark.parametrize("options", [{}, DEEP, {"dtype": torch.half}], ids=str)
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
@every_kind
def test_copies_give_the_same_bits_and_share_nothing(kind, mode, options):
    ours = ours_of(kind, 5, 7, **options).train(mode == "training")
    x = input_of(ours)
    expected = run(ours, x)
    if mode == "frozen":
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
UNFIT_PROJECTIONS = {"LSTM": (7, -1), "GRU": (3, 0), "RNN tanh": (3, 0)}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param(kind, arguments, id=f"{kind}, {name}")
        for kind, sizes in UNFIT_PROJECTIONS.items()
        for name, arguments in (UNFIT | {f"proj_size {n}": {"proj_size": n} for n in sizes}).items()
    ],
)
def test_the_constructor_refuses_what_torchs_refuses_in_its_words(kind, arguments):
    arguments = {"input_size": 5, "hidden_size": 7, **arguments}
    try:
        theirs_of(kind, **arguments)
    except Exception as error:
        refused = error
    else:
        assert torch.__version__ < "2.13", "torch takes what it refused before"
        pytest.skip("this torch does not look at such an argument")
    with pytest.raises(type(refused)) as actual:
        ours_of(kind, **arguments)
    if type(refused) is ValueError:
        assert str(actual.value) == str(refused)


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
    "LSTM": (LSTM, nn.LSTM, (5, 7, 2, False, True, 0.25, True, 3)),
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


# Models.


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
        output, state = ours(packed)
        expected = {
            "logits": pymtl.ops.heads(output.data, weight, bias, parts=2),
            "mean": pymtl.ops.pool(output.data, packed.batch_sizes, "mean", reverse=[False, True]),
            "max": pymtl.ops.pool(output.data, packed.batch_sizes, "max", reverse=[False, True]),
            **{name: last[-2:] for name, last in zip(("h_n", "c_n"), tuple_of(state))},
        }
    assert_same_bits({name: getattr(fused, name) for name in expected}, expected)
