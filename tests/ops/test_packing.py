import pytest
import torch
from parity import assert_same_bits
from samples import shifted, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pymtl import ops, reference

LENGTHS = [
    (1,),
    (4,),
    (1, 1, 1),
    (2, 5, 5, 1),
    (3, 1, 3, 1, 3),
    (1, 2, 3, 4, 5, 6, 7),
    tuple(torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist()),
]
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "-".join(map(str, n[:7])))
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
ALL_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def padded_sample(lengths, features=(3,), *, batch_first=False, steps=None, dtype=torch.float64, padding=0, seed=0):
    """Tokens, with ``padding`` where there are none."""
    steps = max(lengths) if steps is None else steps
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, len(lengths), *features)
    if dtype.is_complex:
        x = torch.randn(shape, generator=generator, dtype=dtype)
    else:
        x = (100 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
    x[torch.arange(steps)[:, None] >= torch.tensor(lengths)] = padding
    return x.transpose(0, 1).contiguous() if batch_first else x


def order_of(lengths, steps=None):
    return ops.packing_order(torch.tensor(lengths), max(lengths) if steps is None else steps)


# Agreement with torch.nn.utils.rnn; nothing is computed, so all of it is exact.


@each_lengths
def test_the_order_is_that_of_pack_padded_sequence(lengths):
    expected = pack_padded_sequence(
        torch.zeros(max(lengths), len(lengths)), torch.tensor(lengths), enforce_sorted=False
    )
    order = order_of(lengths)
    assert torch.equal(order.batch_sizes, expected.batch_sizes)
    stable = torch.sort(torch.tensor(lengths), descending=True, stable=True).indices
    assert torch.equal(order.sorted_indices, stable)
    assert torch.equal(order.sorted_indices[order.unsorted_indices], torch.arange(len(lengths)))
    assert torch.equal(torch.tensor(lengths)[order.sorted_indices], torch.tensor(lengths)[expected.sorted_indices])


@each_lengths
def test_steps_that_no_sequence_reaches_have_batch_size_zero(lengths):
    tight, longer = order_of(lengths), order_of(lengths, max(lengths) + 3)
    assert torch.equal(longer.batch_sizes, torch.cat([tight.batch_sizes, torch.zeros(3, dtype=torch.int64)]))
    assert torch.equal(longer.sorted_indices, tight.sorted_indices)
    assert torch.equal(longer.unsorted_indices, tight.unsorted_indices)


def torch_packed(padded, order, batch_first):
    """What pack_padded_sequence makes of sequences in our order."""
    by_length = padded.index_select(0 if batch_first else 1, order.sorted_indices)
    lengths = (order.batch_sizes[:, None] > torch.arange(len(order.sorted_indices))).sum(0)
    return pack_padded_sequence(by_length, lengths, batch_first=batch_first).data


@each_layout
@each_lengths
@pytest.mark.parametrize("features", [(), (1,), (5,), (2, 3), (129,)], ids=str)
def test_pack_and_unpack_agree_with_torch(lengths, features, batch_first):
    padded = padded_sample(lengths, features, batch_first=batch_first)
    order = order_of(lengths)
    packed = ops.pack(padded, order, batch_first=batch_first)
    assert torch.equal(packed, torch_packed(padded, order, batch_first))
    assert torch.equal(ops.unpack(packed, order, batch_first=batch_first), padded)


@each_layout
@each_lengths
def test_torch_and_the_reference_agree(lengths, batch_first):
    padded = padded_sample(lengths, batch_first=batch_first)
    theirs = pack_padded_sequence(padded, torch.tensor(lengths), batch_first, enforce_sorted=False)
    order = ops.PackingOrder(theirs.batch_sizes, theirs.sorted_indices, theirs.unsorted_indices)
    longer = ops.PackingOrder(torch.cat([theirs.batch_sizes, torch.tensor([0, 0])]), *order[1:])
    expected = pad_packed_sequence(theirs, batch_first, total_length=max(lengths) + 2)[0]
    assert torch.equal(ops.pack(padded, order, batch_first=batch_first), theirs.data)
    assert torch.equal(reference.pack(padded, *order[:2], batch_first), theirs.data)
    assert torch.equal(ops.unpack(theirs.data, longer, batch_first=batch_first), expected)
    assert torch.equal(reference.unpack(theirs.data, *longer[:2], batch_first), expected)


@each_layout
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("features", [(), (3,)], ids=str)
def test_any_dtype(dtype, features, batch_first):
    lengths = (2, 5, 5, 1)
    padded = padded_sample(lengths, features, batch_first=batch_first, dtype=dtype)
    order = order_of(lengths)
    packed = ops.pack(padded, order, batch_first=batch_first)
    assert packed.dtype == dtype
    assert torch.equal(packed, torch_packed(padded, order, batch_first))
    assert torch.equal(ops.unpack(packed, order, batch_first=batch_first), padded)


@each_layout
@each_lengths
def test_padding_is_not_read_and_comes_back_as_zeros(lengths, batch_first, filled_memory):
    steps = max(lengths) + 4
    order = order_of(lengths, steps)
    clean = padded_sample(lengths, batch_first=batch_first, steps=steps)
    spoilt = padded_sample(lengths, batch_first=batch_first, steps=steps, padding=torch.nan)
    filled_memory()
    packed = ops.pack(spoilt, order, batch_first=batch_first)
    assert_same_bits({"packed": packed}, {"packed": ops.pack(clean, order, batch_first=batch_first)})
    assert_same_bits({"padded": ops.unpack(packed, order, batch_first=batch_first)}, {"padded": clean})


def test_without_sorted_indices_the_sequences_keep_their_places():
    lengths = (5, 3, 3, 1)
    padded, order = padded_sample(lengths), order_of(lengths)
    packed = torch.ops.pymtl.pack(padded, order.batch_sizes, None, False)
    assert torch.equal(packed, ops.pack(padded, order))
    assert torch.equal(torch.ops.pymtl.unpack(packed, order.batch_sizes, None, False), padded)


def test_the_results_fit_packed_sequence():
    lengths = (2, 5, 5, 1)
    order = order_of(lengths)
    sequence = PackedSequence(ops.pack(padded_sample(lengths), order), *order)
    padded, found = torch.nn.utils.rnn.pad_packed_sequence(sequence)
    assert torch.equal(padded, padded_sample(lengths))
    assert found.tolist() == list(lengths)


# Derivatives and Torch's contract for an op.


@each_layout
@pytest.mark.parametrize("steps", [3, 5])
def test_gradcheck_and_gradgradcheck(batch_first, steps):
    lengths = (1, 3, 2)
    order = order_of(lengths, steps)
    padded = padded_sample(lengths, (2,), batch_first=batch_first, steps=steps).requires_grad_()
    packed = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for function, leaf in ((ops.pack, padded), (ops.unpack, packed)):
        assert gradcheck(lambda t, f=function: f(t, order, batch_first=batch_first), leaf)
        assert gradgradcheck(lambda t, f=function: f(t, order, batch_first=batch_first), leaf)


@each_layout
@each_lengths
def test_gradients_are_exact_and_zero_at_padding(lengths, batch_first):
    order = order_of(lengths, max(lengths) + 2)
    padded = padded_sample(lengths, batch_first=batch_first, steps=max(lengths) + 2).requires_grad_()
    packed = ops.pack(padded, order, batch_first=batch_first)
    seed = torch.randn_like(packed)
    (gradient,) = torch.autograd.grad(packed, padded, seed)
    assert torch.equal(gradient, ops.unpack(seed, order, batch_first=batch_first))
    leaf = packed.detach().requires_grad_()
    seed = torch.randn_like(padded)
    (gradient,) = torch.autograd.grad(ops.unpack(leaf, order, batch_first=batch_first), leaf, seed)
    assert torch.equal(gradient, ops.pack(seed, order, batch_first=batch_first))


@each_layout
@pytest.mark.parametrize("function", [ops.pack, ops.unpack])
def test_forward_mode_derivatives_and_transforms(function, batch_first):
    order = order_of((2, 3, 1), 4)
    padded = padded_sample((2, 3, 1), batch_first=batch_first, steps=4)
    x = padded if function is ops.pack else torch.randn(6, 3, dtype=torch.float64)
    tangent = torch.randn_like(x)
    result, actual = torch.func.jvp(lambda t: function(t, order, batch_first=batch_first), (x,), (tangent,))
    assert torch.equal(result, function(x, order, batch_first=batch_first))
    assert torch.equal(actual, function(tangent, order, batch_first=batch_first))
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, tangent), order, batch_first=batch_first)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, actual)
    batched = torch.func.vmap(lambda t: function(t, order, batch_first=batch_first))(torch.stack([x, 2 * x]))
    assert torch.equal(batched, torch.stack([result, 2 * result]))


