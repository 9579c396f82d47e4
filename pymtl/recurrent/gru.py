"""The drop-in GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pymtl.recurrent.base import Recurrent, refuse_projection
from pymtl.recurrent.options import Options


class GRU(Recurrent):
    """:class:`torch.nn.GRU`, faster: the same constructor, parameters, ``state_dict`` and results.

    All that :class:`pymtl.LSTM` says of kernels, dtypes, ``lengths`` and equal bits holds here too, and its options
    beyond torch's are here as well, without those of c. But on a GPU it runs through torch's own path, save for these
    options and for lengths on the GPU.

    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
    with the reset gate behind the product as in nn.GRU.

    Shapes as of :class:`pymtl.LSTM`, without c: ``output, h_n = gru(input, h_0)``.
    """

    _original = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        reverse: bool = False,
    ) -> None:
        refuse_projection(proj_size)
        options = Options.of("GRU", recurrent_dropout, weight_drop, zoneout, layer_norm, reverse)
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        super().__init__("GRU", *arguments, device, dtype, options=options)
