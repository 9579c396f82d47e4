"""What describe says of the recurrent layers of a model, before and after it is converted."""

import pytest
import torch
from torch import nn

import pymtl
from pymtl.recurrent import route as router
from pymtl.recurrent.describe import CELL, NOT_CONVERTED, UNKNOWN


class Strict(nn.LSTM):
    def check_forward_args(self, *arguments):
        super().check_forward_args(*arguments)


class Mine(nn.GRU):
    pass


def model():
    return nn.ModuleDict(
        {
            "encoder": nn.LSTM(5, 7, 2, bidirectional=True),
            "cell": nn.GRUCell(3, 4),
            "strict": Strict(2, 3),
            "small": nn.GRU(2, 3).to(torch.float16),
            "mine": Mine(2, 3),
            "inner": nn.Sequential(nn.Linear(2, 2), nn.RNN(2, 3)),
        }
    )


def lines_of(text):
    """Of each layer the name, what it is, who runs it and why."""
    return {line.split()[0]: line for line in text.splitlines()}


def test_before_all_run_on_torch_and_the_way_out_is_named():
    lines = lines_of(pymtl.describe(model()))
    assert list(lines) == ["encoder", "cell", "strict", "small", "mine", "inner.1"]
    for name in ("encoder", "small", "mine", "inner.1"):
        assert lines[name].endswith(f"torch  {NOT_CONVERTED}")
    assert "nn.LSTM(5, 7, num_layers=2, bidirectional=True)" in lines["encoder"]
    assert lines["cell"].endswith(f"torch  {CELL}")
    assert "check_forward_args" in lines["strict"]
    assert "left alone by pymtl.convert" in lines["strict"]


def test_after_the_kernels_run_what_they_take():
    with pytest.warns(UserWarning, match="strict"):
        converted = pymtl.convert(model())
    lines = lines_of(pymtl.describe(converted))
    for name in ("encoder", "mine", "inner.1"):
        assert lines[name].endswith(f"kernels  {router.ON_CPU}")
    assert "pymtl.LSTM(5, 7" in lines["encoder"]
    assert " Mine(2, 3" in lines["mine"]
    assert lines["small"].endswith(f"torch    {router.NO_DTYPE}")
    assert "left alone" in lines["strict"]


def test_a_single_layer_and_a_model_without_any():
    assert pymtl.describe(pymtl.GRU(2, 3, layer_norm=True)).startswith("the module itself  pymtl.GRU(2, 3, layer_norm")
    assert pymtl.describe(nn.Linear(2, 3)) == "no recurrent layer inside Linear"
    on_meta = pymtl.describe(pymtl.LSTM(2, 3, device="meta"))
    assert router.NO_DEVICE in on_meta


def test_convert_warns_of_a_model_without_recurrent_layers(recwarn):
    linear = nn.Sequential(nn.Linear(2, 3), nn.LSTMCell(2, 3))
    for inplace in (False, True):
        with pytest.warns(UserWarning, match="found no nn.LSTM, nn.GRU or nn.RNN inside Sequential"):
            pymtl.convert(linear, inplace)
    recwarn.clear()
    pymtl.convert(pymtl.LSTM(2, 3))
    pymtl.convert(nn.LSTM(2, 3), inplace=True)
    assert not recwarn


class Twice(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


class Other(nn.RNNBase):
    def __init__(self):
        super().__init__("LSTM", 2, 3)


def test_layers_that_decide_for_themselves_are_told_apart():
    lines = lines_of(pymtl.describe(pymtl.convert(nn.ModuleDict({"twice": Twice(2, 3), "other": Other()}))))
    assert lines["twice"].endswith("in what its own forward leaves to super().forward")
    assert lines["other"].endswith(UNKNOWN)


def test_describing_a_model_does_not_change_it():
    model = nn.utils.parametrizations.spectral_norm(nn.LSTM(2, 3), "weight_hh_l0").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in (model, pymtl.convert(model)):
        assert "ParametrizedLSTM(2, 3)" in pymtl.describe(module)
        assert "nn.Parametrized" not in pymtl.describe(module)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
