"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pymtl.training.config import TrainingConfig


def optimizer_of(parameters: Iterable[nn.Parameter], settings: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser that the settings name, of ``torch.optim``."""
    options = {"lr": settings.learning_rate, **settings.optimizer_options}
    if settings.weight_decay > 0:
        options["weight_decay"] = settings.weight_decay
    parameters = list(parameters)
    fused = ["Adam", "AdamW", "SGD"] + ["Adagrad"] * all(p.is_cpu for p in parameters)
    if settings.optimizer in fused and not settings.optimizer_options:
        options["fused"] = True  # one pass over the parameters instead of several
    return getattr(torch.optim, settings.optimizer)(parameters, **options)
