import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pymtl
from pymtl import BinaryCrossEntropy, CrossEntropy, JointLoss, MeanSquaredError

WEIGHTS = {"intent": 0.5, "slots": 2.0, "score": 0.25, "tags": 1.0, "words": 3.0}
LOSSES = {
    "intent": CrossEntropy(weight=(0.5, 2.0, 1.0, 0.25), label_smoothing=0.1),
    "score": MeanSquaredError(),
    "tags": BinaryCrossEntropy(weight=(1.0, 2.0, 0.5)),
    "words": MeanSquaredError(),
}
B, T = 3, 6
NAN = torch.nan


def sample(dtype=torch.float32):
    """Logits and targets of five tasks, each with some labels missing."""
    logits = {
        "intent": torch.randn(B, 4, dtype=dtype),
        "slots": torch.randn(B, T, 5, dtype=dtype),
        "score": torch.randn(B, 1, dtype=dtype),
        "tags": torch.randn(B, 3, dtype=dtype),
        "words": torch.randn(B, T, 2, dtype=dtype),
    }
    targets = {
        "intent": torch.tensor([1, -100, 3]),
        "slots": torch.randint(5, (B, T)),
        "score": torch.tensor([0.5, NAN, -1.0], dtype=dtype),
        "tags": torch.tensor([[1.0, 0.0, NAN], [0.25, -100.0, 1.0], [0.0, 0.0, 1.0]], dtype=dtype),
        "words": torch.randn(B, T, 2, dtype=dtype),
    }
    targets["slots"][0, 2:] = -100
    targets["words"][1, 4:] = NAN
    return logits, targets


def plain(logits, targets, weights=WEIGHTS, losses=LOSSES):
    """One torch loss after another, over the labelled entries only."""
    per_task = {}
    for task, y in targets.items():
        loss, z = losses.get(task, CrossEntropy()), logits[task]
        weight = None if loss.weight is None else z.new_tensor(loss.weight)
        if loss.kind == "cross_entropy":
            options = {"weight": weight, "ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing}
            per_task[task] = F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), **options)
            continue
        y = y.to(z.dtype).reshape(z.shape)
        labelled = ~y.isnan()
        if loss.kind == "mean_squared_error":
            per_task[task] = F.mse_loss(z[labelled], y[labelled])
        else:
            labelled &= y != loss.ignore_index
            weight = None if weight is None else weight.expand_as(y)[labelled]
            per_task[task] = F.binary_cross_entropy_with_logits(z[labelled], y[labelled], pos_weight=weight)
    return sum(weights[task] * loss for task, loss in per_task.items()), per_task


def results(function, logits, targets, dtype=torch.float32):
    """The total, each loss, and the gradient of the total in each task's logits."""
    leaves = {task: z.detach().to(dtype).requires_grad_() for task, z in logits.items()}
    total, per_task, *_ = function(leaves, targets)
    used = [task for task in leaves if task in per_task]
    gradients = torch.autograd.grad(total, [leaves[task] for task in used])
    named = {"total": total.detach()} | {f"loss of {task}": loss.detach() for task, loss in per_task.items()}
    return named | {f"gradient of {task}": gradient for task, gradient in zip(used, gradients)}


def compare(joint, logits, targets, **options):
    def reference(z, y):
        return plain(z, y, **options)

    truth = results(reference, logits, targets, torch.float64)
    assert_parity(results(joint, logits, targets), results(reference, logits, targets), truth)


def test_all_kinds_of_tasks_give_torchs_losses_and_gradients():
    compare(JointLoss(WEIGHTS, LOSSES), *sample())


@pytest.mark.parametrize("task", WEIGHTS)
def test_each_task_alone_gives_torchs_loss_and_gradient(task):
    logits, targets = sample()
    losses = {task: LOSSES[task]} if task in LOSSES else {}
    joint = JointLoss({task: 0.7}, losses)
    compare(joint, {task: logits[task]}, {task: targets[task]}, weights={task: 0.7})


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(weight=(0.0, 1.0, 2.0, 3.0)),
        CrossEntropy(label_smoothing=0.3),
        CrossEntropy(label_smoothing=1.0),
        CrossEntropy(ignore_index=2),
        CrossEntropy(weight=(1.0, 0.5, 2.0, 3.0), ignore_index=0, label_smoothing=0.2),
    ],
    ids=str,
)
def test_the_options_of_cross_entropy_are_torchs(loss):
    logits, targets = {"a": torch.randn(9, 4)}, {"a": torch.tensor([0, 1, 2, 3, 1, 1, 0, 2, 3])}
    compare(JointLoss({"a": 1.0}, {"a": loss}), logits, targets, weights={"a": 1.0}, losses={"a": loss})


