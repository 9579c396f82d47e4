"""The ops of :mod:`pymtl`: each with its wrapper, fake kernel and derivatives.

They are ``torch.ops.pymtl.*``, made in C++; what stands here checks, dispatches and documents.
"""

from pymtl.ops.attention import attend
from pymtl.ops.char_cnn import char_cnn
from pymtl.ops.crf import crf, crf_decode
from pymtl.ops.dropout import dropout
from pymtl.ops.dtypes import has_kernels
from pymtl.ops.heads import heads
from pymtl.ops.joint_loss import joint_loss
from pymtl.ops.late_errors import raise_late_errors
from pymtl.ops.packing import PackingOrder, pack, packing_order, unpack
from pymtl.ops.pooling import attention_pool, pool
from pymtl.ops.rnn import RNNHeadsResult, RNNMasks, RNNNorm, RNNWeights, rnn, rnn_heads
from pymtl.ops.rnn_frozen import (
    NarrowWeights,
    RNNFrozen,
    rnn_frozen,
    rnn_frozen_of,
    rnn_prepack,
)
from pymtl.ops.segments import Segments, segment_order

__all__ = [
    "NarrowWeights",
    "PackingOrder",
    "RNNFrozen",
    "RNNHeadsResult",
    "RNNMasks",
    "RNNNorm",
    "RNNWeights",
    "Segments",
    "attend",
    "attention_pool",
    "char_cnn",
    "crf",
    "crf_decode",
    "dropout",
    "has_kernels",
    "heads",
    "joint_loss",
    "pack",
    "packing_order",
    "pool",
    "raise_late_errors",
    "rnn",
    "rnn_frozen",
    "rnn_frozen_of",
    "rnn_heads",
    "rnn_prepack",
    "segment_order",
    "unpack",
]
