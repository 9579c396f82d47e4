"""Recurrences that a GPU runs step by step, of all cells, options and dtypes; cuda_on_host runs these on the CPU."""

import sys
from dataclasses import replace

import pytest
import torch
from modules import by_packing, in_double, named, pair, tuple_of
from parity import assert_parity, assert_same_bits
from samples import (
    B,
    F,
    RNNCase,
    backward_arguments,
    function_of,
    random_like,
    raw_arguments,
    rnn_sample,
    run_ours,
    run_reference,
    shifted,
    spread,
    transposed,
    with_gradients,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import pymtl
from pymtl import ops

pytestmark = pytest.mark.cuda
ON_HOST = "cuda_on_host" in sys.modules
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def comparable(gpu, monkeypatch):
    """Plain PyTorch on a GPU computes in float32, not in TF32, and so does nn.LSTM then. On the host the kernels get
    float16, too."""
    if gpu.type == "cpu":
        monkeypatch.setattr("pymtl.ops.dtypes._OF_THE_CPU", (torch.float32, torch.float64, torch.float16))
    else:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


def on_cpu(results):
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


PLAIN = [
    RNNCase(3, 5, mode="GRU"),
    RNNCase(1, 1, steps=1, batch=1, reverse=(F,), mode="GRU"),
    RNNCase(5, 33, lengths=(6, 3, 3, 1), reverse=(B, F, B, B), h0=True, mode="GRU"),
    RNNCase(4, 9, lengths=(5, 1), inputs=2, bias=False, mode="GRU"),
    RNNCase(4, 17, lengths=(6, 3, 3, 1), h0=True, mode="RNN_TANH"),
    RNNCase(3, 70, steps=7, batch=2, bias=False, mode="RNN_RELU"),
    RNNCase(3, 300, steps=3, batch=2, h0=True, mode="GRU"),  # more units than a block has threads
]
STRIDED = [
    RNNCase(3, 5, reverse=(F,), mode="GRU", h0=True),
    RNNCase(3, 17, lengths=(6, 3, 1), reverse=(B,), zoneout="h", c0=True),
    RNNCase(3, 17, reverse=(B,), layer_norm=True, h0=True),
]
MORE_THAN_A_LAUNCH_TAKES = RNNCase(2, 3, lengths=(4, 2), reverse=(F, B, B) * 11, h0=True, mode="GRU")
MASKED = [
    RNNCase(3, 5, dropout=True),
    RNNCase(5, 33, lengths=(6, 3, 3, 1), h0=True, c0=True, dropout=True, zoneout="hc"),
    RNNCase(5, 33, lengths=(6, 3, 3, 1), c0=True, bias=False, zoneout="HC"),
    RNNCase(3, 5, h0=True, zoneout="c"),
    RNNCase(3, 17, lengths=(6, 3, 3, 1), h0=True, mode="GRU", dropout=True, zoneout="h"),
    RNNCase(3, 5, mode="RNN_TANH", zoneout="h", h0=True),
    RNNCase(3, 5, mode="RNN_RELU", dropout=True, zoneout="H"),
]
NORMALISED = [
    RNNCase(3, 5, layer_norm=True),
    RNNCase(5, 33, lengths=(6, 3, 3, 1), h0=True, c0=True, layer_norm=True, dropout=True, zoneout="hc"),
    RNNCase(3, 300, steps=3, batch=2, layer_norm=True, bias=False),
    RNNCase(3, 17, lengths=(6, 3, 3, 1), h0=True, mode="GRU", layer_norm=True, zoneout="H"),
    RNNCase(3, 300, steps=3, batch=2, mode="GRU", layer_norm=True),
    RNNCase(3, 17, mode="RNN_TANH", layer_norm=True, zoneout="h", h0=True),
    RNNCase(3, 5, mode="RNN_RELU", layer_norm=True, dropout=True),
]


@each_dtype
@pytest.mark.parametrize("case", PLAIN + MASKED, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_pytorch(case, dtype, gpu):
    sample = rnn_sample(case).to(gpu, dtype)
    seeds = random_like(run_ours(sample))
    truth = with_gradients(run_reference, sample.to("cpu", torch.float64), seeds)
    ours, theirs = (on_cpu(with_gradients(run, sample, seeds)) for run in (run_ours, run_reference))
    assert_parity(ours, theirs, truth)
    assert_same_bits(on_cpu(with_gradients(run_ours, sample, seeds)), ours)


@pytest.mark.parametrize("case", [*PLAIN, MORE_THAN_A_LAUNCH_TAKES, *MASKED, *NORMALISED], ids=str)
def test_in_float64_results_and_gradients_are_those_of_plain_pytorch(case, gpu):
    sample = rnn_sample(case, torch.float64)
    seeds = random_like(run_ours(sample.to(gpu)))
    ours, expected = with_gradients(run_ours, sample.to(gpu), seeds), with_gradients(run_reference, sample, seeds)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-11 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(ours[name].cpu(), value, rtol=1e-10, atol=bound)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_tensors_of_any_strides_give_the_same_numbers(case, layout, gpu):
    sample = rnn_sample(case).to(gpu)
    seeds = random_like(run_ours(sample))
    expected = with_gradients(run_ours, sample, seeds)
    masks = ops.RNNMasks(*(None if mask is None else layout(mask) for mask in sample.masks))
    moved = replace(sample.map(lambda _, tensor: layout(tensor)), masks=masks)
    leaves = moved.map(lambda _, tensor: tensor.requires_grad_())
    results = run_ours(leaves)
    above = [seeds[name].to(gpu) for name in results]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.tensors().values()), above)
    results |= {f"gradient of {name}": gradient for name, gradient in zip(leaves.tensors(), gradients)}
    torch.testing.assert_close(on_cpu(results), on_cpu(expected))


