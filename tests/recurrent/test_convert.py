import copy
import pickle
import threading
import warnings

import pytest
import torch
from modules import compare, input_of, run, saved_and_loaded, with_gradients
from parity import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pymtl
from pymtl import LSTM


class Tagger(nn.Module):
    """An encoder in the middle of other modules, with a buffer and a nested LSTM."""

    def __init__(self, encoder=nn.LSTM):
        super().__init__()
        self.embedding = nn.Embedding(20, 5)
        self.encoder = encoder(5, 7, bidirectional=True, batch_first=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Dropout(0.2)), nn.ModuleDict({"top": encoder(14, 3)})])
        self.gru = nn.GRU(3, 3)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, tokens):
        states, _ = self.encoder(self.embedding(tokens))
        return self.blocks[1]["top"](self.blocks[0](states) * self.scale)


class Named(nn.LSTM):
    """A subclass that adds, and overrides nothing of the call."""

    def __init__(self, *args, label="a", **kwargs):
        super().__init__(*args, **kwargs)
        self.label = label

    def last(self, x):
        return self(x)[1][0]


class Doubled(nn.LSTM):
    """A subclass whose forward does something else."""

    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class Grandchild(Doubled):
    pass


both_ways = pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])


def lstms(module):
    return [type(child) for child in module.modules() if isinstance(child, nn.LSTM | LSTM)]


def tensors(module):
    return {name: id(t) for name, t in (*module.named_parameters(), *module.named_buffers())}


@both_ways
def test_every_lstm_inside_is_converted_and_reverted(inplace):
    model = Tagger().eval()
    tokens = torch.randint(20, (3, 6))
    expected = model(tokens)
    fast = pymtl.convert(model, inplace)
    assert (fast is model) == inplace
    assert lstms(fast) == [LSTM, LSTM]
    assert lstms(model) == ([LSTM, LSTM] if inplace else [nn.LSTM, nn.LSTM])
    twin = Tagger(LSTM).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(fast(tokens)[0], twin(tokens)[0])
    back = pymtl.revert(fast, inplace)
    assert (back is fast) == inplace
    assert lstms(back) == [nn.LSTM, nn.LSTM]
    assert lstms(fast) == ([nn.LSTM, nn.LSTM] if inplace else [LSTM, LSTM])
    assert torch.equal(back(tokens)[0], expected[0])


@both_ways
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3, "bidirectional": True, "dropout": 0.3}, {"batch_first": True, "bias": False}],
    ids=str,
)
def test_a_model_that_is_an_lstm_itself_is_converted_with_equal_results_and_gradients(options, inplace):
    theirs = nn.LSTM(5, 7, **options)
    reference = copy.deepcopy(theirs)
    ours = pymtl.convert(theirs, inplace)
    assert type(ours) is LSTM
    assert (ours is theirs) == inplace
    assert repr(ours) == repr(reference)
    compare(ours, reference, input_of(ours))
    back = pymtl.revert(ours, inplace)
    assert type(back) is nn.LSTM
    x = input_of(back)
    assert_same_bits(with_gradients(back, x), with_gradients(reference, x))


@both_ways
@pytest.mark.parametrize("change", [pymtl.convert, pymtl.revert], ids=["convert", "revert"])
def test_parameters_and_buffers_stay_the_same_objects(change, inplace):
    model = Tagger(nn.LSTM if change is pymtl.convert else LSTM)
    before = tensors(model)
    changed = change(model, inplace)
    assert tensors(changed) == before == tensors(model)
    assert all(w is p for w, p in zip(changed.encoder._flat_weights, changed.encoder.parameters(), strict=True))


@both_ways
def test_an_optimizer_made_before_goes_on_working(inplace):
    model = nn.LSTM(5, 7)
    x = input_of(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(x)[0].sum().backward()
    optimizer.step()
    fast = pymtl.convert(model, inplace)
    before = run(fast, x)
    optimizer.zero_grad()
    fast(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(run(fast, x)["output"], before["output"])
    back = pymtl.revert(fast, inplace)
    fresh = nn.LSTM(5, 7)
    fresh.load_state_dict(fast.state_dict())
    assert_same_bits(run(back, x), run(fresh, x))


@both_ways
def test_shared_modules_stay_shared(inplace):
    shared = nn.LSTM(5, 5)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.LSTM(5, 5)})
    model["c"].weight_hh_l0 = shared.weight_hh_l0
    fast = pymtl.convert(model, inplace)
    assert fast["a"] is fast["b"][0]
    assert lstms(fast) == [LSTM, LSTM]
    assert fast["c"].weight_hh_l0 is fast["a"].weight_hh_l0 is shared.weight_hh_l0


