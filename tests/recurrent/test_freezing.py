"""Frozen LSTMs: what is noticed, what drops a snapshot. What every kind of module does: test_modules_weights.py."""

import copy
import pickle

import pytest
import torch
from modules import (
    WEIGHT_CHANGES,
    fresh_after,
    input_of,
    is_frozen,
    lstm_pair,
    named,
    run,
    saved_and_loaded,
    with_gradients,
)
from parity import assert_same_bits
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pymtl
from pymtl import LSTM, _native

# Nobody can see these: a frozen module goes on with the weights it was frozen with, as pymtl.freeze says.
INVISIBLE = {"edit_through_data"}
visible = {name: change for name, change in WEIGHT_CHANGES.items() if name not in INVISIBLE}


def frozen_pair(**options):
    ours, theirs = lstm_pair(5, 7, **{"bidirectional": True, **options})
    return pymtl.freeze(ours.eval()), theirs.eval()


def test_every_lstm_inside_a_module_is_frozen_and_unfrozen():
    model = nn.ModuleDict({"a": LSTM(5, 7), "b": nn.ModuleList([LSTM(5, 7), nn.Linear(2, 2), nn.LSTM(5, 7)])}).eval()
    ours = [model["a"], model["b"][0]]
    assert pymtl.freeze(model) is model
    assert all(is_frozen(module) for module in ours)
    assert pymtl.unfreeze(model) is model
    assert not any(is_frozen(module) for module in ours)


def test_freezing_inference_tensors_is_refused():
    with torch.inference_mode():
        module = LSTM(5, 7).eval()
    with pytest.raises(RuntimeError, match="inference tensors"):
        pymtl.freeze(module)


@pytest.mark.parametrize("options", [{"proj_size": 3}, {"dtype": torch.half}, {"device": "meta"}], ids=str)
def test_freezing_what_torchs_own_path_runs_changes_nothing(options):
    module = LSTM(5, 7, **options).eval()
    x = torch.randn(6, 3, 5, dtype=module.weight_ih_l0.dtype, device=module.weight_ih_l0.device)
    expected = run(module, x)
    actual = run(pymtl.freeze(module), x)
    if x.device.type == "cpu":
        assert_same_bits(actual, expected)
    assert module._snapshot is None


# Weights that changed.


@pytest.mark.parametrize("change", visible.values(), ids=visible)
def test_a_module_frozen_after_a_change_uses_the_weights_that_nn_lstm_would_use(change):
    ours, theirs = frozen_pair()
    x = input_of(ours)
    call = change(ours.eval())
    pymtl.freeze(ours)
    assert_same_bits(run(call, x), fresh_after(change, theirs, x))
    with torch.no_grad():
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.mul_(0.5)
    x = x.to(next(ours.parameters()).dtype)
    assert_same_bits(run(ours, x), fresh_after(lambda m: m, theirs, x))


@pytest.mark.parametrize("name", sorted(INVISIBLE))
def test_edits_through_data_are_seen_from_unfreezing_on(name):
    ours, theirs = frozen_pair()
    x = input_of(ours)
    before = run(ours, x)
    WEIGHT_CHANGES[name](ours)
    assert_same_bits(run(ours, x), before)
    expected = fresh_after(WEIGHT_CHANGES[name], theirs, x)
    assert_same_bits(named(*ours(x)), expected)  # with gradients
    pymtl.unfreeze(ours)
    assert_same_bits(run(ours, x), expected)


def test_edits_through_a_view_or_a_detached_tensor_are_noticed():
    for alias in (lambda p: p.detach(), lambda p: p[2:9], lambda p: p.view(-1)):
        ours, theirs = frozen_pair()
        x = input_of(ours)
        for module in (ours, theirs):
            with torch.no_grad():
                alias(module.weight_hh_l0).fill_(0.25)
        assert_same_bits(run(ours, x), fresh_after(lambda m: m, theirs, x))


def test_exchanged_parameters_are_noticed():
    """The same objects at the same versions, in other places."""
    ours, theirs = frozen_pair()
    x = input_of(ours)
    for module in (ours, theirs):
        forward, backward = module.weight_hh_l0, module.weight_hh_l0_reverse
        module.weight_hh_l0, module.weight_hh_l0_reverse = backward, forward
    assert_same_bits(run(ours, x), fresh_after(lambda m: m, theirs, x))


