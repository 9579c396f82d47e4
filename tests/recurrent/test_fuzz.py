"""Configurations drawn at random, each held to the rule: PYMTL_FUZZ_CASES says how many (default: 150)."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from longdouble import needs_long_double
from longdouble import rnn as rnn_in_long_double
from modules import seeds_for
from parity import assert_parity, wide
from samples import GATES, RNNCase, random_like, rnn_sample, run_nn, run_ours, run_reference, with_gradients
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl

CASES = int(os.environ.get("PYMTL_FUZZ_CASES", "150"))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="PYMTL_FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WORK = 30_000_000  # multiply-adds of a forward pass
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN_TANH": nn.RNN,
    "RNN_RELU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
sizes = st.one_of(st.integers(1, 20), st.integers(1, 300), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65, 128, 256]))


@dataclass(frozen=True)
class Configuration:
    mode: str
    input_size: int
    hidden_size: int
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    dtype: torch.dtype
    layout: str
    lengths: tuple[int, ...]
    states: bool
    spread: bool  # every second element of a larger tensor
    frozen: bool
    threads: int
    seed: int

    def work(self):
        gates = GATES[self.mode] * self.hidden_size * (2 if self.bidirectional else 1)
        above = self.hidden_size * (2 if self.bidirectional else 1)
        inputs = self.input_size + (self.layers - 1) * above + self.layers * self.hidden_size
        return len(self.lengths) * max(self.lengths) * gates * inputs


configurations = st.builds(
    Configuration,
    mode=st.sampled_from(list(GATES)),
    input_size=sizes,
    hidden_size=sizes,
    layers=st.sampled_from([1, 1, 2, 3]),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["dense", "unbatched", "packed", "unsorted", "lengths"]),
    lengths=st.one_of(
        st.lists(st.integers(1, 12), min_size=1, max_size=20),
        st.lists(st.integers(1, 60), min_size=1, max_size=4),
        st.lists(st.just(1), min_size=1, max_size=40),
    ).map(tuple),
    states=st.booleans(),
    spread=st.booleans(),
    frozen=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10_000),
)


ENOUGH = 256
UNITS = 64


def assert_fuzzed_parity(ours, theirs, truth):
    """The rule, where there are numbers enough that torch's error says how accurate it is.

    A few often come out exact by luck, or cancel: they are allowed 64 units in the last place of 1 or of the call's
    largest number.
    """
    few = ours["output"].numel() < ENOUGH
    large = {name for name, value in ours.items() if value.numel() >= ENOUGH and not few}
    assert_parity(*({name: r[name] for name in r if name in large} for r in (ours, theirs, truth)))
    assert ours.keys() == theirs.keys() == truth.keys()
    size = max(np.abs(wide(value)).max(initial=1.0) for value in truth.values())
    for name in ours.keys() - large:
        assert ours[name].dtype == theirs[name].dtype
        true = wide(truth[name])
        assert tuple(ours[name].shape) == true.shape
        error = np.abs(wide(ours[name]) - true).max(initial=0.0)
        eps = torch.finfo(ours[name].dtype).eps
        assert error <= UNITS * eps * size, f"{name}: error {error:.3e}, largest value {size:.3e}"


def call(module, configuration, x, states, lengths):
    """Every layout's output as padded time-first rows of the valid tokens, and the states."""
    first = configuration.batch_first
    if configuration.layout == "lengths" and isinstance(module, pymtl.LSTM | pymtl.GRU | pymtl.RNN):
        output, last = module(x.transpose(0, 1) if first else x, states, lengths=lengths)
        output = output.transpose(0, 1) if first else output
        output = pack_padded_sequence(output, lengths, enforce_sorted=False).data
    elif configuration.layout in ("packed", "unsorted", "lengths"):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=configuration.layout == "packed")
        output, last = module(packed, states)
        output = output.data
    elif configuration.layout == "unbatched":
        output, last = module(x[:, 0], states)
    else:
        output, last = module(x.transpose(0, 1) if first else x, states)
        output = output.transpose(0, 1) if first else output
    last = last if isinstance(last, tuple) else (last,)
    return {"output": output, **dict(zip(("h_n", "c_n"), last))}


def results_of(module, configuration, x, states, lengths, gradients):
    """Results, and the gradients of everything."""
    given = [] if states is None else list(states) if isinstance(states, tuple) else [states]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *given)]
    if configuration.spread:
        larger = torch.full([2 * n for n in x.shape], torch.nan, dtype=x.dtype)
        view = larger[::2, ::2, ::2]
        x = view.copy_(leaves[0]) if not gradients else torch.stack([leaves[0], leaves[0]], -1)[..., 0]
    else:
        x = leaves[0]
    if states is not None:
        states = tuple(leaves[1:]) if isinstance(states, tuple) else leaves[1]
    if not gradients:
        with torch.no_grad():
            return call(module, configuration, x, states, lengths)
    results = call(module, configuration, x, states, lengths)
    wanted = leaves + list(module.parameters())
    seeds = [seed.to(x.dtype) for seed in seeds_for(results).values()]
    found = torch.autograd.grad(list(results.values()), wanted, seeds)
    names = ["input", *("h0", "c0")[: len(given)], *dict(module.named_parameters())]
    detached = {name: result.detach() for name, result in results.items()}
    return detached | {f"gradient of {name}": gradient for name, gradient in zip(names, found)}