def test_one_number_may_stand_for_a_whole_bias(gpu):
    sample = rnn_sample(STRIDED[0]).to(gpu)
    whole = sample.map(lambda name, tensor: torch.full_like(tensor, 0.25) if name.startswith("bias") else tensor)
    one = sample.map(
        lambda name, tensor: torch.tensor(0.25, device=gpu).expand(tensor.shape) if name.startswith("bias") else tensor
    )
    assert_same_bits(on_cpu(run_ours(one)), on_cpu(run_ours(whole)))


def test_sums_beyond_float16_leave_finite_gradients(gpu):
    sample = rnn_sample(RNNCase(3, 64, mode="GRU", h0=True)).to(gpu, torch.float16)
    large = sample.map(lambda name, tensor: torch.full_like(tensor, 1100.0) if name.startswith("weight_hh") else tensor)
    large = replace(large, h0=torch.ones_like(large.h0))
    found = with_gradients(run_ours, large, random_like(run_ours(large)))
    assert all(tensor.isfinite().all() for name, tensor in found.items() if not name.startswith("gradient of weight"))


@each_dtype
@pytest.mark.parametrize("case", NORMALISED, ids=str)
def test_normalised_results_and_gradients_are_close_to_float64(case, dtype, gpu):
    # Where a variance is small, normalising multiplies every rounding error by hundreds.
    sample = rnn_sample(case).to(gpu, dtype)
    seeds = random_like(run_ours(sample))
    truth = with_gradients(run_reference, sample.to("cpu", torch.float64), seeds)
    ours, theirs = (on_cpu(with_gradients(run, sample, seeds)) for run in (run_ours, run_reference))
    for name, value in truth.items():
        error, allowed = ((found[name].double() - value).abs().max().item() for found in (ours, theirs))
        assert error <= 8 * allowed + 16 * torch.finfo(dtype).eps * value.abs().max().item(), name
    assert_same_bits(on_cpu(with_gradients(run_ours, sample, seeds)), ours)