def test_edits_in_inference_mode_and_by_foreach_are_noticed():
    for context in (torch.inference_mode, torch.no_grad):
        ours, theirs = frozen_pair()
        x = input_of(ours)
        for module in (ours, theirs):
            with context():
                module.weight_ih_l0.mul_(2)
                torch._foreach_mul_([module.weight_hh_l0, module.bias_hh_l0], 2.0)
        assert_same_bits(run(ours, x), fresh_after(lambda m: m, theirs, x))


# What drops a snapshot.

DROPPED_BY = {
    "unfreeze": lambda module: pymtl.unfreeze(module),
    "train": lambda module: module.train(),
    "train and eval": lambda module: module.train().eval(),
    "eval": lambda module: module.eval(),
    "float": lambda module: module.float(),
    "to": lambda module: module.to("cpu"),
    "share_memory": lambda module: module.share_memory(),
    "load_state_dict": lambda module: module.load_state_dict(module.state_dict()),
}


@pytest.mark.parametrize("drop", DROPPED_BY.values(), ids=DROPPED_BY)
@pytest.mark.parametrize("through_parent", [False, True], ids=["itself", "its parent"])
def test_a_snapshot_is_dropped_by(drop, through_parent):
    ours, _ = frozen_pair()
    parent = nn.Sequential(nn.Sequential(ours))
    assert is_frozen(ours)
    drop(parent if through_parent else ours)
    assert not is_frozen(ours)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies_do_not_inherit_a_snapshot(duplicate):
    ours, _ = frozen_pair()
    x = input_of(ours)
    twin = duplicate(ours)
    assert not is_frozen(twin)
    assert is_frozen(ours)
    assert_same_bits(run(twin, x), run(ours, x))


def test_a_snapshot_does_not_make_a_pickle_larger():
    ours, _ = frozen_pair()
    size = len(pickle.dumps(ours))
    assert size == len(pickle.dumps(pymtl.unfreeze(ours)))
    assert set(ours.state_dict()) == set(nn.LSTM(5, 7, bidirectional=True).state_dict())


# Calls that do not use a snapshot.


def test_calls_with_gradients_use_the_weights_and_give_the_same_gradients():
    ours, _ = frozen_pair(num_layers=2)
    x = input_of(ours)
    with_snapshot = with_gradients(ours, x)
    assert_same_bits(with_snapshot, with_gradients(pymtl.unfreeze(ours), x))


def test_a_snapshot_of_another_instruction_set_is_not_used():
    ours, _ = frozen_pair()
    x = input_of(ours)
    frozen_with = _native.active_isa()
    try:
        for isa in _native.available_isas():
            _native.force_isa(isa)
            fresh = LSTM(5, 7, bidirectional=True)
            fresh.load_state_dict(ours.state_dict())
            assert_same_bits(run(ours, x), run(fresh, x))
    finally:
        _native.force_isa(frozen_with)
    assert is_frozen(ours)


def test_autocast_and_other_threads_do_not_disturb_a_frozen_module(threads):
    ours, _ = frozen_pair()
    x = input_of(ours)
    expected = run(ours, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(ours, x), run(copy.deepcopy(ours), x))
    threads(2)
    assert_same_bits(run(ours, x), expected)
    with torch.inference_mode():
        assert_same_bits(named(*ours(x)), expected)


def test_a_frozen_multi_task_model_gives_the_same_bits_and_notices_changes():
    model = pymtl.MultiTaskModel(
        nn.Embedding(20, 5),
        LSTM(5, 7, 2, bidirectional=True, batch_first=True),
        {"intent": pymtl.ClassificationHead(4), "slots": pymtl.TokenClassificationHead(3)},
    ).eval()
    tokens, lengths = torch.randint(20, (3, 6)), [6, 1, 4]
    with torch.no_grad():
        expected = model(tokens, lengths)
        pymtl.freeze(model)
        assert_same_bits(model(tokens, lengths), expected)
        for parameter in model.encoder.parameters():
            parameter.mul_(2)
        changed = model(tokens, lengths)
        assert_same_bits(changed, pymtl.unfreeze(model)(tokens, lengths))
    assert not torch.equal(changed["slots"], expected["slots"])


