"""What only an LSTM has: a projection of h, which torch's own path runs, and c."""

import copy
import pickle

import pytest
import torch
from modules import by_packing, input_of, lstm_pair, run, saved_and_loaded, states_if, states_of, with_gradients
from parity import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from pymtl import LSTM

PROJECTIONS = {
    "proj_size": {"proj_size": 3},
    "everything": {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True},
}
every_projection = pytest.mark.parametrize("options", PROJECTIONS.values(), ids=PROJECTIONS)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])


@with_and_without_states
@every_projection
def test_a_projection_gives_exactly_nn_lstms_results_and_gradients(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    for batch in (3, None):
        x, hx = input_of(ours, batch), states_if(given, ours, batch)
        assert_same_bits(with_gradients(ours, x, hx), with_gradients(theirs, x, hx))
    packed = pack_padded_sequence(input_of(ours), [6, 1, 4], ours.batch_first, enforce_sorted=False)
    hx = states_if(given, ours)
    assert_same_bits(with_gradients(ours, packed, hx), with_gradients(theirs, packed, hx))


@with_and_without_states
@every_projection
def test_a_projection_takes_lengths(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    x, hx = input_of(ours), states_if(given, ours)
    actual = with_gradients(ours, x, hx, call=lambda module, *args: module(*args, lengths=[2, 5, 1]))
    assert_same_bits(actual, with_gradients(theirs, x, hx, call=lambda *args: by_packing([2, 5, 1], *args)))


@every_projection
def test_state_dicts_with_a_projection_load_in_both_directions(options):
    ours, theirs = LSTM(5, 7, **options), nn.LSTM(5, 7, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not any(theirs.load_state_dict(ours.state_dict()))
    assert_same_bits(theirs.state_dict(), ours.state_dict())
    theirs.reset_parameters()
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert_same_bits(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_with_a_projection_give_the_same_bits_and_share_nothing(duplicate):
    ours = LSTM(5, 7, proj_size=3)
    x = input_of(ours)
    expected = run(ours, x)
    twin = duplicate(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert type(twin) is LSTM
    assert_same_bits(run(twin, x), expected)


def test_the_expected_size_of_c_is_nn_lstms():
    ours, theirs = lstm_pair(5, 7, num_layers=2, bidirectional=True)
    x, (h, c) = input_of(ours), states_of(ours)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    with pytest.raises(RuntimeError, match=r"hidden\[1\] size"):
        ours.check_forward_args(x, (h, c[:1]), None)
