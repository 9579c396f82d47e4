"""pymtl: recurrent multi-task learning, fast.

One LSTM encoder shared by several tasks, a head for each, one joint loss; the LSTM step, the projection of
all heads and the loss are C++ kernels. :class:`LSTM` is a drop-in replacement of :class:`torch.nn.LSTM`.
"""

from pymtl._native import version as __version__
from pymtl.convert import convert, revert
from pymtl.freezing import freeze, unfreeze
from pymtl.lstm import LSTM
from pymtl.packing import pack

__all__ = [
    "__version__",
    "LSTM",
    "convert",
    "revert",
    "freeze",
    "unfreeze",
    "pack",
]
