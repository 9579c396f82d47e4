"""pymtl.LSTM on a GPU beside nn.LSTM there, and what it promises of its own; cuda_on_host runs these on the CPU."""

import copy
import random
import sys
from dataclasses import dataclass, field

import pytest
import torch
from modules import by_packing, data_of, in_double, lstm_pair, named, pair, seeds_for, with_data
from parity import assert_parity, assert_same_bits
from samples import shifted, transposed
from tf32 import Tf32Products
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl

pytestmark = pytest.mark.cuda
ON_HOST = "cuda_on_host" in sys.modules
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH, DEEP = {"bidirectional": True}, {"bidirectional": True, "num_layers": 2}


@pytest.fixture(autouse=True)
def comparable(gpu, monkeypatch):
    """On the host the kernels get float16, too."""
    if gpu.type == "cpu":
        monkeypatch.setattr("pymtl.ops.dtypes._OF_THE_CPU", (torch.float32, torch.float16))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@dataclass(frozen=True)
class Case:
    input_size: int = 5
    hidden_size: int = 33
    steps: int = 6
    batch: int | None = 3  # None: unbatched
    options: dict = field(default_factory=dict)
    form: str = "dense"  # or of `lengths`: "sorted" or "unsorted", both packed; "padded"; "there", on the GPU
    lengths: list[int] = ()
    states: bool = False
    layout: object = torch.Tensor.detach

    def draw(self, gpu, dtype=torch.float32):
        """Ours and nn.LSTM of the same weights; the input, the initial states and lengths."""
        ours, theirs = lstm_pair(self.input_size, self.hidden_size, device=gpu, dtype=dtype, **self.options)
        batch = [] if self.batch is None else [self.batch]
        rows = ours.num_layers * (2 if ours.bidirectional else 1)
        leading = [*batch, self.steps] if ours.batch_first else [self.steps, *batch]
        x = torch.randn(*leading, self.input_size).to(gpu, dtype)
        if "sorted" in self.form:
            x = pack_padded_sequence(x, self.lengths, ours.batch_first, enforce_sorted=self.form == "sorted")
        states = [0.5 * torch.randn(rows, *batch, self.hidden_size) for _ in range(2)]
        hx = tuple(self.layout(state.to(gpu, dtype)) for state in states) if self.states else None
        lengths = {"padded": self.lengths, "there": torch.tensor(self.lengths, device=gpu)}.get(self.form)
        return ours, theirs, (with_data(x, self.layout(data_of(x))), hx, lengths)


def call(module, x, hx=None, lengths=None):
    if lengths is not None and type(module) is nn.LSTM:
        return named(*by_packing(torch.as_tensor(lengths).cpu(), module, x, hx))
    return named(*(module(x, hx) if lengths is None else module(x, hx, lengths=lengths)))


def results(module, x, hx=None, lengths=None, call=call):
    """The results of a call and all gradients, on the CPU."""
    leaves = {"input": data_of(x)} | dict(zip(("h0", "c0"), hx or ()))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    found = call(module, with_data(x, leaves["input"]), hx and (leaves["h0"], leaves["c0"]), lengths)
    leaves |= dict(module.named_parameters())
    seeds = [seed.to(found[name]) for name, seed in seeds_for(found).items()]
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), seeds)
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def converted(to, x, hx=None, lengths=None):
    return x.to(*to), hx and tuple(state.to(*to) for state in hx), lengths


def compare(case, gpu, dtype):
    ours, theirs, given = case.draw(gpu, dtype)
    data = data_of(given[0])
    assert ours.kernels_take(data) == (case.hidden_size <= torch.ops.pymtl.rnn_hidden_size_limit(data))
    truth = results(in_double(theirs).cpu(), *converted(("cpu", torch.float64), *given))
    assert_parity(results(ours, *given), results(theirs, *given), truth)


