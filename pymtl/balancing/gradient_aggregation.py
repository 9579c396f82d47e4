"""Methods on the tasks' gradients, by torchjd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymtl.balancing.base import Balancing

AGGREGATORS = (
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "GradDrop",
    "IMTLG",
    "MGDA",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Random",
    "Sum",
    "UPGrad",
)


class GradientAggregation(Balancing):
    """Gradients of all tasks combined into one that conflicts with none, or less: UPGrad (Quinton & Rey 2024), MGDA
    (Désidéri 2012), PCGrad (Yu et al. 2020), CAGrad (Liu et al. 2021), Nash-MTL (Navon et al. 2022), Aligned-MTL
    (Senushkin et al. 2023) and others, computed by torchjd on the Jacobian of the losses with respect to the shared
    parameters. Each head gets its own task's gradient.

    The loss itself is the plain sum; :meth:`pymtl.JointLoss.backward` does what is different. It goes through the
    encoder once for each task.

    Args:
        tasks: the tasks' names.
        aggregator: a class of ``torchjd.aggregation``.
        options: for its constructor.

    Raises:
        ModuleNotFoundError: torchjd is not installed (``pip install pymtl[torchjd]``).
        ValueError, TypeError, AttributeError: the aggregator or an option is unknown or does not fit.
    """

    combines_gradients: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[str], aggregator: str = "UPGrad", **options: Any) -> None:
        super().__init__(tasks)
        if aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator: expected one of {', '.join(AGGREGATORS)}, got {aggregator!r}")
        try:
            from torchjd import aggregation
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("GradientAggregation needs torchjd: pip install pymtl[torchjd]") from error
        # A configuration file has no tensors.
        self._tensors = {name: torch.tensor(v) for name, v in options.items() if isinstance(v, list)}
        if aggregator == "NashMTL":
            options = {"n_tasks": len(self.tasks), **options}
        elif aggregator == "CAGrad":
            options = {"c": 0.5, **options}
        self._make = functools.partial(getattr(aggregation, aggregator), **options)
        with torch.random.fork_rng(devices=[]):
            self._make(**self._tensors)(torch.eye(len(self.tasks)))  # some options are read only now
        self.aggregator = self._make(**self._tensors)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> GradientAggregation:
        super()._apply(function, recurse)
        if self._tensors:  # torchjd's own do not move
            self._tensors = {name: function(tensor) for name, tensor in self._tensors.items()}
            self.aggregator = self._make(**self._tensors)
        return self

    def total(self, values: Tensor, tasks: list[str], shared: Sequence[Tensor]) -> Tensor:
        return values.sum()

    def backward(self, losses: Mapping[str, Tensor], shared: Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
        from torchjd.autojac import jac_to_grad, mtl_backward

        if len(losses) < len(self.tasks) and self._remembers:
            missing = ", ".join(task for task in self.tasks if task not in losses)
            raise ValueError(f"losses: expected one of every task in each batch with NashMTL, got none of {missing}")
        features = [tensor for tensor in shared if tensor.requires_grad]
        if not features:
            raise ValueError(
                "shared: gradient aggregation needs states that all tasks share, as under hard sharing; got none"
            )
        try:
            # One backward pass at a time: the kernels do not batch several by vmap. The losses share their way to the
            # heads (one op computes them all), which must stay for the next one.
            mtl_backward(list(losses.values()), features=features, retain_graph=True, parallel_chunk_size=1)
        except ValueError as error:
            raise ValueError(
                f"gradient aggregation needs heads that read the shared states alone, not the tokens: {error}"
            ) from error
        jac_to_grad([p for p in parameters if getattr(p, "jac", None) is not None], self.aggregator)

    @property
    def _remembers(self) -> bool:
        """Nash-MTL begins each step from the weights of the step before."""
        return type(self.aggregator).__name__ == "NashMTL"

    def get_extra_state(self) -> dict[str, Any]:
        if not self._remembers or self.aggregator.weighting.step == 0:
            return {}
        memory = self.aggregator.weighting
        return {
            "step": float(memory.step),
            "weights": torch.from_numpy(memory.prvs_alpha.copy()),
            "normalization": torch.from_numpy(memory.normalization_factor.copy()),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self._remembers and state:
            memory = self.aggregator.weighting
            memory.prvs_alpha = state["weights"].numpy().copy()
            memory.normalization_factor = state["normalization"].numpy().copy()
            memory._init_optim_problem()  # which the first step would do
            memory.step = state["step"]
