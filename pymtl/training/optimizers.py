"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pymtl.training.config import ConfigError, MethodConfig, TrainingConfig, try_method

# Those whose step needs a closure, sparse gradients or matrices.
_OTHERS = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Muon)


def check_optimizer(settings: TrainingConfig, where: str) -> None:
    """Tries a step of the optimiser that the settings name.

    Raises:
        ConfigError: there is none of this name, or its options do not fit.
    """
    optimizers = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls not in _OTHERS
    }
    for key, instead in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        own = settings.optimizer_options.get(key)
        if own is not None:
            raise ConfigError(
                f"{where}: training.optimizer_options: expected training.{instead} instead of {key}, got {own!r}"
            )
    options = dict(settings.optimizer_options)
    if settings.weight_decay > 0:
        options["weight_decay"] = settings.weight_decay
    chosen = MethodConfig(settings.optimizer, options)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    at = f"{where}: training.optimizer"
    try_method(at, optimizers, chosen, lambda cls, options: cls([parameter], **options).step())


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
