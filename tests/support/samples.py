"""Sample inputs of the ops, and the ways to run them: ours, PyTorch's modules and the plain reference."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from pymtl import ops, reference

DTYPES = [torch.float32, torch.float64]
F, B = False, True  # directions: forward, backward
BOTH = (F, B)
RESULTS = ("output", "h_n", "c_n")  # of an LSTM
NO_MASKS = ops.RNNMasks()


def floats_of(isa):
    """The instruction set whose kernels for float32 and float64 this one has."""
    return "avx512" if isa == "amx" else isa.split("_")[0]


def spread(tensor):
    """The same values, non-contiguous: every second element of a larger tensor, in all dimensions."""
    filler = torch.nan if tensor.is_floating_point() else -1
    larger = torch.full([2 * n for n in tensor.shape], filler, dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def transposed(tensor):
    """The same values with the strides of the first two dimensions exchanged."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else spread(tensor)


def shifted(tensor):
    """The same values, contiguous, at an address that is aligned to one element only."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@dataclass(frozen=True)
class RNNCase:
    """Sizes and options of a call; ``lengths`` given, longest first, means packed."""

    input_size: int
    hidden_size: int
    steps: int = 5
    batch: int = 3
    lengths: tuple[int, ...] | None = None
    reverse: tuple[bool, ...] = BOTH
    inputs: int = 1
    bias: bool = True
    h0: bool = False
    c0: bool = False
    scale: float = 1.0
    mode: str = "LSTM"
    dropout: bool = False
    zoneout: str = ""  # of "h", "c": masks of tokens; of "H", "C": expected values of units
    layer_norm: bool = False

    def __str__(self):
        shape = f"T{self.steps}-B{self.batch}"
        if self.lengths is not None:
            shape = "lengths-" + "-".join(map(str, self.lengths[:6])) + ("-etc" if len(self.lengths) > 6 else "")
        directions = "".join("b" if backwards else "f" for backwards in self.reverse)
        options = [name for name in ("h0", "c0") if getattr(self, name)]
        options += [] if self.bias else ["nobias"]
        options += [] if self.inputs == 1 else [f"P{self.inputs}"]
        options += [] if self.scale == 1.0 else [f"scale{self.scale:g}"]
        options += [] if self.mode == "LSTM" else [self.mode]
        options += ["dropout"] if self.dropout else []
        options += [f"zoneout-{self.zoneout}"] if self.zoneout else []
        options += ["norm"] if self.layer_norm else []
        return "-".join([f"I{self.input_size}-H{self.hidden_size}-{directions}-{shape}", *options])


SMALL = [
    RNNCase(1, 1, steps=1, batch=1, reverse=(F,)),
    RNNCase(3, 5, reverse=(F,)),
    RNNCase(3, 5, reverse=(B,)),
    RNNCase(4, 3, steps=7, batch=2),
    RNNCase(2, 9, steps=1, batch=4, h0=True, c0=True),
    RNNCase(5, 4, lengths=(6, 3, 3, 1), bias=False),
    RNNCase(3, 17, lengths=(4, 2, 1), h0=True, c0=True),
    RNNCase(3, 8, lengths=(1, 1, 1), reverse=(F, B, F, B)),
    RNNCase(2, 6, lengths=(5,), reverse=(F, F), h0=True),
    RNNCase(2, 6, lengths=(5, 1), reverse=(B, B), c0=True),
    RNNCase(6, 7, lengths=(9, 8, 2), scale=4.0, h0=True, c0=True),
    RNNCase(1, 1, steps=1, batch=1, reverse=(F,), mode="GRU"),
    RNNCase(3, 5, mode="GRU"),
    RNNCase(5, 17, lengths=(6, 3, 3, 1), reverse=(F, B, F, B), h0=True, mode="GRU"),
    RNNCase(2, 9, steps=7, batch=2, bias=False, h0=True, mode="GRU"),
    RNNCase(1, 1, steps=1, batch=1, reverse=(F,), mode="RNN_TANH"),
    RNNCase(4, 17, lengths=(6, 3, 3, 1), h0=True, mode="RNN_TANH"),
    RNNCase(3, 5, steps=7, batch=2, bias=False, mode="RNN_RELU"),
    RNNCase(3, 70, lengths=(4, 1), h0=True, mode="RNN_RELU"),
]
# Enough work that it is shared among threads; a single sequence of it spans several blocks of the input's projection.
LONG = RNNCase(11, 64, lengths=(230, 229, 130, 33, 8, 7, 1, 1))
RAGGED = RNNCase(9, 19, lengths=(9, 9, 7, 6, 5, 5, 4, 3, 2, 1, 1, 1, 1))
ALL_OPTIONS = RNNCase(5, 33, lengths=(8, 6, 6, 3, 2, 1, 1), reverse=(F, B, F, B), h0=True, c0=True)
INVARIANT = [
    LONG,
    RAGGED,
    ALL_OPTIONS,
    replace(LONG, mode="GRU"),
    replace(ALL_OPTIONS, c0=False, mode="GRU"),
    replace(LONG, mode="RNN_TANH"),
    replace(ALL_OPTIONS, c0=False, mode="RNN_RELU"),
]


@dataclass(frozen=True)
class RNNSample:
    """The tensors of a call."""

    input: torch.Tensor
    batch_sizes: torch.Tensor | None
    weights: ops.RNNWeights
    h0: torch.Tensor | None = None
    c0: torch.Tensor | None = None
    masks: ops.RNNMasks = NO_MASKS
    norm: ops.RNNNorm | None = None

    @property
    def inputs(self):
        """How many inputs stand side by side."""
        return self.input.shape[-1] // self.weights.weight_ih[0].shape[1]

    def tensors(self):
        """All floating-point tensors by name."""
        named = {"input": self.input}
        for field in self.weights._fields[:4]:
            named |= {f"{field}[{g}]": tensor for g, tensor in enumerate(getattr(self.weights, field))}
        for field, group in self.norm._asdict().items() if self.norm is not None else ():
            named |= {f"{field}[{g}]": tensor for g, tensor in enumerate(group)}
        return named | {name: getattr(self, name) for name in ("h0", "c0") if getattr(self, name) is not None}

    def map(self, function):
        """The same call with ``function(name, tensor)`` for each of its tensors."""
        new = {name: function(name, tensor) for name, tensor in self.tensors().items()}
        groups = [
            [new[f"{field}[{g}]"] for g in range(len(getattr(self.weights, field)))]
            for field in self.weights._fields[:4]
        ]
        weights = ops.RNNWeights(*groups, self.weights.reverse, self.weights.mode)
        norm = self.norm
        if norm is not None:
            fields = norm._asdict().items()
            norm = ops.RNNNorm(*([new[f"{field}[{g}]"] for g in range(len(group))] for field, group in fields))
        return replace(self, input=new["input"], weights=weights, h0=new.get("h0"), c0=new.get("c0"), norm=norm)

    def to(self, *to):
        """With all floating-point tensors of a dtype, or on a device, or both."""
        masks = ops.RNNMasks(*(None if mask is None else mask.to(*to) for mask in self.masks))
        return replace(self.map(lambda _, tensor: tensor.to(*to)), masks=masks)

    def leaves(self, names=None):
        """Fresh leaves; those of ``names``, all by default, require a gradient."""
        return self.map(lambda name, t: t.detach().clone().requires_grad_(names is None or name in names))


def sizes_of(lengths):
    """PackedSequence's batch_sizes of sequences sorted by length."""
    return torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])


