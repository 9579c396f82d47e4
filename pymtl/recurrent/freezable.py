"""What a recurrent module keeps of frozen weights, when it uses them and what drops them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pymtl import ops
from pymtl.ops.autograd import is_exporting, wants_gradient
from pymtl.ops.dtypes import autocast_dtype
from pymtl.recurrent.options import Options
from pymtl.recurrent.portable import PortableWeights
from pymtl.recurrent.route import Route
from pymtl.recurrent.snapshot import Snapshot, notice_fused_optimizers

if TYPE_CHECKING:
    from typing_extensions import Self

NARROW = (torch.int8, torch.bfloat16)  # that weights of float32 may be kept in
MOST_COLUMNS = 65536  # of 8-bit integers: the sums of longer rows might not fit 32 bits


class Freezable(nn.RNNBase):
    """A stack of recurrent layers that may be frozen; how they run is for the class that derives from it to say."""

    _snapshot: Snapshot | None = None
    _pymtl_variants: Options

    if TYPE_CHECKING:

        def _weights(self) -> list[Tensor]: ...
        def _name(self) -> str: ...
        def _pymtl_reverse(self) -> list[bool]: ...
        def _pymtl_route(self, input: Tensor, weights: Sequence[Tensor], lengths: Tensor | None = None) -> Route: ...
        def layer_weights(self, layer: int, weights: Sequence[Tensor] | None = None) -> ops.RNNWeights: ...
        def _layer_norm_of(self, layer: int) -> ops.RNNNorm | None: ...

    def freeze(self, weights: torch.dtype | None = None) -> None:
        """Packs the weights once, for calls without gradients; :func:`pymtl.freeze` does so for a whole model.

        Raises:
            RuntimeError: the module is in training mode, or its weights are inference tensors, whose changes
                nobody could notice, or no kernel keeps the weights of such a module in that dtype.
            ValueError: ``weights`` is no dtype that weights are kept in, or a number does not fit it.
        """
        self._pymtl_snapshot_with(self._pymtl_snapshot_of(weights))

    def _pymtl_snapshot_with(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot

    def _pymtl_snapshot_of(self, dtype: torch.dtype | None) -> Snapshot | None:
        """The weights packed in that dtype (None: their own); None where the kernels read them as they are."""
        if self.training:
            raise RuntimeError("freeze: expected a module in eval mode, got one in training mode: call eval() first")
        weights = self._weights()
        own = weights[0].dtype
        if dtype is not None and dtype != own:
            self._pymtl_check_narrow(weights, dtype)
        way = self._pymtl_route(weights[0], weights)
        if not weights[0].is_cpu or way.runner != "kernels":
            return None  # a GPU's kernels read the weights as they are
        if any(w.is_inference() for w in weights):
            raise RuntimeError("freeze: expected ordinary weights, got inference tensors, whose changes go unnoticed")
        notice_fused_optimizers()
        with torch.no_grad():
            prepacked = [
                ops.rnn_prepack(self.layer_weights(layer, weights), self._layer_norm_of(layer), dtype)
                for layer in range(self.num_layers)
            ]
        whole = ops.RNNFrozen.of(prepacked, self.hidden_size, self._pymtl_reverse(), self.mode)
        return Snapshot.of(weights, dtype or own, prepacked, whole)

    def _pymtl_check_narrow(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Refuses what cannot be kept in a dtype other than its own."""
        own, device = weights[0].dtype, weights[0].device
        if dtype not in NARROW:
            raise ValueError(f"weights: expected {' or '.join(map(str, NARROW))} or the module's {own}, got {dtype!r}")
        layer = f"{self._name()}({self.extra_repr()})"
        way = self._pymtl_route(weights[0], weights)
        if own != torch.float32 or device.type != "cpu" or way.runner != "kernels":
            why = f" ({way.reason})" if way.runner != "kernels" else ""
            raise RuntimeError(
                f"weights: {dtype} is for layers of torch.float32 on the CPU that this library's kernels run, got "
                f"{layer} of {own} on {device}{why}: make it one (model.float()), or freeze the others alone"
            )
        made = [name for name in self._flat_weights_names if name not in self._parameters]
        if made:
            raise RuntimeError(
                f"weights: {dtype} is for parameters, but {layer} computes {made[0]} anew at each call: remove its "
                "parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        for name, weight in zip(self._flat_weights_names, weights):
            packed = weight.dim() == 2 and not (self._pymtl_variants.layer_norm and name.startswith("weight_ih"))
            if packed and dtype == torch.int8 and not torch.isfinite(weight).all():
                raise ValueError(f"{name}: expected finite numbers to make 8-bit integers of, got inf or nan")
            if packed and dtype == torch.int8 and weight.shape[1] > MOST_COLUMNS:
                raise ValueError(
                    f"{name}: expected at most {MOST_COLUMNS:,} columns of 8-bit integers, got {weight.shape[1]:,}"
                )
            if packed and dtype == torch.bfloat16 and (weight.bfloat16().isinf() & weight.isfinite()).any():
                raise ValueError(f"{name}: expected numbers that bfloat16 holds, got one that it rounds to infinity")

    def _pymtl_make_portable(self, dtype: torch.dtype) -> None:
        """For torch.export: from now on, and for good, calls read matrices of that dtype in the parameters' place."""
        self._pymtl_check_narrow(self._weights(), dtype)
        if self._pymtl_variants.act(training=False):
            described = self._pymtl_variants.describe(self.mode)
            raise RuntimeError(f"weights: a program keeps float32 for layers with {described}, got {dtype}")
        with torch.no_grad():
            layers = [self.layer_weights(layer) for layer in range(self.num_layers)]
            self._modules["_pymtl_narrow"] = PortableWeights(layers, dtype)

    def _pymtl_portable(self) -> PortableWeights | None:
        """What a module that is to be exported has in the parameters' place."""
        return self._modules.get("_pymtl_narrow")

    def unfreeze(self) -> None:
        """Drops what :meth:`freeze` made."""
        self._snapshot = None

    def train(self, mode: bool = True) -> Self:
        self._snapshot = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._snapshot = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._snapshot = None
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def _valid_snapshot(self, weights: Sequence[Tensor], *inputs: Tensor | None) -> Snapshot | None:
        """The snapshot, if a call with these inputs uses it: all layers do then."""
        snapshot = self._snapshot
        if snapshot is None or autocast_dtype(weights[0]):
            return None
        if snapshot.is_narrow and is_exporting():
            raise RuntimeError(
                f"torch.export cannot keep weights frozen in {snapshot.dtype}, which are packed for this machine: call "
                "pymtl.unfreeze first; of a run of pymtl train, pymtl export --weights makes such a program"
            )
        if snapshot.is_narrow and wants_gradient(*inputs, *weights):
            return None
        if torch.compiler.is_compiling():
            # Float32 weights compiled code packs by itself, with the same results; those of fewer bits give others.
            return snapshot if snapshot.is_narrow else None
        return snapshot if snapshot.is_of(weights) else None

    def _pymtl_runs_narrow(self, input: Tensor) -> bool:
        """Whether a call with this input uses weights in fewer bits."""
        if self._pymtl_portable() is not None:
            return True
        snapshot = self._snapshot
        return snapshot is not None and snapshot.is_narrow and self._valid_snapshot(self._weights(), input) is not None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_snapshot", None)
        return state
