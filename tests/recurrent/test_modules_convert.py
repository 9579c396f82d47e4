import copy
import pickle
import warnings

import pytest
import torch
from modules import (
    KINDS,
    WITHOUT_CELLS,
    compare,
    draw,
    fresh,
    input_of,
    pair,
    run,
    saved_and_loaded,
    states_of,
    theirs_of,
    weight_norm,
    with_gradients,
)
from parity import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pymtl
from pymtl import GRU, LSTM, RNN

DEEP = {"num_layers": 2, "bidirectional": True}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_ways = pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])


X = draw(6, 3, 5)

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
