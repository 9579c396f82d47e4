"""The ops besides the recurrence on a GPU, beside the plain reference; cuda_on_host runs these on the CPU."""

import copy

import pytest
import torch
from losses import BCE, CE, LARGE, MIXED, MSE, SMALL, Sample, Task, only, ours, plain, sample_of
from losses import with_gradients as of_losses
from parity import assert_parity, assert_same_bits
from samples import RNNCase, backward_arguments, random_lengths, raw_arguments, rnn_sample, shifted, sizes_of
from torch import nn
from torch.library import opcheck

import pymtl
from pymtl import ops, reference

pytestmark = pytest.mark.cuda
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def on_cpu(results):
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def with_gradients(function, tensors, seed):
    """The result of ``function`` of these tensors and their gradients, on the CPU."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), seed.to(output))
    return on_cpu({"output": output} | {f"gradient of {name}": g for name, g in zip(leaves, gradients)})


def compare(function, plain, tensors, seed):
    """Holds ``function`` to the rule, twice for the same bits, beside ``plain`` of the same dtype and device."""
    found = with_gradients(function, tensors, seed)
    truth = with_gradients(plain, {name: tensor.cpu().double() for name, tensor in tensors.items()}, seed)
    assert_parity(found, with_gradients(plain, tensors, seed), truth)
    assert_same_bits(with_gradients(function, tensors, seed), found)


# Packing: nothing is computed, so all of it is exact.

LENGTHS = [(1,), (4,), (1, 1, 1), (2, 5, 5, 1), (3, 1, 3, 1, 3), random_lengths(40, 30, seed=1)[::-1]]
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "-".join(map(str, n[:6])))
each_layout = pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])


def padded_sample(lengths, features, dtype, batch_first=False, steps=None):
    """Tokens, with NaN or ones at padding."""
    steps = max(lengths) if steps is None else steps
    x = (100 * torch.rand(steps, len(lengths), *features)).to(dtype)
    x[torch.arange(steps)[:, None] >= torch.tensor(lengths)] = torch.nan if dtype.is_floating_point else 1
    return x.transpose(0, 1).contiguous() if batch_first else x


def order_of_gpu(lengths, steps, gpu):
    """From lengths on the GPU: by torch's operations, which the host has, too."""
    if gpu.type == "cuda":
        return ops.packing_order(lengths.to(gpu), steps)
    return ops.PackingOrder(*torch.ops.pymtl.packing_order.default._op_dk(torch._C.DispatchKey.CUDA, lengths, steps))


@each_lengths
@pytest.mark.parametrize("more", [0, 3])
def test_lengths_on_the_gpu_are_sorted_as_on_the_cpu(lengths, more, gpu):
    lengths, steps = torch.tensor(lengths), max(lengths) + more
    expected = ops.packing_order(lengths, steps)
    for order in (order_of_gpu(lengths, steps, gpu), ops.packing_order(lengths, steps, gpu)):
        assert all(torch.equal(found.cpu(), tensor) for found, tensor in zip(order, expected, strict=True))
        assert order.sorted_indices.device.type == order.unsorted_indices.device.type == gpu.type


def test_lengths_on_the_gpu_are_cut_to_0_and_the_number_of_steps(gpu):
    batch_sizes, indices, _ = order_of_gpu(torch.tensor([2, -5, 99, 0, 3]), 4, gpu)
    assert batch_sizes.tolist() == [3, 3, 2, 1]
    assert indices.tolist() == [2, 4, 0, 1, 3]


@each_layout
@each_lengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("features", [(), (1,), (2, 3), (16,), (129,)], ids=str)
def test_pack_and_unpack_are_exact(features, dtype, lengths, batch_first, gpu):
    order = ops.packing_order(torch.tensor(lengths), max(lengths) + 1, gpu)
    on_host = [index.cpu() for index in order[:2]]
    padded = padded_sample(lengths, features, dtype, batch_first, max(lengths) + 1)
    expected = reference.pack(padded, *on_host, batch_first)
    for layout in (torch.Tensor.detach, shifted):
        packed = ops.pack(layout(padded.to(gpu)), order, batch_first=batch_first)
        assert torch.equal(packed.cpu(), expected)
        unpacked = ops.unpack(layout(packed), order, batch_first=batch_first)
        assert torch.equal(unpacked.cpu(), reference.unpack(expected, *on_host, batch_first))