def random_lengths(batch, longest, seed):
    """Lengths from 1 to ``longest``, longest first, both ends included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator).tolist()
    lengths[0] = longest
    lengths[-1] = 1 if batch > 1 else longest
    return tuple(sorted(lengths, reverse=True))


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def rnn_weights(
    input_size, hidden_size, reverse=BOTH, *, bias=True, dtype=torch.float32, seed=0, scale=1.0, mode="LSTM"
):
    """Weights drawn as nn.LSTM draws its own, times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    bound = scale / hidden_size**0.5

    def draw(*size):
        return [
            torch.empty(GATES[mode] * hidden_size, *size, dtype=dtype).uniform_(-bound, bound, generator=generator)
            for _ in reverse
        ]

    return ops.RNNWeights(
        draw(input_size), draw(hidden_size), draw() if bias else [], draw() if bias else [], list(reverse), mode
    )


def rnn_sample(case, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, dtype=dtype, generator=generator)

    weights = rnn_weights(
        case.input_size,
        case.hidden_size,
        case.reverse,
        bias=case.bias,
        dtype=dtype,
        seed=seed + 1,
        scale=case.scale,
        mode=case.mode,
    )
    batch_sizes = None
    batch = case.batch
    leading = (case.steps, case.batch)
    if case.lengths is not None:
        batch_sizes = sizes_of(case.lengths)
        batch = len(case.lengths)
        leading = (sum(case.lengths),)
    state = (len(case.reverse), batch, case.hidden_size)
    sample = RNNSample(
        draw(*leading, case.inputs * case.input_size),
        batch_sizes,
        weights,
        0.5 * draw(*state) if case.h0 else None,
        draw(*state) if case.c0 else None,
    )
    width = len(case.reverse) * case.hidden_size

    def dropped(*size):
        return (torch.rand(*size, generator=generator) < 0.7).to(dtype) / 0.7

    def kept(kind):
        if kind.upper() in case.zoneout:
            return torch.rand(width, generator=generator).to(dtype)
        if kind in case.zoneout:
            return (torch.rand(*leading, width, generator=generator) < 0.3).to(dtype)
        return None

    masks = ops.RNNMasks(dropped(*state) if case.dropout else None, kept("h"), kept("c"))

    def gains(size):
        return [1 + 0.3 * draw(size) for _ in case.reverse]

    norm = None
    if case.layer_norm:
        rows, cells = GATES[case.mode] * case.hidden_size, case.mode == "LSTM"
        of_c = gains(case.hidden_size) if cells else []
        shifts = [0.3 * draw(case.hidden_size) for _ in case.reverse] if cells and case.bias else []
        norm = ops.RNNNorm(gains(rows), gains(rows), of_c, shifts)
    return replace(sample, masks=masks, norm=norm)


