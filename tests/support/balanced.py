"""Losses to balance, alone and of a model, and the papers' formulas."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pymtl import LSTM, JointLoss, MultiTaskModel
from pymtl.balancing import DWA, EW, FAMO, GLS, IMTLL, STCH, UW

TASKS = ("a", "b", "c")
VALUES = (0.7, 2.5, 0.05)
B, T, E, H, VOCABULARY = 4, 6, 5, 6, 20
LENGTHS = [3, 6, 1, 4]
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(1, VOCABULARY, (B, T), generator=GENERATOR)
CLASSES = torch.tensor([0, 2, -100, 1])
TOKEN_TARGETS = torch.randint(4, (B, T), generator=GENERATOR)
TOKEN_TARGETS = TOKEN_TARGETS.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
WEIGHTS = {"a": 0.5, "b": 3.0, "c": 1.0}


def leaves(tasks=TASKS, values=VALUES, dtype=torch.float64):
    """Losses that are leaves of the graph themselves."""
    of = dict(zip(TASKS, values))
    return {task: torch.tensor(of[task], dtype=dtype, requires_grad=True) for task in tasks}


def filled(method):
    """The method, with what it learns away from where it starts."""
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    return method


def learned(method):
    return {n: p.detach().double().requires_grad_() for n, p in method.named_parameters()}


def joint_sample():
    logits = {task: torch.randn(B, 3, dtype=torch.float64, requires_grad=True) for task in TASKS}
    return logits, {task: torch.randint(3, (B,)) for task in TASKS}


def cross_entropies(logits, targets):
    return {task: F.cross_entropy(logits[task], targets[task]) for task in targets}


def model_and_loss(heads, balancing, weights=None):
    torch.manual_seed(1)
    encoder = LSTM(E, H, batch_first=True, bidirectional=True)
    model = MultiTaskModel(nn.Embedding(VOCABULARY, E), encoder, heads).double()
    return model, JointLoss(weights or dict.fromkeys(heads, 1.0), model.losses, balancing)


# The totals, by the papers.


def uncertainty(regression):
    def formula(losses, learned):
        total = 0.0
        for task, loss in losses.items():
            log_variance = learned["log_variance"][TASKS.index(task)]
            sigma = (log_variance / 2).exp()
            total = total + loss / ((2 if task in regression else 1) * sigma**2) + sigma.log()
        return total

    return formula


def imtl_l(losses, learned):
    s = learned["log_scale"]
    return sum(s[TASKS.index(task)].exp() * loss - s[TASKS.index(task)] for task, loss in losses.items())


def geometric(losses, learned):
    product = math.prod(losses.values())
    return product ** (1 / len(losses))


def tchebycheff(mu, ideal):
    return lambda losses, learned: mu * torch.log(sum(torch.exp((l - ideal) / mu) for l in losses.values()))


def famo(losses, learned):
    z = {task: 1 / len(losses) for task in losses}  # softmax of zeros
    c = 1 / sum(z[task] / loss.item() for task, loss in losses.items())
    return sum(c * z[task] * loss.log() for task, loss in losses.items())


FORMULAS = {
    "EW": (lambda: EW(TASKS), lambda losses, learned: sum(losses.values())),
    "UW": (lambda: UW(TASKS), uncertainty(())),
    "UW with regression": (lambda: UW(TASKS, regression=["c", "a"]), uncertainty(("a", "c"))),
    "DWA": (lambda: DWA(TASKS), lambda losses, learned: sum(losses.values())),
    "GLS": (lambda: GLS(TASKS), geometric),
    "IMTL-L": (lambda: IMTLL(TASKS), imtl_l),
    "STCH": (lambda: STCH(TASKS), tchebycheff(1.0, 0.0)),
    "STCH with options": (lambda: STCH(TASKS, mu=0.3, ideal=0.02), tchebycheff(0.3, 0.02)),
    "FAMO": (lambda: FAMO(TASKS), famo),
}