@both_ways
def test_hooks_and_training_flags_stay(inplace):
    model = Tagger()
    model.encoder.eval()
    calls = []
    model.encoder.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.encoder.register_forward_hook(lambda *_: calls.append("forward"))
    model.blocks[1]["top"].register_full_backward_hook(lambda *_: calls.append("backward"))
    fast = pymtl.convert(model, inplace)
    assert [m.training for m in fast.modules()] == [m.training for m in model.modules()]
    assert not fast.encoder.training
    assert fast.blocks[1]["top"].training
    fast(torch.randint(20, (3, 6)))[0].sum().backward()
    assert calls == ["pre", "forward", "backward"]
    pymtl.revert(fast, inplace)(torch.randint(20, (3, 6)))[0].sum().backward()
    assert calls == 2 * ["pre", "forward", "backward"]


def test_frozen_parameters_and_gradients_stay():
    model = nn.LSTM(5, 7)
    model.weight_hh_l0.requires_grad_(False)
    model(input_of(model))[0].sum().backward()
    gradient = model.weight_ih_l0.grad
    fast = pymtl.convert(model)
    assert fast.weight_ih_l0.grad is gradient
    assert not fast.weight_hh_l0.requires_grad
    fast(input_of(fast))[0].sum().backward()
    assert fast.weight_hh_l0.grad is None


@both_ways
def test_converting_or_reverting_twice_changes_nothing(inplace):
    fast = pymtl.convert(pymtl.convert(Tagger(), inplace), inplace)
    assert lstms(fast) == [LSTM, LSTM]
    back = pymtl.revert(pymtl.revert(fast, inplace), inplace)
    assert lstms(back) == [nn.LSTM, nn.LSTM]


def test_a_model_without_an_lstm_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pymtl.convert(model, inplace=True) is model
        assert tensors(pymtl.revert(pymtl.convert(model))) == tensors(model)


def test_the_original_stays_untouched_when_not_in_place():
    model = Tagger().eval()
    tokens = torch.randint(20, (3, 6))
    expected, state = model(tokens)[0], {k: v.clone() for k, v in model.state_dict().items()}
    fast = pymtl.convert(model)
    fast.train()
    fast.encoder.register_forward_hook(lambda *_: pytest.fail("a hook of the copy ran"))
    fast.extra = nn.Linear(1, 1)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(tokens)[0], expected)
    assert_same_bits(model.state_dict(), state)


# Subclasses.


@both_ways
@pytest.mark.parametrize("kind", [Doubled, Grandchild])
def test_a_subclass_with_a_forward_of_its_own_reaches_the_kernels_through_it(kind, inplace):
    model = nn.ModuleDict({"mine": kind(5, 7), "plain": nn.LSTM(5, 7)})
    x = torch.randn(6, 3, 5)
    before = run(model["mine"], x)
    plain = LSTM(5, 7)
    plain.load_state_dict(model["mine"].state_dict())
    fast = pymtl.convert(model, inplace)
    assert isinstance(fast["mine"], kind)
    assert isinstance(fast["mine"], LSTM)
    assert type(fast["mine"]).forward is kind.forward
    results = run(fast["mine"], x)
    assert_same_bits(results, run(plain, 2 * x))
    torch.testing.assert_close(results, before)
    copied = pickle.loads(pickle.dumps(fast["mine"]))
    assert_same_bits(run(copied, x), results)
    assert_same_bits(run(pymtl.freeze(copied.eval()), x), results)
    back = pymtl.revert(fast, inplace)
    assert type(back["mine"]) is kind
    assert_same_bits(run(back["mine"], x), before)


