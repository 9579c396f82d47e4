"""One encoder for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.states import States


class HardSharing(Sharing):
    """Hard parameter sharing (Caruana 1997, "Multitask Learning"): all tasks read the states of one LSTM.

    Arguments as for :class:`Sharing`. A :class:`pymtl.MultiTaskModel` given a plain :class:`pymtl.LSTM` does the same.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tasks, input_size, hidden_size, num_layers, bidirectional, dropout)
        self.encoder = self.lstm()

    def run(self, data: Tensor, batch_sizes: Tensor, tasks: tuple[str, ...]) -> SharingResult:
        output, (h_n, _) = self.encoder(PackedSequence(data, batch_sizes))
        last = h_n[-self.directions :].transpose(0, 1).flatten(1)
        states = States.of(output.data, batch_sizes, self.directions, last)
        return SharingResult(dict.fromkeys(tasks, states), {})