@pytest.mark.parametrize(("lengths", "steps"), [((2, 3, 1), 3), ((1,), 1), ((4, 4), 6), ((), 3)], ids=str)
def test_opcheck_of_packing_order(lengths, steps):
    opcheck(torch.ops.pymtl.packing_order.default, (torch.tensor(lengths, dtype=torch.int64), steps))


@each_layout
@pytest.mark.parametrize("indices", [True, False], ids=["sorted_indices", "in order"])
@pytest.mark.parametrize("kind", ["float32", "float64 with gradient", "int64"])
def test_opcheck_of_pack_and_unpack(kind, indices, batch_first):
    lengths = (3, 2, 1) if not indices else (2, 1, 3)
    order = order_of(lengths, 4)
    dtype = getattr(torch, kind.split()[0])
    padded = padded_sample(lengths, batch_first=batch_first, steps=4, dtype=dtype)
    packed = ops.pack(padded, order, batch_first=batch_first)
    rest = (order.batch_sizes, order.sorted_indices if indices else None, batch_first)
    gradient = "gradient" in kind
    opcheck(torch.ops.pymtl.pack.default, (padded.requires_grad_(gradient), *rest))
    opcheck(torch.ops.pymtl.unpack.default, (packed.requires_grad_(gradient), *rest))