@each_layout
@each_lengths
def test_the_gradients_of_pack_and_unpack_are_one_another(lengths, batch_first, gpu):
    order = ops.packing_order(torch.tensor(lengths), max(lengths) + 2, gpu)
    padded = padded_sample(lengths, (3,), torch.float32, batch_first, max(lengths) + 2).to(gpu).requires_grad_()
    packed = ops.pack(padded, order, batch_first=batch_first)
    (of_padded,) = torch.autograd.grad(packed, padded, packed.detach())
    assert torch.equal(of_padded, ops.unpack(packed.detach(), order, batch_first=batch_first))
    leaf = packed.detach().requires_grad_()
    (of_packed,) = torch.autograd.grad(ops.unpack(leaf, order, batch_first=batch_first), leaf, of_padded)
    assert torch.equal(of_packed, leaf)


@each_layout
@each_lengths
def test_with_the_order_on_the_gpu_zeros_stand_behind_the_last_token(lengths, batch_first, real_gpu):
    order = order_of_gpu(torch.tensor(lengths), max(lengths) + 1, real_gpu)
    padded = padded_sample(lengths, (3,), torch.float32, batch_first, max(lengths) + 1).to(real_gpu)
    packed = ops.pack(padded, order, batch_first=batch_first)
    assert packed.shape == ((max(lengths) + 1) * len(lengths), 3)
    assert torch.equal(
        packed[: sum(lengths)], ops.pack(padded, order._replace(batch_sizes=order[0].cpu()), batch_first=batch_first)
    )
    assert not packed[sum(lengths) :].any()
    assert torch.equal(ops.unpack(packed, order, batch_first=batch_first), padded.nan_to_num())


# Pooling and heads.

POOLED = {
    "one token": ((1,), 3, (False,)),
    "dense": ([6] * 7, 33, (True,)),
    "packed": ((5, 3, 3, 1), 6, (False, True)),
    "many sequences": (random_lengths(17, 20, seed=1), 64, (False, True)),
}


@every_dtype
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("function", ["wrapper", "op"])
@pytest.mark.parametrize(("lengths", "features", "reverse"), POOLED.values(), ids=POOLED)
def test_pooling_is_as_accurate_as_the_reference(lengths, features, reverse, kind, function, dtype, gpu):
    tokens = sum(lengths)
    # Different numbers that every dtype has: at a tie the reference shares the gradient out.
    x = (torch.stack([torch.randperm(tokens) for _ in range(features)], 1) - tokens // 2) / 16
    sizes = None if isinstance(lengths, list) else sizes_of(lengths)
    x = (x.view(lengths[0], -1, features) if sizes is None else x).to(gpu, dtype)

    def pool(x):
        if function == "op":
            return torch.ops.pymtl.pool(x, sizes, reverse, kind)[0]
        return ops.pool(x, sizes, kind, reverse=reverse)

    seed = torch.randn(len(lengths), features).bfloat16()
    compare(pool, lambda x: reference.pool(x, sizes, kind), {"x": x}, seed)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling_keeps_nan_within_its_sequence_and_its_feature(kind, gpu):
    x = torch.randn(5, 4, 6)
    x[2, 1, 3] = torch.nan
    pooled = ops.pool(x.to(gpu), None, kind).cpu()
    assert pooled.isnan().nonzero().tolist() == [[1, 3]]
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(pooled[others], reference.pool(x, None, kind)[others])


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [(1, 2, 3), (7, 66, 17), (40, 128, 79), (0, 4, 3)], ids=str)
def test_heads_are_as_accurate_as_the_reference(size, bias, dtype, gpu):
    rows, features, classes = size
    tensors = {"input": torch.randn(rows, features), "weight": torch.randn(classes, features) / features**0.5}
    tensors |= {"bias": torch.randn(classes)} if bias else {}
    tensors = {name: tensor.to(gpu, dtype) for name, tensor in tensors.items()}

    def heads(input, weight, bias=None):
        return ops.heads(input, weight, bias, parts=2)

    def plain_heads(input, weight, bias=None):
        return reference.heads(input, weight, bias)

    compare(heads, plain_heads, tensors, torch.randn(rows, classes).bfloat16())


