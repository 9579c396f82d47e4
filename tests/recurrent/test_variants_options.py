import copy
import pickle

import numpy as np
import pytest
import torch
from formulas import (
    DEEP,
    LASTING,
    LENGTHS,
    B,
    H,
    I,
    T,
    assert_near,
    every_kind,
    every_lasting,
    made,
    options_of,
)
from modules import (
    KINDS,
    input_of,
    ours_of,
    run,
    saved_and_loaded,
    states_of,
    theirs_of,
    with_gradients,
)
from parity import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations

import pymtl
from pymtl import LSTM
from pymtl.recurrent.options import Options

# The constructor and the attributes.


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None, (0.1,), (0.1, 0.2, 0.3)], ids=repr)
@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_drop", "zoneout"])
@every_kind
def test_no_probability(kind, name, value):
    with pytest.raises(ValueError, match=name):
        ours_of(kind, I, H, **{name: value})
    module = ours_of(kind, I, H, **{name: 0.25})
    before = module._pymtl_variants
    if value is not None:  # which leaves an option as it is
        with pytest.raises(ValueError, match=name):
            pymtl.set_variants(module, **{name: value})
    assert module._pymtl_variants == before


def test_pairs_are_for_the_zoneout_of_an_lstm():
    for kind in KINDS:
        for name in ("recurrent_dropout", "weight_drop") + (("zoneout",) if kind != "LSTM" else ()):
            with pytest.raises(ValueError, match=name):
                ours_of(kind, I, H, **{name: (0.1, 0.2)})
    for pair in ((0.1, 1.5), (True, 0.1), ("0.1", 0.1)):
        with pytest.raises(ValueError, match="zoneout"):
            LSTM(I, H, zoneout=pair)
    assert LSTM(I, H, zoneout=(0.1, 0.2))._pymtl_variants[2:4] == (0.1, 0.2)
    assert LSTM(I, H, zoneout=[0.1, 0.1])._pymtl_variants == LSTM(I, H, zoneout=np.float64(0.1))._pymtl_variants


def test_the_flag_of_layer_norm_is_a_bool():
    with pytest.raises(TypeError, match="layer_norm should be of type bool"):
        LSTM(I, H, layer_norm="no")


PROJECTED = {"recurrent_dropout": 0.1, "weight_drop": 0.1, "zoneout": (0, 0.1), "layer_norm": True}


@pytest.mark.parametrize("name", PROJECTED)
def test_no_option_goes_with_projections(name):
    with pytest.raises(ValueError, match=f"proj_size.*{name}"):
        LSTM(I, H, proj_size=3, **{name: PROJECTED[name]})
    assert LSTM(I, H, proj_size=3, **{name: False if name == "layer_norm" else 0}).proj_size == 3


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_drop", "zoneout"])
@pytest.mark.parametrize("make", [LSTM, lambda *a, **o: pymtl.convert(nn.LSTM(*a, **o))], ids=["ours", "converted"])
def test_no_option_comes_to_projections_later(make, name):
    module = make(I, H, proj_size=3)
    with pytest.raises(ValueError, match="proj_size"):
        pymtl.set_variants(module, **{name: 0.1})
    assert not module._pymtl_variants.act(training=True)
    assert module(torch.randn(T, B, I))[0].shape == (T, B, 3)


@every_kind
def test_positions_are_torchs_and_options_have_names(kind):
    ours, theirs, _ = KINDS[kind]
    positions = [I, H, 2, *(["tanh"] if ours is pymtl.RNN else []), False, True, 0.25, True]
    module, other = ours(*positions), theirs(*positions)
    assert repr(module) == repr(other)
    module = made(kind, "all")
    shown = repr(module)
    assert all(f"{name}=" in shown for name in ("recurrent_dropout", "weight_drop", "zoneout", "layer_norm"))


