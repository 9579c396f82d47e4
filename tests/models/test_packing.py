import pytest
import torch
from parity import assert_same_bits
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pymtl
from pymtl.packing import as_lengths

LENGTHS = [[3], [1, 1, 1], [4, 6, 1, 4, 2], [6, 5, 4], [2, 2, 5, 5, 1, 5]]
every_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
both_layouts = pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])


def padded(batch, steps, *features, batch_first=False):
    leading = (batch, steps) if batch_first else (steps, batch)
    return torch.randn(*leading, *features)


@both_layouts
@every_lengths
@pytest.mark.parametrize("features", [(), (3,), (2, 3)], ids=str)
def test_pack_is_pack_padded_sequence(lengths, batch_first, features):
    x = padded(len(lengths), max(lengths), *features, batch_first=batch_first)
    packed = pymtl.pack(x, lengths, batch_first=batch_first)
    assert isinstance(packed, PackedSequence)
    if not features:  # pack_padded_sequence wants features
        x = x.unsqueeze(-1)
    expected = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    assert torch.equal(packed.data, expected.data if features else expected.data.squeeze(-1))
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)
    # Which of two equally long sequences comes first is free.
    order = packed.sorted_indices
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert [lengths[b] for b in order] == sorted(lengths, reverse=True)
    assert torch.equal(order[packed.unsorted_indices], torch.arange(len(lengths)))


@both_layouts
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_comes_back_from_pad_packed_sequence(dtype, batch_first):
    lengths = [4, 6, 1, 4, 2]
    x = padded(5, 6, 3, batch_first=batch_first).mul(10).to(dtype)
    output, counts = pad_packed_sequence(pymtl.pack(x, lengths, batch_first=batch_first), batch_first)
    valid = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    valid = valid if batch_first else valid.t()
    assert output.dtype == dtype
    assert torch.equal(output[valid], x[valid])
    assert not output[~valid].any()
    assert counts.tolist() == lengths


def test_steps_that_no_sequence_reaches_leave_no_batch_size():
    packed = pymtl.pack(padded(3, 9, 2), [2, 4, 3])
    assert packed.batch_sizes.tolist() == [3, 3, 2, 1]
    assert packed.data.shape == (9, 2)


def test_a_tensor_and_a_list_of_lengths_give_the_same():
    x = padded(3, 6, 2)
    for lengths in (torch.tensor([2, 6, 3]), (2, 6, 3)):
        a, b = pymtl.pack(x, lengths), pymtl.pack(x, [2, 6, 3])
        assert all(torch.equal(s, t) for s, t in zip(a, b))


def test_the_gradient_is_that_of_the_tokens_alone():
    x = padded(3, 6, 2).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    seed = torch.randn(9, 2)
    pymtl.pack(x, [2, 4, 3]).data.backward(seed)
    pack_padded_sequence(reference, [2, 4, 3], enforce_sorted=False).data.backward(seed)
    assert_same_bits({"gradient": x.grad}, {"gradient": reference.grad})


def test_padding_is_not_read():
    x = padded(2, 4, 3)
    x[2:, 0] = torch.nan
    assert pymtl.pack(x, [2, 4]).data.isfinite().all()


def test_a_packed_batch_runs_through_nn_lstm_and_ours():
    x, lengths = padded(5, 6, 3), [4, 6, 1, 4, 2]
    for kind in (torch.nn.LSTM, pymtl.LSTM):
        lstm = kind(3, 4, bidirectional=True)
        _, (h, c) = lstm(pymtl.pack(x, lengths))
        _, (h_expected, c_expected) = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert_same_bits({"h": h, "c": c}, {"h": h_expected, "c": c_expected})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([6, 0, 1], "from 1 to 6.* got 0 at position 1"),
        ([6, -1, 1], "from 1 to 6.* got -1 at position 1"),
        ([6, 1, 7], "from 1 to 6.* got 7 at position 2"),
        ([6, 2], "expected 3 lengths.* got 2"),
        ([6, 2, 1, 1], "expected 3 lengths.* got 4"),
        (torch.tensor([[6, 2, 1]]), "1D CPU int64 tensor, got a 2D"),
        (torch.tensor([6.0, 2.0, 1.0]), "1D CPU int64 tensor, got a 1D cpu torch.float32"),
        (torch.tensor([6, 2, 1], device="meta"), "1D CPU int64 tensor, got a 1D meta"),
        (3, "1D CPU int64 tensor, got a 0D"),
    ],
    ids=str,
)
def test_bad_lengths_are_refused_by_name(lengths, message):
    with pytest.raises(RuntimeError, match=f"lengths: .*{message}"):
        pymtl.pack(padded(3, 6, 2), lengths)


def test_as_lengths_keeps_a_fitting_tensor_and_makes_one_of_a_list():
    lengths = torch.tensor([3, 1, 2])
    assert as_lengths(lengths, 3) is lengths
    assert torch.equal(as_lengths([3, 1, 2], 3), lengths)
    assert as_lengths([], 0).dtype == torch.int64