# The joint loss.

# In float16 torch's own square of the omitted task's errors overflows.
TASKS = [task for task in SMALL if not (task.kind == MSE and task.scale == 100)] + LARGE[:2]


def on(device, s):
    return Sample(
        *(
            [each.to(device) if isinstance(each, torch.Tensor) else each for each in column]
            for column in vars(s).values()
        )
    )


def compare_losses(s, gpu):
    found, expected = (on_cpu(of_losses(function, on(gpu, s))) for function in (ours, plain))
    assert_parity(found, expected, of_losses(plain, s.to(torch.float64)))
    assert_same_bits(on_cpu(of_losses(ours, on(gpu, s))), found)
    return found


@every_dtype
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_each_loss_is_as_accurate_as_the_reference(task, dtype, gpu):
    compare_losses(sample_of([task], dtype), gpu)


@every_dtype
def test_twenty_tasks_in_one_call_are_as_accurate_as_the_reference_and_as_alone(dtype, gpu):
    s = sample_of([*MIXED, *TASKS[:15]], dtype)
    together = compare_losses(s, gpu)
    for k in range(20):
        alone = on_cpu(of_losses(ours, on(gpu, only(s, k))))
        assert_same_bits({n: together[f"{n} {k}"] for n in ("loss", "gradient")}, {n[:-2]: t for n, t in alone.items()})


def test_slices_of_stacked_logits_give_the_same_bits(gpu):
    s = on(gpu, sample_of([Task(CE, 40, 7), Task(BCE, 40, 5, ignored=0.2), Task(CE, 40, 33, smoothing=0.1)]))
    stacked = torch.cat(s.logits, 1).requires_grad_()
    losses = ops.joint_loss(stacked.split([7, 5, 33], 1), s.targets, s.kinds, **s.others())
    (gradient,) = torch.autograd.grad(losses.sum(), stacked)
    apart = of_losses(ours, s)
    assert_same_bits(dict(enumerate(losses)), {k: apart[f"loss {k}"] for k in range(3)})
    assert_same_bits({"": gradient}, {"": torch.cat([apart[f"gradient {k}"] for k in range(3)], 1)})


@every_dtype
@pytest.mark.parametrize("kind", [CE, MSE, BCE])
def test_a_task_without_a_label_gives_zero_and_no_gradient(kind, dtype, gpu):
    s = sample_of([Task(kind, 40, 4, weighted=kind != MSE, ignored=1.1), Task(CE, 3, 2)], dtype)
    found = on_cpu(of_losses(ours, on(gpu, s)))
    assert found["loss 0"] == 0
    assert torch.equal(found["gradient 0"], torch.zeros(40, 4, dtype=dtype))
    assert found["loss 1"] > 0
    assert found["gradient 1"].any()


@every_dtype
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("target", [-1, 7, 2**40])
def test_a_class_out_of_range_gives_nan_to_its_task_alone(target, gradients, dtype, gpu):
    s = sample_of(MIXED, dtype)
    clean = on_cpu(of_losses(ours, on(gpu, s)))
    s.targets[0][3] = target
    there = on(gpu, s)
    if not gradients:
        losses = ops.joint_loss(there.logits, there.targets, there.kinds, **there.others())
        assert losses.isnan().tolist() == [True, *[False] * 4]
    else:
        found = on_cpu(of_losses(ours, there))
    if gpu.type == "cuda":
        with pytest.raises(IndexError, match=r"targets of task 0: expected classes from 0 to 6 .* row 3 of an earlier"):
            ops.raise_late_errors()
        ops.raise_late_errors()
    if not gradients:
        return
    assert found["loss 0"].isnan()
    assert found["gradient 0"].isnan().all()
    assert_same_bits({n: t for n, t in found.items() if "0" not in n}, {n: t for n, t in clean.items() if "0" not in n})