RAGGED = [4, 6, 1, 6, 2]
CASES = {
    "one step of one sequence": Case(steps=1, batch=1, options=DEEP, states=True),
    "many sequences": Case(hidden_size=20, batch=37, options=BOTH),
    "two directions": Case(options=BOTH, states=True),
    "two layers of two directions": Case(options=DEEP, states=True),
    "batch first": Case(options={"batch_first": True, "num_layers": 2}, states=True),
    "unbatched": Case(batch=None, options=DEEP, states=True),
    "sorted": Case(5, 33, 6, 4, BOTH, "sorted", [6, 6, 2, 1], states=True),
    "unsorted": Case(5, 33, 6, 5, DEEP, "unsorted", RAGGED, states=True),
    "lengths": Case(5, 33, 6, 5, {"batch_first": True, **DEEP}, "padded", RAGGED),
    "lengths on the GPU": Case(5, 33, 6, 5, DEEP, "there", RAGGED, states=True),
    "lengths of 1": Case(5, 33, 6, 5, BOTH, "padded", [1] * 5),
    "no bias": Case(5, 33, 6, 23, {"bias": False}, "padded", [*range(1, 7)] * 3 + RAGGED),
    "not contiguous": Case(options=BOTH, states=True, layout=transposed),
    "one number off alignment": Case(8, 64, options=BOTH, states=True, layout=shifted),
    "packed, one number off alignment": Case(8, 64, 6, 2, BOTH, "sorted", [6, 2], layout=shifted),
}
SIZES = [1, 5, 64, 65, 100, 200] if ON_HOST else [1, 5, 64, 65, 100, 200, 256, 300, 512, 700, 768, 1000]
CASES |= {f"hidden size {size}": Case(7, size, steps=4, options=BOTH, states=True) for size in SIZES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_as_accurate_as_nn_lstms(case, dtype, gpu):
    compare(case, gpu, dtype)


def random_case(seed):
    pick = random.Random(seed)
    batch, steps = pick.choice([1, 2, 3, 5, 8, 9, 17, 33]), pick.randint(1, 9)
    lengths = [steps, *(pick.randint(1, steps) for _ in range(batch - 1))]
    pick.shuffle(lengths)
    form = pick.choice(["dense", "dense", "sorted", "unsorted", "padded", "there"])
    sizes = [pick.randint(1, 40), pick.choice([15, 16, 17, 31, 32, 47, 48, 49, 63, 64, 65])]
    sizes += [] if ON_HOST else [pick.choice([96, 128, 129, 192, 256, 257, 320, 500])]
    options = {name: pick.random() < 0.5 for name in ("bidirectional", "bias", "batch_first")}
    return Case(
        pick.choice([pick.randint(1, 40), 16, 64]),
        pick.choice(sizes),
        steps,
        None if form == "dense" and pick.random() < 0.3 else batch,
        options | {"num_layers": pick.choice([1, 1, 2, 3])},
        form,
        sorted(lengths, reverse=True) if form == "sorted" else lengths,
        pick.random() < 0.5,
        pick.choice([torch.Tensor.detach, transposed, shifted]),
    ), pick.choice(DTYPES)


@pytest.mark.parametrize("part", range(25))
def test_random_configurations_are_as_accurate_as_nn_lstm(part, gpu):
    for seed in range(part, 25 if ON_HOST else 300, 25):
        case, dtype = random_case(seed)
        print(seed, dtype, case)  # the last one is that of a failure
        torch.manual_seed(seed)
        compare(case, gpu, dtype)


TF32_CASES = [  # of as many sequences as make TF32 the faster one in the recurrence too, on a GPU where H is 512
    Case(hidden_size=20, batch=37, options=BOTH, states=True),
    Case(5, 33, 6, 37, DEEP, "padded", [*range(1, 7)] * 6 + [6]),
    Case(5, 100, 4, 37, BOTH, "there", [*range(1, 5)] * 9 + [4]),
    Case(1, 7, 1, 1, states=True),  # matrices of one row or column
    *(Case(64, size, 30, 64, BOTH, states=True) for size in (() if ON_HOST else (128, 256, 512))),
]


@pytest.mark.parametrize("case", TF32_CASES, ids=lambda case: f"{case.hidden_size} {case.form}")
def test_tf32_where_torch_allows_it_is_as_accurate_as_nn_lstm_in_tf32(case, gpu, monkeypatch):
    ours, theirs, given = case.draw(gpu)
    exact = results(ours, *given)
    truth = results(in_double(theirs).cpu(), *converted(("cpu", torch.float64), *given))
    if gpu.type == "cpu":
        monkeypatch.setattr(sys.modules["pymtl.ops.rnn"], "allows_tf32", lambda tensor: True)
        with Tf32Products(), torch.backends.mkldnn.flags(enabled=False):
            expected = results(theirs, *given)
    else:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
        expected = results(theirs, *given)
        # Its libraries may multiply small matrices as exactly as ever: then the allowance is that of rounded operands.
        with Tf32Products(), torch.backends.mkldnn.flags(enabled=False):
            rounded = results(copy.deepcopy(theirs).cpu(), *converted(["cpu"], *given))
        for name, exactly in truth.items():
            if (rounded[name] - exactly).abs().max() > (expected[name] - exactly).abs().max():
                expected[name] = rounded[name]
    found = results(ours, *given)
    assert_parity(found, expected, truth)
    assert_same_bits(results(ours, *given), found)
    if ON_HOST or case.hidden_size >= 128:  # a GPU's library may multiply small matrices as exactly as ever
        assert not any(torch.equal(found[name], exact[name]) for name in ("output", "gradient of input"))


@pytest.mark.parametrize("precision", ["ieee", "none"])
def test_no_tf32_where_torch_does_not_allow_it(precision, real_gpu, monkeypatch):
    ours, _, given = TF32_CASES[0].draw(real_gpu)
    exact = results(ours, *given)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    assert_same_bits(results(ours, *given), exact)


inferred = torch.no_grad()(call)
NAMES = ["two layers of two directions", "unsorted", "lengths", "lengths on the GPU"]
various = pytest.mark.parametrize("name", NAMES)


@various
def test_every_run_in_every_mode_gives_the_same_bits(name, dtype, gpu):
    ours, _, given = CASES[name].draw(gpu, dtype)
    expected = results(ours, *given)
    for change in (nn.Module.train, nn.Module.eval):
        assert_same_bits(results(change(ours), *given), expected)
    assert ON_HOST or pymtl.freeze(ours)._snapshot is None  # a GPU reads the weights as they are
    found = {n: tensor.cpu() for n, tensor in inferred(ours, *given).items()}
    assert_same_bits(found, {n: expected[n] for n in found})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["dense", "padded"])
