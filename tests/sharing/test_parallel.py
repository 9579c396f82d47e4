"""Encoders side by side: the bits of each alone, and torch.nn.LSTM's numbers."""

import pytest
import torch
from parity import assert_same_bits
from schemes import (
    INPUT,
    LENGTHS,
    H,
    batch,
    directions_of,
    every_batch,
    every_depth,
    every_direction,
    finals,
    gradients,
    packed,
    unpacked,
    walk,
)
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence

from pymtl import LSTM
from pymtl.sharing import ParallelLSTM


def encoders(count=3, dtype=torch.float32, input_size=INPUT, hidden_size=7, **options):
    return {f"e{k}": LSTM(input_size, hidden_size, dtype=dtype, **options) for k in range(count)}


def alone(encoder, data, sizes):
    """Output and final states of one LSTM by itself."""
    output, (h_n, _) = encoder(PackedSequence(data, sizes))
    directions = directions_of(encoder.bidirectional)
    return output.data, torch.cat(tuple(h_n[-directions:]), dim=-1)


def side_by_side(count, options, dtype, own, names=None, lengths=LENGTHS):
    """Results and gradients of some encoders in one launch, and of each alone."""
    several = ParallelLSTM(encoders(count, dtype, **options))
    wanted = list(several.encoders if names is None else names)
    size = options.get("input_size", INPUT)
    data, sizes = batch(lengths, size, dtype)
    if own:
        data = torch.randn(len(data), len(wanted), size, dtype=dtype, requires_grad=True)
    tokens, last = several(data, sizes, names)
    found = []
    for k, name in enumerate(wanted):
        encoder, own_data = several.encoders[name], data[:, k] if own else data
        results = {"ours": (tokens[:, k], last[:, k]), "alone": alone(encoder, own_data, sizes)}
        leaves = dict(encoder.named_parameters()) | {"data": data}
        for kind, (output, final) in results.items():
            grads = dict(zip(leaves, gradients([output, final], list(leaves.values()))))
            results[kind] = {"output": output, "last": final} | {f"gradient of {n}": g for n, g in grads.items()}
            if kind == "ours":
                # The backward of one launch is asked for K times here; each time the others get zeros.
                tokens, last = several(data, sizes, names)
        found.append(results)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_depth
@every_direction
def test_encoders_side_by_side_give_the_bits_of_each_alone(bidirectional, num_layers, own, dtype, threads):
    options = {"bidirectional": bidirectional, "num_layers": num_layers}
    for count in (1, 2):
        threads(count)
        for results in side_by_side(3, options, dtype, own):
            assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_batch
def test_the_bits_are_the_same_in_every_batch(lengths, own):
    for results in side_by_side(2, {"bidirectional": True, "num_layers": 2}, torch.float32, own, lengths=lengths):
        assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize("names", [["e1"], ["e2", "e0"], ("e0", "e1", "e2")], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_some_of_the_encoders_run_in_the_order_asked_for(names, own):
    for results in side_by_side(3, {"bidirectional": True, "num_layers": 2}, torch.float32, own, names):
        assert_same_bits(results["ours"], results["alone"])


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {}),
        (3, {"bias": False, "num_layers": 2, "bidirectional": True}),
        (2, {"input_size": 70, "hidden_size": 90, "num_layers": 2, "bidirectional": True}),
        (3, {"input_size": 300, "hidden_size": 33}),
    ],
    ids=["one encoder", "no bias", "large", "wide input"],
)
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_the_bits_are_the_same_at_every_size(count, options, own, threads):
    # Many tokens and wide layers: weight gradients are large matrix products.
    for number in (1, 2):
        threads(number)
        for results in side_by_side(count, options, torch.float32, own, lengths=[40, 31, 31, 12, 5, 1, 1]):
            assert_same_bits(results["ours"], results["alone"])