def test_the_total_is_the_weighted_sum():
    logits, targets = sample(torch.float64)
    total, per_task, *_ = JointLoss(WEIGHTS, LOSSES)(logits, targets)
    assert list(per_task) == list(WEIGHTS)
    expected = sum(WEIGHTS[task] * loss for task, loss in per_task.items())
    assert_parity({"total": total}, {"total": expected}, {"total": expected})
    for task, loss in per_task.items():
        assert torch.equal(JointLoss(WEIGHTS, LOSSES)(logits, {task: targets[task]}).total, WEIGHTS[task] * loss)


def test_each_tasks_loss_is_differentiable_alone():
    logits, targets = sample()
    joint = JointLoss(WEIGHTS, LOSSES)
    for task in WEIGHTS:
        leaves = {name: z.clone().requires_grad_() for name, z in logits.items()}
        per_task = joint(leaves, targets).per_task
        per_task[task].backward()
        alone = results(
            JointLoss({task: 1.0}, {t: l for t, l in LOSSES.items() if t == task}),
            {task: logits[task]},
            {task: targets[task]},
        )
        assert_same_bits({"g": leaves[task].grad}, {"g": alone[f"gradient of {task}"]})
        assert all(leaf.grad is None or not leaf.grad.any() for name, leaf in leaves.items() if name != task)


def test_learned_weights_of_the_losses_get_gradients():
    """As uncertainty weighting (Kendall et al. 2018) needs."""
    logits, targets = sample()
    logits["intent"].requires_grad_()
    log_variances = torch.zeros(len(WEIGHTS), requires_grad=True)
    per_task = JointLoss(WEIGHTS, LOSSES)(logits, targets).per_task
    losses = torch.stack(list(per_task.values()))
    (losses * torch.exp(-log_variances) + log_variances).sum().backward()
    assert torch.equal(log_variances.grad, (1 - losses).detach())
    assert logits["intent"].grad.any()


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_a_scaled_total_gives_scaled_gradients(scale):
    """As a GradScaler makes it; powers of two change no bit of the mantissa."""
    logits, targets = sample()
    joint = JointLoss(WEIGHTS, LOSSES)
    expected = results(joint, logits, targets)

    def scaled(*args):
        total, per_task, *_ = joint(*args)
        return scale * total, per_task

    actual = results(scaled, logits, targets)
    for name, value in actual.items():
        if name.startswith("gradient"):
            assert torch.equal(value / scale, expected[name])


# Labels that are missing.


def test_rows_without_a_label_change_nothing():
    joint = JointLoss(WEIGHTS, LOSSES)
    logits, targets = sample()
    full = results(joint, logits, targets)
    for task, rows in {"intent": [0, 2], "score": [0, 2]}.items():
        one = JointLoss({task: WEIGHTS[task]}, {task: LOSSES[task]})
        part = results(one, {task: logits[task][rows]}, {task: targets[task][rows]})
        assert_same_bits({"loss": full[f"loss of {task}"]}, {"loss": part[f"loss of {task}"]})
        gradient = full[f"gradient of {task}"]
        assert_same_bits({"gradient": gradient[rows]}, {"gradient": part[f"gradient of {task}"]})
        assert not gradient[1].any()
    for task in ("slots", "words", "tags"):
        y = targets[task]
        missing = (y == -100) | (y.isnan() if y.is_floating_point() else torch.zeros_like(y, dtype=torch.bool))
        assert missing.any()
        assert not full[f"gradient of {task}"][missing].any()


def test_logits_without_a_label_are_not_read():
    joint = JointLoss(WEIGHTS, LOSSES)
    logits, targets = sample()
    expected = results(joint, logits, targets)
    logits["slots"][0, 2:] = torch.nan
    logits["intent"][1] = torch.inf
    logits["words"][1, 4:] = torch.nan
    logits["score"][1] = torch.nan
    assert_same_bits(results(joint, logits, targets), expected)


MISSING = {"intent": torch.full((B,), -100), "slots": torch.full((B, T), -100), "score": torch.full((B, 1), NAN)}
MISSING |= {"tags": torch.tensor([[NAN, -100.0, NAN]] * B), "words": torch.full((B, T, 2), NAN)}