def bad_rows(s):
    weights = [z.new_empty(0) if w is None else w for z, w in zip(s.logits, s.weights)]
    arguments = (s.logits, s.targets, s.kinds, weights, s.ignore_index, s.label_smoothing)
    return torch.ops.pymtl.joint_loss(*arguments, False)[2].tolist()


def test_the_first_row_out_of_range_of_each_task_is_found(gpu):
    tasks = [Task(CE, rows, 7, ignored=0.1) for rows in (0, 1, 31, 700, 40)] + [Task(BCE, 40, 5), Task(MSE, 9, 2)]
    s = sample_of(tasks * 3)  # more tasks than one launch takes
    assert bad_rows(on(gpu, s)) == [-1] * 21
    for task, rows in {1: [0], 2: [30], 3: [699, 511, 690], 18: [39, 3]}.items():
        s.targets[task][rows] = 7
    expected = {1: 0, 2: 30, 3: 511, 18: 3}
    assert bad_rows(on(gpu, s)) == [expected.get(task, -1) for task in range(21)]


def test_a_later_loss_raises_the_error_of_an_earlier_one_by_its_tasks_name(real_gpu):
    joint, logits = pymtl.JointLoss({"topic": 1.0, "slots": 1.0}), torch.zeros(3, 4, device=real_gpu)
    good, bad = torch.tensor([0, 3, -100], device=real_gpu), torch.tensor([0, 3, 4], device=real_gpu)
    assert joint({"slots": logits}, {"slots": bad}).total.isnan()  # which waits for the GPU
    with pytest.raises(IndexError, match=r"targets\['slots'\]: expected classes from 0 to 3 .* at row 2"):
        joint({"topic": logits}, {"topic": good})
    assert joint({"topic": logits}, {"topic": good}).total.isfinite()
    ops.raise_late_errors()


def test_a_loss_is_recorded_as_a_graph_after_others_and_its_nan_tells(real_gpu):
    joint, logits = pymtl.JointLoss({"slots": 1.0}), torch.zeros(3, 4, device=real_gpu)
    target = torch.tensor([0, 3, -100], device=real_gpu)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        joint({"slots": logits}, {"slots": target})
    with torch.cuda.graph(graph, stream=stream):
        recorded = joint({"slots": logits}, {"slots": target}).total
    for value, is_nan in ((3, False), (4, True), (3, False)):
        target[1] = value
        graph.replay()
        assert recorded.isnan().item() is is_nan
    ops.raise_late_errors()


# Torch's contract for an op.


def arguments_of_ops(gpu):
    """Each op's arguments on the GPU."""
    sample = rnn_sample(RNNCase(3, 5, lengths=(4, 2, 1), h0=True, c0=True)).map(lambda _, tensor: tensor.to(gpu))
    sizes, indices, _ = ops.packing_order(torch.tensor([1, 4, 2]), 4, gpu)
    packed, padded = torch.randn(7, 4).to(gpu), torch.randn(4, 3, 4).to(gpu)
    weight, bias = torch.randn(5, 4).to(gpu), torch.randn(5).to(gpu)
    s = on(gpu, sample_of([Task(CE, 6, 3, weighted=True, smoothing=0.1), Task(MSE, 4, 2)]))
    weights = [z.new_empty(0) if w is None else w for z, w in zip(s.logits, s.weights)]
    _, argmax = torch.ops.pymtl.pool(packed, sizes, [False], "max")
    return {
        "packing_order": (torch.tensor([1, 4, 2], device=gpu), 4),
        "pack": (padded, sizes, indices, False),
        "unpack": (packed, sizes, indices, True),
        "pool": (packed, sizes, [False, True], "max"),
        "pool_backward": (packed[:3], sizes, argmax, [7, 4], "max"),
        "heads": (packed, weight, bias, 2),
        "heads_backward": (torch.randn(7, 5).to(gpu), packed, weight, [True, False, True]),
        "joint_loss": (s.logits, s.targets, s.kinds, weights, s.ignore_index, s.label_smoothing, True),
        "rnn_inference": (*raw_arguments(sample), None),
        "rnn_training": raw_arguments(sample.leaves()),
        "rnn_backward": backward_arguments(sample),
    }