def compiled(case):
    """:func:`run_ours`, compiled as a whole."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, batch_sizes, w_ih, w_hh, b_ih, b_hh, h0, c0):
        return ops.rnn(x, batch_sizes, ops.RNNWeights(w_ih, w_hh, b_ih, b_hh, list(case.reverse), case.mode), h0, c0)

    return lambda s: named(s, call(s.input, s.batch_sizes, *s.weights[:4], s.h0, s.c0))


def run_ours(sample, **options):
    options = {"inputs": sample.inputs, "masks": sample.masks, "norm": sample.norm, **options}
    results = ops.rnn(sample.input, sample.batch_sizes, sample.weights, sample.h0, sample.c0, **options)
    return named(sample, results)


def function_of(sample, names):
    """The op as a function of the tensors of these names, for gradcheck."""

    def run(*tensors):
        given = dict(zip(names, tensors))
        return tuple(run_ours(sample.map(lambda name, tensor: given.get(name, tensor))).values())

    leaves = sample.leaves(names).tensors()
    return run, tuple(leaves[name] for name in names)


def named(sample, results):
    """The results by name; only an LSTM has c."""
    return dict(zip(results_of(sample.weights.mode), results))


def results_of(mode):
    return RESULTS if mode == "LSTM" else RESULTS[:2]


def run_reference(sample):
    return named(sample, reference.rnn(*raw_arguments(sample)[:-1]))


def raw_arguments(sample):
    """The arguments that the raw ops have in common, the last is allow_tf32; a layer-normalised layer's input comes
    projected."""
    input, weights, flat = sample.input, sample.weights, None
    if sample.norm is not None:
        gain_ih, *others = sample.norm
        input = reference.normalised_projection(input, weights.weight_ih, gain_ih, sample.inputs)
        weights, flat = weights._replace(weight_ih=[]), [tensor for group in others for tensor in group]
    return (input, sample.batch_sizes, *weights, sample.h0, sample.c0, *sample.masks, flat, False)


def heads_arguments(sample):
    """Of the raw rnn_heads: it knows no masks, no layer normalisation and no TF32."""
    return raw_arguments(sample)[: -len(ops.RNNMasks._fields) - 2]


def backward_arguments(sample, given=RESULTS, needs=(True,) * 5):
    """The raw backward op's arguments after a forward pass; the gradients of ``given`` are ones."""
    output, h_n, c_n, gates, cells = torch.ops.pymtl.rnn_training(*raw_arguments(sample))
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    given = [name for name in given if name in results_of(sample.weights.mode)]
    gradients = [torch.ones_like(results[name]) if name in given else None for name in RESULTS]
    return (*gradients, *raw_arguments(sample), output, gates, cells, list(needs))