def check(configuration):
    torch.manual_seed(configuration.seed)
    options = {name: getattr(configuration, name) for name in ("bidirectional", "bias", "batch_first", "dtype")}
    theirs = KINDS[configuration.mode](
        configuration.input_size, configuration.hidden_size, configuration.layers, **options
    )
    lengths = list(configuration.lengths)
    if configuration.layout in ("dense", "unbatched"):
        lengths = [max(lengths)] * (1 if configuration.layout == "unbatched" else len(lengths))
    elif configuration.layout == "packed":
        lengths.sort(reverse=True)
    x = torch.randn(max(lengths), len(lengths), configuration.input_size).to(configuration.dtype)
    states = None
    if configuration.states:
        leading = [configuration.layers * (2 if configuration.bidirectional else 1)]
        leading += [] if configuration.layout == "unbatched" else [len(lengths)]
        states = tuple(
            torch.randn(*leading, configuration.hidden_size).to(configuration.dtype)
            for _ in range(2 if configuration.mode == "LSTM" else 1)
        )
        states = states if configuration.mode == "LSTM" else states[0]
    wide = KINDS[configuration.mode](
        configuration.input_size,
        configuration.hidden_size,
        configuration.layers,
        **{**options, "dtype": torch.float64},
    )
    wide.load_state_dict({name: value.double() for name, value in theirs.state_dict().items()})
    wide_states = tuple(s.double() for s in states) if isinstance(states, tuple) else states
    wide_states = wide_states.double() if isinstance(wide_states, torch.Tensor) else wide_states
    ours = pymtl.convert(theirs)
    # Of a rounded relu some derivatives are another's than the truth's.
    rounded = configuration.mode == "RNN_RELU" and configuration.dtype == torch.bfloat16
    gradients = not configuration.frozen and not rounded
    if configuration.frozen:
        ours = pymtl.freeze(ours.eval())
    threads = torch.get_num_threads()
    torch.set_num_threads(configuration.threads)
    try:
        found = results_of(ours, configuration, x, states, lengths, gradients)
    finally:
        torch.set_num_threads(threads)
    expected = results_of(theirs, configuration, x, states, lengths, gradients)
    truth = results_of(wide, configuration, x.double(), wide_states, lengths, gradients)
    assert_fuzzed_parity(found, expected, truth)


@fuzz
@given(configurations)
def test_any_configuration_is_as_accurate_as_torchs(configuration):
    assume(configuration.work() < WORK)
    check(configuration)


@needs_long_double
@fuzz
@given(
    mode=st.sampled_from(list(GATES)),
    input_size=st.integers(1, 40),
    hidden_size=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    reverse=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    packed=st.booleans(),
    bias=st.booleans(),
    h0=st.booleans(),
    c0=st.booleans(),
    seed=st.integers(0, 10_000),
)
@example("GRU", 1, 1, [1], (True,), False, False, True, False, 0)
def test_any_float64_layer_is_as_accurate_as_torchs(
    mode, input_size, hidden_size, lengths, reverse, packed, bias, h0, c0, seed
):
    lengths = tuple(sorted(lengths, reverse=True))
    shape = {"lengths": lengths} if packed else {"steps": lengths[0], "batch": len(lengths)}
    case = RNNCase(
        input_size, hidden_size, reverse=reverse, bias=bias, h0=h0, c0=c0 and mode == "LSTM", mode=mode, **shape
    )
    sample = rnn_sample(case, torch.float64, seed)
    seeds = random_like(run_ours(sample))
    assert_fuzzed_parity(
        with_gradients(run_ours, sample, seeds),
        with_gradients(run_nn, sample, seeds),
        rnn_in_long_double(sample, seeds),
    )


@fuzz
@given(
    mode=st.sampled_from(list(GATES)),
    input_size=st.integers(1, 40),
    hidden_size=st.integers(1, 80),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    reverse=st.lists(st.booleans(), min_size=1, max_size=2).map(tuple),
    inputs=st.sampled_from([1, 1, 2]),
    packed=st.booleans(),
    bias=st.booleans(),
    h0=st.booleans(),
    c0=st.booleans(),
    dropout=st.booleans(),
    zoneout=st.sampled_from(["", "h", "c", "hc", "H", "C", "hC"]),
    layer_norm=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10_000),
)
def test_any_variant_is_that_of_plain_pytorch(
    mode, lengths, reverse, inputs, packed, c0, zoneout, layer_norm, threads, seed, **options
):
    lengths = tuple(sorted(lengths, reverse=True))
    shape = {"lengths": lengths} if packed else {"steps": lengths[0], "batch": len(lengths)}
    if mode != "LSTM":
        c0, zoneout = False, "".join(kind for kind in zoneout if kind in "hH")
    reverse = reverse * inputs
    case = RNNCase(
        **options, **shape, mode=mode, reverse=reverse, inputs=inputs, c0=c0, zoneout=zoneout, layer_norm=layer_norm
    )
    # To normalise is to divide by what may be small: of single samples only float64 leaves room for that.
    dtype = torch.float64 if layer_norm else torch.float32
    sample = rnn_sample(case, dtype, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seeds = random_like(run_ours(sample))
        found = with_gradients(run_ours, sample, seeds)
    finally:
        torch.set_num_threads(before)
    expected = with_gradients(run_reference, sample, seeds)
    if not layer_norm:
        assert_fuzzed_parity(found, expected, with_gradients(run_reference, sample.to(torch.float64), seeds))
        return
    for name, value in expected.items():
        largest = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7 * largest, msg=f"{case}: {name}")
