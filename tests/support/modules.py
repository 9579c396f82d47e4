"""Modules of ours beside PyTorch's own with the same weights, and the ways to run, compare and change them."""

import copy
import io
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from longdouble import rnn as rnn_in_long_double
from parity import assert_parity, wide
from samples import RNNSample
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

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


def lstm_pair(input_size, hidden_size, **options):
    return pair("LSTM", input_size, hidden_size, **options)


def input_of(module, batch=3, steps=6):
    """A padded batch, or one sequence if ``batch`` is None."""
    leading = [steps] if batch is None else [batch, steps] if module.batch_first else [steps, batch]
    return torch.randn(*leading, module.input_size, dtype=module.weight_ih_l0.dtype)


def states_of(module, batch=3):
    """h_0, or h_0 and c_0 of an LSTM."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    leading = [rows] if batch is None else [rows, batch]
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    states = tuple(0.5 * torch.randn(*leading, size, dtype=module.weight_ih_l0.dtype) for size in sizes)
    return states if module.mode == "LSTM" else states[0]


def states_if(given, module, batch=3):
    return states_of(module, batch) if given else None


def draw(*size, **options):
    return torch.randn(*size, **options)


def packed(*size, **options):
    return pack_padded_sequence(draw(*size, **options), [6, 2, 1])


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def tuple_of(state):
    return state if isinstance(state, tuple) else (state,)


def like(state, tensors):
    """``tensors`` as one passes and gets states: a tuple if ``state`` is one."""
    return tuple(tensors) if isinstance(state, tuple) else next(iter(tensors))


def data_of(value):
    return value.data if isinstance(value, PackedSequence) else value


def with_data(value, data):
    return PackedSequence(data, *value[1:]) if isinstance(value, PackedSequence) else data


def named(output, state):
    return {"output": data_of(output), **dict(zip(("h_n", "c_n"), tuple_of(state)))}


def run(module, *args, **options):
    """A call's results, without gradients."""
    with torch.no_grad():
        return named(*module(*args, **options))


def is_frozen(module):
    """Whether calls without gradients use a snapshot: an edit that nobody can see is not seen."""
    x = input_of(module)
    before = run(module, x)
    original = [p.data.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.data.add_(1.0)
    after = run(module, x)
    for parameter, data in zip(module.parameters(), original):
        parameter.data.copy_(data)
    return torch.equal(before["output"], after["output"])


def by_packing(lengths, module, input, hx=None):
    """What ``module(input, hx, lengths=lengths)`` stands for."""
    steps = input.shape[1 if module.batch_first else 0]
    packed = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
    output, state = module(packed, hx)
    return pad_packed_sequence(output, module.batch_first, total_length=steps)[0], state


def seeds_for(results):
    """Gradients to start from, exact in every dtype that is compared."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(r.shape, generator=generator).bfloat16() for name, r in results.items()}


@contextmanager
def autocast(enabled=True):
    """bfloat16 under autocast, for torch's modules too. On CPUs without AVX-512 oneDNN has no bfloat16 LSTM and nn.LSTM
    raises: torch's own code takes its place there."""
    without = enabled and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    onednn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=False) if without else nullcontext()
    with onednn, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


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


