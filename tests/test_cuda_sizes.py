"""Batch sizes on a GPU: nobody looks at them, so there may be more rows than tokens, and h0 tells B.

On the host sizes pass for being on the GPU where PYMTL_SIZES_ON_GPU says so.
"""

import pytest
import torch

from pymtl import ops

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


def weights_of(gpu, size, dtype):
    def drawn(*shape):
        return [torch.randn(*shape, device=gpu).div(3).to(dtype).requires_grad_() for _ in range(2)]

    return ops.RNNWeights(drawn(4 * size, 4), drawn(4 * size, size), drawn(4 * size), drawn(4 * size), [False, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_behind_the_last_token_change_nothing(gpu, on_gpu, dtype, monkeypatch):
    size = 9
    padded = torch.randn(STEPS, len(LENGTHS), 4, device=gpu).to(dtype).requires_grad_()
    h0, c0 = (torch.randn(2, len(LENGTHS), size, device=gpu).to(dtype).requires_grad_() for _ in range(2))
    weights = weights_of(gpu, size, dtype)
    order = order_of(on_gpu)
    leaves = [padded, h0, c0, *weights.tensors()]

    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    packed = ops.pack(padded, order)
    assert packed.shape[0] == padded.shape[0] * padded.shape[1]
    output, h_n, c_n = ops.rnn(packed, order.batch_sizes, weights, h0, c0)
    back = ops.unpack(output, order)
    seeds = [torch.randn_like(t) for t in (back, h_n, c_n)]
    found = list(torch.autograd.grad([back, h_n, c_n], leaves, seeds))
    found[0], seed = ops.pack(found[0], order), ops.pack(seeds[0], order)

    # The same without the sequence that has no token, and with sizes on the CPU.
    monkeypatch.delenv("PYMTL_SIZES_ON_GPU")
    alive = int(order.batch_sizes[0])
    tokens = int(order.batch_sizes.sum())
    sizes = order.batch_sizes[:5].cpu()
    leaves[0] = packed.detach()[:tokens].requires_grad_()
    output, h_last, c_last = ops.rnn(leaves[0], sizes, weights, h0[:, :alive], c0[:, :alive])
    assert torch.equal(h_n[:, :alive], h_last)
    assert torch.equal(h_n[:, alive:], h0[:, alive:])
    assert torch.equal(c_n[:, :alive], c_last)
    for b, length in enumerate(LENGTHS):
        place = int(order.unsorted_indices[b])
        starts = [int(order.batch_sizes[:t].sum()) for t in range(length)]
        own = torch.stack([output[start + place] for start in starts]) if length > 0 else output[:0]
        assert torch.equal(back[:length, b], own)
        assert not back[length:, b].any()
    states = [seeds[1][:, :alive], seeds[2][:, :alive]]
    expected = torch.autograd.grad([output, h_last, c_last], leaves, [seed[:tokens], *states])
    for name, ours, theirs in zip(("input", "h0", "c0", *"wwwwbbbb"), found, expected, strict=True):
        if name == "input":
            assert not ours[tokens:].any()
            ours = ours[:tokens]
        elif name in ("h0", "c0"):
            ours, theirs = ours[:, :alive], theirs[:, :alive]
        assert (
            torch.equal(ours, theirs) or (ours - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()
        )


def test_the_number_of_sequences_has_to_be_told(gpu, on_gpu, monkeypatch):
    order = order_of(on_gpu)
    weights = weights_of(gpu, 3, torch.float32)
    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")
    with pytest.raises(RuntimeError, match="batch_sizes: expected them on the CPU, or h0"):
        ops.rnn(torch.randn(36, 4, device=gpu), order.batch_sizes, weights)