class Strict(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise ValueError("strict")


@both_ways
def test_a_subclass_that_overrides_a_check_is_left_alone_and_named(inplace):
    model = nn.ModuleDict({"mine": Strict(5, 7), "plain": nn.LSTM(5, 7)})
    with pytest.warns(UserWarning, match=r"mine \(Strict\)"):
        fast = pymtl.convert(model, inplace)
    assert lstms(fast) == [Strict, LSTM]
    with pytest.raises(ValueError, match="strict"):
        fast["mine"](torch.randn(6, 3, 5))
    with pytest.warns(UserWarning, match="itself"):
        assert type(pymtl.convert(Strict(5, 7))) is Strict


@both_ways
def test_a_subclass_that_only_adds_is_converted_with_what_it_adds(inplace):
    model = Named(5, 7, bidirectional=True, label="b")
    reference = copy.deepcopy(model)
    x = input_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = pymtl.convert(model, inplace)
    assert isinstance(fast, LSTM)
    assert isinstance(fast, Named)
    assert type(fast).__name__ == "Named"
    assert fast.label == "b"
    twin = LSTM(5, 7, bidirectional=True)
    twin.load_state_dict(reference.state_dict())
    assert_same_bits(run(fast, x), run(twin, x))
    assert_same_bits(run(fast, x, lengths=[1, 6, 3]), run(twin, x, lengths=[1, 6, 3]))
    assert torch.equal(fast.last(x), twin(x)[1][0])
    assert type(pymtl.convert(fast, inplace)) is type(fast)
    back = pymtl.revert(fast, inplace)
    assert type(back) is Named
    assert_same_bits(run(back, x), run(reference, x))


def test_what_a_subclass_overrides_besides_forward_goes_on_working():
    class Strict(nn.LSTM):
        def check_forward_args(self, input, hidden, batch_sizes):
            raise ValueError("strict")

        def train(self, mode=True):
            self.trained = mode
            return super().train(mode)

        def flatten_parameters(self):
            return "flat"

        def extra_repr(self):
            return "strict"

    fast = pymtl.convert(Strict(5, 7))
    assert fast.eval().trained is False
    assert fast.flatten_parameters() == "flat"
    assert repr(fast) == "Strict(strict)"
    with pytest.raises(ValueError, match="strict"):
        fast.check_forward_args(None, None, None)


@pytest.mark.parametrize("kind", [nn.LSTM, Named])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_a_converted_module_can_be_copied_and_pickled(duplicate, kind):
    fast = pymtl.convert(kind(5, 7, num_layers=2))
    twin = duplicate(fast)
    assert type(twin) is type(fast)
    assert vars(twin).get("label") == vars(fast).get("label")
    x = input_of(fast)
    assert_same_bits(with_gradients(twin, x), with_gradients(fast, x))
    assert type(pymtl.revert(twin)) is kind


def test_a_subclass_of_ours_written_by_hand_is_not_reverted_but_named():
    class Mine(LSTM):
        pass

    model = nn.ModuleDict({"mine": Mine(5, 7), "plain": LSTM(5, 7)})
    with pytest.warns(UserWarning, match=r"mine \(Mine\)"):
        back = pymtl.revert(model)
    assert lstms(back) == [Mine, nn.LSTM]
    assert type(pymtl.convert(model)["mine"]) is Mine


# Parametrizations.


def normed(module):
    return parametrizations.weight_norm(parametrizations.orthogonal(module, "weight_hh_l0"), "weight_ih_l0")


@both_ways
@pytest.mark.parametrize("kind", [nn.LSTM, Named])
def test_a_parametrised_lstm_is_converted_and_the_parametrizations_can_go(kind, inplace):
    model = normed(kind(5, 7))
    reference = copy.deepcopy(model)
    x = input_of(reference)
    before = tensors(model)
    fast = pymtl.convert(model, inplace)
    assert isinstance(fast, LSTM)
    assert tensors(fast) == before
    assert parametrize.is_parametrized(fast, "weight_hh_l0")
    compare(fast, reference, x)
    with torch.no_grad():
        for module in (fast, reference):
            module.parametrizations.weight_ih_l0.original0.mul_(3.0)
    compare(fast, reference, x)
    for module in (fast, reference):
        for name in ("weight_hh_l0", "weight_ih_l0"):
            parametrize.remove_parametrizations(module, name)
    assert isinstance(fast, LSTM)
    assert not parametrize.is_parametrized(fast)
    compare(fast, reference, x)
    back = pymtl.revert(fast, inplace)
    assert type(back) is kind
    assert_same_bits(run(back, x), run(reference, x))


@both_ways
def test_a_parametrised_lstm_that_has_been_trained_is_converted_and_reverted(inplace):
    model = normed(nn.LSTM(5, 7))
    x = torch.randn(6, 3, 5)
    before = with_gradients(model, x)
    fast = pymtl.convert(model, inplace)
    with_gradients(fast, x)
    assert_same_bits(with_gradients(pymtl.revert(fast, inplace), x), before)


@both_ways
def test_a_parametrised_lstm_is_reverted(inplace):
    model = normed(nn.LSTM(5, 7))
    original = type(model)
    reference = copy.deepcopy(model)
    back = pymtl.revert(pymtl.convert(model, inplace), inplace)
    assert type(back) is original
    x = torch.randn(6, 3, 5)
    assert_same_bits(run(back, x), run(reference, x))
    parametrize.remove_parametrizations(back, "weight_hh_l0")
    parametrize.remove_parametrizations(back, "weight_ih_l0")
    assert type(back) is nn.LSTM


@both_ways
def test_a_lstm_parametrised_after_its_conversion_is_reverted(inplace):
    model = normed(pymtl.convert(nn.LSTM(5, 7)))
    x = torch.randn(6, 3, 5)
    fresh = LSTM(5, 7)
    fresh.load_state_dict({name: getattr(model, name).detach() for name in fresh.state_dict()})
    assert_same_bits(run(model, x), run(fresh, x))
    back = pymtl.revert(model, inplace)
    assert isinstance(back, nn.LSTM)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        parametrize.remove_parametrizations(back, name)
    assert type(back) is nn.LSTM


def test_a_weight_dropped_lstm_is_converted():
    model = nn.LSTM(5, 7)
    raw = model.weight_hh_l0
    del model._parameters["weight_hh_l0"]
    model.register_parameter("weight_hh_l0_raw", raw)
    model.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    reference = nn.LSTM(5, 7)
    reference.load_state_dict({name: getattr(model, name).detach() for name in reference.state_dict()})
    fast = pymtl.convert(model)
    twin = pymtl.convert(reference)
    x = torch.randn(6, 3, 5)
    assert_same_bits(run(fast, x), run(twin, x))
    assert_same_bits(run(pymtl.revert(fast), x), run(reference, x))


@both_ways
def test_reverting_a_frozen_module_drops_its_snapshot(inplace):
    model = pymtl.freeze(pymtl.convert(nn.LSTM(5, 7)).eval())
    back = pymtl.revert(model, inplace)
    assert "_snapshot" not in vars(back) or vars(back)["_snapshot"] is None
    again = pymtl.convert(back)
    back.weight_hh_l0.data.zero_()
    fresh = LSTM(5, 7)
    fresh.load_state_dict(back.state_dict())
    x = torch.randn(6, 3, 5)
    assert_same_bits(run(again, x), run(fresh, x))


@both_ways
def test_torchs_own_path_is_exactly_nn_lstm_after_conversion(inplace):
    for options in ({"proj_size": 3}, {"dtype": torch.half}):
        model = nn.LSTM(5, 7, **options)
        reference = copy.deepcopy(model)
        x = input_of(model)
        assert_same_bits(with_gradients(pymtl.convert(model, inplace), x), with_gradients(reference, x))


@both_ways
def test_reverting_leaves_alone_what_modules_of_ours_need(inplace):
    tasks = ["a"]
    encoder = pymtl.sharing.SharedPrivate(tasks, 6, 8)
    words = pymtl.TokenFeatures({"words": nn.Embedding(9, 4), "characters": pymtl.CharacterLSTM(5, 3, 1)})
    model = nn.ModuleDict(
        {
            "tagger": pymtl.MultiTaskModel(words, encoder, {"a": pymtl.TokenClassificationHead(3)}),
            "plain": pymtl.LSTM(2, 3),
        }
    )
    inputs = {"words": torch.randint(9, (2, 4)), "characters": torch.randint(1, 5, (2, 4, 3))}
    expected = model["tagger"](inputs, [4, 2])
    with pytest.warns(UserWarning, match=r"left alone .*tagger\.embedding.*tagger\.encoder"):
        back = pymtl.revert(model, inplace)
    assert type(back["plain"]) is nn.LSTM
    assert_same_bits(back["tagger"](inputs, [4, 2]), expected)


@pytest.mark.parametrize("function", [pymtl.convert, pymtl.revert, pymtl.describe])
def test_what_is_no_module_is_refused(function):
    for given, got in ((nn.Linear, "the class Linear"), ([nn.LSTM(2, 3)], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"module: expected an nn.Module, got {got}"):
            function(given)


@pytest.mark.parametrize("change", [pymtl.convert, pymtl.revert])
def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out(change):
    model = Tagger()
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"Tagger cannot be copied \(TypeError: cannot pickle .*lock.*inplace=True"):
        change(model)
    assert type(model.encoder) is nn.LSTM
    assert type(pymtl.convert(model, inplace=True).encoder) is LSTM
    assert type(pymtl.revert(model, inplace=True).encoder) is nn.LSTM


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_pickle_of_what_revert_gives_does_not_need_pymtl(kind):
    made = getattr(pymtl, kind)(3, 4)
    set_once = pymtl.set_variants(pymtl.convert(getattr(nn, kind)(3, 4)), zoneout=0.1)
    pymtl.set_variants(set_once, zoneout=0.0)
    for module in (made, set_once):
        assert b"pymtl" not in pickle.dumps(pymtl.revert(module))


def test_a_frozen_parametrised_module_can_be_copied_and_the_copy_is_not_frozen():
    module = parametrizations.weight_norm(LSTM(3, 4), "weight_hh_l0").eval()
    pymtl.freeze(module)
    for change in (copy.deepcopy, pymtl.convert):
        assert change(module)._snapshot is None
    assert type(pymtl.revert(module)).__bases__ == (nn.LSTM,)
    assert module._snapshot is not None
