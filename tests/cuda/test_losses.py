"""Losses on a GPU that nobody waits for; cuda_on_host runs those on the CPU that a CPU can stand in for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pymtl
from pymtl import ops, reference

pytestmark = pytest.mark.cuda

LENGTHS = [4, 0, 6, 1, 6]  # of the tags: a sentence may have none
TAGS = 5


@pytest.fixture(autouse=True)
def lengths_stay_there(gpu, monkeypatch):
    """On the host a tensor of the CPU passes for one on a GPU, and so do sizes."""
    if gpu.type == "cuda":
        return
    order_of_gpu = torch.ops.pymtl.packing_order.default._op_dk

    def packing_order(lengths, steps, device=None):
        return ops.PackingOrder(*order_of_gpu(torch._C.DispatchKey.CUDA, lengths, steps))

    monkeypatch.setattr("pymtl.crf.has_cuda", lambda tensor: True)
    monkeypatch.setattr("pymtl.ops.late_errors.has_cuda", lambda tensor: True)
    monkeypatch.setattr("pymtl.ops.late_errors.report", lambda *arguments: None)
    monkeypatch.setattr("pymtl.ops.packing_order", packing_order)
    monkeypatch.setenv("PYMTL_SIZES_ON_GPU", "1")


def crf_of(dtype, batch_first=True):
    return pymtl.CRF(TAGS, batch_first=batch_first).to(dtype)


def tags_of(lengths, batch_first=True):
    steps = torch.arange(max(6, *lengths))
    tags = torch.randint(TAGS, (len(lengths), len(steps)))
    tags[steps >= torch.tensor(lengths).unsqueeze(1)] = -100
    return tags if batch_first else tags.t().contiguous()


def with_gradients(crf, emissions, tags):
    leaf = emissions.detach().requires_grad_()
    loss = pymtl.CRFLoss(crf)(leaf, tags)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, [leaf, *crf.parameters()]))]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [6] * 5, [1], [0, 0, 3]], ids=str)
def test_the_loss_of_padded_sentences_is_that_of_each_alone(lengths, batch_first, gpu, monkeypatch):
    crf, tags = crf_of(torch.float64, batch_first), tags_of(lengths, batch_first)
    emissions = torch.randn(*tags.shape, TAGS, dtype=torch.float64)
    found = with_gradients(crf.to(gpu), emissions.to(gpu), tags.to(gpu))

    crf, leaf = crf.cpu(), emissions.requires_grad_()
    by_sentence = zip(lengths, *(t if batch_first else t.transpose(0, 1) for t in (leaf, tags)))
    scores = (crf.start_transitions, crf.end_transitions, crf.transitions)
    alone = [reference.crf(e[:n], torch.ones(n, dtype=torch.int64), y[:n], *scores) for n, e, y in by_sentence if n > 0]
    loss = -torch.cat(alone).sum() / sum(lengths)
    expected = [loss.detach(), *torch.autograd.grad(loss, [leaf, *crf.parameters()], materialize_grads=True)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_sentences_without_any_tag_give_a_loss_of_zero(gpu):
    crf = crf_of(torch.float32).to(gpu)
    tags = torch.full((3, 6), -100, device=gpu)
    found = with_gradients(crf, torch.randn(3, 6, TAGS, device=gpu), tags)
    assert all(not tensor.any() for tensor in found)


@pytest.mark.parametrize("lengths", [[4, 6, 1], [6, 6, 6]], ids=str)
def test_lengths_on_the_gpu_give_what_lengths_on_the_cpu_give(lengths, real_gpu):
    crf = crf_of(torch.float64).to(real_gpu)
    emissions, tags = torch.randn(3, 6, TAGS, device=real_gpu).double(), tags_of(lengths).to(real_gpu).clamp(min=0)
    here, there = torch.tensor(lengths), torch.tensor(lengths, device=real_gpu)
    with torch.no_grad():
        for function in (crf.log_likelihood, crf):
            ours, theirs = (function(emissions, tags, lengths) for lengths in (there, here))
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for ours, theirs in zip(crf.decode(emissions, there), crf.decode(emissions, here)):
            assert torch.equal(ours, theirs)


# What a GPU finds late.

LATE = {
    "a tag out of range": (
        {(2, 3): TAGS},
        IndexError,
        r"targets\['slots'\]: expected tags from 0 to 4, got 5, in",
    ),
    "tags of some tokens": ({(0, 1): -100}, ValueError, r"targets\['slots'\]: .* got some for sentence 0, in"),
}


@pytest.mark.parametrize("changes", [changes for changes, _, _ in LATE.values()], ids=LATE)
@pytest.mark.parametrize("ignored", [-100, 0])
def test_bad_tags_give_nan(ignored, changes, gpu):
    tags = tags_of(LENGTHS).clamp(min=-1) + 1 if ignored == 0 else tags_of(LENGTHS)
    crf = pymtl.CRF(TAGS + 1, batch_first=True).to(gpu)
    loss = pymtl.CRFLoss(crf, ignored)
    emissions = torch.randn(5, 6, TAGS + 1, device=gpu)
    assert loss(emissions, tags.to(gpu)).isfinite()
    for place, tag in changes.items():
        tags[place] = TAGS + 1 if tag == TAGS else ignored
    assert loss(emissions, tags.to(gpu)).isnan()


@pytest.mark.parametrize(("changes", "error", "message"), LATE.values(), ids=LATE)
def test_bad_tags_give_nan_and_a_later_loss_raises_the_error(changes, error, message, real_gpu):
    crf = crf_of(torch.float32).to(real_gpu)
    joint = pymtl.JointLoss({"slots": 1.0}, {"slots": pymtl.CRFLoss(crf)})
    emissions = {"slots": torch.randn(5, 6, TAGS, device=real_gpu, requires_grad=True)}
    good = tags_of(LENGTHS).to(real_gpu)
    bad = good.clone()
    for place, tag in changes.items():
        bad[place] = tag
    loss = joint(emissions, {"slots": bad}).total
    loss.backward()
    assert loss.isnan()  # which waits for the GPU
    assert emissions["slots"].grad.isnan().any()
    with pytest.raises(error, match=message):
        joint(emissions, {"slots": good})
    assert joint(emissions, {"slots": good}).total.isfinite()
    ops.raise_late_errors()


def test_a_bad_ordered_class_leaves_no_finite_loss_and_a_later_one_raises_the_error(real_gpu):
    joint = pymtl.JointLoss({"stars": 1.0}, {"stars": pymtl.OrdinalLoss()})
    logits = {"stars": torch.randn(3, 4, device=real_gpu)}
    assert not joint(logits, {"stars": torch.tensor([0, 5, 1], device=real_gpu)}).total.isfinite()
    with pytest.raises(IndexError, match=r"targets\['stars'\]: Target 5 is out of bounds, in an earlier call"):
        ops.raise_late_errors()
    assert joint(logits, {"stars": torch.tensor([0, 4, -100], device=real_gpu)}).total.isfinite()
    ops.raise_late_errors()


def joint_of(gpu):
    """A joint loss, its logits and targets."""
    losses = {
        "slots": pymtl.CRFLoss(crf_of(torch.float32).to(gpu)),
        "stars": pymtl.OrdinalLoss(),
        "topic": pymtl.losses.CrossEntropy(weight=(1.0, 2.0, 3.0)),
    }
    logits = {"slots": torch.randn(5, 6, TAGS), "stars": torch.randn(5, 4), "topic": torch.randn(5, 3)}
    logits = {task: z.to(gpu).requires_grad_() for task, z in logits.items()}
    targets = {"slots": tags_of(LENGTHS), "stars": torch.arange(5), "topic": torch.arange(5) % 3}
    return pymtl.JointLoss(dict.fromkeys(losses, 1.0), losses), logits, {task: y.to(gpu) for task, y in targets.items()}


class ReadsNothing(TorchDispatchMode):
    """Fails where something asks for a value, or for sizes that are values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"), name
        by_truth = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_truth, name
        return func(*args, **(kwargs or {}))


def test_no_value_is_asked_for(gpu):
    joint, logits, targets = joint_of(gpu)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), ReadsNothing():
        logits["topic"].sum().item()
    with ReadsNothing():
        joint(logits, targets).total.backward()
    assert all(z.grad.isfinite().all() for z in logits.values())


def test_nothing_waits_for_the_gpu(real_gpu):
    joint, logits, targets = joint_of(real_gpu)
    for mode in ("default", "error"):  # the first run may wait, to ask the driver
        torch.cuda.set_sync_debug_mode(mode)
        try:
            joint(logits, targets).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(z.grad.isfinite().all() for z in logits.values())
    ops.raise_late_errors()