@pytest.mark.parametrize("task", WEIGHTS)
def test_a_task_without_any_label_gives_zero_and_no_gradient(task):
    logits, targets = sample()
    joint = JointLoss(WEIGHTS, LOSSES)
    full, without = results(joint, logits, targets), results(joint, logits, targets | {task: MISSING[task]})
    assert without[f"loss of {task}"] == 0
    assert not without[f"gradient of {task}"].any()
    others = [name for name in full if not name.endswith(task) and name != "total"]
    assert_same_bits({name: without[name] for name in others}, {name: full[name] for name in others})
    assert without["total"].isfinite()


def test_a_batch_without_any_label_gives_zero_and_can_be_trained_on():
    logits, _ = sample()
    actual = results(JointLoss(WEIGHTS, LOSSES), logits, MISSING)
    assert not any(value.any() for value in actual.values())


@pytest.mark.parametrize("left_out", [None, "absent"], ids=str)
@pytest.mark.parametrize("task", WEIGHTS)
def test_a_task_without_targets_contributes_nothing(task, left_out):
    logits, targets = sample()
    joint = JointLoss(WEIGHTS, LOSSES)
    full = results(joint, logits, targets)
    some = {name: y for name, y in targets.items() if name != task}
    given = some | ({task: None} if left_out is None else {})
    leaves = {name: z.clone().requires_grad_() for name, z in logits.items()}
    total, per_task, *_ = joint(leaves, given)
    assert list(per_task) == list(some)
    total.backward()
    assert leaves[task].grad is None or not leaves[task].grad.any()
    for name in some:
        assert_same_bits({"g": leaves[name].grad}, {"g": full[f"gradient of {name}"]})
    assert_same_bits({"l": joint({n: z for n, z in logits.items() if n != task}, some).total}, {"l": total})


# Shapes, layouts and dtypes.


def test_packed_tokens_give_what_padded_tokens_give():
    lengths = [2, 6, 4]
    logits, targets = torch.randn(B, T, 5), torch.randint(5, (B, T))
    targets[torch.arange(T) >= torch.tensor(lengths).unsqueeze(1)] = -100
    joint = JointLoss({"slots": 2.0})
    leaf = logits.clone().requires_grad_()
    packed = pack_padded_sequence(leaf, lengths, True, enforce_sorted=False)
    total = joint({"slots": packed}, {"slots": pymtl.pack(targets, lengths, batch_first=True)}).total
    (gradient,) = torch.autograd.grad(total, leaf)
    ours = {"total": total.detach(), "gradient": gradient}

    def padded(dtype):
        z = logits.to(dtype).requires_grad_()
        loss = 2.0 * F.cross_entropy(z.flatten(0, 1), targets.flatten())
        return {"total": loss.detach(), "gradient": torch.autograd.grad(loss, z)[0]}

    assert_parity(ours, padded(torch.float32), padded(torch.float64))


def test_strided_logits_give_the_same_bits():
    stacked = torch.randn(B, T, 9)
    targets = {"a": torch.randint(4, (B, T)), "b": torch.randint(5, (B, T))}
    joint = JointLoss({"a": 1.0, "b": 1.0})
    views, copies = ({"a": f(stacked[..., :4]), "b": f(stacked[..., 4:])} for f in (lambda z: z, torch.clone))
    assert_same_bits(results(joint, views, targets), results(joint, copies, targets))
    time_first = {task: z.transpose(0, 1) for task, z in views.items()}
    expected = {task: z.contiguous() for task, z in time_first.items()}
    flipped = {task: y.t() for task, y in targets.items()}
    assert_same_bits(results(joint, time_first, flipped), results(joint, expected, flipped))


def test_targets_of_another_floating_dtype_and_integer_labels_are_taken():
    logits, _ = sample()
    joint = JointLoss({"tags": 1.0, "score": 1.0}, {"tags": BinaryCrossEntropy(), "score": MeanSquaredError()})
    tags, score = torch.randint(2, (B, 3)), torch.randn(B, 1)
    logits = {task: logits[task] for task in ("tags", "score")}
    expected = joint(logits, {"tags": tags.float(), "score": score})
    for kind in (torch.float64, torch.int64, torch.bool):
        assert torch.equal(joint(logits, {"tags": tags.to(kind), "score": score.double()}).total, expected.total)


def test_float64_logits_give_float64_losses():
    total, per_task, *_ = JointLoss(WEIGHTS, LOSSES)(*sample(torch.float64))
    assert {loss.dtype for loss in (total, *per_task.values())} == {torch.float64}


# Refusals.