# Layouts, threads.


@each_layout
@pytest.mark.parametrize("layout", [spread, transposed, shifted])
@pytest.mark.parametrize("features", [(), (5,), (2, 3)], ids=str)
def test_other_memory_layouts_give_the_same_values(layout, features, batch_first):
    lengths = (2, 5, 5, 1)
    order = order_of(lengths)
    padded = padded_sample(lengths, features, batch_first=batch_first)
    packed = ops.pack(padded, order, batch_first=batch_first)
    other = ops.PackingOrder(*(torch.stack([t, t - 1], 1)[:, 0] for t in order))
    assert torch.equal(ops.pack(layout(padded), other, batch_first=batch_first), packed)
    assert torch.equal(ops.unpack(layout(packed), other, batch_first=batch_first), padded)


def test_batch_first_is_a_transpose():
    lengths = (2, 5, 5, 1)
    order, padded = order_of(lengths), padded_sample(lengths)
    assert torch.equal(ops.pack(padded.transpose(0, 1), order, batch_first=True), ops.pack(padded, order))


def test_an_expanded_input_gives_the_same_values():
    order = order_of((2, 3, 1))
    row = torch.randn(1, 1, 4)
    assert torch.equal(ops.pack(row.expand(3, 3, 4), order), row[0].expand(6, 4))
    assert torch.equal(ops.unpack(row[0].expand(6, 4), order), ops.unpack(row[0].repeat(6, 1), order))


@each_layout
def test_any_number_of_threads_gives_the_same_values(batch_first, threads):
    lengths = LENGTHS[-1]
    padded = padded_sample(lengths, (257,), batch_first=batch_first)
    for count in (1, 2, 3):
        threads(count)
        order = order_of(lengths)
        packed = ops.pack(padded, order, batch_first=batch_first)
        assert torch.equal(packed, torch_packed(padded, order, batch_first))
        assert torch.equal(ops.unpack(packed, order, batch_first=batch_first), padded)


def test_inputs_are_never_modified():
    lengths = torch.tensor([2, 5, 5, 1])
    order, padded = ops.packing_order(lengths, 5), padded_sample((2, 5, 5, 1))
    packed = ops.pack(padded, order)
    tensors = (lengths, *order, padded, packed)
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    ops.packing_order(lengths, 7)
    ops.pack(padded, order)
    ops.unpack(packed, order)
    for tensor, (values, version) in zip(tensors, before):
        assert torch.equal(tensor, values)
        assert tensor._version == version


# Edges.