def run_nn(sample):
    """PyTorch's own modules: one bidirectional module for a forward and a backward recurrence side by side.

    They know no backward recurrence alone: that is the second half of a bidirectional one.
    """
    reverse = list(sample.weights.reverse)
    parts = []
    g = 0
    while g < len(reverse):
        both = reverse[g : g + 2] == [False, True]
        members = [g, g + 1] if both else [g, g] if reverse[g] else [g]
        output, *states = _run_module(sample, members)
        if reverse[g]:
            output, states = output[..., output.shape[-1] // 2 :], [state[1:] for state in states]
        parts.append((output, *states))
        g += 2 if both else 1
    outputs, *states = zip(*parts)
    return named(sample, (torch.cat(outputs, -1), *map(torch.cat, states)))


def _run_module(sample, members):
    weights = sample.weights
    input_size, hidden_size = weights.weight_ih[0].shape[1], weights.weight_hh[0].shape[1]
    bias = len(weights.bias_ih) > 0
    options = {"bias": bias, "bidirectional": len(members) == 2, "dtype": sample.input.dtype}
    if weights.mode.startswith("RNN"):
        module = nn.RNN(input_size, hidden_size, nonlinearity=weights.mode[4:].lower(), **options)
    else:
        module = getattr(nn, weights.mode)(input_size, hidden_size, **options)
    parameters = {
        f"{field}_l0" + ("_reverse" if place == 1 else ""): getattr(weights, field)[g]
        for place, g in enumerate(members)
        for field in weights._fields[: 4 if bias else 2]
    }
    states = None
    if weights.mode != "LSTM":
        states = None if sample.h0 is None else sample.h0[members]
    elif sample.h0 is not None or sample.c0 is not None:
        given = sample.h0 if sample.h0 is not None else sample.c0
        states = tuple(
            torch.zeros_like(given)[members] if state is None else state[members] for state in (sample.h0, sample.c0)
        )
    inputs = sample.input
    if sample.batch_sizes is not None:
        inputs = PackedSequence(inputs, sample.batch_sizes[sample.batch_sizes > 0])
    output, last = functional_call(module, parameters, (inputs, states))
    output = output if sample.batch_sizes is None else output.data
    return output, *(last if weights.mode == "LSTM" else (last,))


def random_like(results, seed=100):
    """Gradients to start a backward pass from."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(r.shape, dtype=r.dtype, generator=generator) for name, r in results.items()}


def with_gradients(run, sample, seeds, names=None):
    """The results of ``run(sample)`` and the gradients of ``names`` (all tensors by default), in one mapping.

    ``seeds`` maps the results that the loss reads to their gradients.
    """
    sample = sample.leaves(names)
    results = run(sample)
    wanted = {name: tensor for name, tensor in sample.tensors().items() if tensor.requires_grad}
    gradients = torch.autograd.grad(
        [results[name] for name in seeds],
        list(wanted.values()),
        [seed.to(sample.input) for seed in seeds.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    detached = {name: result.detach() for name, result in results.items()}
    return detached | {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients)}