def stack_in_long_double(module, input, hx=None):
    """The same for a module of any layers in long double; the input time first or packed and sorted, no dropout."""
    directions = 2 if module.bidirectional else 1
    batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
    given, last = (("h0", "c0"), ("h_n", "c_n")) if module.mode == "LSTM" else (("h0",), ("h_n",))
    kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
    suffixes = [[f"_l{n}" + ("_reverse" if d else "") for d in range(directions)] for n in range(module.num_layers)]
    states = [()] * module.num_layers if hx is None else list(zip(*(s.split(directions) for s in tuple_of(hx))))
    x, samples, values = data_of(input), [], []
    for layer in range(module.num_layers):
        groups = [[getattr(module, name + suffix).detach() for suffix in suffixes[layer]] for name in kinds]
        groups += [[]] * (4 - len(groups))
        weights = ops.RNNWeights(*groups, [False, True][:directions], module.mode)
        samples.append(RNNSample(x, batch_sizes, weights, *states[layer]))
        values.append(rnn_in_long_double(samples[-1], {}))
        x = values[-1]["output"]
    results = {"output": x} | {name: np.concatenate([v[name] for v in values]) for name in last}
    seeds = {name: wide(seed.double()) for name, seed in seeds_for(results).items()}
    d_output, gradients = seeds["output"], {name: [] for name in given}
    for layer in reversed(range(module.num_layers)):
        rows = slice(layer * directions, (layer + 1) * directions)
        back = rnn_in_long_double(samples[layer], {"output": d_output} | {name: seeds[name][rows] for name in last})
        d_output = back["gradient of input"]
        for d, suffix in enumerate(suffixes[layer]):
            gradients |= {name + suffix: back[f"gradient of {name}[{d}]"] for name in kinds}
        for name in given if hx is not None else ():
            gradients[name].insert(0, back[f"gradient of {name}"])
    gradients |= {name: np.concatenate(gradients[name]) for name in given if hx is not None}
    gradients = {name: value for name, value in gradients.items() if not isinstance(value, list)}
    return results | {f"gradient of {name}": value for name, value in {**gradients, "input": d_output}.items()}


# What people do to a module's weights. Each takes a module, torch's or ours, and returns how to call it then.


def fresh_after(change, theirs, x):
    """Results of a new module of ours with the weights that torch's uses after ``change(theirs)``."""
    seen = {}
    call = change(theirs)
    theirs.register_forward_pre_hook(
        lambda module, _: seen.update({n: getattr(module, n).detach().clone() for n in module._flat_weights_names})
    )
    run(call, x)
    return run(fresh(theirs, seen), x.to(seen["weight_ih_l0"].dtype))


def edit_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    return module


def edit_through_data(module):
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    return module


def replace_data(module):
    for parameter in module.parameters():
        parameter.data = 1.5 * parameter.data
    return module


def load(module, **options):
    module.load_state_dict({name: 1.5 * tensor for name, tensor in module.state_dict().items()}, **options)
    return module


def optimizer_step(module):
    for parameter in module.parameters():
        parameter.grad = -0.5 * parameter.detach()
    torch.optim.SGD(module.parameters(), 1.0).step()
    module.zero_grad()
    return module


def new_parameter(module):
    module.weight_hh_l0 = nn.Parameter(1.5 * module.weight_hh_l0.detach())
    module.bias_ih_l0 = nn.Parameter(1.5 * module.bias_ih_l0.detach())
    return module


def plain_tensor(module):
    """Weight-drop (Merity et al. 2018): the Parameter goes, a tensor made from it takes its name."""
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("weight_hh_l0_raw", raw)
    module.weight_hh_l0 = 1.5 * raw
    return module


def weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(1.5)
    return module


def orthogonal(module):
    torch.manual_seed(5)
    return parametrizations.orthogonal(module, "weight_hh_l0")


def spectral_norm(module):
    torch.manual_seed(5)
    # In training mode every look at the weight would be another step of its power iteration.
    return parametrizations.spectral_norm(module, "weight_ih_l0").eval()


def old_weight_norm(module):
    torch.nn.utils.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(1.5)
    return module


def functional(module):
    return partial(functional_call, module, {name: 1.5 * p for name, p in module.state_dict().items()})


def functional_double(module):
    weights = {name: p.double() for name, p in module.state_dict().items()}
    return lambda input: functional_call(module, weights, input.double())


def to_double(module):
    module.double()
    return lambda input: module(input.double())


def to_double_and_back(module):
    return module.double().float()


def reset(module):
    torch.manual_seed(31337)
    module.reset_parameters()
    return module


def load_by_assigning(module):
    return load(module, assign=True)


WEIGHT_CHANGES = {
    function.__name__: function
    for function in (
        edit_in_place,
        edit_through_data,
        replace_data,
        load,
        load_by_assigning,
        optimizer_step,
        new_parameter,
        plain_tensor,
        weight_norm,
        orthogonal,
        spectral_norm,
        old_weight_norm,
        functional,
        functional_double,
        to_double,
        to_double_and_back,
        reset,
    )
}
