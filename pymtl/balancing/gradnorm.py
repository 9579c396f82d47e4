"""Gradient normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymtl.balancing.base import Balancing


class GradNorm(Balancing):
    """GradNorm (Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing", algorithm 1): a
    weight for each task, learned together with the model's parameters. They are trained so that the norm of task k's
    gradient becomes the tasks' mean norm times ``r_k^alpha``. ``r_k`` says how slowly task k learns: its loss divided
    by its first loss, divided by the tasks' mean of that ratio.

    The gradients are with respect to the shared states, not to the weights of the last shared layer as in the paper.
    They need a backward pass through the heads only, as in MGDA-UB (Sener & Koltun 2018).

    Args:
        tasks: the tasks' names.
        alpha: how strongly slow tasks are helped; 0 makes all norms equal.
    """

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5) -> None:
        super().__init__(tasks)
        self.alpha = alpha
        self.log_weights = nn.Parameter(torch.zeros(len(self.tasks)))
        self.register_buffer("first", torch.full((len(self.tasks),), torch.nan))

    def weights(self) -> Tensor:
        """[K], of all tasks; they sum to K (renormalised in each step, as the algorithm says)."""
        return len(self.tasks) * torch.softmax(self.log_weights, 0)

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        places = self.places(tasks)
        weights = self.weights()[places].to(values.dtype)
        total = torch.dot(weights.detach(), values)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return total
        if not any(tensor.requires_grad for tensor in shared):
            raise ValueError("shared: GradNorm needs states that all tasks share, as under hard sharing; got none")
        now = values.detach()
        first = self.first[places].to(now.dtype)
        first = torch.where(first.isnan(), now, first)
        self.first[places] = first.to(self.first.dtype)
        progress = now / first.clamp(min=1e-12)
        rates = progress / progress.mean().clamp(min=1e-12)
        norms = torch.stack([weight * _norm(loss, shared) for weight, loss in zip(weights, values)])
        goals = (norms.mean() * rates**self.alpha).detach()
        distance = (norms - goals).abs().sum()
        # The second term is zero: it leaves the loss as it is, and its gradient reaches only the tasks' weights.
        return total + (distance - distance.detach())


def _norm(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """Of the gradient of the shared states; a constant."""
    wanted = [tensor for tensor in shared if tensor.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    squares = [g.square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())
