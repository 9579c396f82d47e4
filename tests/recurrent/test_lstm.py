import copy
import io
import pickle

import pytest
import torch
from longdouble import needs_long_double
from modules import (
    WEIGHT_CHANGES,
    by_packing,
    compare,
    fresh_after,
    input_of,
    lstm_pair,
    named,
    run,
    stack_in_long_double,
    states_of,
    with_gradients,
)
from parity import assert_parity, assert_same_bits
from samples import spread
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from pymtl import LSTM

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
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# What torch's own path runs: exactly nn.LSTM.
FALLBACKS = {
    "proj_size": {"proj_size": 3},
    "proj_size, everything": {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True},
    "half": {"dtype": torch.half, "bidirectional": True, "num_layers": 2},
}
every_fallback = pytest.mark.parametrize("options", FALLBACKS.values(), ids=FALLBACKS)
with_and_without_states = pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
LENGTHS = [4, 6, 1, 4, 2]  # of a batch of 6 steps


def states_if(given, module, batch=3):
    return states_of(module, batch) if given else None


# Results and gradients.


@with_and_without_states
@every_option
def test_a_batch_gives_nn_lstms_results_and_gradients(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    compare(ours, theirs, input_of(ours), states_if(given, ours))


@with_and_without_states
@every_option
def test_one_unbatched_sequence_gives_nn_lstms_results_and_gradients(options, given):
    ours, theirs = lstm_pair(4, 6, **options)
    compare(ours, theirs, input_of(ours, batch=None), states_if(given, ours, None))


@with_and_without_states
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@every_option
def test_a_packed_sequence_gives_nn_lstms_results_and_gradients(options, enforce_sorted, given):
    ours, theirs = lstm_pair(5, 7, **options)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    sequences = [torch.randn(length, 5) for length in lengths]
    compare(ours, theirs, pack_sequence(sequences, enforce_sorted), states_if(given, ours, len(LENGTHS)))


@with_and_without_states
@every_option
def test_lengths_give_what_packing_by_hand_gives(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    hx = states_if(given, ours, len(LENGTHS))
    compare(
        ours,
        theirs,
        input_of(ours, len(LENGTHS)),
        hx,
        call=lambda module, *args: module(*args, lengths=LENGTHS),
        reference=lambda *args: by_packing(LENGTHS, *args),
    )


@needs_long_double
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["zero states", "given states"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_float64_results_and_gradients_are_as_accurate_as_nn_lstms(options, given, packed):
    ours, theirs = lstm_pair(3, 5, dtype=torch.float64, **options)
    x = input_of(ours)
    hx = states_if(given, ours)
    if packed:
        x = pack_padded_sequence(x, [6, 3, 1])
    assert_parity(with_gradients(ours, x, hx), with_gradients(theirs, x, hx), stack_in_long_double(theirs, x, hx))


def test_a_real_models_size_gives_nn_lstms_results_and_gradients():
    ours, theirs = lstm_pair(100, 128, num_layers=2, bidirectional=True, batch_first=True)
    compare(ours, theirs, input_of(ours, batch=8, steps=20), states_of(ours, 8))


def test_equal_seeds_drop_equal_elements_and_others_other_ones():
    ours, theirs = lstm_pair(4, 64, num_layers=3, dropout=0.5, bidirectional=True)
    x = input_of(ours)
    compare(ours, theirs, x)
    assert_same_bits(with_gradients(ours, x), with_gradients(ours, x))
    assert not torch.equal(run(ours, x)["output"], run(ours, x)["output"])


def test_dropout_is_for_training_only():
    ours, theirs = lstm_pair(4, 8, num_layers=2, dropout=0.5)
    x = input_of(ours)
    assert_same_bits(run(ours.eval(), x), run(ours, x))
    compare(ours, theirs.eval(), x)


@pytest.mark.parametrize("change", [spread, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)])
def test_non_contiguous_input_and_states_give_the_same_bits(change):
    ours, _ = lstm_pair(5, 7, bidirectional=True)
    x, hx = input_of(ours), states_of(ours)
    expected = with_gradients(ours, x, hx)
    actual = named(*ours(change(x), tuple(change(h) for h in hx)))
    assert_same_bits(actual, {name: expected[name] for name in actual})


def test_expanded_input_and_states_give_the_same_bits():
    ours, _ = lstm_pair(5, 7, bidirectional=True)
    x, hx = torch.randn(6, 1, 5).expand(6, 3, 5), tuple(torch.randn(1, 1, 7).expand(2, 3, 7) for _ in range(2))
    assert_same_bits(run(ours, x, hx), run(ours, x.contiguous(), tuple(h.contiguous() for h in hx)))
    assert_same_bits(run(ours, x, hx, lengths=[6, 2, 3]), run(ours, x.contiguous(), hx, lengths=[6, 2, 3]))


# Torch's own path.


@with_and_without_states
@every_fallback
def test_torchs_own_path_gives_exactly_nn_lstms_results_and_gradients(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    for batch in (3, None):
        x, hx = input_of(ours, batch), states_if(given, ours, batch)
        assert_same_bits(with_gradients(ours, x, hx), with_gradients(theirs, x, hx))
    packed = pack_padded_sequence(input_of(ours), [6, 1, 4], ours.batch_first, enforce_sorted=False)
    hx = states_if(given, ours)
    assert_same_bits(with_gradients(ours, packed, hx), with_gradients(theirs, packed, hx))


@with_and_without_states
@every_fallback
def test_torchs_own_path_takes_lengths(options, given):
    ours, theirs = lstm_pair(5, 7, **options)
    x, hx = input_of(ours), states_if(given, ours)
    actual = with_gradients(ours, x, hx, call=lambda module, *args: module(*args, lengths=[2, 5, 1]))
    assert_same_bits(actual, with_gradients(theirs, x, hx, call=lambda *args: by_packing([2, 5, 1], *args)))


# lengths.


@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_is_zero_in_the_output_and_neither_read_nor_given_a_gradient(batch_first):
    ours, _ = lstm_pair(5, 7, bidirectional=True, batch_first=batch_first, num_layers=2)
    x = input_of(ours, len(LENGTHS))
    padding = torch.arange(6).unsqueeze(0) >= torch.tensor(LENGTHS).unsqueeze(1)
    padding = padding if batch_first else padding.t()
    clean = run(ours, x, lengths=LENGTHS)
    x[padding] = torch.nan
    x.requires_grad_()
    output, state = ours(x, lengths=LENGTHS)
    assert_same_bits(named(output, state), clean)
    assert (output[padding] == 0).all()
    output.sum().backward()
    assert (x.grad[padding] == 0).all()
    assert (x.grad[~padding] != 0).any(-1).all()


def test_lengths_may_be_a_tensor_a_list_or_a_tuple_in_any_order():
    ours, _ = lstm_pair(5, 7, bidirectional=True, batch_first=True)
    x = input_of(ours, len(LENGTHS))
    expected = run(ours, x, lengths=LENGTHS)
    assert_same_bits(run(ours, x, lengths=torch.tensor(LENGTHS)), expected)
    assert_same_bits(run(ours, x, lengths=tuple(LENGTHS)), expected)
    order = [3, 0, 4, 2, 1]
    shuffled = run(ours, x[order], lengths=[LENGTHS[b] for b in order])
    assert_same_bits(
        shuffled, {"output": expected["output"][order]} | {k: expected[k][:, order] for k in ("h_n", "c_n")}
    )


def test_steps_beyond_the_longest_sequence_are_kept_as_padding():
    ours, theirs = lstm_pair(5, 7, bidirectional=True)
    x = input_of(ours, batch=3, steps=9)
    output, _ = ours(x, lengths=[2, 4, 3])
    assert output.shape == (9, 3, 14)
    assert (output[4:] == 0).all()
    call = {"call": lambda m, *args: m(*args, lengths=[2, 4, 3]), "reference": lambda *a: by_packing([2, 4, 3], *a)}
    compare(ours, theirs, x, **call)


# What other people's code uses.


def test_the_attributes_of_nn_lstm_work():
    ours, theirs = lstm_pair(5, 7, num_layers=2, bidirectional=True, dropout=0.1)
    assert isinstance(ours, nn.RNNBase)
    assert repr(ours) == repr(theirs)
    assert ours.mode == "LSTM"
    assert ours.flatten_parameters() is None
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    names = [[name for name, p in ours.named_parameters() for w in group if p is w] for group in ours.all_weights]
    assert names == [[name for name, p in theirs.named_parameters() for w in g if p is w] for g in theirs.all_weights]
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    x, hx = input_of(ours), states_of(ours)
    assert ours.check_forward_args(x, hx, None) is None
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size"):
        ours.check_forward_args(x, (hx[0][:1], hx[1]), None)


@pytest.mark.parametrize("options", [*OPTIONS.values(), *FALLBACKS.values()], ids=[*OPTIONS, *FALLBACKS])
def test_state_dict_loads_in_both_directions(options):
    ours, theirs = LSTM(5, 7, **options), nn.LSTM(5, 7, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not any(theirs.load_state_dict(ours.state_dict()))
    assert_same_bits(theirs.state_dict(), ours.state_dict())
    theirs.reset_parameters()
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert_same_bits(ours.state_dict(), theirs.state_dict())


@every_option
def test_the_same_seed_draws_the_same_weights_as_nn_lstm(options):
    torch.manual_seed(2)
    ours = LSTM(5, 7, **options)
    torch.manual_seed(2)
    assert_same_bits(ours.state_dict(), nn.LSTM(5, 7, **options).state_dict())


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_give_the_same_bits_and_share_nothing(duplicate, options):
    ours = LSTM(5, 7, **options)
    x = input_of(ours)
    expected = run(ours, x)
    run(ours, x)
    twin = duplicate(ours)
    assert type(twin) is LSTM
    assert_same_bits(run(twin, x), expected)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same_bits(run(twin, x), expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"hidden_size": 0}, ValueError),
        ({"input_size": -1}, ValueError),
        ({"num_layers": 0}, ValueError),
        ({"dropout": 1.5}, ValueError),
        ({"dropout": True}, ValueError),
        ({"proj_size": 7}, ValueError),
        ({"proj_size": -1}, ValueError),
        ({"hidden_size": 2.0}, TypeError),
        ({"bias": 1}, TypeError),
        ({"batch_first": None}, TypeError),
        ({"nonsense": 1}, TypeError),
    ],
    ids=str,
)
def test_the_constructor_refuses_what_nn_lstm_refuses(arguments, error):
    for kind in (nn.LSTM, LSTM):
        with pytest.raises(error):
            kind(**{"input_size": 5, "hidden_size": 7, **arguments})


def test_the_meta_device_gives_shapes():
    ours, theirs = (kind(5, 7, num_layers=2, bidirectional=True, device="meta") for kind in (LSTM, nn.LSTM))
    x = torch.empty(6, 3, 5, device="meta")
    actual, expected = named(*ours(x)), named(*theirs(x))
    assert {k: (v.shape, v.device) for k, v in actual.items()} == {k: (v.shape, v.device) for k, v in expected.items()}


# Weights are read anew by every call.


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("change", WEIGHT_CHANGES.values(), ids=WEIGHT_CHANGES)
def test_a_call_uses_the_weights_that_nn_lstm_would_use(change, gradients):
    ours, theirs = lstm_pair(5, 7, bidirectional=True)
    x = input_of(ours)
    before = run(ours, x)
    expected = fresh_after(change, theirs.train(gradients), x)
    call = change(ours.train(gradients))
    with torch.set_grad_enabled(gradients):
        actual = named(*call(x))
    assert_same_bits(actual, expected)
    if change.__name__ not in ("to_double", "to_double_and_back", "functional_double"):
        assert not torch.equal(actual["output"], before["output"])


# The same bits however the sequences come.


def ragged(dtype=torch.float32, **options):
    """A module, and sequences of many lengths with their results alone."""
    ours = LSTM(9, 19, dtype=dtype, **options)
    sequences = [torch.randn(length, 9, dtype=dtype) for length in (9, 1, 7, 7, 3, 12, 2, 1, 5, 33, 4)]
    return ours, sequences, [run(ours, sequence) for sequence in sequences]


def assert_each_as_alone(results, alone, lengths):
    """``results`` are of a padded batch, time first."""
    for b, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        actual = {"output": results["output"][:length, b], "h_n": results["h_n"][:, b], "c_n": results["c_n"][:, b]}
        assert_same_bits(actual, expected)


DEEP = {"num_layers": 2, "bidirectional": True}
deep_or_not = pytest.mark.parametrize("options", [{}, {"bidirectional": True}, DEEP], ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@every_dtype
@deep_or_not
def test_a_sequence_gives_the_same_bits_alone_with_lengths_and_packed(options, dtype):
    ours, sequences, alone = ragged(dtype, **options)
    lengths = [len(sequence) for sequence in sequences]
    padded = nn.utils.rnn.pad_sequence(sequences, padding_value=torch.nan)
    assert_each_as_alone(run(ours, padded, lengths=lengths), alone, lengths)
    more_padding = torch.cat([padded, torch.full_like(padded, 3.0)])
    assert_each_as_alone(run(ours, more_padding, lengths=lengths), alone, lengths)
    packed = pack_sequence(sequences, enforce_sorted=False)
    with torch.no_grad():
        output, state = ours(packed)
    output, _ = nn.utils.rnn.pad_packed_sequence(output)
    assert_each_as_alone(named(output, state), alone, lengths)


@every_dtype
@deep_or_not
def test_a_sequence_gives_the_same_bits_alone_and_in_a_dense_batch(options, dtype):
    ours = LSTM(9, 19, dtype=dtype, **options)
    for batch in (2, 5, 8, 17):
        x = torch.randn(6, batch, 9, dtype=dtype)
        assert_each_as_alone(run(ours, x), [run(ours, x[:, b]) for b in range(batch)], [6] * batch)


@every_dtype
def test_states_given_do_not_change_that(dtype):
    ours, sequences, _ = ragged(dtype, **DEEP)
    lengths = [len(sequence) for sequence in sequences]
    hx = states_of(ours, len(sequences))
    alone = [run(ours, sequence, (hx[0][:, b], hx[1][:, b])) for b, sequence in enumerate(sequences)]
    assert_each_as_alone(run(ours, nn.utils.rnn.pad_sequence(sequences), hx, lengths=lengths), alone, lengths)


@every_dtype
def test_training_evaluation_and_every_number_of_threads_give_the_same_bits(threads, dtype):
    ours = LSTM(40, 64, dtype=dtype, **DEEP)
    x = torch.randn(80, 16, 40, dtype=dtype)
    threads(1)
    expected = run(ours, x)
    for count in (1, 2):
        threads(count)
        assert_same_bits(run(ours, x), expected)
        assert_same_bits(named(*ours(x)), expected)
        ours.eval()
        assert_same_bits(run(ours, x), expected)
        with torch.inference_mode():
            assert_same_bits(named(*ours(x)), expected)
        ours.train()
        lengths = [80] * 16
        assert_same_bits(run(ours, x, lengths=lengths), expected)


@every_dtype
@pytest.mark.parametrize("layers", [1, 2])
def test_chunks_with_carried_states_give_the_same_bits_as_the_whole(layers, dtype):
    ours = LSTM(9, 19, layers, dtype=dtype)
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


def test_twenty_runs_give_the_same_bits_gradients_included(threads):
    ours = LSTM(40, 64, **DEEP)
    x = torch.randn(40, 8, 40)
    for count in (1, 2):
        threads(count)
        expected = with_gradients(ours, x)
        for _ in range(10):
            assert_same_bits(with_gradients(ours, x), expected)


@pytest.mark.parametrize(("input_size", "hidden_size"), [(128, 1000), (3000, 16), (5000, 8)])
def test_long_sums_are_as_accurate_as_nn_lstms(input_size, hidden_size):
    ours, theirs = lstm_pair(input_size, hidden_size)
    exact = nn.LSTM(input_size, hidden_size).double()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, input_size)

    def results(module, x):
        x = x.clone().requires_grad_()
        output, (h_n, c_n) = module(x)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        return {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach(), "x": x.grad, **gradients}

    assert_parity(results(ours, x), results(theirs, x), results(exact, x.double()))


@pytest.mark.parametrize("packed", [False, True])
def test_an_output_may_be_edited_in_place_where_nn_lstm_s_may(packed):
    gradients = []
    for module in lstm_pair(5, 7, bidirectional=True):
        torch.manual_seed(0)
        x = torch.randn(6, 3, 5, requires_grad=True)
        given = pack_padded_sequence(x, [6, 4, 1]) if packed else x
        output, _ = module(given)
        data = output.data if packed else output
        data[2:] = 0.0
        data.square_().sum().backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_a_default_device_does_not_matter():
    module = LSTM(5, 7)
    x = torch.randn(6, 3, 5)
    expected, _ = module(x, lengths=[6, 4, 1])
    with torch.device("meta"):
        assert torch.equal(module(x, lengths=[6, 4, 1])[0], expected)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_torch_func_differentiates_the_module(options):
    ours, theirs = lstm_pair(5, 7, **options)
    x = torch.randn(6, 3, 5)

    def gradients(module):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,))[0].square().sum())(parameters)

    a, b = gradients(ours), gradients(theirs)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
