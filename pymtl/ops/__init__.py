"""The ops of :mod:`pymtl`: each with its wrapper, fake kernel and derivatives.

They are ``torch.ops.pymtl.*``, made in C++; what stands here checks, dispatches and documents.
"""

from pymtl.ops.crf import crf, crf_decode
from pymtl.ops.dropout import dropout
from pymtl.ops.dtypes import has_kernels
from pymtl.ops.heads import heads
from pymtl.ops.joint_loss import joint_loss
from pymtl.ops.lstm import LSTMHeadsResult, LSTMWeights, lstm, lstm_frozen, lstm_heads, lstm_pack
from pymtl.ops.packing import PackingOrder, pack, packing_order, unpack
from pymtl.ops.pooling import pool

__all__ = [
    "LSTMHeadsResult",
    "LSTMWeights",
    "PackingOrder",
    "crf",
    "crf_decode",
    "dropout",
    "has_kernels",
    "heads",
    "joint_loss",
    "lstm",
    "lstm_frozen",
    "lstm_heads",
    "lstm_pack",
    "pack",
    "packing_order",
    "pool",
    "unpack",
]