OPS = ["packing_order", "pack", "unpack", "pool", "pool_backward", "heads", "heads_backward", "joint_loss"]
OPS += ["rnn_inference", "rnn_training", "rnn_backward"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, gpu):
    arguments = arguments_of_ops(gpu)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(getattr(torch.ops.pymtl, op).default, arguments[op], test_utils=utilities)


# A model.


def test_a_training_step_of_a_converted_model_is_that_of_float64_and_lowers_the_loss(gpu, monkeypatch):
    if gpu.type == "cpu":  # float64 is then torch's own
        monkeypatch.setattr("pymtl.ops.dtypes._OF_THE_CPU", (torch.float32,))
    heads = {
        "slots": pymtl.TokenClassificationHead(6),
        "intent": pymtl.ClassificationHead(4, "mean"),
        "topic": pymtl.ClassificationHead(3, "max"),
        "score": pymtl.RegressionHead(2, "last"),
    }
    encoder = pymtl.convert(nn.LSTM(9, 33, 2, batch_first=True, bidirectional=True))
    exact = pymtl.MultiTaskModel(nn.Embedding(30, 9), encoder, heads)
    ours = copy.deepcopy(exact).to(gpu)
    lengths = torch.tensor([4, 7, 1, 5, 2])
    tokens, slots = torch.randint(30, (5, 7)), torch.randint(6, (5, 7))
    slots[torch.arange(7) >= lengths[:, None]] = -100
    targets = {"slots": slots, "intent": torch.tensor([0, 3, 2, -100, 1]), "topic": torch.arange(5) % 3}
    targets["score"] = torch.randn(5, 2)
    joint = pymtl.JointLoss({"slots": 1.0, "intent": 0.5, "topic": 0.25, "score": 2.0}, ours.losses)

    def step(model, device):
        loss = joint(model(tokens.to(device), lengths), {task: y.to(device) for task, y in targets.items()}).total
        model.zero_grad()
        loss.backward()
        return {"loss": loss.detach().cpu()} | {name: p.grad.detach().cpu() for name, p in model.named_parameters()}

    found, expected = step(ours, gpu), step(exact.double(), "cpu")
    # Some thousand roundings to float32, whose eps is 1.2e-7, mostly cancel: a hundredth of them may add up.
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max()
        assert error <= 2e-5 * value.abs().max(), name
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    losses = [found["loss"]]
    for _ in range(3):
        optimizer.step()
        losses.append(step(ours, gpu)["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.95 * losses[0]


def test_lengths_on_the_gpu_give_a_model_the_bits_of_lengths_on_the_cpu(real_gpu):
    heads = {"tags": pymtl.CRFHead(5), "intent": pymtl.ClassificationHead(4, "mean")}
    encoder = pymtl.LSTM(9, 33, batch_first=True, bidirectional=True)
    model = pymtl.MultiTaskModel(nn.Embedding(30, 9), encoder, heads).to(real_gpu)
    tokens, lengths = torch.randint(30, (5, 7), device=real_gpu), torch.tensor([4, 7, 1, 5, 2])
    expected, found = model(tokens, lengths), model(tokens, lengths.to(real_gpu))
    assert_same_bits(found, expected)
    emissions, crf = found["tags"].detach(), model.heads["tags"].crf
    for there, here in zip(crf.decode(emissions, lengths.to(real_gpu)), crf.decode(emissions, lengths)):
        assert torch.equal(there, here)
    packed = pymtl.pack(tokens, lengths.to(real_gpu), batch_first=True)
    assert torch.equal(packed.data, pymtl.pack(tokens, lengths, batch_first=True).data)
