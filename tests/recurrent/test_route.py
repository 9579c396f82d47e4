"""Who runs a call, and why: every reason has a case here and a line in docs/switching.md."""

import importlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import pymtl
from pymtl.recurrent import route as router
from pymtl.recurrent.options import Options


class Subclass(nn.LSTM):
    """Importable, as a pickle needs it."""


DOCS = Path(__file__).parents[2] / "docs" / "switching.md"
X = torch.zeros(2, 1, 3)


def lstm(**options):
    return pymtl.LSTM(3, 4, **options)


ON_CPU = {
    "kernels": (lstm(), X, "kernels", router.ON_CPU),
    "bfloat16": (lstm().bfloat16(), X.bfloat16(), "kernels", router.ON_CPU),
    "proj_size": (lstm(proj_size=2), X, "torch", router.NO_PROJECTION),
    "float16": (lstm().half(), X.half(), "torch", router.NO_DTYPE),
    "float16 with options": (lstm(zoneout=0.1).half(), X.half(), "reference", router.NO_DTYPE),
    "options that do nothing in evaluation": (lstm(weight_drop=0.1).half().eval(), X.half(), "torch", router.NO_DTYPE),
    "another device": (lstm(device="meta"), X.to("meta"), "torch", router.NO_DEVICE),
}


@pytest.mark.parametrize(("module", "x", "runner", "reason"), ON_CPU.values(), ids=ON_CPU)
def test_a_call_says_who_runs_it_and_why(module, x, runner, reason):
    assert module.route(x) == (runner, reason)
    assert module.kernels_take(x) == (runner == "kernels")


def test_autocast_to_float16_leaves_a_call_to_torch():
    with torch.autocast("cpu", torch.float16):
        assert lstm().route(X) == ("torch", router.NO_AUTOCAST)
    with torch.autocast("cpu", torch.bfloat16):
        assert lstm().route(X) == ("kernels", router.ON_CPU)


class There(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, is_cpu = True, False


ON_A_GPU = {
    "held": ("LSTM", True, {}, ("kernels", router.PERSISTENT)),
    "too large": ("LSTM", False, {}, ("torch", router.NOT_FASTER)),
    "a GRU": ("GRU", True, {}, ("torch", router.NOT_FASTER)),
    "options": ("GRU", False, {"varied": True}, ("kernels", router.PER_STEP_OPTIONS)),
    "held, from the end": ("LSTM", True, {"reverse": True}, ("kernels", router.PERSISTENT)),
    "too large, from the end": ("LSTM", False, {"reverse": True}, ("kernels", router.PER_STEP_OPTIONS)),
    "lengths": ("GRU", False, {"lengths": There()}, ("kernels", router.PER_STEP_LENGTHS)),
    "lengths of an LSTM": ("LSTM", True, {"lengths": There()}, ("kernels", router.PERSISTENT)),
}


@pytest.mark.parametrize(("mode", "fits", "given", "expected"), ON_A_GPU.values(), ids=ON_A_GPU)
def test_a_gpu_runs_what_its_kernels_are_for(mode, fits, given, expected, monkeypatch):
    monkeypatch.setattr(router, "has_cuda", lambda tensor: True)
    monkeypatch.setattr(router, "has_kernels_of_gpu", lambda tensor, dtype: True)
    monkeypatch.setattr(router, "lstm_fits_gpu", lambda tensor, dtype, size: fits)
    monkeypatch.setattr(router, "autocast_dtype", lambda tensor: None)
    assert router.route(There(), [There()], mode, 4, **given) == expected


def test_without_kernels_for_a_device_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(router, "has_cuda", lambda tensor: False)
    assert router.route(There(), [There()], "LSTM", 4) == ("torch", router.NO_DEVICE)
    assert lstm(device="meta").route(X) == ("torch", router.NO_DEVICE)


class OnRoute(nn.LSTM):
    """A subclass with names of its own that ours have too."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.route = "north"

    def _route(self, x):
        return x


def test_a_subclass_may_have_a_route_of_its_own():
    module = OnRoute(3, 4)
    expected = module(X)[0]
    fast = pymtl.convert(module)
    torch.testing.assert_close(fast(X)[0], expected)
    assert fast.kernels_take(X)
    assert fast.route == "north"


def test_every_reason_stands_in_the_docs():
    text = " ".join(DOCS.read_text().split())
    assert [reason for reason in router.REASONS if reason not in text] == []


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_pickles_from_before_the_modules_moved_load(kind):
    module = getattr(pymtl, kind)(3, 4, zoneout=0.25).eval()
    old = pickle.dumps(module, protocol=2)
    for now, before in (
        (f"pymtl.recurrent.{kind.lower()}", f"pymtl.{kind.lower()}"),
        ("pymtl.recurrent.options\nOptions", "pymtl.variants\nVariants"),
    ):
        assert now.encode() in old
        old = old.replace(now.encode(), before.encode())
    loaded = pickle.loads(old)
    assert type(loaded) is getattr(pymtl, kind)
    assert loaded._pymtl_variants == Options(zoneout_h=0.25, zoneout_c=0.25 if kind == "LSTM" else 0.0)
    assert torch.equal(loaded(X)[0], module(X)[0])


def test_pickles_of_converted_subclasses_from_before_the_move_load():
    module = pymtl.convert(Subclass(3, 4))
    now = pickle.dumps(module, protocol=2)
    assert b"pymtl.recurrent.convert" in now
    old = now.replace(b"pymtl.recurrent.convert", b"pymtl.convert")
    assert torch.equal(pickle.loads(old)(X)[0], module(X)[0])


@pytest.mark.parametrize("name", ["lstm.LSTM", "gru.GRU", "rnn.RNN", "variants.Variants", "freezing.freeze"])
def test_modules_are_found_where_they_stood_before(name):
    module, member = name.split(".")
    assert callable(getattr(importlib.import_module(f"pymtl.{module}"), member))
    assert callable(getattr(getattr(pymtl, module), member))
