"""pymtl.LSTM on a GPU beside nn.LSTM there, and what it promises of its own; cuda_on_host runs these on the CPU."""

import copy
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from modules import by_packing, data_of, in_double, lstm_pair, named, run, seeds_for, with_data
from modules import pair as any_pair
from parity import assert_parity, assert_same_bits
from samples import shifted, transposed
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl

pytestmark = pytest.mark.cuda
ON_HOST = "cuda_on_host" in sys.modules
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
every_16_bit_dtype = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
BOTH, DEEP = {"bidirectional": True}, {"bidirectional": True, "num_layers": 2}


@pytest.fixture(autouse=True)
def comparable(gpu, monkeypatch):
    """nn.LSTM on a GPU computes with float32, not TF32. On the host the kernels get float16, too."""
    if gpu.type == "cpu":
        monkeypatch.setattr("pymtl.ops.dtypes._OF_THE_CPU", (torch.float32, torch.float16))
    elif hasattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision"):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.fixture
def real_gpu(gpu):
    if gpu.type != "cuda":
        pytest.skip("of a GPU itself, which the host does not stand in for")
    return gpu


def every_second(tensor):
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


@dataclass(frozen=True)
class Case:
    input_size: int = 5
    hidden_size: int = 33
    steps: int = 6
    batch: int | None = 3  # None: unbatched
    options: dict = field(default_factory=dict)
    lengths: list[int] | None = None
    form: str = "dense"  # or "packed", "unsorted", "lengths"
    states: bool = False
    layout: object = staticmethod(lambda tensor: tensor)

    def draw(self, gpu, dtype=torch.float32):
        """Ours and nn.LSTM of the same weights, the input and the initial states."""
        ours, theirs = lstm_pair(self.input_size, self.hidden_size, device=gpu, dtype=dtype, **self.options)
        batch = [] if self.batch is None else [self.batch]
        rows = ours.num_layers * (2 if ours.bidirectional else 1)
        leading = [*batch, self.steps] if ours.batch_first else [self.steps, *batch]
        x = torch.randn(*leading, self.input_size).to(gpu, dtype)
        if "pack" in self.form or self.form == "unsorted":
            x = pack_padded_sequence(x, self.lengths, ours.batch_first, enforce_sorted=self.form == "packed")
        states = [0.5 * torch.randn(rows, *batch, self.hidden_size) for _ in range(2)]
        hx = tuple(self.layout(state.to(gpu, dtype)) for state in states) if self.states else None
        return ours, theirs, with_data(x, self.layout(data_of(x))), hx

    def calls(self):
        """How ours and how nn.LSTM is called."""
        if self.form != "lengths":
            return plainly, plainly
        return partial(with_lengths, self.lengths), partial(by_packing, self.lengths)


def plainly(module, *arguments):
    return module(*arguments)


def with_lengths(lengths, module, *arguments):
    return module(*arguments, lengths=lengths)


def results(module, x, hx=None, call=plainly):
    """The results of a call and all gradients, on the CPU."""
    leaves = {"input": data_of(x)} | dict(zip(("h0", "c0"), hx or ()))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    found = named(*call(module, with_data(x, leaves["input"]), (leaves["h0"], leaves["c0"]) if hx else None))
    leaves |= dict(module.named_parameters())
    seeds = [seed.to(found[name]) for name, seed in seeds_for(found).items()]
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), seeds)
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def compare(case, gpu, dtype):
    ours, theirs, x, hx = case.draw(gpu, dtype)
    limit = torch.ops.pymtl.rnn_hidden_size_limit(torch.empty(0, dtype=dtype, device=gpu))
    assert ours.kernels_take(data_of(x)) == (case.hidden_size <= limit)
    call, call_theirs = case.calls()
    exact = [x.to("cpu", torch.float64), hx and [state.to("cpu", torch.float64) for state in hx]]
    truth = results(in_double(theirs).cpu(), *exact, call_theirs)
    assert_parity(results(ours, x, hx, call), results(theirs, x, hx, call_theirs), truth)


# Accuracy.

