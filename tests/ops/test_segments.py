"""The index work of sequences that begin anew: against the reference, and what it refuses."""

import pytest
import torch
from torch.library import opcheck

from pymtl import ops, reference

SHAPES = [(1, 1), (1, 7), (5, 1), (4, 9), (40, 33), (0, 3)]
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])


def samples(batch, steps, share, ragged, batch_first):
    generator = torch.Generator().manual_seed(batch * 100 + steps)
    resets = torch.rand(batch, steps, generator=generator) < share
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator) if ragged else None
    return resets if batch_first else resets.t(), lengths


@each_layout
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("batch", "steps"), SHAPES, ids=str)
def test_the_order_is_the_references(batch, steps, share, ragged, batch_first):
    resets, lengths = samples(batch, steps, share, ragged, batch_first)
    before = resets.clone()
    found = ops.segment_order(resets, lengths, batch_first)
    for name, own, expected in zip(
        found._fields, found, reference.segment_order(resets, lengths, batch_first), strict=True
    ):
        assert own.dtype == torch.int64
        assert torch.equal(own, expected), name
    assert torch.equal(resets, before)
    tokens = batch * steps if lengths is None else int(lengths.sum())
    assert found.tokens.unique().numel() == tokens == int(found.batch_sizes.sum())


@each_layout
def test_packing_and_unpacking_go_back_and_forth(batch_first):
    resets, lengths = samples(4, 9, 0.3, True, batch_first)
    segments = ops.segment_order(resets, lengths, batch_first)
    padded = torch.randn(*resets.shape, 3)
    packed = segments.pack(padded)
    back = segments.unpack(packed, *resets.shape)
    valid = torch.arange(9) < lengths.unsqueeze(1)
    valid = (valid if batch_first else valid.t()).unsqueeze(-1)
    assert torch.equal(back, torch.where(valid, padded, 0.0))


@each_layout
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_opcheck_of_segment_order(ragged, batch_first):
    resets, lengths = samples(4, 9, 0.3, ragged, batch_first)
    opcheck(torch.ops.pymtl.segment_order.default, (resets.contiguous(), lengths, batch_first))


@pytest.mark.parametrize(
    ("resets", "lengths", "says"),
    [
        (torch.zeros(3, dtype=torch.bool), None, "resets: expected two dimensions, got 1"),
        (torch.zeros(3, 4), None, "resets: expected dtype Bool, got Float"),
        (torch.zeros(3, 0, dtype=torch.bool), None, "resets: expected at least one step, got none"),
        (torch.zeros(3, 4, dtype=torch.bool), [1, 2], r"lengths: expected size \[3\], got \[2\]"),
        (
            torch.zeros(3, 4, dtype=torch.bool),
            [1, 5, 2],
            "lengths: expected lengths from 1 to 4, .* got 5 at position 1",
        ),
        (
            torch.zeros(3, 4, dtype=torch.bool),
            [1, 0, 2],
            "lengths: expected lengths from 1 to 4, .* got 0 at position 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(resets, lengths, says):
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(RuntimeError, match=says):
        ops.segment_order(resets, lengths, True)
