"""Batch sizes on a GPU: nobody looks at them, so there may be more rows than tokens, T*B where nothing else tells B.

On the host sizes pass for being on the GPU where PYMTL_SIZES_ON_GPU says so.
"""

import pytest
import torch

from pymtl import ops
from pymtl.ops.rnn_arguments import cell_of

pytestmark = pytest.mark.cuda

LENGTHS = torch.tensor([2, 5, 1, 5, 0, 3])
STEPS = 6


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    """Moves sizes or indices to the GPU, and for the rest of the test says that sizes are there."""
    return (lambda tensor: tensor.to(gpu)) if gpu.type == "cuda" else (lambda tensor: tensor)


def order_of(on_gpu):
    sorted_lengths, indices = LENGTHS.sort(descending=True, stable=True)
    sizes = (sorted_lengths.unsqueeze(0) > torch.arange(STEPS).unsqueeze(1)).sum(1)
    return ops.PackingOrder(on_gpu(sizes), on_gpu(indices), on_gpu(indices.argsort()))


def weights_of(gpu, size, dtype, mode="LSTM"):
    def drawn(*shape):
        return [torch.randn(*shape, device=gpu).div(3).to(dtype).requires_grad_() for _ in range(2)]

    rows = cell_of(mode).gates * size
    return ops.RNNWeights(drawn(rows, 4), drawn(rows, size), drawn(rows), drawn(rows), [False, True], mode)


def is_close(ours, theirs):
    """How many rows there are may change the order of the sums of a product over them."""
    bound = 4 * torch.finfo(theirs.dtype).eps * theirs.abs().max() if theirs.numel() > 0 else 0
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mode", "options"), [("LSTM", ""), ("LSTM", "dz"), ("GRU", ""), ("RNN_TANH", "d"), ("GRU", "z")]
)
def test_rows_behind_the_last_token_change_nothing(gpu, on_gpu, mode, options, dtype, monkeypatch):
    size = 9
    held = mode == "LSTM" and options == ""  # by one kernel, which goes over no other rows
    same = torch.equal if held else is_close
    padded = torch.randn(STEPS, len(LENGTHS), 4, device=gpu).to(dtype)
    h0, c0 = (torch.randn(2, len(LENGTHS), size, device=gpu).to(dtype).requires_grad_() for _ in range(2))
    weights = weights_of(gpu, size, dtype, mode)
    if held:  # how many rows a product has may change the order of its sums, which is no matter where all are exact
        with torch.no_grad():
            for tensor, unit in ((padded, 8), *((weight, 64) for weight in weights.weight_ih)):
                tensor.copy_((tensor * unit).round() / unit)
    padded.requires_grad_()
    order = order_of(on_gpu)
    states = {"h0": h0, "c0": c0} if mode == "LSTM" else {"h0": h0}
    factors = (torch.rand(2, len(LENGTHS), size, device=gpu) < 0.7).to(dtype) / 0.7 if "d" in options else None
    kept = (torch.rand(STEPS * len(LENGTHS), 2 * size, device=gpu) < 0.3).to(dtype) if "z" in options else None
    leaves = [padded, *states.values(), *weights.tensors()]

    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    packed = ops.pack(padded, order)
    assert packed.shape[0] == padded.shape[0] * padded.shape[1]
    output, *last = ops.rnn(packed, order.batch_sizes, weights, **states, masks=ops.RNNMasks(factors, kept))
    last = last[: len(states)]
    back = ops.unpack(output, order)
    seeds = [torch.randn_like(t) for t in (back, *last)]
    found = list(torch.autograd.grad([back, *last], leaves, seeds))
    found[0], seed = ops.pack(found[0], order), ops.pack(seeds[0], order)

    # The same without the sequence that has no token, and with sizes on the CPU.
    monkeypatch.delenv("PYMTL_SIZES_ON_GPU")
    alive = int(order.batch_sizes[0])
    tokens = int(order.batch_sizes.sum())
    sizes = order.batch_sizes[:5].cpu()
    leaves[0] = packed.detach()[:tokens].requires_grad_()
    here = {name: state[:, :alive] for name, state in states.items()}
    masks = ops.RNNMasks(None if factors is None else factors[:, :alive], None if kept is None else kept[:tokens])
    output, *expected = ops.rnn(leaves[0], sizes, weights, **here, masks=masks)
    for state, ours, theirs in zip(states.values(), last, expected):
        assert same(ours[:, :alive], theirs)
        assert torch.equal(ours[:, alive:], state[:, alive:])
    for b, length in enumerate(LENGTHS):
        place = int(order.unsorted_indices[b])
        starts = [int(order.batch_sizes[:t].sum()) for t in range(length)]
        own = torch.stack([output[start + place] for start in starts]) if length > 0 else output[:0]
        assert same(back[:length, b], own)
        assert not back[length:, b].any()
    above = [seed[:tokens], *(seed_of_state[:, :alive] for seed_of_state in seeds[1:])]
    gradients = torch.autograd.grad([output, *expected[: len(states)]], leaves, above)
    for name, ours, theirs in zip(("input", *states, *"wwwwbbbb"), found, gradients, strict=True):
        if name == "input":
            assert not ours[tokens:].any()
            ours = ours[:tokens]
        elif name in states:
            ours, theirs = ours[:, :alive], theirs[:, :alive]
        assert is_close(ours, theirs), name