RAGGED = [4, 6, 1, 6, 2]
CASES = {
    "one sequence": Case(batch=1),
    "one step": Case(steps=1, options=DEEP, states=True),
    "one step of one sequence": Case(steps=1, batch=1),
    "many sequences": Case(hidden_size=20, batch=37, options=BOTH),
    "many steps": Case(hidden_size=9, steps=70, batch=2),
    "two directions": Case(options=BOTH, states=True),
    "two layers": Case(options={"num_layers": 2}),
    "two layers of two directions": Case(options=DEEP, states=True),
    "no bias": Case(options={"bias": False, **BOTH}),
    "batch first": Case(options={"batch_first": True, **DEEP}, states=True),
    "unbatched": Case(batch=None, options=DEEP, states=True),
    "sorted": Case(batch=4, lengths=[6, 3, 3, 1], form="packed", options=DEEP),
    "sorted with states": Case(batch=4, lengths=[6, 6, 2, 1], form="packed", options=BOTH, states=True),
    "unsorted with states": Case(batch=5, lengths=RAGGED, form="unsorted", options=DEEP, states=True),
    "lengths": Case(batch=5, lengths=RAGGED, form="lengths", options=DEEP),
    "lengths with states": Case(batch=5, lengths=RAGGED, form="lengths", options=BOTH, states=True),
    "lengths of 1": Case(batch=5, lengths=[1] * 5, form="lengths", options=BOTH),
    "lengths, batch first": Case(batch=5, lengths=RAGGED, form="lengths", options={"batch_first": True}),
    "more lengths than rows of a cluster": Case(batch=23, lengths=[*range(1, 7)] * 3 + RAGGED, form="lengths"),
    "every second number": Case(options=BOTH, states=True, layout=every_second),
    "transposed": Case(options=BOTH, states=True, layout=transposed),
    "one number behind alignment": Case(hidden_size=64, input_size=8, options=BOTH, states=True, layout=shifted),
    "packed, one number behind alignment": Case(batch=2, lengths=[6, 2], form="packed", layout=shifted),
}
SIZES = [1, 5, 33, 64, 65, 100, 200] + ([] if ON_HOST else [256, 300, 512, 700, 768])


@every_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_as_accurate_as_nn_lstms(case, dtype, gpu):
    compare(case, gpu, dtype)


@every_dtype
@pytest.mark.parametrize("hidden_size", SIZES)
def test_every_hidden_size_is_as_accurate_as_nn_lstm(hidden_size, dtype, gpu):
    compare(Case(7, hidden_size, steps=4, options=BOTH, states=True), gpu, dtype)


PARTS = 25
SMALL, AT_EDGES, LARGE = range(1, 40), [15, 16, 17, 31, 32, 47, 48, 49, 63, 64, 65], [96, 128, 129, 192, 256, 257, 320]


def random_case(seed):
    pick = random.Random(seed)
    batch, steps = pick.choice([1, 2, 3, 5, 8, 9, 17, 33]), pick.randint(1, 9)
    form = pick.choice(["dense", "unbatched", "packed", "unsorted", "lengths"])
    lengths = [pick.randint(1, steps) for _ in range(batch - 1)]
    lengths.insert(pick.randint(0, batch - 1), steps)
    return Case(
        input_size=pick.choice([pick.randint(1, 40), 16, 64]),
        hidden_size=pick.choice(pick.choice([SMALL, AT_EDGES] if ON_HOST else [SMALL, AT_EDGES, LARGE])),
        steps=steps,
        batch=None if form == "unbatched" else batch,
        options={
            "num_layers": pick.choice([1, 1, 2, 3]),
            "bidirectional": pick.random() < 0.5,
            "bias": pick.random() < 0.7,
            "batch_first": pick.random() < 0.3,
        },
        lengths=sorted(lengths, reverse=True) if form == "packed" else lengths,
        form="dense" if form == "unbatched" else form,
        states=pick.random() < 0.5,
        layout=pick.choice([Case.layout, every_second, shifted]),
    ), pick.choice([torch.float32, *SIXTEEN_BITS])


@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations_are_as_accurate_as_nn_lstm(part, gpu):
    for seed in range(part, PARTS if ON_HOST else 12 * PARTS, PARTS):
        case, dtype = random_case(seed)
        print(seed, dtype, case)  # the last one is that of a failure
        torch.manual_seed(seed)
        compare(case, gpu, dtype)


# The same bits.

VARIOUS = {name: CASES[name] for name in ("two layers of two directions", "unsorted with states", "lengths")}
various = pytest.mark.parametrize("case", VARIOUS.values(), ids=VARIOUS)


@every_dtype
@various
def test_repeated_runs_training_evaluation_and_inference_give_the_same_bits(case, dtype, gpu):
    ours, _, x, hx = case.draw(gpu, dtype)
    call, _ = case.calls()
    expected = results(ours, x, hx, call)
    for _ in range(2):
        assert_same_bits(results(ours, x, hx, call), expected)
    assert_same_bits(results(ours.eval(), x, hx, call), expected)
    inferred = run(partial(call, ours), x, hx)
    assert_same_bits({name: tensor.cpu() for name, tensor in inferred.items()}, {n: expected[n] for n in inferred})