@every_kind
def test_options_may_be_set_later_but_for_layer_norm(kind):
    given, later = made(kind, "zoneout", **DEEP), ours_of(kind, I, H, **DEEP).eval()
    converted = pymtl.convert(theirs_of(kind, I, H, **DEEP)).eval()
    x = input_of(given)
    for module in (later, converted):
        module.load_state_dict(given.state_dict())
        before = run(module, x)
        pymtl.set_variants(module, **options_of(kind, "zoneout"))
        assert module._pymtl_variants == given._pymtl_variants
        assert_same_bits(run(module, x), run(given, x))
        pymtl.set_variants(module, zoneout=0)
        assert_same_bits(run(module, x), before)
        pymtl.set_variants(module, weight_drop=0.5, recurrent_dropout=1)
        assert module._pymtl_variants == Options(recurrent_dropout=1.0, weight_drop=0.5)
        assert not torch.equal(run(module.train(), x)["output"], before["output"])
        assert_same_bits(run(module.eval(), x), before)
        with pytest.raises(TypeError):
            pymtl.set_variants(module, layer_norm=True)


@every_kind
def test_a_frozen_plain_module_takes_zoneout_later(kind):
    module = pymtl.freeze(ours_of(kind, I, H, **DEEP).eval())
    other = ours_of(kind, I, H, **DEEP, **options_of(kind, "zoneout")).eval()
    other.load_state_dict(module.state_dict())
    x = input_of(module)
    assert not torch.equal(run(module, x)["output"], run(other, x)["output"])
    pymtl.set_variants(module, **options_of(kind, "zoneout"))
    assert_same_bits(run(module, x), run(other, x))


