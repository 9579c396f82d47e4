"""One optimisation step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pymtl.joint_loss import JointLossResult
from pymtl.training.batches import Batch
from pymtl.training.config import TrainingConfig
from pymtl.training.errors import ConfigError
from pymtl.training.model_with_loss import ModelWithLoss
from pymtl.training.optimizers import optimizer_of


class Step:
    """Loss, backward, clipping and the optimiser's step, for training and for timing it.

    Args:
        model_with_loss: its parameters are the ones that change.
        settings: the optimiser and what is done to the gradients.
        scheduled: the factor of the learning rate at each step; None for none.
        module: what to call for the loss, where several processes wrap it.
        backward: what to call for its gradients; the loss's own by default.
        mean: of a tensor over all processes.
    """

    def __init__(
        self,
        model_with_loss: ModelWithLoss,
        settings: TrainingConfig,
        scheduled: Callable[[int], float] | None = None,
        module: nn.Module | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model_with_loss = model_with_loss
        self.settings = settings
        self.module = model_with_loss if module is None else module
        self.backward = backward
        self.mean = mean
        self.parameters = [p for p in model_with_loss.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("warm_start.freeze: expected something left to train, got every parameter frozen")
        self.optimizer = optimizer_of(self.parameters, settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scheduled) if scheduled else None
        self.averaged: MovingAverage | None = None
        if settings.ema_decay > 0:
            self.averaged = MovingAverage(model_with_loss.model, settings.ema_decay)
        self._shrunk = [p for p in model_with_loss.model.encoder.parameters() if p.requires_grad]
        self._shrunk += [p for p in model_with_loss.model.heads.parameters() if p.requires_grad]

    def __call__(
        self, batches: Sequence[Batch], scales: Sequence[Mapping[str, float]] | None = None
    ) -> list[JointLossResult]:
        """Takes the mean of the batches' losses; returns them.

        Args:
            batches: of one step.
            scales: of each, as :meth:`pymtl.JointLoss.forward` takes them.
        """
        self.optimizer.zero_grad()
        results = []
        for batch, own in zip(batches, scales or [None] * len(batches)):
            result = self.module(batch, own, self.mean)
            if self.model_with_loss.joint.combines_gradients:
                try:
                    self.model_with_loss.joint.backward(
                        result, self.model_with_loss.model.parameters(), 1 / len(batches)
                    )
                except ValueError as error:
                    raise ConfigError(f"balancing: {error}") from error
            else:
                self.backward(result.total / len(batches) if len(batches) > 1 else result.total)
            results.append(result)
        if self.settings.l1 > 0:
            shrunk = [p for p in self._shrunk if p.grad is not None]
            torch._foreach_add_([p.grad for p in shrunk], [p.detach().sign() for p in shrunk], alpha=self.settings.l1)
        self.clip()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model_with_loss.model)
        balancing = self.model_with_loss.joint.balancing
        if balancing is not None and balancing.needs_losses_after_step:
            balancing.after_step(self._losses(batches[-1], (scales or [None])[-1]))
        return results

    def clip(self) -> None:
        """Scales the gradients down, if they are too large."""
        # clip_grad_norm_ multiplies all gradients by one where nothing is to be clipped. On a GPU, that pass takes less
        # time than waiting to know whether the norm is too large.
        parameters = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if norm.is_cuda or not norm <= self.settings.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)

    @torch.no_grad()
    def _losses(self, batch: Batch, scales: Mapping[str, float] | None) -> dict[str, Tensor]:
        """The whole batch's weighted losses with the parameters as they are now."""
        return self.module(batch, scales, self.mean).weighted


class MovingAverage(AveragedModel):
    """The exponential moving average of a model, shorter at the beginning so that the first weights are soon forgotten.

    Updated otherwise than torch updates it, which waits for a GPU at every step: the count stays on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        count = int(self.n_averaged)
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if count == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + count) / (10 + count)))
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1