def test_gradients_of_all_encoders_together_are_those_of_each_alone():
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=True, num_layers=2))
    data, sizes = batch()
    tokens, last = several(data, sizes)
    each = [alone(e, data, sizes) for e in several.encoders.values()]
    theirs = [torch.stack([t for t, _ in each], 1), torch.stack([f for _, f in each], 1)]
    leaves = dict(several.named_parameters())
    ours = dict(zip(leaves, gradients([tokens, last], list(leaves.values()))))
    assert_same_bits(ours, dict(zip(leaves, gradients(theirs, list(leaves.values())))))
    # An input that all of them read gets a sum of gradients, whose order is free.
    several_grad = gradients(several(data, sizes), [data])
    theirs = [torch.stack(parts, 1) for parts in zip(*(alone(e, data, sizes) for e in several.encoders.values()))]
    torch.testing.assert_close(several_grad, gradients(theirs, [data]))


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
@every_depth
@every_direction
def test_encoders_side_by_side_are_torch_s_over_single_sequences(bidirectional, num_layers, own):
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=bidirectional, num_layers=num_layers))
    data, sizes = batch()
    if own:
        data = torch.randn(len(data), 3, INPUT, dtype=data.dtype, requires_grad=True)
    tokens, last = several(data, sizes)
    theirs = []
    for k, encoder in enumerate(several.encoders.values()):
        theirs.append(walk(encoder, unpacked(data[:, k] if own else data, sizes)))
    expected = torch.stack([packed(s) for s in theirs], 1)
    expected_last = torch.stack([finals(s, directions_of(bidirectional)) for s in theirs], 1)
    torch.testing.assert_close([tokens, last], [expected, expected_last])
    leaves = [data, *several.parameters()]
    torch.testing.assert_close(gradients([tokens, last], leaves), gradients([expected, expected_last], leaves))


def test_without_gradients_the_bits_are_the_same():
    several = ParallelLSTM(encoders(2, bidirectional=True, num_layers=2))
    data, sizes = batch(dtype=torch.float32)
    with_gradients = several(data, sizes)
    with torch.no_grad():
        assert_same_bits(several(data, sizes)._asdict(), with_gradients._asdict())
    with torch.inference_mode():
        assert_same_bits(several(data, sizes)._asdict(), with_gradients._asdict())


def test_states_are_named_and_hold_the_final_states():
    several = ParallelLSTM(encoders(3, torch.float64, bidirectional=True))
    data, sizes = batch()
    for names in (None, ["e2", "e1"]):
        states = several.states(data, sizes, names)
        assert list(states) == (names or ["e0", "e1", "e2"])
        for name, state in states.items():
            sequences = walk(several.encoders[name], unpacked(data, sizes))
            torch.testing.assert_close(state.tokens, packed(sequences))
            torch.testing.assert_close(state.pooled("last"), finals(sequences, 2))


def doubled(module, arguments, result):
    output, state = result
    return output._replace(data=2 * output.data), (3 * state[0], state[1])


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_an_encoder_with_a_forward_hook_is_called(own):
    several = ParallelLSTM(encoders(3, bidirectional=True, num_layers=2))
    data, sizes = batch(dtype=torch.float32)
    if own:
        data = torch.randn(len(data), 3, INPUT)
    before = several(data, sizes)
    several.encoders["e1"].register_forward_hook(doubled)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            tokens, last = several(data, sizes)
        assert_same_bits({"t": tokens[:, ::2], "l": last[:, ::2]}, {"t": before[0][:, ::2], "l": before[1][:, ::2]})
        assert_same_bits({"t": tokens[:, 1], "l": last[:, 1]}, {"t": 2 * before[0][:, 1], "l": 3 * before[1][:, 1]})
    tokens, _ = several(data, sizes, ["e0", "e2"] if not own else None)
    assert tokens.shape[1] == (3 if own else 2)