@every_dtype
@pytest.mark.parametrize("layout", [every_second, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, dtype, gpu):
    ours, _, x, hx = Case(16, 32, options=BOTH, states=True).draw(gpu, dtype)
    assert_same_bits(results(ours, layout(x), [layout(h) for h in hx]), results(ours, x, hx))


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["dense", "lengths"])
def test_nan_and_inf_stay_within_their_sequence(form, value, dtype, gpu):
    case = Case(batch=11, lengths=[6, 1, 4, 6, 6, 2, 3, 6, 5, 1, 6], form=form, options=DEEP, states=True)
    ours, _, x, hx = case.draw(gpu, dtype)
    call, _ = case.calls()
    clean = results(ours, x, hx, call)
    x[1, 4] = value
    spoilt = results(ours, x, hx, call)
    for name in ("output", "h_n", "c_n", "gradient of input", "gradient of h0", "gradient of c0"):
        others = [b for b in range(11) if b != 4]
        assert_same_bits({name: spoilt[name][:, others]}, {name: clean[name][:, others]})
    assert spoilt["output"][1, 4].isnan().any()
    assert spoilt["gradient of weight_hh_l0"].isnan().any()


@every_16_bit_dtype
@various
def test_autocast_gives_what_converting_by_hand_gives(case, dtype, gpu):
    if gpu.type == "cpu" and dtype == torch.float16:
        pytest.skip("autocast on the CPU is to bfloat16")
    ours, _, x, hx = case.draw(gpu)
    call, _ = case.calls()

    def under_autocast(*arguments):
        with torch.autocast(gpu.type, dtype=dtype):
            return call(*arguments)

    found = results(ours, x, hx, under_autocast)
    assert found["output"].dtype == dtype
    converted = copy.deepcopy(ours).to(dtype)
    expected = results(converted, x.to(dtype), hx and [state.to(dtype) for state in hx], call)
    assert_same_bits({n: t.float() for n, t in found.items()}, {n: t.float() for n, t in expected.items()})


# Edges and errors.


@every_dtype
@pytest.mark.parametrize("call", [plainly, partial(with_lengths, [])], ids=["dense", "lengths"])
def test_no_sequences_give_empty_results_and_zero_gradients(call, dtype, gpu):
    ours, _, x, hx = Case(batch=0, options=DEEP, states=True).draw(gpu, dtype)
    found = results(ours, x, hx, call)
    assert [tuple(found[name].shape) for name in ("output", "h_n", "c_n")] == [(6, 0, 66), (4, 0, 33), (4, 0, 33)]
    for name, parameter in ours.named_parameters():
        assert found[f"gradient of {name}"].shape == parameter.shape
        assert not found[f"gradient of {name}"].any()


X, HX = torch.zeros(6, 3, 5), (torch.zeros(2, 3, 7),) * 2
REFUSED = {
    "h0 of another batch": ((X, (HX[0][:, :2], HX[1])), RuntimeError, r"hidden\[0\] size \(2, 3, 7\), got \[2, 2, 7\]"),
    "c0 of another size": ((X, (HX[0], HX[1][..., :6])), RuntimeError, r"hidden\[1\] size .* got \[2, 3, 6\]"),
    "h0 of another dtype": ((X, (HX[0].bfloat16(), HX[1])), RuntimeError, "h0: expected dtype Float, got BFloat16"),
    "c0 of another dtype": ((X, (HX[0], HX[1].double())), RuntimeError, "c0: expected dtype Float, got Double"),
    "input of another size": ((X[..., :4],), RuntimeError, r"input.size\(-1\).* Expected 5, got 4"),
    "input of another dtype": ((X.bfloat16(),), ValueError, r"input dtype \(torch.bfloat16\).*\(torch.float32\)"),
    "input of one dimension": ((X[0, 0],), ValueError, "input to be 2D or 3D, got 1D"),
    "no steps": ((X[:0],), RuntimeError, "sequence length to be larger than 0"),
    "fewer tokens": ((X[0], [2, 2]), RuntimeError, "batch_sizes: expected a sum of 3, the tokens of input, got 4"),
    "growing sizes": ((X[0], [1, 2]), RuntimeError, "batch_sizes: .* got 2 at step 1"),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_by_name(arguments, error, message, gradients, gpu):
    x, *rest = arguments
    x = x.to(gpu)
    if rest and isinstance(rest[0], list):
        x, rest = PackedSequence(x, torch.tensor(rest[0])), []
    states = [tuple(state.to(gpu) for state in hx) for hx in rest]
    ours, _ = lstm_pair(5, 7, bidirectional=True, device=gpu)
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        ours(x, *states)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([6, 0, 1], "from 1 to 6, .* got 0 at position 1"), ([6, 2], "expected 3 lengths, .* got 2")],
    ids=["zero", "too few"],
)
def test_bad_lengths_are_refused_by_name(lengths, message, gpu):
    ours, _, x, _ = Case().draw(gpu)
    with pytest.raises(RuntimeError, match=f"lengths: .*{message}"):
        ours(x, lengths=lengths)


