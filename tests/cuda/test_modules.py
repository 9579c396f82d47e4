"""What the modules take beyond torch's, on a GPU: resets, and one direction that reads from the end."""

import itertools

import pytest
import torch
from modules import in_double, named, seeds_for
from parity import assert_parity
from torch import nn

import pymtl

pytestmark = pytest.mark.cuda
I, H, T, B = 5, 33, 9, 4
MODULES = {
    "LSTM": (pymtl.LSTM, nn.LSTM),
    "GRU": (pymtl.GRU, nn.GRU),
    "RNN": (pymtl.RNN, nn.RNN),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request, gpu, monkeypatch):
    if gpu.type == "cpu":
        monkeypatch.setattr("pymtl.ops.dtypes._OF_THE_CPU", (torch.float32, torch.float16))
    return request.param


def by_pieces(plain, x, resets, reverse):
    """torch's module over each piece of each sequence alone, turned around if it is read from the end."""
    outputs, states = [], []
    for row in range(x.shape[1]):
        cuts = [0, *(t for t in range(1, len(x)) if resets[t, row]), len(x)]
        pieces = [x[start:end, row] for start, end in itertools.pairwise(cuts)]
        found = [plain(piece.flip(0) if reverse else piece) for piece in pieces]
        outputs.append(torch.cat([output.flip(0) if reverse else output for output, _ in found]))
        states.append(found[0 if reverse else -1][1])
    if isinstance(states[0], tuple):
        return torch.stack(outputs, 1), tuple(torch.stack(each, 1) for each in zip(*states))
    return torch.stack(outputs, 1), torch.stack(states, 1)


def with_gradients(call, module, x):
    x = x.detach().requires_grad_()
    found = named(*call(module, x))
    seeds = [seed.to(found[name]) for name, seed in seeds_for(found).items()]
    leaves = {"input": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), seeds)
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["from the start", "from the end"])
@pytest.mark.parametrize("kind", MODULES)
def test_each_piece_is_read_as_a_sequence_of_its_own(kind, reverse, dtype, gpu):
    make, torchs = MODULES[kind]
    sizes = {"num_layers": 2, "device": gpu, "dtype": dtype}
    ours, theirs = make(I, H, **sizes, reverse=reverse), torchs(I, H, **sizes)
    theirs.load_state_dict(ours.state_dict())
    x, resets = torch.randn(T, B, I).to(gpu, dtype), torch.rand(T, B) < 0.3

    def by_ours(module, x):
        return module(x, resets=resets.to(x.device))

    def by_torch(module, x):
        return by_pieces(module, x, resets, reverse)

    exact = with_gradients(by_torch, in_double(theirs).cpu(), x.double().cpu())
    assert_parity(with_gradients(by_ours, ours, x), with_gradients(by_torch, theirs, x), exact)


@pytest.mark.parametrize("hidden_size", [33, 1100], ids=["held", "too large to be held"])
def test_who_reads_from_the_end(hidden_size, real_gpu):
    x = torch.randn(T, B, I, device=real_gpu, dtype=torch.bfloat16)
    module = pymtl.LSTM(I, hidden_size, device=real_gpu, dtype=torch.bfloat16, reverse=True)
    assert module.route(x).runner == "kernels"
    assert pymtl.GRU(I, hidden_size, device=real_gpu, dtype=torch.bfloat16, reverse=True).route(x).runner == "kernels"


def test_freed_memory_is_refused_by_name(gpu):
    module, x = pymtl.LSTM(I, H, device=gpu), torch.randn(T, B, I, device=gpu)
    x.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="input"):
        module(x)