REFUSED = {
    "unknown targets": (lambda z, y: (z, y | {"nonsense": y["intent"]}), KeyError, "targets: unknown task 'nonsense'"),
    "unknown logits": (lambda z, y: (z | {"nonsense": z["intent"]}, y), KeyError, "logits: unknown task 'nonsense'"),
    "no logits": (
        lambda z, y: ({k: z[k] for k in z if k != "slots"}, y),
        KeyError,
        "'slots' has targets but no logits",
    ),
    "no targets": (lambda z, y: (z, {}), ValueError, "targets: expected targets of at least one task"),
    "class too large": (lambda z, y: (z, y | {"slots": y["slots"].fill_(5)}), IndexError, "'slots'"),
    "class negative": (lambda z, y: (z, y | {"intent": y["intent"].fill_(-1)}), IndexError, "'intent'"),
    "float classes": (lambda z, y: (z, y | {"intent": y["intent"].float()}), RuntimeError, "'intent'.*float32"),
    "int32 classes": (
        lambda z, y: (z, y | {"intent": y["intent"].int()}),
        RuntimeError,
        "expected dtype Long, got Int",
    ),
    "fewer sentences": (lambda z, y: (z, y | {"intent": y["intent"][:2]}), ValueError, r"'intent'.*\[3\].*got \[2\]"),
    "fewer steps": (lambda z, y: (z, y | {"slots": y["slots"][:, :4]}), ValueError, r"'slots'.*\[3, 6\].*got \[3, 4\]"),
    "one-hot classes": (
        lambda z, y: (z, y | {"intent": torch.ones(B, 4).long()}),
        ValueError,
        r"'intent'.*got \[3, 4\]",
    ),
    "fewer numbers": (lambda z, y: (z, y | {"words": y["words"][..., 0]}), ValueError, r"'words'.*got \[3, 6\]"),
    "mixed layouts": (
        lambda z, y: (z, y | {"slots": pymtl.pack(y["slots"], [6, 6, 6], batch_first=True)}),
        TypeError,
        "'slots'.*expected a Tensor.*got a PackedSequence",
    ),
    "other batch_sizes": (
        lambda z, y: (
            z | {"slots": pymtl.pack(z["slots"], [5, 1, 3], batch_first=True)},
            y | {"slots": pymtl.pack(y["slots"], [3, 3, 3], batch_first=True)},
        ),
        ValueError,
        "'slots'",
    ),
    "other order": (
        lambda z, y: (
            z | {"slots": pymtl.pack(z["slots"], [5, 1, 3], batch_first=True)},
            y | {"slots": pymtl.pack(y["slots"], [1, 5, 3], batch_first=True)},
        ),
        ValueError,
        "'slots'",
    ),
    "mixed logits": (lambda z, y: (z | {"slots": z["slots"].double()}, y), RuntimeError, "dtype"),
    "meta targets": (lambda z, y: (z, y | {"intent": y["intent"].to("meta")}), RuntimeError, "meta"),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_by_the_name_of_the_task(change, error, message, gradients):
    logits, targets = sample()
    logits = {task: z.requires_grad_(gradients) for task, z in logits.items()}
    with pytest.raises(error, match=message):
        JointLoss(WEIGHTS, LOSSES)(*change(logits, targets))


def test_the_constructor_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one task"):
        JointLoss({})
    with pytest.raises(KeyError, match="losses: unknown task 'b'"):
        JointLoss({"a": 1.0}, {"b": CrossEntropy()})
    for smoothing in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="label_smoothing"):
            CrossEntropy(label_smoothing=smoothing)
    with pytest.raises(RuntimeError):
        JointLoss({"a": 1.0}, {"a": CrossEntropy(weight=(1.0, 2.0))})(
            {"a": torch.randn(2, 3)}, {"a": torch.zeros(2).long()}
        )


def test_it_can_be_copied_pickled_and_shown():
    joint = JointLoss(WEIGHTS, LOSSES)
    assert isinstance(joint, nn.Module)
    assert all(task in repr(joint) for task in WEIGHTS)
    logits, targets = sample()
    for twin in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert_same_bits(results(twin, logits, targets), results(joint, logits, targets))


def test_errors_name_the_task_and_not_its_number():
    joint = JointLoss({"a": 1.0, "b": 1.0}, {"b": CrossEntropy(weight=(1.0, 2.0))})
    z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"targets\['b'\]: expected dtype Long"):
        joint({"a": z, "b": z[:, :2]}, {"a": y, "b": y.int()})
    with pytest.raises(RuntimeError, match=r"weights\['b'\]: expected size \[4\]"):
        joint({"a": z, "b": z}, {"a": y, "b": y})