def test_a_pruned_encoder_s_mask_counts():
    several = ParallelLSTM(encoders(2))
    data, sizes = batch(dtype=torch.float32)
    prune.l1_unstructured(several.encoders["e0"], "weight_ih_l0", amount=0.5)
    several.encoders["e0"].weight_ih_l0_orig.data.mul_(2)
    tokens, last = several(data, sizes)
    for k, encoder in enumerate(several.encoders.values()):
        assert_same_bits(dict(zip("tl", (tokens[:, k], last[:, k]))), dict(zip("tl", alone(encoder, data, sizes))))


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own inputs"])
def test_another_dtype_autocast_and_projections_take_torch_s_path(own):
    cases = {
        "bfloat16": (encoders(2, torch.bfloat16, bidirectional=True, num_layers=2), torch.bfloat16, False),
        "autocast": (encoders(2, bidirectional=True), torch.float32, True),
        "projections": (encoders(2, bidirectional=True, num_layers=2, proj_size=4), torch.float32, False),
    }
    for name, (made, dtype, autocast) in cases.items():
        several = ParallelLSTM(made)
        data, sizes = batch(dtype=dtype)
        if own:
            data = torch.randn(len(data), 2, INPUT, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tokens, last = several(data, sizes)
            for k, encoder in enumerate(several.encoders.values()):
                output, final = alone(encoder, data[:, k] if own else data, sizes)
                assert torch.equal(tokens[:, k], output), name
                assert torch.equal(last[:, k], final), name


def test_encoders_of_different_dtypes_are_refused_as_one_alone_would():
    several = ParallelLSTM({"a": LSTM(INPUT, H), "b": LSTM(INPUT, H, dtype=torch.float64)})
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"dtype|float"):
        several(data, sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": INPUT + 1},
        {"hidden_size": H + 1},
        {"num_layers": 2},
        {"bias": False},
        {"dropout": 0.3},
        {"bidirectional": True},
        {"proj_size": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_encoders_of_different_architectures_are_refused(change):
    sizes = {"input_size": INPUT, "hidden_size": H}
    with pytest.raises(ValueError, match=r"encoders\['other'\]: expected the sizes of the first"):
        ParallelLSTM({"first": LSTM(**sizes), "other": LSTM(**(sizes | change))})


def test_what_is_no_encoder_is_refused():
    with pytest.raises(ValueError, match="encoders: expected at least one"):
        ParallelLSTM({})
    with pytest.raises(TypeError, match=r"encoders\['b'\]: expected a pymtl.LSTM, got LSTM"):
        ParallelLSTM({"a": LSTM(INPUT, H), "b": nn.LSTM(INPUT, H)})


def test_inputs_that_do_not_fit_are_refused():
    several = ParallelLSTM(encoders(3))
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="data: expected 3 inputs, one for each encoder, got 2"):
        several(torch.randn(len(data), 2, INPUT), sizes)
    with pytest.raises(KeyError):
        several(data, sizes, ["unknown"])
    for wrong in (torch.randn(len(data), 3 * INPUT), torch.randn(len(data), INPUT + 1)):
        with pytest.raises(RuntimeError, match="input"):
            several(wrong, sizes)
    with pytest.raises(RuntimeError, match="input"):
        several(torch.randn(len(data), 3, INPUT + 1), sizes)


def test_dropout_between_layers_is_for_training_only():
    several = ParallelLSTM(encoders(2, bidirectional=True, num_layers=2, dropout=0.5))
    data, sizes = batch(dtype=torch.float32)
    several.eval()
    for k, encoder in enumerate(several.encoders.values()):
        results = several(data, sizes)
        expected = alone(encoder, data, sizes)
        assert_same_bits(dict(zip("tl", (r[:, k] for r in results))), dict(zip("tl", expected)))
    evaluated = several(data, sizes)
    several.train()
    torch.manual_seed(1)
    once, again = several(data, sizes), several(data, sizes)
    assert not torch.equal(once.tokens, again.tokens)
    assert not torch.equal(once.tokens, evaluated.tokens)
    torch.manual_seed(1)
    assert_same_bits(several(data, sizes)._asdict(), once._asdict())


def test_dropping_everything_gives_the_second_layer_zeros():
    several = ParallelLSTM(encoders(2, torch.float64, bidirectional=True, num_layers=2, dropout=1.0)).train()
    data, sizes = batch()
    tokens, last = several(data, sizes)
    for k, encoder in enumerate(several.encoders.values()):
        second = LSTM(2 * 7, 7, bidirectional=True, dtype=torch.float64)
        second.load_state_dict({n.replace("_l1", "_l0"): p for n, p in encoder.state_dict().items() if "_l1" in n})
        sequences = walk(second, [s.new_zeros(len(s), 14) for s in unpacked(data, sizes)])
        torch.testing.assert_close(tokens[:, k], packed(sequences))
        torch.testing.assert_close(last[:, k], finals(sequences, 2))


def test_each_encoder_drops_other_states():
    made = encoders(2, num_layers=2, dropout=0.5)
    made["e1"].load_state_dict(made["e0"].state_dict())
    data, sizes = batch(dtype=torch.float32)
    tokens, _ = ParallelLSTM(made).train()(data, sizes)
    assert not torch.equal(tokens[:, 0], tokens[:, 1])


def test_an_empty_batch_of_encoders_gives_empty_states():
    several = ParallelLSTM(encoders(2, bidirectional=True))
    tokens, last = several(torch.zeros(0, INPUT), torch.zeros(4, dtype=torch.int64))
    assert tokens.shape == (0, 2, 14)
    assert last.shape == (0, 2, 14)
