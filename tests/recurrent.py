"""Recurrent modules of every kind, ours beside PyTorch's own with the same weights, and the ways to run them."""

import copy

import numpy as np
import torch
from longdouble import rnn as rnn_in_long_double
from modules import data_of, seeds_for, with_data
from modules import states_of as states_of_lstm
from parity import assert_parity, wide
from samples import RNNSample
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from pymtl import GRU, LSTM, RNN, ops

# Our class, PyTorch's, and the options that make the kind.
WITHOUT_CELLS = {
    "GRU": (GRU, nn.GRU, {}),
    "RNN tanh": (RNN, nn.RNN, {}),
    "RNN relu": (RNN, nn.RNN, {"nonlinearity": "relu"}),
}
KINDS = {"LSTM": (LSTM, nn.LSTM, {}), **WITHOUT_CELLS}


def ours_of(kind, input_size, hidden_size, **options):
    ours, _, extra = KINDS[kind]
    return ours(input_size, hidden_size, **extra, **options)


def theirs_of(kind, input_size, hidden_size, **options):
    _, theirs, extra = KINDS[kind]
    return theirs(input_size, hidden_size, **extra, **options)


def pair(kind, input_size, hidden_size, **options):
    """Ours and PyTorch's, of the same weights."""
    theirs = theirs_of(kind, input_size, hidden_size, **options)
    ours = ours_of(kind, input_size, hidden_size, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def fresh(module, weights=None):
    """A new module of ours like this one, with its weights or those given."""
    options = {name: getattr(module, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")}
    kind = {"RNN_TANH": "RNN tanh", "RNN_RELU": "RNN relu"}.get(module.mode, module.mode)
    weights = {n: getattr(module, n).detach() for n in module._flat_weights_names} if weights is None else weights
    ours = ours_of(kind, module.input_size, module.hidden_size, dtype=weights["weight_ih_l0"].dtype, **options)
    ours.load_state_dict(weights)
    return ours


def states_of(module, batch=3):
    """h_0, or h_0 and c_0 of an LSTM."""
    states = states_of_lstm(module, batch)
    return states if module.mode == "LSTM" else states[0]


def tuple_of(state):
    return state if isinstance(state, tuple) else (state,)


def like(state, tensors):
    """``tensors`` as one passes and gets states: a tuple if ``state`` is one."""
    return tuple(tensors) if isinstance(state, tuple) else next(iter(tensors))


def named(output, state):
    return {"output": data_of(output), **dict(zip(("h_n", "c_n"), tuple_of(state)))}


def run(module, *args, **options):
    """A call's results, without gradients."""
    with torch.no_grad():
        return named(*module(*args, **options))


def with_gradients(module, input, hx=None, *, call=None, dtype=None, only=None):
    """Results and gradients of the input, the states and every parameter (or ``only`` of some), in one mapping."""
    dtype = dtype or data_of(input).dtype
    leaves = {"input": data_of(input)} | ({} if hx is None else dict(zip(("h0", "c0"), tuple_of(hx))))
    wanted = {name: only is None or name in only for name in leaves}
    leaves = {n: leaf.detach().to(dtype, copy=True).requires_grad_(wanted[n]) for n, leaf in leaves.items()}
    torch.manual_seed(1)
    call = call or (lambda module, *args: module(*args))
    states = None if hx is None else like(hx, [leaves[name] for name in ("h0", "c0") if name in leaves])
    results = named(*call(module, with_data(input, leaves["input"]), states))
    leaves |= dict(module.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if only is None or name in only}
    seeds = [seed.to(results[name].dtype) for name, seed in seeds_for(results).items()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), seeds)
    detached = {name: result.detach() for name, result in results.items()}
    return detached | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}


def in_double(module):
    """A copy in float64."""
    with torch.no_grad():
        module._init_flat_weights()  # holds what parametrizations computed, which deepcopy refuses if it has a graph
    return copy.deepcopy(module).double()


def compare(ours, theirs, input, hx=None, *, call=None, reference=None):
    """Holds the results and all gradients of two float32 modules to the rule."""
    truth = with_gradients(in_double(theirs), input, hx, call=reference, dtype=torch.float64)
    assert_parity(with_gradients(ours, input, hx, call=call), with_gradients(theirs, input, hx, call=reference), truth)


def stack_in_long_double(module, input, h0=None):
    """The same for a float64 GRU or RNN of any layers in long double; the input time first or packed and sorted."""
    directions = 2 if module.bidirectional else 1
    batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
    x, samples, values = data_of(input), [], []
    kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
    suffixes = [[f"_l{n}" + ("_reverse" if d else "") for d in range(directions)] for n in range(module.num_layers)]
    for layer in range(module.num_layers):
        groups = [[getattr(module, name + suffix).detach() for suffix in suffixes[layer]] for name in kinds]
        groups += [[]] * (4 - len(groups))
        weights = ops.RNNWeights(*groups, [False, True][:directions], module.mode)
        state = None if h0 is None else h0[layer * directions : (layer + 1) * directions]
        samples.append(RNNSample(x, batch_sizes, weights, state, None))
        values.append(rnn_in_long_double(samples[-1], {}))
        x = values[-1]["output"]
    results = {"output": x, "h_n": np.concatenate([v["h_n"] for v in values])}
    seeds = {name: wide(seed.double()) for name, seed in seeds_for(results).items()}
    d_output, d_h0, gradients = seeds["output"], [], {}
    for layer in reversed(range(module.num_layers)):
        rows = slice(layer * directions, (layer + 1) * directions)
        back = rnn_in_long_double(samples[layer], {"output": d_output, "h_n": seeds["h_n"][rows]})
        d_output = back["gradient of input"]
        for d, suffix in enumerate(suffixes[layer]):
            gradients |= {f"gradient of {name}{suffix}": back[f"gradient of {name}[{d}]"] for name in kinds}
        if h0 is not None:
            d_h0.insert(0, back["gradient of h0"])
    gradients["gradient of input"] = d_output
    return results | gradients | ({} if h0 is None else {"gradient of h0": np.concatenate(d_h0)})