def test_weights_of_another_dtype_are_refused_by_name(gpu):
    ours, _, x, _ = Case().draw(gpu)
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.detach().bfloat16())
    with pytest.raises(RuntimeError, match=r"weight_hh\[0\]: expected dtype Float, got BFloat16"):
        ours(x)


# What is built on it.


def test_second_derivatives_are_nn_lstms(gpu):
    ours, theirs, x, _ = Case(4, 7, options=BOTH).draw(gpu)

    def second(module, x):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        output, (_, c_n) = module(leaves[0])
        first = torch.autograd.grad(output.square().sum() + c_n.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    # Sums of a few hundred products of rounded first derivatives: a thousand times float32's 1.2e-7 is enough.
    for found, expected in zip(second(ours, x), second(in_double(theirs).cpu(), x.cpu().double()), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@every_dtype
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@various
def test_compiled_code_gives_the_same_bits(case, backend, dtype, gpu):
    if gpu.type == "cpu" and (backend == "inductor" or dtype != torch.float32):
        pytest.skip("once is enough on the host")
    torch._dynamo.reset()
    ours, _, x, hx = case.draw(gpu, dtype)
    call, _ = case.calls()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    found = results(ours, x, hx, lambda _, *arguments: call(compiled, *arguments))
    assert_same_bits(found, results(ours, x, hx, call))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(5, 33, batch_first=True, **DEEP)
        self.linear = nn.Linear(66, 3)

    def forward(self, x, hx=None):
        output, state = self.encoder(x, hx)
        return self.linear(output), state


def test_a_converted_model_is_as_accurate_as_before(gpu):
    theirs, x = Tagger().to(gpu), torch.randn(4, 6, 5).to(gpu)
    ours = pymtl.convert(copy.deepcopy(theirs).cpu()).to(gpu)
    assert isinstance(ours.encoder, pymtl.LSTM)
    truth = results(copy.deepcopy(theirs).double().cpu(), x.cpu().double())
    assert_parity(results(ours, x), results(theirs, x), truth)


# Of a GPU itself.


def test_tensors_on_different_devices_are_refused_by_name(real_gpu):
    ours, _, x, hx = Case(options=BOTH, states=True).draw(real_gpu)
    for bad, message in (((hx[0].cpu(), hx[1]), "h0: "), ((hx[0], hx[1].cpu()), "c0: ")):
        with pytest.raises(RuntimeError, match=message + "expected a tensor on device 0, got one on the CPU"):
            ours(x, bad)
    with pytest.raises(RuntimeError, match="lengths: expected a 1D CPU int64 tensor"):
        copy.deepcopy(ours).cpu()(x.cpu(), lengths=torch.tensor([6, 2, 1], device=real_gpu))
    for module, given in ((ours, x.cpu()), (copy.deepcopy(ours).cpu(), x)):
        with pytest.raises(RuntimeError, match="device"):
            module(given)
    ours.weight_hh_l0_reverse = nn.Parameter(ours.weight_hh_l0_reverse.detach().cpu())
    with pytest.raises(RuntimeError, match=r"weight_hh\[1\]: expected a tensor on device 0, got one on the CPU"):
        ours(x)


@every_dtype
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
def test_lengths_on_the_gpu_give_the_results_of_lengths_on_the_cpu(states, dtype, real_gpu):
    case = Case(batch=5, lengths=RAGGED, form="lengths", options=DEEP, states=states)
    there = torch.tensor(RAGGED, device=real_gpu)
    ours, theirs, x, hx = case.draw(real_gpu, dtype)
    exact = [x.cpu().double(), hx and [state.cpu().double() for state in hx]]
    call, call_theirs = case.calls()
    truth = results(in_double(theirs).cpu(), *exact, call_theirs)
    assert_parity(results(ours, x, hx, partial(with_lengths, there)), results(theirs, x, hx, call_theirs), truth)
    # The number of rows may change the order of a product's sums, which is no matter if all of these are exact.
    ours, _, x, hx = Case(batch=5, options=BOTH, states=states).draw(real_gpu, dtype)
    with torch.no_grad():
        for tensor, unit in ((x, 8), (ours.weight_ih_l0, 64), (ours.weight_ih_l0_reverse, 64)):
            tensor.copy_((tensor * unit).round() / unit)
    assert_same_bits(run(ours, x, hx, lengths=there), run(ours, x, hx, lengths=RAGGED))


def test_lengths_on_the_gpu_are_cut_to_what_there_is(real_gpu):
    ours, _, x, hx = Case(options=BOTH, states=True).draw(real_gpu)
    found = run(ours, x, hx, lengths=torch.tensor([9, 0, -3], device=real_gpu))
    first = run(ours, x[:, :1], tuple(state[:, :1] for state in hx))
    torch.testing.assert_close({n: t[:, :1] for n, t in found.items()}, first)
    assert not found["output"][:, 1:].any()
    assert torch.equal(found["h_n"][:, 1:], hx[0][:, 1:])
    assert torch.equal(found["c_n"][:, 1:], hx[1][:, 1:])


@contextmanager
def never_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_dtype
@pytest.mark.parametrize("form", ["dense", "packed", "lengths"])
def test_nothing_waits_for_the_gpu(form, dtype, real_gpu):
    case = Case(batch=4, lengths=[6, 3, 3, 1], form=form, options=DEEP)
    ours, _, x, _ = case.draw(real_gpu, dtype)
    options = {"lengths": torch.tensor(case.lengths, device=real_gpu)} if form == "lengths" else {}

    def step():
        output, (h_n, c_n) = ours(x, **options)
        (data_of(output).sum() + h_n.sum() + c_n.sum()).backward()

    step()
    with never_waiting():
        step()
    torch.cuda.synchronize()


@every_dtype
@pytest.mark.parametrize("form", ["dense", "lengths"])
def test_a_recorded_graph_gives_the_bits_of_eager_code(form, dtype, real_gpu):
    ours, _, x, hx = Case(batch=5, options=DEEP, states=True).draw(real_gpu, dtype)
    lengths = torch.tensor(RAGGED, device=real_gpu)
    options = {"lengths": lengths} if form == "lengths" else {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(ours, x, hx, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(ours, x, hx, **options)
    for other in (RAGGED, [1, 2, 3, 4, 5]):
        x.normal_()
        lengths.copy_(torch.tensor(other))
        graph.replay()
        assert_same_bits(recorded, run(ours, x, hx, **options))


@pytest.mark.parametrize("form", ["packed", "lengths"])
def test_sizes_on_the_cpu_are_refused_while_a_graph_is_recorded(form, real_gpu):
    case = Case(batch=4, lengths=[6, 3, 3, 1], form=form)
    ours, _, x, _ = case.draw(real_gpu)
    call, _ = case.calls()
    expected = run(partial(call, ours), x)
    with pytest.raises(RuntimeError, match="batch_sizes"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(partial(call, ours), x)
    assert_same_bits(run(partial(call, ours), x), expected)


@every_dtype
@various
def test_another_stream_gives_the_same_bits(case, dtype, real_gpu):
    ours, _, x, hx = case.draw(real_gpu, dtype)
    call, _ = case.calls()
    expected = results(ours, x, hx, call)
    late = torch.zeros_like(data_of(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what goes elsewhere than to this stream reads zeros
        late.copy_(data_of(x))
        found = results(ours, with_data(x, late), hx, call)
    assert_same_bits(found, expected)


@every_dtype
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN tanh"])
def test_what_no_kernel_takes_runs_as_torchs_own(kind, dtype, real_gpu):
    limit = torch.ops.pymtl.rnn_hidden_size_limit(torch.empty(0, dtype=dtype, device=real_gpu))
    ours, theirs = any_pair(kind, 5, limit + 1 if kind == "LSTM" else 20, device=real_gpu, dtype=dtype)
    x = torch.randn(6, 3, 5).to(real_gpu, dtype)
    assert not ours.kernels_take(x)
    assert_same_bits(run(ours, x), run(theirs, x))
    assert_same_bits(run(ours, x, lengths=[2, 6, 1]), run(partial(by_packing, [2, 6, 1], theirs), x))


def test_freezing_changes_nothing(real_gpu):
    ours, _, x, hx = Case(options=DEEP, states=True).draw(real_gpu)
    expected = run(ours.eval(), x, hx)
    assert pymtl.freeze(ours) is ours
    assert ours._snapshot is None
    assert_same_bits(run(ours, x, hx), expected)
