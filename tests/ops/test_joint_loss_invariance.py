import pytest
import torch
from losses import BCE, CE, LARGE, MIXED, MSE, Sample, Task, only, ours, sample_of, with_gradients
from parity import assert_same_bits
from samples import shifted, spread, transposed

from pymtl import ops


def test_a_tasks_loss_has_the_same_bits_whatever_tasks_stand_beside_it(dtype, isa):
    together = with_gradients(ours, sample_of(MIXED, dtype))
    s = sample_of(MIXED, dtype)
    for k in range(len(MIXED)):
        assert_same_bits(
            with_gradients(ours, only(s, k)), {"loss 0": together[f"loss {k}"], "gradient 0": together[f"gradient {k}"]}
        )


def test_a_loss_has_the_same_bits_with_and_without_a_gradient(dtype, isa):
    s = sample_of(MIXED, dtype)
    losses = dict(enumerate(ours(s.logits, s)))
    leaves = [z.clone().requires_grad_() for z in s.logits]
    assert_same_bits(dict(enumerate(ours(leaves, s))), losses)
    with torch.no_grad():
        assert_same_bits(dict(enumerate(ours(leaves, s))), losses)


@pytest.mark.parametrize("tasks", [MIXED, *([task] for task in LARGE)], ids=lambda tasks: "+".join(map(str, tasks)))
def test_runs_repeat_bit_for_bit_with_any_number_of_threads(tasks, dtype, isa, threads, filled_memory):
    s = sample_of(tasks, dtype)
    threads(1)
    expected = with_gradients(ours, s)
    for count in (1, 2, 2, 3):
        threads(count)
        assert_same_bits(with_gradients(ours, s), expected)
    filled_memory()
    assert_same_bits(with_gradients(ours, s), expected)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, dtype):
    s = sample_of(MIXED, dtype)
    views = Sample(
        s.logits,
        [layout(y) for y in s.targets],
        s.kinds,
        [None if w is None else layout(w) for w in s.weights],
        s.ignore_index,
        s.label_smoothing,
    )
    assert_same_bits(with_gradients(lambda z, v: ours([layout(t) for t in z], v), views), with_gradients(ours, s))


def test_columns_of_stacked_logits_give_the_same_bits(dtype):
    tasks = [Task(CE, 40, 7), Task(CE, 40, 72, weighted=True), Task(MSE, 40, 3), Task(BCE, 40, 5)]
    s = sample_of(tasks, dtype)
    widths = [task.classes for task in tasks]
    stacked = torch.cat(s.logits, 1).requires_grad_()
    losses = ours(stacked.split(widths, 1), s)
    (gradient,) = torch.autograd.grad(sum(losses), stacked)
    expected = with_gradients(ours, s)
    assert_same_bits(
        {f"loss {k}": loss for k, loss in enumerate(losses)}
        | {f"gradient {k}": part for k, part in enumerate(gradient.split(widths, 1))},
        expected,
    )


def test_expanded_logits_targets_and_weights_give_the_same_bits(dtype):
    z, w = torch.randn(1, 5, dtype=dtype), torch.rand(1, dtype=dtype)
    y = torch.tensor([3])
    expanded = ops.joint_loss([z.expand(6, 5)], [y.expand(6)], [CE], weights=[w.expand(5)])
    copied = ops.joint_loss([z.repeat(6, 1)], [y.repeat(6)], [CE], weights=[w.repeat(5)])
    assert_same_bits({"loss": expanded}, {"loss": copied})


def test_inputs_are_never_modified(dtype):
    s = sample_of(MIXED, dtype)
    tensors = [*s.logits, *s.targets, *(w for w in s.weights if w is not None)]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    for z in s.logits:
        z.requires_grad_()
    torch.autograd.grad(sum(ours(s.logits, s)), s.logits)
    for tensor, (values, version) in zip(tensors, before):
        assert_same_bits({"values": tensor}, {"values": values})
        assert tensor._version == version