def test_nan_and_inf_stay_within_their_sequence(form, value, dtype, gpu):
    case = Case(5, 33, 6, 11, DEEP, form, [6, 1, 4, 6, 6, 2, 3, 6, 5, 1, 6], states=True)
    ours, _, given = case.draw(gpu, dtype)
    clean = results(ours, *given)
    given[0][1, 4] = value
    spoilt = results(ours, *given)
    for n in ("output", "h_n", "c_n", "gradient of input", "gradient of h0", "gradient of c0"):
        assert spoilt[n][:, 4].isnan().any()
        others = [b for b in range(11) if b != 4]
        assert_same_bits({n: spoilt[n][:, others]}, {n: clean[n][:, others]})


@various
@pytest.mark.parametrize("dtype", DTYPES[1:2] if ON_HOST else DTYPES[1:], ids=str)
def test_autocast_gives_what_converting_by_hand_gives(name, dtype, gpu):
    ours, _, given = CASES[name].draw(gpu)
    expected = results(copy.deepcopy(ours).to(dtype), *converted([dtype], *given))
    found = results(ours, *given, call=torch.autocast(gpu.type, dtype=dtype)(call))
    assert found["output"].dtype == dtype
    assert_same_bits({n: t.float() for n, t in found.items()}, {n: t.float() for n, t in expected.items()})