def test_vector_to_parameters_is_seen():
    ours, _ = frozen_pair()
    x = input_of(ours)
    new = torch.randn_like(nn.utils.parameters_to_vector(ours.parameters())) / 3
    nn.utils.vector_to_parameters(new, ours.parameters())
    with torch.no_grad():
        output = ours(x)[0]
        assert torch.equal(output, pymtl.unfreeze(ours)(x)[0])


def test_a_frozen_module_compiles_and_sees_edits():
    torch._dynamo.reset()
    ours, _ = frozen_pair()
    x = input_of(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], ours(x)[0])
        ours.weight_hh_l0.mul_(2)
        assert torch.equal(compiled(x)[0], ours(x)[0])


def test_dropout_between_frozen_layers_works_where_only_the_flag_says_training():
    module = pymtl.freeze(LSTM(5, 7, num_layers=2, dropout=0.5).eval())
    x = input_of(module)
    with torch.no_grad():
        expected = module(x)[0]
        module.training = True  # not by train(), which would thaw it
        torch.manual_seed(0)
        dropped = module(x)[0]
        torch.manual_seed(0)
        assert torch.equal(module(x)[0], dropped)
    assert not torch.equal(dropped, expected)


def test_a_float32_pack_is_left_aside_under_autocast():
    module = LSTM(5, 7).eval()
    weights, x = module.layer_weights(0), input_of(module)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        prepacked = pymtl.ops.rnn_prepack(weights)
        assert torch.equal(pymtl.ops.rnn(x, None, weights, prepacked=prepacked)[0], pymtl.ops.rnn(x, None, weights)[0])


def test_a_model_without_our_layers_is_told_so():
    with pytest.warns(UserWarning, match="freeze found no pymtl.LSTM, GRU or RNN inside Sequential"):
        pymtl.freeze(torch.nn.Sequential(torch.nn.LSTM(3, 4)).eval())


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def frozen_layer_and_call():
    """A frozen layer and a call of it that may go past the dispatcher, which would tell those who watch."""
    ours, _ = frozen_pair(batch_first=False)
    x = torch.randn(3, 2, 5)
    return ours, x, run(ours, x)


@pytest.mark.parametrize("mode", [_Watch, _WatchFunctions])
def test_modes_see_the_op_of_a_frozen_call(mode):
    ours, x, expected = frozen_layer_and_call()
    with mode() as watch:
        watched = run(ours, x)
    assert "pymtl.rnn_frozen.default" in watch.seen
    assert_same_bits(watched, expected)


def test_profilers_see_the_op_of_a_frozen_call():
    ours, x, expected = frozen_layer_and_call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = run(ours, x)
    assert "pymtl::rnn_frozen" in {event.key for event in profile.key_averages()}
    assert_same_bits(profiled, expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traces_of_a_frozen_call_hold_its_op(pre_dispatch):
    ours, x, _ = frozen_layer_and_call()
    other = torch.randn(3, 2, 5)
    with torch.no_grad():
        traced = make_fx(lambda x: ours(x)[0], pre_dispatch=pre_dispatch)(x)
        assert "pymtl.rnn_frozen.default" in {str(node.target) for node in traced.graph.nodes}
        assert torch.equal(traced(other), ours(other)[0])


@pytest.mark.parametrize("place", ["input", "h0", "c0"])
def test_a_frozen_call_reads_views_that_negate(place):
    ours, x, _ = frozen_layer_and_call()
    given = {"input": x, "h0": torch.randn(2, 2, 7), "c0": torch.randn(2, 2, 7)}
    negated = {**given, place: torch.complex(given[place], given[place]).conj().imag}
    expected = {**given, place: -given[place]}
    results = []
    with torch.no_grad():
        for call in (negated, expected):
            output, (h, c) = ours(call["input"], (call["h0"], call["c0"]))
            results.append({"output": output, "h_n": h, "c_n": c})
    assert_same_bits(*results)


class _Wrapped(torch.Tensor):
    """Has its numbers in another tensor, as DTensor has."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = [arg.inner if isinstance(arg, _Wrapped) else arg for arg in args]
        return func(*unwrapped, **(kwargs or {}))


def test_a_frozen_call_takes_states_of_a_subclass():
    ours, x, _ = frozen_layer_and_call()
    h, c = torch.randn(2, 2, 7), torch.randn(2, 2, 7)
    with torch.no_grad():
        output, _ = ours(x, (_Wrapped(h), _Wrapped(c)))
        assert torch.equal(output, ours(x, (h, c))[0])
