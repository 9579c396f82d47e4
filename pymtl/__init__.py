"""pymtl: recurrent multi-task learning, fast.

One LSTM encoder shared by several tasks, a head for each, one joint loss; the LSTM step, the projection of
all heads and the loss are C++ kernels. :class:`LSTM` is a drop-in replacement of :class:`torch.nn.LSTM`.
"""

from pymtl._native import version as __version__
from pymtl.convert import convert, revert
from pymtl.crf import CRF, CRFLoss
from pymtl.freezing import freeze, unfreeze
from pymtl.heads import ClassificationHead, CRFHead, Head, MultiLabelHead, RegressionHead, TokenClassificationHead
from pymtl.joint_loss import BinaryCrossEntropy, CrossEntropy, JointLoss, JointLossResult, MeanSquaredError
from pymtl.lstm import LSTM
from pymtl.models import MultiTaskModel
from pymtl.packing import pack

__all__ = [
    "CRF",
    "CRFHead",
    "CRFLoss",
    "BinaryCrossEntropy",
    "ClassificationHead",
    "CrossEntropy",
    "Head",
    "JointLoss",
    "JointLossResult",
    "LSTM",
    "MeanSquaredError",
    "MultiLabelHead",
    "MultiTaskModel",
    "RegressionHead",
    "TokenClassificationHead",
    "__version__",
    "convert",
    "freeze",
    "pack",
    "revert",
    "unfreeze",
]