class Normed(nn.LSTM):
    """What people write on top of nn.LSTM, with names of their own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.layer_norm = nn.LayerNorm(H)
        self.weight_drop = 0.5
        self.zoneout = "mine"
        self.variants = ["mine"]

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return self.layer_norm(output), state

    def freeze(self):
        return "mine"


def test_a_converted_subclass_keeps_its_own_attributes_of_these_names():
    theirs = Normed(I, H).eval()
    x = input_of(theirs)
    ours = pymtl.convert(theirs)
    assert isinstance(ours.layer_norm, nn.LayerNorm)
    assert (ours.weight_drop, ours.zoneout, ours.variants) == (0.5, "mine", ["mine"])
    assert ours.freeze() == "mine"
    pymtl.set_variants(ours, zoneout=0.5)
    assert not torch.equal(run(ours, x)["output"], run(theirs, x)["output"])
    pymtl.set_variants(ours, zoneout=0)
    assert pymtl.freeze(ours) is ours
    assert_near(run(ours, x), run(theirs, x), rtol=1e-4, atol=1e-5)


def test_a_subclass_written_for_ours_keeps_a_submodule_named_layer_norm():
    class Own(LSTM):
        def __init__(self):
            super().__init__(I, H)
            self.layer_norm = nn.LayerNorm(H)

    assert isinstance(Own().layer_norm, nn.LayerNorm)


# Weights.

GAINS = {"LSTM": {"gain_ih": 28, "gain_hh": 28, "gain_c": 7, "bias_c": 7}, "GRU": {"gain_ih": 21, "gain_hh": 21}}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_kind
def test_the_gains_are_ones_and_biases_of_c_zeros_also_after_a_reset(kind, bias):
    module, theirs = (make(kind, I, H, bias=bias, **DEEP) for make in (ours_of, theirs_of))
    module = ours_of(kind, I, H, bias=bias, layer_norm=True, **DEEP)
    expected = GAINS.get(kind, {"gain_ih": 7, "gain_hh": 7})
    expected = {name: size for name, size in expected.items() if bias or name != "bias_c"}
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    sizes = {name + suffix: (size,) for suffix in suffixes for name, size in expected.items()}
    own = {name: p for name, p in module.named_parameters() if name not in theirs.state_dict()}
    assert {name: tuple(p.shape) for name, p in own.items()} == sizes
    for change in (lambda p: None, lambda p: p.fill_(5)):
        with torch.no_grad():
            for p in module.parameters():
                change(p)
        module.reset_parameters()
        assert all((p == (0 if name.startswith("bias") else 1)).all() for name, p in own.items())
        assert all((p.abs() <= H**-0.5).all() for name, p in module.named_parameters() if name not in own)


@pytest.mark.parametrize("variant", [*LASTING, "all"])
@every_kind
def test_copies_are_the_same_module(kind, variant, tmp_path):
    module = made(kind, variant, **DEEP)
    x = input_of(module)
    expected = run(module, x)
    other, assigned = (ours_of(kind, I, H, **options_of(kind, variant), **DEEP).eval() for _ in range(2))
    assert not torch.equal(run(other, x)["output"], expected["output"])
    other.load_state_dict(module.state_dict())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assigned.load_state_dict(state, assign=True)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    read = ours_of(kind, I, H, **options_of(kind, variant), **DEEP).eval()
    read.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    copies = [
        other,
        assigned,
        read,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        saved_and_loaded(module),
    ]
    for each in copies:
        assert_same_bits(run(each, x), expected)
        assert repr(each) == repr(module)
        for training in (module, each):
            training.train()
        assert_same_bits(with_gradients(each, x), with_gradients(module, x))
        module.eval()
        pymtl.set_variants(each, zoneout=1)
        assert module._pymtl_variants.zoneout_h != 1


@pytest.mark.parametrize("options", [{}, DEEP, {"bias": False}], ids=str)
@every_lasting
@every_kind
def test_a_frozen_module_gives_the_same_bits_and_notices_every_edit(kind, variant, options):
    module = made(kind, variant, 9, 19, **options)
    x, hx = input_of(module, B), states_of(module)

    def results():
        return {
            f"{call}, {name}": result
            for call, found in (
                ("dense", run(module, x, hx)),
                ("lengths", run(module, x, hx, lengths=LENGTHS)),
                ("alone", run(module, x[:, 0])),
                ("recorded", with_gradients(module, x, hx)),
            )
            for name, result in found.items()
        }

    expected = results()
    pymtl.freeze(module)
    assert_same_bits(results(), expected)
    for name, parameter in module.named_parameters():
        before = run(module, x)["output"]
        with torch.no_grad():
            parameter[1] += 0.5
        edited = run(module, x)
        assert_same_bits(edited, run(copy.deepcopy(module), x))
        assert not torch.equal(edited["output"], before), name
    for name in [n for n, _ in module.named_parameters()]:
        setattr(module, name, nn.Parameter(0.5 * getattr(module, name).detach()))
        assert_same_bits(run(module, x), run(copy.deepcopy(module), x))
    pymtl.unfreeze(module)
    assert_same_bits(run(module, x), run(copy.deepcopy(module), x))


@pytest.mark.parametrize("variant", ["layer norm", "zoneout", "recurrent dropout", "weight drop"])
@every_kind
def test_revert_leaves_such_modules_alone(kind, variant):
    model = nn.ModuleDict({"varied": made(kind, variant), "plain": ours_of(kind, I, H)})
    with pytest.warns(UserWarning, match="varied"):
        reverted = pymtl.revert(model)
    assert type(reverted["varied"]) is KINDS[kind][0]
    assert type(reverted["plain"]) is KINDS[kind][1]
    x = input_of(model["varied"])
    assert_same_bits(run(reverted["varied"], x), run(model["varied"], x))


@every_lasting
@every_kind
def test_a_functional_call_uses_the_tensors_given(kind, variant):
    module, other = made(kind, variant, **DEEP), made(kind, variant, **DEEP)
    x = input_of(module)
    expected = run(other, x)
    for each in (module, pymtl.freeze(module)):
        results = run(lambda x, each=each: torch.func.functional_call(each, dict(other.named_parameters()), x), x)
        assert_same_bits(results, expected)
        assert not torch.equal(run(each, x)["output"], expected["output"])


@every_kind
def test_a_parametrised_gain_is_read_anew(kind):
    class Doubled(nn.Module):
        def forward(self, gain):
            return 2 * gain

    module, other = made(kind, "both"), made(kind, "both")
    other.load_state_dict(module.state_dict())
    nn.utils.parametrize.register_parametrization(module, "gain_hh_l0", Doubled())
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        other.gain_hh_l0.mul_(2)
        other.weight_hh_l0.copy_(module.weight_hh_l0)
    x = input_of(module)
    assert_same_bits(run(module, x), run(other, x))
    assert_same_bits(run(pymtl.freeze(module), x), run(other, x))


def test_weight_drop_acts_on_a_frozen_module_too():
    module = pymtl.freeze(LSTM(I, H, weight_drop=0.9).eval())
    x = input_of(module)
    with torch.no_grad():
        before = module(x)[0]
        module.training = True  # as those do who want dropout's uncertainty: train() would drop the snapshot
        assert not torch.equal(module(x)[0], before)