TINY = [replace(case, hidden_size=3, reverse=case.reverse[:2]) for case in (PLAIN[2], PLAIN[4], *MASKED, *NORMALISED)]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_and_gradgradcheck(case, gpu):
    sample = rnn_sample(case, torch.float64).to(gpu)
    function = function_of(sample, list(sample.tensors()))
    assert gradcheck(*function, fast_mode=True)
    assert gradgradcheck(*function, fast_mode=True)


@pytest.mark.parametrize("case", TINY[1::3], ids=str)
def test_opcheck(case, gpu):
    sample = rnn_sample(case).to(gpu)
    opcheck(torch.ops.pymtl.rnn_training.default, raw_arguments(sample))
    opcheck(torch.ops.pymtl.rnn_backward.default, backward_arguments(sample))


@pytest.mark.parametrize("part", ["input", "weight_hh[1]", "bias_ih[0]", "h0"])
def test_gradients_where_only_one_input_requires_one(part, gpu):
    sample = rnn_sample(replace(PLAIN[2], hidden_size=3), torch.float64).to(gpu)
    assert gradcheck(*function_of(sample, [part]))


@pytest.mark.parametrize("case", [PLAIN[0], MASKED[0], NORMALISED[0]], ids=str)
def test_no_sequences_give_empty_results_and_zero_gradients(case, gpu):
    sample = rnn_sample(replace(case, batch=0)).to(gpu)
    seeds = random_like(run_ours(sample))
    found = with_gradients(run_ours, sample, seeds)
    assert found["output"].shape == (5, 0, 10)
    assert all(not gradient.any() for name, gradient in found.items() if name.startswith("gradient of"))


REFUSED = {
    "a GRU's c0": (RNNCase(3, 5, mode="GRU"), {"c0": torch.zeros(2, 3, 5)}, "c0: expected None"),
    "h0 of another size": (RNNCase(3, 5, mode="GRU"), {"h0": torch.zeros(2, 3, 6)}, r"h0: expected size \[2, 3, 5\]"),
    "dropout of another size": (RNNCase(3, 5), {"dropout": torch.ones(2, 3, 1)}, r"dropout: expected size \[2, 3, 5\]"),
    "zoneout of another size": (RNNCase(3, 5), {"zoneout_h": torch.ones(9)}, r"zoneout_h: expected size \[10\]"),
    "zoneout of another dtype": (RNNCase(3, 5), {"zoneout_c": torch.ones(10).double()}, "zoneout_c: expected dtype"),
}


