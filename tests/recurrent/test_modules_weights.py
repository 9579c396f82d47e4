"""The LSTM, the GRU and the RNN alike: weights that change, frozen or not."""

import pytest
import torch
from modules import (
    KINDS,
    WEIGHT_CHANGES,
    fresh,
    fresh_after,
    input_of,
    is_frozen,
    named,
    ours_of,
    pair,
    run,
    states_of,
    theirs_of,
    with_gradients,
)
from parity import assert_same_bits
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl import LSTM

DEEP = {"num_layers": 2, "bidirectional": True}
every_kind = pytest.mark.parametrize("kind", KINDS)

# Weights are read anew by every call, frozen or not.

# Nobody can see this one: a frozen module goes on with the weights it was frozen with, as pymtl.freeze says.
INVISIBLE = "edit_through_data"
CHANGES = {
    f"{name}, {how}": (change, how)
    for name, change in WEIGHT_CHANGES.items()
    for how in ("inference", "training", "frozen")
    if (name, how) != (INVISIBLE, "frozen")
}


@pytest.mark.parametrize(("change", "how"), CHANGES.values(), ids=CHANGES)
@every_kind
def test_a_call_uses_the_weights_that_torch_would_use(kind, change, how):
    ours, theirs = (module.train(how == "training") for module in pair(kind, 5, 7, bidirectional=True))
    x = input_of(ours)
    before = run(pymtl.freeze(ours) if how == "frozen" else ours, x)
    call = change(ours)
    expected = fresh_after(change, theirs, x)
    with torch.set_grad_enabled(how == "training"):
        assert_same_bits(named(*call(x)), expected)
    if change.__name__ not in ("to_double", "to_double_and_back", "functional_double"):
        assert not torch.equal(expected["output"], before["output"])


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 3, "bias": False}, {"num_layers": 3, "bidirectional": True}],
    ids=str,
)
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
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@every_kind
def test_the_step_of_an_optimizer_is_noticed(kind, optimizer, options):
    ours = pymtl.freeze(ours_of(kind, 5, 7).eval())
    x = input_of(ours)
    before = run(ours, x)
    for parameter in ours.parameters():
        parameter.grad = 0.5 * parameter.detach()
    optimizer(ours.parameters(), lr=0.5, **options).step()
    assert_same_bits(run(ours, x), run(fresh(ours), x))
    assert not torch.equal(run(ours, x)["output"], before["output"])


@every_kind
def test_freezing_in_training_mode_is_refused(kind):
    with pytest.raises(RuntimeError, match="expected a module in eval mode"):
        pymtl.freeze(nn.Sequential(ours_of(kind, 5, 7)))
    model = nn.Sequential(ours_of(kind, 5, 7)).eval()
    model[0].train()
    with pytest.raises(RuntimeError, match="expected a module in eval mode"):
        pymtl.freeze(model)


@every_kind
def test_all_kinds_inside_a_module_are_frozen_and_train_thaws_them(kind):
    model = nn.ModuleDict({"a": LSTM(5, 7), "b": nn.ModuleList([ours_of(kind, 5, 7), theirs_of(kind, 5, 7)])}).eval()
    assert pymtl.freeze(model) is model
    assert is_frozen(model["b"][0])
    for drop in (nn.Module.train, nn.Module.float, lambda m: m.load_state_dict(m.state_dict()), pymtl.unfreeze):
        pymtl.freeze(model.eval())
        drop(model)
        assert not is_frozen(model["b"][0])


@pytest.mark.parametrize("whole", [False, True], ids=["state_dict", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_go_in_both_directions(kind, whole, tmp_path):
    ours, theirs = ours_of(kind, 5, 7, **DEEP).eval(), theirs_of(kind, 5, 7, **DEEP).eval()
    x = input_of(ours)
    for k, (source, target) in enumerate(((theirs, ours), (ours, theirs))):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.uniform_(-0.5, 0.5)
        path = tmp_path / f"{k}.safetensors"
        if whole:
            save_model(source, path)
            assert load_model(target, path) == (set(), [])
        else:
            save_file(source.state_dict(), path)
            target.load_state_dict(load_file(path))
        assert_same_bits(target.state_dict(), source.state_dict())
        assert_same_bits(run(ours, x), run(fresh(theirs, theirs.state_dict()), x))