@each_layout
def test_an_empty_batch_gives_empty_results(batch_first):
    order = ops.packing_order(torch.zeros(0, dtype=torch.int64), 4)
    assert order.batch_sizes.tolist() == [0, 0, 0, 0]
    assert order.sorted_indices.shape == order.unsorted_indices.shape == (0,)
    padded = torch.zeros((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)
    packed = ops.pack(padded, order, batch_first=batch_first)
    assert packed.shape == (0, 3)
    unpacked = ops.unpack(packed, order, batch_first=batch_first)
    assert unpacked.shape == padded.shape
    unpacked.sum().backward()
    assert padded.grad.shape == padded.shape


def test_no_features_give_empty_results():
    order = order_of((2, 3, 1))
    packed = ops.pack(torch.zeros(3, 3, 0), order)
    assert packed.shape == (6, 0)
    assert ops.unpack(packed, order).shape == (3, 3, 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([2, 0]), r"lengths: expected lengths from 1 to 3.*got 0 at position 1"),
        (torch.tensor([-1, 2]), r"lengths: expected lengths from 1 to 3.*got -1 at position 0"),
        (torch.tensor([2, 3, 4]), r"lengths: expected lengths from 1 to 3.*got 4 at position 2"),
        (torch.tensor([[2, 3]]), r"lengths: expected one dimension, got 2"),
        (torch.tensor(2), r"lengths: expected one dimension, got 0"),
        (torch.tensor([2, 3], dtype=torch.int32), r"lengths: expected dtype Long, got Int"),
        (torch.tensor([2.0, 3.0]), r"lengths: expected dtype Long, got Float"),
    ],
    ids=["zero", "negative", "too long", "rank 2", "rank 0", "int32", "float"],
)
def test_bad_lengths_are_refused_by_values(lengths, message):
    with pytest.raises(RuntimeError, match=message):
        ops.packing_order(lengths, 3)


def test_negative_steps_are_refused_by_name():
    with pytest.raises(RuntimeError, match=r"steps.*-3"):
        ops.packing_order(torch.zeros(0, dtype=torch.int64), -3)


ORDER = order_of((1, 3, 2))
REFUSED = [
    (
        "an index twice",
        {"sorted_indices": torch.tensor([0, 1, 1])},
        r"sorted_indices: .*below 3 once, got 1 at position 2",
    ),
    (
        "an index too large",
        {"sorted_indices": torch.tensor([0, 3, 1])},
        r"sorted_indices: .*below 3.*got 3 at position 1",
    ),
    ("a negative index", {"sorted_indices": torch.tensor([-1, 0, 1])}, r"sorted_indices: .*got -1 at position 0"),
    ("an index too few", {"sorted_indices": torch.tensor([0, 1])}, r"sorted_indices: expected size \[3\], got \[2\]"),
    ("an index too many", {"sorted_indices": torch.arange(4)}, r"sorted_indices: expected size \[3\], got \[4\]"),
    ("int32 indices", {"sorted_indices": ORDER[1].int()}, r"sorted_indices: expected dtype Long, got Int"),
    ("indices of rank 2", {"sorted_indices": ORDER[1][None]}, r"sorted_indices: expected size \[3\], got \[1, 3\]"),
    ("indices on another device", {"sorted_indices": ORDER[1].to("meta")}, r"sorted_indices: expected .* CPU"),
    ("increasing sizes", {"batch_sizes": torch.tensor([2, 3, 1])}, r"batch_sizes:.*never increase.*got 3 at step 1"),
    ("a negative size", {"batch_sizes": torch.tensor([3, 3, -1])}, r"batch_sizes:.*not negative, got -1 at step 2"),
    ("int32 sizes", {"batch_sizes": ORDER[0].int()}, r"batch_sizes: expected dtype Long, got Int"),
    ("sizes of rank 2", {"batch_sizes": ORDER[0][None]}, r"batch_sizes: expected one dimension, got 2"),
    ("sizes on another device", {"batch_sizes": ORDER[0].to("meta")}, r"batch_sizes: expected .* CPU"),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", [ops.pack, ops.unpack])
@pytest.mark.parametrize(("changes", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSED])
def test_a_bad_order_is_refused_by_name_and_values(changes, message, function, gradient):
    tensor = torch.zeros((3, 3, 2) if function is ops.pack else (6, 2), requires_grad=gradient)
    with pytest.raises(RuntimeError, match=message):
        function(tensor, ORDER._replace(**changes))


@pytest.mark.parametrize(
    ("function", "tensor", "message"),
    [
        (ops.pack, torch.zeros(3), r"padded: expected at least two dimensions, got 1"),
        (ops.pack, torch.zeros(4, 3, 2), r"padded: expected size \[3, 3, 2\], got \[4, 3, 2\]"),
        (ops.pack, torch.zeros(3, 2, 2), r"padded: expected size \[3, 3, 2\], got \[3, 2, 2\]"),
        (ops.unpack, torch.tensor(1.0), r"packed: expected at least one dimension, got a scalar"),
        (ops.unpack, torch.zeros(5, 2), r"packed: expected size \[6, 2\], got \[5, 2\]"),
    ],
    ids=["pack rank 1", "pack steps", "pack batch", "unpack rank 0", "unpack tokens"],
)
def test_tensors_that_do_not_fit_the_order_are_refused_by_name_and_values(function, tensor, message):
    with pytest.raises(RuntimeError, match=message):
        function(tensor, ORDER)