@pytest.mark.parametrize(("case", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_by_name(case, arguments, message, gpu):
    sample = rnn_sample(case).to(gpu)
    arguments = {name: tensor.to(gpu) for name, tensor in arguments.items()}
    masks = ops.RNNMasks(**{name: t for name, t in arguments.items() if name in ops.RNNMasks._fields})
    states = {name: t for name, t in arguments.items() if name in ("h0", "c0")}
    with pytest.raises(RuntimeError, match=message):
        ops.rnn(sample.input, None, sample.weights, masks=masks, **states)


# The modules.

LENGTHS = [4, 6, 1, 6, 2]
KINDS = {
    "GRU": ("GRU", 20, torch.float32),
    "GRU in half precision": ("GRU", 20, torch.float16),
    "RNN": ("RNN tanh", 20, torch.float32),
    "LSTM in double precision": ("LSTM", 20, torch.float64),
    "large LSTM": ("LSTM", 1100, torch.float32),
    "large LSTM in bfloat16": ("LSTM", 1100, torch.bfloat16),
}
each_kind = pytest.mark.parametrize(("kind", "hidden_size", "dtype"), KINDS.values(), ids=KINDS)


def module_pair(kind, hidden_size, dtype, device):
    return pair(kind, 5, hidden_size, num_layers=2, bidirectional=True, device=device, dtype=dtype)


def module_results(module, x, lengths):
    """With all gradients, on the CPU; of torch's module by packing."""
    leaves = {"input": x.detach().requires_grad_(), **dict(module.named_parameters())}
    if isinstance(module, pymtl.recurrent.Recurrent):
        found = named(*module(leaves["input"], lengths=lengths))
    else:
        found = named(*by_packing(lengths.cpu(), module, leaves["input"]))
    loss = sum(result.sin().sum() for result in found.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return on_cpu(found | {f"gradient of {name}": g for name, g in zip(leaves, gradients)})


@each_kind
def test_lengths_on_the_gpu_are_taken_where_torch_runs_all_else(kind, hidden_size, dtype, gpu):
    ours, theirs = module_pair(kind, hidden_size, dtype, gpu)
    x, lengths = torch.randn(6, 5, 5).to(gpu, dtype), torch.tensor(LENGTHS, device=gpu)
    found, expected = module_results(ours, x, lengths), module_results(theirs, x, lengths)
    if dtype == torch.float64:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11 * max(1.0, value.abs().max().item()))
    else:
        assert_parity(found, expected, module_results(in_double(theirs).cpu(), x.cpu().double(), lengths.cpu()))


LASTING = {  # in evaluation, too
    "zoneout": {"zoneout": 0.2},
    "layer norm": {"layer_norm": True},
    "both": {"zoneout": 0.2, "layer_norm": True},
}
OPTIONS = {
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "weight-drop": {"weight_drop": 0.3},
    "zoneout": {"zoneout": 0.2},
    "layer norm": {"layer_norm": True},
    "all": {"recurrent_dropout": 0.3, "weight_drop": 0.3, "zoneout": 0.2, "layer_norm": True},
}


@pytest.mark.parametrize("options", LASTING.values(), ids=LASTING)
@pytest.mark.parametrize("make", [pymtl.LSTM, pymtl.GRU, pymtl.RNN])
def test_modules_with_options_compute_what_they_compute_on_the_cpu(make, options, real_gpu):
    here = make(5, 20, num_layers=2, bidirectional=True, dtype=torch.float64, **options).eval()
    there = make(5, 20, num_layers=2, bidirectional=True, dtype=torch.float64, **options).eval()
    there.load_state_dict(here.state_dict())
    there.to(real_gpu)
    x = torch.randn(6, 5, 5, dtype=torch.float64)
    for lengths in (None, LENGTHS):
        with torch.no_grad():
            found, expected = named(*there(x.to(real_gpu), lengths=lengths)), named(*here(x, lengths=lengths))
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [pymtl.LSTM, pymtl.GRU, pymtl.RNN])
def test_modules_with_options_learn(make, options, gpu):
    encoder = make(5, 20, bidirectional=True, device=gpu, **options)
    x, target = torch.randn(6, 5, 5, device=gpu), torch.randn(6, 5, 40, device=gpu).tanh()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (encoder(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.2, "layer_norm": True}, {"recurrent_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("make", [pymtl.LSTM, pymtl.GRU])
def test_nothing_waits_for_the_gpu(make, options, real_gpu):
    encoder = make(5, 1100, bidirectional=True, device=real_gpu, **options)
    x, lengths = torch.randn(6, 5, 5, device=real_gpu), torch.tensor(LENGTHS, device=real_gpu)
    for mode in ("default", "error"):  # the first run may wait, to ask the driver
        torch.cuda.set_sync_debug_mode(mode)
        try:
            output, state = encoder(x, lengths=lengths)
            (output.sum() + sum(s.sum() for s in tuple_of(state))).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@each_kind
def test_a_recorded_graph_gives_the_bits_of_eager_code(kind, hidden_size, dtype, real_gpu):
    ours, _ = module_pair(kind, hidden_size, dtype, real_gpu)
    x, lengths = torch.randn(6, 5, 5, device=real_gpu).to(dtype), torch.tensor(LENGTHS, device=real_gpu)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            ours(x, lengths=lengths)
        with torch.cuda.graph(graph, stream=stream):
            recorded = named(*ours(x, lengths=lengths))
        for new in (LENGTHS, [1, 2, 3, 4, 5]):
            x.normal_()
            lengths.copy_(torch.tensor(new))
            graph.replay()
            assert_same_bits(recorded, named(*ours(x, lengths=lengths)))
