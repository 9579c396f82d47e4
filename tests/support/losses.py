"""Tasks of the joint loss, and the ways to run them: ours, torch's losses one after another and the plain reference."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from longdouble import binary_cross_entropy, cross_entropy, mean_squared_error

from pymtl import ops, reference

CE, MSE, BCE = "cross_entropy", "mean_squared_error", "binary_cross_entropy"


@dataclass(frozen=True)
class Task:
    kind: str
    rows: int
    classes: int
    weighted: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # the share of targets that are no label
    ignore_index: int = -100
    scale: float = 1.0

    def __str__(self):
        name = {CE: "ce", MSE: "mse", BCE: "bce"}[self.kind]
        options = [
            text
            for text, given in [
                ("weighted", self.weighted),
                (f"smoothing{self.smoothing:g}", self.smoothing),
                (f"ignored{self.ignored:g}", self.ignored),
                (f"index{self.ignore_index}", self.ignore_index != -100),
                (f"scale{self.scale:g}", self.scale != 1),
            ]
            if given
        ]
        return "-".join([name, f"{self.rows}x{self.classes}", *options])


@dataclass(frozen=True)
class Sample:
    """The arguments of a call, one entry for each task."""

    logits: list
    targets: list
    kinds: list
    weights: list
    ignore_index: list
    label_smoothing: list

    def others(self):
        return {
            "weights": self.weights,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    def to(self, dtype):
        def convert(tensor):
            return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor

        return Sample(
            [convert(z) for z in self.logits],
            [convert(y) for y in self.targets],
            self.kinds,
            [convert(w) for w in self.weights],
            self.ignore_index,
            self.label_smoothing,
        )


def sample_of(tasks, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, targets, weights = [], [], []
    for task in tasks:
        size = (task.rows, task.classes)
        logits.append(task.scale * torch.randn(size, generator=generator, dtype=dtype))
        if task.kind == CE:
            target = torch.randint(task.classes, (task.rows,), generator=generator)
            target[torch.rand(task.rows, generator=generator) < task.ignored] = task.ignore_index
        else:
            target = torch.rand(size, generator=generator, dtype=dtype)
            if task.kind == BCE:
                target = torch.where(torch.rand(size, generator=generator) < 0.3, target, target.round())
            gone = torch.rand(size, generator=generator)
            target[gone < task.ignored] = torch.nan
            if task.kind == BCE:
                target[gone < task.ignored / 2] = task.ignore_index
        targets.append(target)
        weights.append(0.1 + torch.rand(task.classes, generator=generator, dtype=dtype) if task.weighted else None)
    return Sample(
        logits,
        targets,
        [task.kind for task in tasks],
        weights,
        [task.ignore_index for task in tasks],
        [task.smoothing for task in tasks],
    )


def only(s, k):
    """One task of a sample."""
    return Sample(*([column[k]] for column in vars(s).values()))


def ours(logits, s):
    return ops.joint_loss(logits, s.targets, s.kinds, **s.others()).unbind()


def plain(logits, s):
    return reference.joint_loss(logits, s.targets, s.kinds, *s.others().values()).unbind()


def theirs(logits, s):
    """One torch loss after another, on the entries that have a label."""
    losses = []
    for z, y, kind, weight, ignored, smoothing in zip(logits, s.targets, s.kinds, *s.others().values()):
        if kind == CE:
            loss = F.cross_entropy(z, y, weight=weight, ignore_index=ignored, label_smoothing=smoothing)
        elif kind == MSE:
            labelled = ~y.isnan()
            loss = F.mse_loss(z[labelled], y[labelled])
        else:
            labelled = ~y.isnan() & (y != ignored)
            weight = None if weight is None else weight.expand_as(y)[labelled]
            loss = F.binary_cross_entropy_with_logits(z[labelled], y[labelled], pos_weight=weight)
        losses.append(loss)
    return losses


def with_gradients(function, s):
    """Each task's loss and the gradient of that loss alone."""
    leaves = [z.detach().clone().requires_grad_() for z in s.logits]
    losses = function(leaves, s)
    results = {f"loss {k}": loss.detach() for k, loss in enumerate(losses)}
    for k, (loss, leaf) in enumerate(zip(losses, leaves)):
        (results[f"gradient {k}"],) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return results


def in_long_double(s):
    results = {}
    for k, (z, y, kind, weight, ignored, smoothing) in enumerate(
        zip(s.logits, s.targets, s.kinds, *s.others().values())
    ):
        if kind == CE:
            loss, gradient = cross_entropy(z, y, weight, ignored, smoothing)
        elif kind == MSE:
            loss, gradient = mean_squared_error(z, y)
        else:
            loss, gradient = binary_cross_entropy(z, y, weight, ignored)
        results |= {f"loss {k}": loss, f"gradient {k}": gradient}
    return results


SMALL = [
    Task(CE, 1, 1),
    Task(CE, 1, 2),
    Task(CE, 3, 5),
    Task(CE, 7, 17, weighted=True),
    Task(CE, 9, 16, smoothing=0.1),
    Task(CE, 12, 33, weighted=True, smoothing=0.3, ignored=0.4),
    Task(CE, 12, 4, ignored=0.3, ignore_index=2),
    Task(CE, 5, 6, smoothing=1.0),
    Task(CE, 8, 6, scale=30.0),
    Task(MSE, 1, 1),
    Task(MSE, 6, 5, ignored=0.4),
    Task(MSE, 40, 3, scale=100.0),
    Task(BCE, 1, 1),
    Task(BCE, 6, 5, weighted=True, ignored=0.4),
    Task(BCE, 30, 7, scale=40.0),
    Task(BCE, 9, 3, ignored=0.5, ignore_index=-1),
]
LARGE = [
    Task(CE, 1000, 72, ignored=0.3),
    Task(CE, 500, 79, weighted=True, smoothing=0.1, ignored=0.5),
    Task(CE, 20, 5000),
    Task(CE, 65, 7),
    Task(CE, 5000, 2, weighted=True),
    Task(MSE, 700, 3, ignored=0.2),
    Task(BCE, 300, 20, weighted=True, ignored=0.2),
]
MIXED = [
    Task(CE, 16, 7),
    Task(CE, 300, 72, weighted=True, smoothing=0.1, ignored=0.3),
    Task(MSE, 16, 1),
    Task(BCE, 16, 9, weighted=True, ignored=0.1),
    Task(CE, 130, 5, ignored=0.2, ignore_index=-1),
]
