"""The drop-in LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pymtl.recurrent.base import Cells, Recurrent
from pymtl.recurrent.options import Options


class LSTM(Recurrent):
    """:class:`torch.nn.LSTM`, faster: the same constructor, parameters, ``state_dict`` and results.

    float32, float64 and bfloat16 on the CPU run through this library's kernels, float32, bfloat16 and float16 on an
    NVIDIA GPU through its CUDA kernels where they were built (not yet run on a GPU), up to a hidden size that depends
    on the device; ``proj_size``, other dtypes, sizes and devices run through torch's own path. The options below and
    ``lengths`` on a GPU take its kernels for any floating dtype and size. Under autocast to bfloat16 the results are
    bfloat16, where nn.LSTM's of a PackedSequence stay float32. Beyond nn.LSTM, a padded batch may come with
    ``lengths``, and on the CPU a sequence's result is the same bits in any batch, at any padding and number of threads.

    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000.

    Shapes: L layers, D directions, B sequences, T steps, I input size, H hidden size.

    - input: ``[T, B, I]`` (``[B, T, I]`` if ``batch_first``), unbatched ``[T, I]``, or a
      :class:`~torch.nn.utils.rnn.PackedSequence`;
    - ``h_0``, ``c_0``: ``[L*D, B, H]`` (unbatched ``[L*D, H]``), zeros if not given;
    - output: the input's layout with D*H features; ``h_n``, ``c_n`` as ``h_0`` and ``c_0``, behind each
      sequence's own last step (its first, in a direction that reads from the end):
      ``output, (h_n, c_n) = lstm(input, (h_0, c_0))``.

    Options that nn.LSTM has not, all off by default; :func:`pymtl.set_variants` changes the first three later:

    - ``recurrent_dropout``: the probability that a unit of h is hidden from the product with ``weight_hh``, the same
      units at all steps of a sequence, in training (Gal & Ghahramani 2016, "A Theoretically Grounded Application of
      Dropout in Recurrent Neural Networks");
    - ``weight_drop``: the probability that a number of ``weight_hh`` is zero during a forward pass, in training
      (DropConnect; Merity et al. 2018, "Regularizing and Optimizing LSTM Language Models");
    - ``zoneout``: the probability that a unit keeps its state for a step, one number or two, for h and for c; in
      evaluation the states are mixed accordingly (Krueger et al. 2017, "Zoneout");
    - ``layer_norm``: the products with ``weight_ih`` and ``weight_hh`` are normalised over the gates, and c on its way
      to h (Ba et al. 2016, "Layer Normalization", equations 20 to 22), with the parameters ``gain_ih``, ``gain_hh``
      [4*H], ``gain_c`` and ``bias_c`` [H] of each layer and direction;
    - ``reverse``: one direction that reads each sequence from its own last step to its first, and so ends with the
      state behind the first (``direction="reverse"`` of ONNX). The output stays in the input's order. Not with
      ``bidirectional``.
    """

    _original = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        reverse: bool = False,
    ) -> None:
        options = Options.of("LSTM", recurrent_dropout, weight_drop, zoneout, layer_norm, reverse)
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *arguments, device, dtype, options=options)

    # Other people's code calls these on an nn.LSTM.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def _initial_state(self, hx: tuple[Tensor, Tensor] | None, batch: int, batched: bool) -> Cells:
        if hx is None:
            return None, None
        if isinstance(hx, Tensor):
            raise TypeError("hx: expected a tuple of two tensors (h_0, c_0), got a Tensor")
        h0, c0 = hx
        dims = 3 if batched else 2
        if h0.dim() != dims or c0.dim() != dims:
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
        if not batched:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        size = self._state_size(batch)
        self.check_hidden_size(
            h0, (*size[:2], self.proj_size or self.hidden_size), "Expected hidden[0] size {}, got {}"
        )
        self.check_hidden_size(c0, size, "Expected hidden[1] size {}, got {}")
        return h0, c0

    def _states(self, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor]:
        return h_n, c_n
