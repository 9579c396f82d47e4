"""Batches of packed tokens, and loops over single sequences through torch.nn.LSTM to hold sharing schemes to."""

import pytest
import torch
from torch import nn

INPUT, H = 5, 3
LENGTHS = [5, 3, 3, 1]
TASKS = ("a", "b", "c")
BATCHES = {"ragged": LENGTHS, "one sequence": [4], "one step": [1, 1, 1], "one token": [1], "equal": [3, 3]}
every_batch = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
every_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["unidirectional", "bidirectional"])
every_depth = pytest.mark.parametrize("num_layers", [1, 2], ids=["1 layer", "2 layers"])


def batch(lengths=LENGTHS, size=INPUT, dtype=torch.float64):
    """Packed random tokens, and the batch sizes."""
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
    return torch.randn(int(sizes.sum()), size, dtype=dtype, requires_grad=True), sizes


def unpacked(data, sizes):
    """A tensor for each sequence; the packed tokens by loops."""
    steps = data.split(sizes.tolist())
    return [torch.stack([step[row] for step in steps if len(step) > row]) for row in range(int(sizes[0]))]


def packed(sequences):
    longest = max(map(len, sequences))
    return torch.stack([s[t] for t in range(longest) for s in sequences if len(s) > t])


def finals(sequences, directions):
    """Each direction's own final state: the forward one's at the last token, the backward one's at the first."""
    half = sequences[0].shape[-1] // directions
    if directions == 1:
        return torch.stack([s[-1] for s in sequences])
    return torch.stack([torch.cat([s[-1, :half], s[0, half:]]) for s in sequences])


def walk(encoder, sequences):
    """What torch.nn.LSTM with the very parameters of ``encoder`` makes of each sequence alone."""
    twin = nn.LSTM(
        encoder.input_size,
        encoder.hidden_size,
        encoder.num_layers,
        encoder.bias,
        bidirectional=encoder.bidirectional,
        dtype=encoder.weight_hh_l0.dtype,
    )
    for name, parameter in encoder.named_parameters():
        setattr(twin, name, parameter)
    return [twin(s)[0] for s in sequences]


def gradients(results, leaves):
    """Of a fixed random combination of ``results``, with respect to ``leaves``."""
    generator = torch.Generator().manual_seed(5)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def assert_agrees(scheme, oracle, lengths=LENGTHS, tasks=None):
    """Asserts that a scheme's states, final states and gradients are those that ``oracle`` gives for the sequences."""
    scheme.double().eval()
    data, sizes = batch(lengths)
    states = scheme(data, sizes, tasks).states
    expected = oracle(unpacked(data, sizes))
    expected = {task: expected[task] for task in (tasks or scheme.tasks)}
    assert set(states) == set(expected)
    ours, theirs = [], []
    for task, sequences in expected.items():
        state = states[task]
        assert state.tokens.shape == (len(data), scheme.features_of(task))
        ours += [state.tokens, state.pooled("last"), state.pooled("mean"), state.pooled("max")]
        theirs += [packed(sequences), finals(sequences, scheme.directions)]
        theirs += [torch.stack([s.mean(0) for s in sequences]), torch.stack([s.amax(0) for s in sequences])]
    torch.testing.assert_close(ours, theirs)
    leaves = {"data": data} | dict(scheme.named_parameters())
    actual, wanted = (gradients(results, list(leaves.values())) for results in (ours, theirs))
    for name, a, w in zip(leaves, actual, wanted):
        zero = torch.zeros_like(leaves[name])  # no gradient and a gradient of zeros are the same here
        a, w = (zero if g is None else g for g in (a, w))
        torch.testing.assert_close(a, w, msg=lambda text, name=name: f"{name}: {text}")


def directions_of(bidirectional):
    return 2 if bidirectional else 1
