"""The functions of :mod:`pymtl.ops` in plain PyTorch: readable, any dtype and device, differentiable to any order.

They are the oracle of the tests and the "pure PyTorch" side of comparisons. None of them is fast.
"""

from pymtl.reference.attention import attend
from pymtl.reference.char_cnn import char_cnn, char_cnn_at
from pymtl.reference.crf import crf, crf_decode
from pymtl.reference.dropout import dropout
from pymtl.reference.heads import heads
from pymtl.reference.joint_loss import joint_loss
from pymtl.reference.packing import pack, segment_order, unpack
from pymtl.reference.pooling import attention_pool, pool
from pymtl.reference.quantised import Int8Weight, int8_linear, int8_weight
from pymtl.reference.rnn import normalised_projection, rnn

__all__ = [
    "Int8Weight",
    "attend",
    "attention_pool",
    "char_cnn",
    "char_cnn_at",
    "crf",
    "crf_decode",
    "dropout",
    "heads",
    "int8_linear",
    "int8_weight",
    "joint_loss",
    "normalised_projection",
    "pack",
    "pool",
    "rnn",
    "segment_order",
    "unpack",
]