def test_second_derivatives_read_the_masks_of_tokens_alone(gpu, on_gpu, monkeypatch):
    order, weights = order_of(on_gpu), weights_of(gpu, 3, torch.float64, "GRU")
    packed = torch.randn(STEPS * len(LENGTHS), 4, device=gpu, dtype=torch.float64, requires_grad=True)
    kept = (torch.rand(len(packed), 6, device=gpu) < 0.3).double()
    found = []
    for on_there in (True, False):
        tokens = len(packed) if on_there else int(LENGTHS.sum())
        sizes = order.batch_sizes if on_there else order.batch_sizes[:5].cpu()
        monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1" if on_there else "")
        output, _, _ = ops.rnn(packed[:tokens], sizes, weights, masks=ops.RNNMasks(None, kept[:tokens]))
        found.append(second_of(output, [packed, *weights.tensors()]))
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_without_initial_states_the_rows_tell_how_many_sequences_there_are(mode, gpu, on_gpu, monkeypatch):
    order, weights = order_of(on_gpu), weights_of(gpu, 3, torch.float32, mode)
    batch = len(LENGTHS)
    packed = torch.randn(STEPS * batch, 4, device=gpu)
    zeros = torch.zeros(2, batch, 3, device=gpu)
    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    found = ops.rnn(packed, order.batch_sizes, weights)
    expected = ops.rnn(packed, order.batch_sizes, weights, zeros)
    assert found[1].shape == (2, batch, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
    with pytest.raises(RuntimeError, match=r"input: expected as many rows for each of 6 steps .* got 35 in all"):
        ops.rnn(packed[1:], order.batch_sizes, weights)


def test_pooling_takes_sizes_on_the_cpu_alone(gpu, on_gpu, monkeypatch):
    order = order_of(on_gpu)
    packed = torch.randn(STEPS * len(LENGTHS), 4, device=gpu)
    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    with pytest.raises(RuntimeError, match="batch_sizes: expected them on the CPU, got them on the GPU"):
        ops.pool(packed, order.batch_sizes, "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "all paths"])
def test_a_chain_ends_with_its_tokens_and_an_empty_one_gives_nothing(tagged, dtype, gpu, on_gpu, monkeypatch):
    classes, order = 5, order_of(on_gpu)
    padded = torch.randn(STEPS, len(LENGTHS), classes, device=gpu, dtype=dtype)
    tags = torch.randint(classes, (STEPS, len(LENGTHS)), device=gpu)
    parameters = [torch.randn(*size, device=gpu, dtype=dtype).requires_grad_() for size in ((5,), (5,), (5, 5))]
    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    leaf = ops.pack(padded, order).requires_grad_()
    flat = ops.pack(tags, order) if tagged else None
    result = ops.crf(leaf, order.batch_sizes, flat, *parameters)
    seed = torch.randn_like(result)
    gradients = torch.autograd.grad(result, [leaf, *parameters], seed)
    best, scores = ops.crf_decode(leaf, order.batch_sizes, *(p.detach() for p in parameters))
    second = second_of(ops.crf(leaf, order.batch_sizes, flat, *parameters), [leaf, *parameters])
    monkeypatch.delenv("PYMTL_SIZES_ON_GPU")

    alive, tokens = int((LENGTHS > 0).sum()), int(LENGTHS.sum())
    here, sizes = leaf.detach()[:tokens].requires_grad_(), order.batch_sizes[:5].cpu()
    given = flat[:tokens] if tagged else None
    expected = ops.crf(here, sizes, given, *parameters)
    assert torch.equal(result[:alive], expected)
    assert not result[alive:].any()
    of_leaf, *others = gradients
    of_here, *expected_others = torch.autograd.grad(expected, [here, *parameters], seed[:alive])
    assert torch.equal(of_leaf[:tokens], of_here)
    assert not of_leaf[tokens:].any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, expected_others, strict=True))
    best_here, scores_here = ops.crf_decode(here, sizes, *(p.detach() for p in parameters))
    assert torch.equal(best[:tokens], best_here)
    assert torch.equal(scores[:alive], scores_here)
    assert not scores[alive:].any()
    second_here = second_of(ops.crf(here, sizes, given, *parameters), [here, *parameters])
    for ours, theirs in zip(second, second_here, strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-5)


def second_of(result, leaves):
    first = torch.autograd.grad(result.sin().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
