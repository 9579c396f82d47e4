"""Filters over the characters of words, against torch's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_same_bits
from samples import shifted, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

# words, their longest length, characters, filters, widths
SIZES = [
    (1, 1, 1, 1, (1,)),
    (1, 1, 2, 3, (3,)),
    (3, 4, 5, 2, (3, 5)),
    (7, 2, 9, 17, (9,)),  # windows longer than the words
    (40, 16, 60, 50, (3, 5)),
    (33, 11, 20, 64, (1, 3, 7)),
    (9, 30, 30, 130, (5,)),
    (2000, 12, 60, 20, (3,)),
]
sized = pytest.mark.parametrize("size", SIZES, ids=str)
SMALL = SIZES[:4]


def sample(size, dtype=torch.float32, seed=0):
    """Words with 0 behind their characters (one of them without any), the table and a gradient of the result."""
    count, length, characters, filters, widths = size
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(min(1, characters - 1), characters, (count, length), generator=generator)
    lengths = torch.randint(1, length + 1, (count, 1), generator=generator)
    words = words.masked_fill(torch.arange(length) >= lengths, 0)
    words[-1] = 0
    table = torch.randn(characters, filters * sum(widths), generator=generator, dtype=dtype)
    return words, table, torch.randn(count, filters * len(widths), generator=generator, dtype=dtype)


def torchs(words, table, widths):
    """By a convolution over one-hot characters, whose weights are the table."""
    filters = table.shape[1] // sum(widths)
    hot = F.one_hot(words, table.shape[0]).to(table.dtype).transpose(1, 2)
    outside = torch.arange(words.shape[1]) >= (words != 0).sum(1, keepdim=True).clamp(min=1)
    found = []
    for width, part in zip(widths, table.split([w * filters for w in widths], dim=1)):
        weight = part.unflatten(1, (width, filters)).permute(2, 0, 1)  # [F, C, K]
        values = F.conv1d(hot, weight, padding=width // 2)
        found.append(values.masked_fill(outside.unsqueeze(1), -torch.inf).amax(2))
    return torch.cat(found, dim=1)


def with_gradient(function, words, table, widths, seed):
    leaf = table.detach().clone().requires_grad_()
    output = function(words, leaf, widths)
    return {"output": output.detach(), "gradient": torch.autograd.grad(output, leaf, seed)[0]}


@sized
def test_it_is_as_accurate_as_torch(size, isa):
    words, table, seed = sample(size)
    exact = with_gradient(torchs, words, table.double(), size[4], seed.double())
    assert_parity(
        with_gradient(ops.char_cnn, words, table, size[4], seed),
        with_gradient(torchs, words, table, size[4], seed),
        exact,
    )
    assert_parity(
        with_gradient(reference.char_cnn, words, table, size[4], seed),
        with_gradient(torchs, words, table, size[4], seed),
        exact,
    )


@sized
def test_float64_agrees_with_torch(size, isa):
    words, table, seed = sample(size, torch.float64)
    expected = with_gradient(torchs, words, table, size[4], seed)
    found = with_gradient(ops.char_cnn, words, table, size[4], seed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@sized
def test_threads_other_words_and_padding_change_no_bit(size, dtype, threads):
    words, table, seed = sample(size, dtype)
    threads(1)
    expected = with_gradient(ops.char_cnn, words, table, size[4], seed)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(with_gradient(ops.char_cnn, words, table, size[4], seed), expected)
    with torch.no_grad():
        assert_same_bits({"output": ops.char_cnn(words, table, size[4])}, {"output": expected["output"]})
    alone = torch.cat([ops.char_cnn(word.unsqueeze(0), table, size[4]) for word in words[:20]])
    assert_same_bits({"output": alone}, {"output": expected["output"][:20]})
    table[0] = 0.0  # as of an embedding whose padding is zero
    wider = F.pad(words, (0, 3))
    assert_same_bits({"output": ops.char_cnn(wider, table, size[4])}, {"output": ops.char_cnn(words, table, size[4])})


def test_of_equal_places_the_first_has_the_gradient():
    words, table = torch.tensor([[1, 2, 1, 2]]), torch.tensor([[0.0], [3.0], [3.0]], requires_grad=True)
    ops.char_cnn(words, table, [1]).backward(torch.ones(1, 1))
    assert table.grad.tolist() == [[0.0], [1.0], [0.0]]


def test_a_number_that_is_none_stays():
    table = torch.tensor([[0.0, 0.0], [torch.nan, torch.inf], [5.0, -torch.inf]], requires_grad=True)
    output = ops.char_cnn(torch.tensor([[2, 1, 2], [2, 0, 0]]), table, [1])
    assert output[0].isnan().tolist() == [True, False]
    assert output[0, 1] == torch.inf
    assert output[1].tolist() == [5.0, -torch.inf]
    output.sum().backward()
    assert table.grad.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(size):
    words, table, _ = sample(size, torch.float64)
    table.requires_grad_()
    assert gradcheck(lambda t: ops.char_cnn(words, t, size[4]), table)
    assert gradgradcheck(lambda t: ops.char_cnn(words, t, size[4]), table)


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("places", [False, True], ids=["inference", "training"])
def test_opcheck(size, places):
    words, table, seed = sample(size)
    widths = list(size[4])
    table.requires_grad_(places)
    opcheck(torch.ops.pymtl.char_cnn.default, (words, table, widths, places))
    found = torch.ops.pymtl.char_cnn(words, table, widths, True)[1]
    opcheck(
        torch.ops.pymtl.char_cnn_backward.default,
        (seed.requires_grad_(), words, found, widths, table.shape[0]),
    )


def test_the_raw_op_without_places_has_no_silent_derivative():
    words, table, _ = sample(SIZES[2])
    with pytest.raises(RuntimeError, match="expected places=True where a gradient is wanted, got False"):
        torch.ops.pymtl.char_cnn(words, table.requires_grad_(), [3, 5], False)


def test_under_torch_func_it_is_the_reference():
    words, table, _ = sample(SIZES[2])
    actual = torch.func.grad(lambda t: ops.char_cnn(words, t, [3, 5]).sum())(table)
    expected = torch.func.grad(lambda t: reference.char_cnn(words, t, [3, 5]).sum())(table)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_any_layout_of_the_arguments_gives_the_same_bits(layout):
    words, table, seed = sample(SIZES[2])
    expected = with_gradient(ops.char_cnn, words, table, [3, 5], seed)
    output = ops.char_cnn(layout(words), layout(table).requires_grad_(), [3, 5])
    assert_same_bits({"output": output}, {"output": expected["output"]})


def test_no_words_give_no_features():
    table = torch.randn(5, 16, requires_grad=True)
    output = ops.char_cnn(torch.zeros(0, 4, dtype=torch.int64), table, [3, 5])
    assert output.shape == (0, 4)
    output.sum().backward()
    assert not table.grad.any()


WORDS, TABLE, SEED = sample(SIZES[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"words": WORDS + 5}, IndexError, "words: expected characters from 0 to 4, got "),
        ({"words": -WORDS - 1}, IndexError, "words: expected characters from 0 to 4, got -"),
        ({"words": WORDS[0]}, RuntimeError, r"words: expected \[words, characters\], got 1-D"),
        ({"words": WORDS.int()}, RuntimeError, "words: expected dtype Long, got Int"),
        ({"words": WORDS[:, :0]}, RuntimeError, "words: expected at least one character, got none"),
        ({"table": TABLE[0]}, RuntimeError, "table: expected a matrix, got 1-D"),
        ({"table": TABLE[:, :-1]}, RuntimeError, "table: expected a number of columns that the 8 places"),
        ({"table": TABLE[:, :0]}, RuntimeError, "table: expected a number of columns that the 8 places"),
        ({"table": TABLE.bfloat16()}, RuntimeError, "table: expected dtype Float or Double, got BFloat16"),
        ({"widths": [3, 4]}, RuntimeError, "widths: expected odd numbers, got 4"),
        ({"widths": [-1]}, RuntimeError, "widths: expected odd numbers, got -1"),
        ({"widths": []}, RuntimeError, "widths: expected at least one, got none"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_refused_by_name_and_values(change, error, message):
    arguments = {"words": WORDS, "table": TABLE, "widths": [3, 5], **change}
    for gradient in (False, True):
        given = arguments | {"table": arguments["table"].clone().requires_grad_(gradient)}
        with pytest.raises(error, match=message):
            ops.char_cnn(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": torch.full((3, 4), 4)}, "places: expected numbers below 4, got 4"),
        ({"places": torch.full((3, 4), -1)}, "places: expected numbers below 4, got -1"),
        ({"places": torch.zeros(2, 4, dtype=torch.int64)}, r"places: expected size \[3, 4\], got \[2, 4\]"),
        ({"grad_output": SEED[:2]}, r"grad_output: expected size \[3, 4\], got \[2, 4\]"),
        ({"grad_output": SEED[:, :3]}, "grad_output: expected as many filters of each of the 2 widths, got 3 in all"),
        ({"characters": 2}, "words: expected characters from 0 to 1, got "),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_backward_op_refuses_bad_input(change, message):
    places = torch.ops.pymtl.char_cnn(WORDS, TABLE, [3, 5], True)[1]
    arguments = {"grad_output": SEED, "words": WORDS, "places": places, "widths": [3, 5], "characters": 5, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymtl.char_cnn_backward(**arguments)
