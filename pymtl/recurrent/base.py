"""What the drop-in LSTM, GRU and RNN share: checks, layouts and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pymtl import ops, reference
from pymtl.dropout import dropout
from pymtl.ops.autograd import is_plain, needs_reference, wants_gradient
from pymtl.ops.rnn_frozen import rnn_frozen_plain
from pymtl.packing import as_lengths, turned_around
from pymtl.recurrent.freezable import Freezable
from pymtl.recurrent.options import Options
from pymtl.recurrent.resets import begun, check_resets, cut_nothing
from pymtl.recurrent.route import Route, refuse_recording, route
from pymtl.recurrent.snapshot import Snapshot

Cells = tuple[Tensor | None, Tensor | None]  # h_0 and c_0
Module = TypeVar("Module", bound=nn.Module)


class Recurrent(Freezable):
    """A stack of layers that runs through the kernels where they take its input, elsewhere through torch's own path.

    It derives from nn.RNNBase, not from torch's module: Dynamo does not trace instances of nn.LSTM, nn.GRU and nn.RNN.
    """

    _original: type[nn.RNNBase]
    # The name differs from the options': a converted subclass may have attributes of its own by those names.
    _pymtl_variants: Options = Options()

    def __init__(self, *arguments: Any, options: Options) -> None:
        super().__init__(*arguments)
        self._set_options(options)
        if options.layer_norm:
            self._add_gains()

    def _set_options(self, options: Options) -> None:
        if options.reverse and self.bidirectional:
            raise ValueError("reverse: expected False with bidirectional=True, which reads from both ends, got True")
        if self.proj_size > 0 and options.act(training=True):
            raise ValueError(f"proj_size: expected 0 with {options.describe(self.mode)}, got {self.proj_size}")
        self._pymtl_variants = options

    def _add_gains(self) -> None:
        weight = self._weights()[0]
        for suffix in self._suffixes():
            for kind in self._gain_kinds():
                size = self.hidden_size if kind.endswith("_c") else weight.shape[0]
                self.register_parameter(kind + suffix, nn.Parameter(weight.new_empty(size)))
        self._reset_gains()

    def _gain_kinds(self) -> list[str]:
        """Of the parameters of layer normalisation."""
        of_c = ["gain_c", *(["bias_c"] if self.bias else [])] if self.mode == "LSTM" else []
        return ["gain_ih", "gain_hh", *of_c] if self._pymtl_variants.layer_norm else []

    def _reset_gains(self) -> None:
        for kind in self._gain_kinds():
            for suffix in self._suffixes():
                nn.init.constant_(getattr(self, kind + suffix), 0.0 if kind == "bias_c" else 1.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_gains()

    def extra_repr(self) -> str:
        described = self._pymtl_variants.describe(self.mode)
        return super().extra_repr() + (f", {described}" if described else "")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Runs the layers.

        Args:
            input: see the class.
            hx: the initial states, as the class has them.
            lengths: of the sequences of a padded batch, in any order: int64 [B] on the CPU or integers, each
                from 1 to T. Padding is neither read nor computed on; the output is zero there. For an input on a GPU
                they may be on that GPU too, so that the call does not wait for them: they are then clamped to 0 and T
                rather than checked.
            resets: of a padded batch, bool [T, B] ([B, T] if ``batch_first``, unbatched [T]); True where an episode, a
                document or a recording begins: the state before the step is zero. A reset cuts a sequence in two, and
                no direction sees across the cut. The forward direction begins the first segment with h_0 (or zero,
                if its first step is a reset) and ends with the state of the last segment; the backward direction (also
                that of ``reverse=True``) begins the last segment with its h_0 and ends with the state of the first.
                Resets on a GPU are waited for.

        Returns:
            The output and the last states.

        Raises:
            ValueError: the input is not 2-D or 3-D or has another dtype than the weights, or ``lengths`` comes
                with a PackedSequence or an unbatched input, or ``resets`` with a PackedSequence.
            TypeError: ``resets`` is no tensor.
            RuntimeError: a size, dtype or device does not fit; the message names the argument.
        """
        if self._snapshot is not None and lengths is None and resets is None:
            frozen = self._frozen_stack(self._snapshot, input)
            if frozen is not None:
                return self._frozen_forward(frozen, input, hx)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            if resets is not None:
                raise ValueError("resets: expected none with a PackedSequence: give the padded batch and its lengths")
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._name()}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if lengths is not None and input.dim() != 3:
            raise ValueError("lengths: expected none with an unbatched (2-D) input")
        if resets is not None:
            return self._forward_resets(input, hx, lengths, resets)
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths)
        weights = self._weights()
        way = self._pymtl_route(input, weights)
        if way.runner == "torch":
            return self._pymtl_torchs_forward(input, hx)

        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
        self._check_input(input, weights, 3)
        h0, c0 = self._initial_state(hx, input.shape[0 if self.batch_first else 1], batched)
        if self.batch_first:
            input = input.transpose(0, 1)
        if input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n, c_n = self._layers(way, input, None, weights, h0, c0, input.shape[1])
        output = _editable(output)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            return output.squeeze(0 if self.batch_first else 1), self._states(h_n.squeeze(1), c_n.squeeze(1))
        return output, self._states(h_n, c_n)

    def _frozen_stack(self, snapshot: Snapshot, input: Any) -> ops.RNNFrozen | None:
        """The prepacked layers, if all this call needs is to run them over a padded batch: the short way for calls of
        microseconds. Every other call, also a wrong one, goes the long way."""
        stack = snapshot.stacks[-1]
        if (
            type(input) is not Tensor
            or not is_plain()
            or self.training
            or self._pymtl_variants.act(False)
            or input.dtype is not stack.prepacked.dtype
            or not input.is_cpu
        ):
            return None
        shape = input.shape
        fits = len(shape) == 3 and shape[2] == self.input_size and shape[0 if not self.batch_first else 1] > 0
        return stack if fits and snapshot.is_of(self._weights()) else None

    def _frozen_forward(self, stack: ops.RNNFrozen, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        h0, c0 = self._initial_state(hx, input.shape[0 if self.batch_first else 1], True)
        if not self.batch_first:
            output, h_n, c_n = rnn_frozen_plain(input, stack, h0, c0)
            return output, self._states(h_n, c_n)
        output, h_n, c_n = rnn_frozen_plain(input.transpose(0, 1), stack, h0, c0)
        return output.transpose(0, 1), self._states(h_n, c_n)

    def _pymtl_torchs_forward(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        """torch's own path; of a layer that reads from the end with its sequences turned around."""
        if not self._pymtl_variants.reverse:
            return self._original.forward(self, input, hx)
        if isinstance(input, Tensor):
            time = 1 if self.batch_first and input.dim() == 3 else 0
            output, state = self._original.forward(self, input.flip(time), hx)
            return output.flip(time), state
        places = turned_around(input.batch_sizes).to(input.data.device)
        output, state = self._original.forward(self, input._replace(data=input.data[places]), hx)
        return output._replace(data=output.data[places]), state

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if self._pymtl_variants.reverse:
            refuse_recording("reverse=True with lengths or a PackedSequence", "torch.export.export can")
        weights = self._weights()
        way = self._pymtl_route(data, weights)
        if way.runner == "torch":
            return self._pymtl_torchs_forward(input, hx)
        self._check_input(data, weights, 2)
        h0, c0 = self._initial_state(hx, _batch_of(input, hx), batched=True)
        h0, c0 = _permute(h0, sorted_indices), _permute(c0, sorted_indices)
        batch = None if sorted_indices is None else sorted_indices.shape[0]
        output, h_n, c_n = self._layers(way, data, batch_sizes, weights, h0, c0, batch)
        packed = PackedSequence(_editable(output), batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._permuted_states(h_n, c_n, unsorted_indices)

    def _forward_lengths(self, input: Tensor, hx: Any, lengths: Tensor | Sequence[int]) -> tuple[Tensor, Any]:
        weights = self._weights()
        self._check_input(input, weights, 3)
        batch, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        lengths = as_lengths(lengths, batch, input.device)
        way = self._pymtl_route(input, weights, lengths)
        if way.runner != "kernels":
            packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
            result, state = self._forward_packed(packed, hx)
            return pad_packed_sequence(result, self.batch_first, total_length=steps)[0], state
        h0, c0 = self._initial_state(hx, batch, batched=True)
        order = ops.packing_order(lengths, steps, input.device)
        data = ops.pack(input, order, batch_first=self.batch_first)
        h0, c0 = _permute(h0, order.sorted_indices), _permute(c0, order.sorted_indices)
        output, h_n, c_n = self._layers(way, data, order.batch_sizes, weights, h0, c0, batch)
        padded = ops.unpack(output, order, batch_first=self.batch_first)
        return padded, self._permuted_states(h_n, c_n, order.unsorted_indices)

    def _forward_resets(
        self, input: Tensor, hx: Any, lengths: Tensor | Sequence[int] | None, resets: Tensor
    ) -> tuple[Tensor, Any]:
        check_resets(resets, input)
        refuse_recording("resets", "the cuts would be those of this call for ever; torch.export.export can")
        batched = input.dim() == 3
        if not batched:
            place = 0 if self.batch_first else 1
            input, resets = input.unsqueeze(place), resets.unsqueeze(place)
        weights = self._weights()
        self._check_input(input, weights, 3)
        batch, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = as_lengths(lengths, batch, input.device)
        h0, c0 = self._initial_state(hx, batch, batched)
        reverse = self._pymtl_reverse()
        h0, c0 = (begun(state, resets, self.batch_first, reverse) for state in (h0, c0))
        if cut_nothing(resets, self.batch_first):
            hx = None if h0 is None else self._states(h0, c0)
            output, state = Recurrent.forward(self, input, hx, lengths=lengths)
            if batched:
                return output, state
            h_n, c_n = state if isinstance(state, tuple) else (state, state)
            return output.squeeze(place), self._states(h_n.squeeze(1), c_n.squeeze(1))
        segments = ops.segment_order(resets, lengths, self.batch_first, input.device)
        data = segments.pack(input)
        h0, c0 = (segments.initial(state, reverse) for state in (h0, c0))
        way = self._pymtl_route(data, weights)
        if way.runner == "torch":
            longest = int((segments.batch_sizes > 0).sum())
            packed = PackedSequence(data, segments.batch_sizes[:longest])
            result, state = self._pymtl_torchs_forward(packed, None if h0 is None else self._states(h0, c0))
            output, (h_n, c_n) = result.data, state if isinstance(state, tuple) else (state, state)
        else:
            count = segments.sequences.shape[0]
            output, h_n, c_n = self._layers(way, data, segments.batch_sizes, weights, h0, c0, count)
        output = segments.unpack(output, input.shape[0], input.shape[1])
        h_n, c_n = (segments.final(state, reverse) for state in (h_n, c_n))
        if not batched:
            return output.squeeze(place), self._states(h_n.squeeze(1), c_n.squeeze(1))
        return output, self._states(h_n, c_n)

    def _weights(self) -> list[Tensor]:
        """The weights of this very call, in the order of ``_flat_weights_names``.

        Looked up by name each time: parametrizations, functional_call, weight-drop and others replace them.
        """
        parameters = self._parameters
        names = self._flat_weights_names
        try:
            return [parameters[name] for name in names]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _check_input(self, input: Tensor, weights: Sequence[Tensor], dims: int) -> None:
        # As nn.RNNBase.check_input, but with this call's weights: that method reads _flat_weights, which may be stale.
        if input.dtype != weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weights[0].dtype}). "
                f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({input.dtype})"
            )
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )

    # The calls below go by this name: a converted subclass may have a `route` of its own.
    def route(self, input: Tensor, lengths: Tensor | None = None) -> Route:
        """Who runs such an input now, and why: this library's kernels, torch's own path or the plain reference."""
        return self._pymtl_route(input, self._weights(), lengths)

    def kernels_take(self, input: Tensor) -> bool:
        """Whether this library's kernels run such an input without ``lengths``. With ``lengths`` on a GPU they take
        more inputs: ask :meth:`route`."""
        return self._pymtl_route(input, self._weights()).runner == "kernels"

    def _pymtl_route(self, input: Tensor, weights: Sequence[Tensor], lengths: Tensor | None = None) -> Route:
        varied = self._pymtl_variants.act(self.training)
        if self._snapshot is not None and self._snapshot.is_narrow:
            refuse_recording(f"weights frozen in {self._snapshot.dtype}", "call pymtl.unfreeze first")
        if varied:
            described = self._pymtl_variants.describe(self.mode)
            refuse_recording(
                f"a layer with {described}", "torch's layers have no such options; torch.export.export can"
            )
        return route(
            input, weights, self.mode, self.hidden_size, self.proj_size, varied, self._pymtl_variants.reverse, lengths
        )

    def _initial_state(self, hx: Any, batch: int, batched: bool) -> Cells:
        """h_0 and c_0 [layers * D, B, H], checked."""
        if hx is None:
            return None, None
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
        dims = 3 if batched else 2
        if hx.dim() != dims:
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor")
        hx = hx if batched else hx.unsqueeze(1)
        self.check_hidden_size(hx, self._state_size(batch), "Expected hidden size {}, got {}")
        return hx, None

    def _states(self, h_n: Tensor, c_n: Tensor) -> Any:
        """The last states as forward returns them."""
        return h_n

    def _permuted_states(self, h_n: Tensor, c_n: Tensor, indices: Tensor | None) -> Any:
        return self._states(_permute(h_n, indices), _permute(c_n, indices))

    def _state_size(self, batch: int) -> tuple[int, int, int]:
        return self.num_layers * self._directions(), batch, self.hidden_size

    def _name(self) -> str:
        return self._original.__name__

    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _pymtl_reverse(self) -> list[bool]:
        """Of each direction: whether it reads from the last step to the first."""
        return [False, True] if self.bidirectional else [self._pymtl_variants.reverse]

    def layer_weights(self, layer: int, weights: Sequence[Tensor] | None = None) -> ops.RNNWeights:
        """A layer's weights as they are now (or out of ``weights``), for :func:`pymtl.ops.rnn`."""
        weights = self._weights() if weights is None else weights
        directions = self._directions()
        each = 4 if self.bias else 2
        flat = weights[layer * directions * each : (layer + 1) * directions * each]
        return ops.RNNWeights(
            list(flat[0::each]),
            list(flat[1::each]),
            list(flat[2::each]) if self.bias else [],
            list(flat[3::each]) if self.bias else [],
            self._pymtl_reverse(),
            self.mode,
        )

    def _layer_norm_of(self, layer: int) -> ops.RNNNorm | None:
        """A layer's gains as they are now, if it is layer-normalised."""
        if not self._pymtl_variants.layer_norm:
            return None
        directions = self._directions()
        suffixes = self._suffixes()[layer * directions : (layer + 1) * directions]
        lists = [[getattr(self, kind + suffix) for suffix in suffixes] for kind in self._gain_kinds()]
        return ops.RNNNorm(*lists, *([] for _ in range(4 - len(lists))))

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, for each layer and direction."""
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ("", "_reverse")[: self._directions()]]

    def _layers(
        self,
        way: Route,
        input: Tensor,
        batch_sizes: Tensor | None,
        weights: Sequence[Tensor],
        h0: Tensor | None,
        c0: Tensor | None,
        batch: int | None = None,
        layers: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output of the last of the first ``layers`` layers (all by default), and the states of each.

        ``way`` is the call's route, of which only counts here whether it is the reference; ``batch`` is B, or None
        where only ``batch_sizes`` tells.
        """
        directions = self._directions()
        snapshot = self._valid_snapshot(weights, input, h0, c0)
        drops = self.training and self.dropout > 0
        varied = self._pymtl_variants.act(self.training)
        if (
            snapshot is not None
            and not drops
            and not varied
            and not needs_reference(input, h0, c0, *weights)
            and not wants_gradient(input, h0, c0, *weights)
        ):
            stack = snapshot.stacks[-1 if layers is None else layers - 1]
            if torch.compiler.is_compiling():
                return ops.rnn_frozen_of(input, batch_sizes, stack, h0, c0, weights, snapshot.origin)
            return ops.rnn_frozen(input, batch_sizes, stack, h0, c0)
        portable = self._pymtl_portable()
        h_last, c_last = [], []
        for layer in range(self.num_layers if layers is None else layers):
            if layer > 0:
                input = self._between_layers(input)
            states = slice(layer * directions, (layer + 1) * directions)
            own = (
                self.layer_weights(layer, weights),
                None if h0 is None else h0[states],
                None if c0 is None else c0[states],
            )
            if portable is not None:
                packed = portable.prepacked(layer, own[0])
                frozen = ops.RNNFrozen.of([packed], self.hidden_size, self._pymtl_reverse(), self.mode)
                input, h_n, c_n = ops.rnn_frozen(input, batch_sizes, frozen, *own[1:])
            elif varied:
                if snapshot is not None and torch.compiler.is_compiling():
                    raise RuntimeError(
                        f"compiled code cannot take weights frozen in {snapshot.dtype} for layers with "
                        f"{self._pymtl_variants.describe(self.mode)}: call pymtl.unfreeze, or leave them uncompiled"
                    )
                prepacked = None if snapshot is None else snapshot.prepacked[layer]
                input, h_n, c_n = self._varied_layer(way, layer, input, batch_sizes, *own, batch, prepacked)
            else:
                input, h_n, c_n = ops.rnn(input, batch_sizes, *own)
            h_last.append(h_n)
            c_last.append(c_n)
        if len(h_last) == 1:
            return input, h_last[0], c_last[0]
        return input, torch.cat(h_last), torch.cat(c_last)

    def _varied_layer(
        self,
        way: Route,
        layer: int,
        input: Tensor,
        batch_sizes: Tensor | None,
        weights: ops.RNNWeights,
        h0: Tensor | None,
        c0: Tensor | None,
        batch: int | None,
        prepacked: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        variants = self._pymtl_variants
        if self.training and variants.weight_drop > 0:
            weights = weights._replace(weight_hh=[dropout(w, variants.weight_drop) for w in weights.weight_hh])
            prepacked = None
        if batch is None:
            batch = int(batch_sizes[0]) if self.training and variants.recurrent_dropout > 0 else 0
        masks = variants.masks(input, batch, self._directions(), self.hidden_size, self.training)
        norm = self._layer_norm_of(layer)
        if way.runner == "reference":
            gains = () if norm is None else (norm.within(), norm.gain_ih)
            return reference.rnn(input, batch_sizes, *weights, h0, c0, *masks, *gains)
        return ops.rnn(input, batch_sizes, weights, h0, c0, prepacked=prepacked, masks=masks, norm=norm)

    def _between_layers(self, output: Tensor) -> Tensor:
        # Drawn over the same tensor in the same order as nn.LSTM does: the same seed gives the same mask.
        if self.dropout > 0 and self.training:
            return F.dropout(output, self.dropout, training=True)
        return output

    def forward_heads(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        *,
        mean: bool = False,
        max: bool = False,
    ) -> ops.RNNHeadsResult:
        """The encoder with token heads and pooling fused into its last layer, whose states are never written.

        For inference in model code, which has packed its tokens already; no gradient is recorded. The results
        are the same bits as those of :meth:`forward`, :func:`pymtl.ops.heads` and :func:`pymtl.ops.pool`.

        Args:
            input: [T, B, I], or packed [N, I] with ``batch_sizes`` [T].
            head_weight, head_bias: [C, D*H] and [C] of all token heads, stacked, or None.
            mean, max: whether to pool the last layer's states over each sequence's tokens.

        Returns:
            ``logits`` [T, B, C] or [N, C]; ``mean``, ``max`` [B, D*H]; ``h_n``, ``c_n`` [D, B, H] of the last layer.
        """
        weights = self._weights()
        self._check_input(input, weights, 3 if batch_sizes is None else 2)
        way = self._pymtl_route(input, weights)
        if self._pymtl_variants.act(self.training) or not input.is_cpu:
            return self._unfused_heads(way, input, batch_sizes, weights, head_weight, head_bias, mean, max)
        last = self.num_layers - 1
        snapshot = self._valid_snapshot(weights, input)
        if self._pymtl_portable() is not None or (snapshot is not None and torch.compiler.is_compiling()):
            return self._unfused_heads(way, input, batch_sizes, weights, head_weight, head_bias, mean, max)
        if last > 0:
            input, _, _ = self._layers(way, input, batch_sizes, weights, None, None, layers=last)
            input = self._between_layers(input)
        return ops.rnn_heads(
            input,
            batch_sizes,
            self.layer_weights(last, weights),
            head_weight,
            head_bias,
            mean=mean,
            max=max,
            prepacked=None if snapshot is None else snapshot.prepacked[last],
        )

    def _unfused_heads(
        self,
        way: Route,
        input: Tensor,
        batch_sizes: Tensor | None,
        weights: Sequence[Tensor],
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        mean: bool,
        max: bool,
    ) -> ops.RNNHeadsResult:
        directions = self._directions()
        batch = input.shape[1] if batch_sizes is None else None
        output, h_n, c_n = self._layers(way, input, batch_sizes, weights, None, None, batch)
        rows = output.flatten(0, -2)
        logits = rows.new_empty(rows.shape[0], 0)
        if head_weight is not None:
            logits = ops.heads(rows, head_weight, head_bias, parts=directions)
        reverse = self._pymtl_reverse()
        features = [
            ops.pool(output, batch_sizes, kind, reverse=reverse) if wanted else output.new_empty(0, output.shape[-1])
            for kind, wanted in (("mean", mean), ("max", max))
        ]
        logits = logits.view(*output.shape[:-1], logits.shape[-1])
        return ops.RNNHeadsResult(logits, *features, h_n[-directions:], c_n[-directions:])

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, which would fail on the first thing in ``forward`` that it has no words for."""
        raise RuntimeError(
            f"torch.jit.script cannot compile pymtl's {self._name()}: script pymtl.revert(model), which has the same "
            "parameters, or take torch.jit.trace"
        )


def refuse_projection(proj_size: None) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _editable(output: Tensor) -> Tensor:
    # Backward needs the output unchanged. A copy lets the caller edit it in place, as nn.LSTM allows. A trace, which is
    # recorded and checked with and without gradients, has to be the same in both.
    return output.clone() if output.requires_grad and not torch.jit.is_tracing() else output


def _batch_of(packed: PackedSequence, hx: Any) -> int:
    """The batch size B, for a check of the states. A tracer cannot read it: in compiled code the op makes the check."""
    if hx is None:
        return 0  # nobody asks
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    if torch.compiler.is_compiling():
        return (hx if isinstance(hx, Tensor) else hx[0]).shape[1]
    return int(packed.batch_sizes[0])


def _permute(state: Tensor | None, indices: Tensor | None) -> Tensor | None:
    return state if state is None or indices is None else state.index_select(1, indices)


def set_variants(
    module: Module,
    *,
    recurrent_dropout: float | None = None,
    weight_drop: float | None = None,
    zoneout: float | tuple[float, float] | None = None,
) -> Module:
    """Changes these options of every :class:`pymtl.LSTM`, ``GRU`` and ``RNN`` inside; None leaves one as it is.

    Returns:
        ``module``.

    Raises:
        ValueError: one is not from 0 to 1, ``zoneout`` is a pair but there is no c, or there is ``proj_size``.
    """
    given = {"recurrent_dropout": recurrent_dropout, "weight_drop": weight_drop, "zoneout": zoneout}
    given = {name: p for name, p in given.items() if p is not None}
    for child in module.modules():
        if isinstance(child, Recurrent):
            child._set_options(child._pymtl_variants.changed(child.mode, **given))
    return module
