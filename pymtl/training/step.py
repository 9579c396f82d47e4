"""One optimisation step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymtl.training.backends import Backend
from pymtl.training.data import Batch


class Step:
    """Loss, backward, clipping and Adam (Kingma & Ba 2015), for training and for timing it.

    Args:
        backend: the model and its loss; its parameters are the ones that change.
        learning_rate: Adam's.
        clip_norm: the gradients are scaled down to this norm over all parameters, if theirs is larger.
    """

    def __init__(self, backend: Backend, learning_rate: float, clip_norm: float) -> None:
        self.backend = backend
        self.clip_norm = clip_norm
        self.optimizer = torch.optim.Adam(backend.model.parameters(), lr=learning_rate, fused=True)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the joint loss, and each task's."""
        self.optimizer.zero_grad()
        total, per_task = self.backend.loss(batch)
        total.backward()
        self.clip()
        self.optimizer.step()
        return total, per_task

    def clip(self) -> None:
        """Scales the gradients down, if they are too large."""
        # clip_grad_norm_ multiplies by one where nothing is to be clipped: a pass over all gradients.
        parameters = [p for p in self.backend.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if not norm <= self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