@pytest.mark.parametrize("lengths", [None, []], ids=["dense", "lengths"])
def test_no_sequences_give_empty_results_and_zero_gradients(lengths, dtype, gpu):
    ours, _, (x, hx, _) = Case(batch=0, options=DEEP, states=True).draw(gpu, dtype)
    found = results(ours, x, hx, lengths)
    assert [found[n].shape for n in ("output", "h_n", "c_n")] == [(6, 0, 66), (4, 0, 33), (4, 0, 33)]
    for name, parameter in ours.named_parameters():
        assert torch.equal(found[f"gradient of {name}"], torch.zeros(parameter.shape, dtype=dtype))


X, H = torch.zeros(6, 3, 5), torch.zeros(2, 3, 7)
REFUSED = {
    "h0 of another batch": ((X, (H[:, :2], H)), RuntimeError, r"hidden\[0\] size \(2, 3, 7\), got \[2, 2, 7\]"),
    "c0 of another size": ((X, (H, H[..., :6])), RuntimeError, r"hidden\[1\] size .* got \[2, 3, 6\]"),
    "h0 of another dtype": ((X, (H.bfloat16(), H)), RuntimeError, "h0: expected dtype Float, got BFloat16"),
    "input of another size": ((X[..., :4],), RuntimeError, r"input.size\(-1\).* Expected 5, got 4"),
    "input of another dtype": ((X.bfloat16(),), ValueError, r"input dtype \(torch.bfloat16\).*\(torch.float32\)"),
    "no steps": ((X[:0],), RuntimeError, "sequence length to be larger than 0"),
    "fewer tokens": ((PackedSequence(X[0], torch.tensor([2])),), RuntimeError, "batch_sizes: expected a sum of 3"),
    "growing sizes": ((PackedSequence(X[0], torch.tensor([1, 2])),), RuntimeError, "batch_sizes: .* got 2 at step 1"),
    "lengths of zero": ((X, None, [6, 0, 1]), RuntimeError, "lengths: .* from 1 to 6, .* got 0 at position 1"),
    "too few lengths": ((X, None, [6, 2]), RuntimeError, "lengths: expected 3 lengths, .* got 2"),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_by_name(arguments, error, message, gradients, gpu):
    ours, _ = lstm_pair(5, 7, bidirectional=True, device=gpu)
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        call(ours, *converted([gpu], *arguments))


@pytest.mark.parametrize("form", ["dense", "padded", "there"])
def test_second_derivatives_are_nn_lstms(form, gpu):
    ours, theirs, (x, _, lengths) = Case(4, 7, 6, 3, BOTH, form, [6, 2, 4]).draw(gpu)

    def second(module, x):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        found = call(module, leaves[0], None, lengths)
        first = torch.autograd.grad(found["output"].square().sum() + found["c_n"].sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    # Sums of some hundred products of rounded first derivatives: a thousand times float32's 1.2e-7 is enough.
    for found, expected in zip(second(ours, x), second(in_double(theirs).cpu(), x.cpu().double()), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@various
@pytest.mark.parametrize("backend", ["aot_eager"] if ON_HOST else ["aot_eager", "inductor"])
def test_compiled_code_gives_the_same_bits(backend, name, dtype, gpu):
    torch._dynamo.reset()
    ours, _, given = CASES[name].draw(gpu, dtype)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    found = results(ours, *given, call=lambda _, *arguments: call(compiled, *arguments))
    assert_same_bits(found, results(ours, *given))


def test_tensors_on_different_devices_are_refused_by_name(real_gpu):
    ours, _, (x, (h0, c0), _) = CASES["two directions"].draw(real_gpu)
    on_cpu, elsewhere = copy.deepcopy(ours).cpu(), "expected a tensor on device 0, got one on the CPU"
    with pytest.raises(RuntimeError, match="lengths: expected a 1D CPU int64 tensor"):
        on_cpu(x.cpu(), lengths=torch.tensor([6, 2, 1], device=real_gpu))
    for module, given in ((ours, x.cpu()), (on_cpu, x)):
        with pytest.raises(RuntimeError, match="device"):
            module(given)
    for hx, name in (((h0.cpu(), c0), "h0"), ((h0, c0.cpu()), "c0")):
        with pytest.raises(RuntimeError, match=f"{name}: {elsewhere}"):
            ours(x, hx)
    ours.weight_hh_l0_reverse = on_cpu.weight_hh_l0_reverse
    with pytest.raises(RuntimeError, match=rf"weight_hh\[1\]: {elsewhere}"):
        ours(x)


def test_lengths_on_the_gpu_give_the_bits_of_lengths_on_the_cpu(dtype, real_gpu):
    _, _, (x, hx, there) = CASES["lengths on the GPU"].draw(real_gpu, dtype)
    ours = pymtl.LSTM(5, 33, bidirectional=True, device=real_gpu, dtype=dtype)
    # How many rows there are may change the order of a product's sums, which is no matter where all are exact.
    with torch.no_grad():
        for tensor, unit in ((x, 8), (ours.weight_ih_l0, 64), (ours.weight_ih_l0_reverse, 64)):
            tensor.copy_((tensor * unit).round() / unit)
    for states in (None, tuple(state[:2] for state in hx)):
        assert_same_bits(inferred(ours, x, states, there), inferred(ours, x, states, RAGGED))


def test_a_sequence_without_a_token_keeps_its_state(dtype, real_gpu):
    ours, _, (x, hx, _) = Case(states=True).draw(real_gpu, dtype)
    found = inferred(ours, x, hx, torch.tensor([9, 0, -3], device=real_gpu))
    assert found["output"][:, 0].any(-1).all()
    assert not found["output"][:, 1:].any()
    assert all(torch.equal(found[n][:, 1:], state[:, 1:]) for n, state in zip(("h_n", "c_n"), hx))


@pytest.mark.parametrize("name", ["sorted", NAMES[0], NAMES[3]])
def test_nothing_waits_for_the_gpu(name, dtype, real_gpu):
    ours, _, given = CASES[name].draw(real_gpu, dtype)
    for mode in ("default", "error"):  # the first run may wait, to ask the driver
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sum(result.sum() for result in call(ours, *given).values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_recorded_graph_gives_the_bits_of_eager_code(name, dtype, real_gpu):
    ours, _, given = CASES[name].draw(real_gpu, dtype)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inferred(ours, *given)
    with torch.cuda.graph(graph, stream=stream):
        recorded = inferred(ours, *given)
    for lengths in (RAGGED, [1, 2, 3, 4, 5]):
        given[0].normal_()
        if given[2] is not None:
            given[2].copy_(torch.tensor(lengths))
        graph.replay()
        assert_same_bits(recorded, inferred(ours, *given))


@pytest.mark.parametrize(("name", "message"), [("sorted", "batch_sizes"), ("lengths", "batch_sizes|graph capture")])
def test_sizes_on_the_cpu_are_refused_while_a_graph_is_recorded(name, message, real_gpu):
    ours, _, given = CASES[name].draw(real_gpu)
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        inferred(ours, *given)
    inferred(ours, *given)  # nothing is broken


@various
def test_another_stream_gives_the_same_bits(name, dtype, real_gpu):
    ours, _, (x, *rest) = CASES[name].draw(real_gpu, dtype)
    expected = results(ours, x, *rest)
    late, stream = torch.zeros_like(data_of(x)), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that goes to another stream reads zeros
        late.copy_(data_of(x))
        assert_same_bits(results(ours, with_data(x, late), *rest), expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN tanh"])
def test_what_no_kernel_takes_runs_as_torchs_own(kind, dtype, real_gpu):
    x = torch.randn(6, 3, 5).to(real_gpu, dtype)
    hidden_size = torch.ops.pymtl.rnn_hidden_size_limit(x) + 1 if kind == "LSTM" else 20
    ours, theirs = pair(kind, 5, hidden_size, device=real_gpu, dtype=dtype)
    assert not ours.kernels_take(x)
    with torch.no_grad():
        assert_same_bits(named(*ours(x)), named(*theirs(x)))
        assert_same_bits(named(*ours(x, lengths=[2, 6, 1])), named(*by_packing([2, 6, 1], theirs, x)))
