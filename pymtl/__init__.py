"""pymtl: recurrent multi-task learning, fast.

One LSTM encoder shared by several tasks, a head for each, one joint loss; the LSTM step, the projection of
all heads and the loss are C++ kernels. :class:`LSTM`, :class:`GRU` and :class:`RNN` are drop-in
replacements of torch's.
"""

from typing import TYPE_CHECKING, Any

try:
    from pymtl._native import version as __version__
except ModuleNotFoundError as error:
    if error.name != "pymtl._native":
        raise
    raise ImportError(
        f"the compiled module of pymtl is not in {__path__[0]}: in the source folder Python finds the source before an "
        "installed pymtl. Run it in another folder, or install the source itself: pip install -e ."
    ) from None

from pymtl import balancing, sharing
from pymtl.attention import Attention
from pymtl.crf import CRF, CRFLoss
from pymtl.ctc import CTCLoss, ctc_beam, ctc_greedy
from pymtl.decoder import DecoderHead
from pymtl.embeddings import CharacterCNN, CharacterLSTM, TokenFeatures
from pymtl.exported_decoder import export_step
from pymtl.heads import (
    ClassificationHead,
    CRFHead,
    CTCHead,
    Head,
    MultiLabelHead,
    OrdinalHead,
    Reads,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.joint_loss import JointLoss, JointLossResult
from pymtl.language_model import LanguageModelHead, language_model_targets
from pymtl.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, OrdinalLoss
from pymtl.lowering import export
from pymtl.models import Logits, MultiTaskModel
from pymtl.packing import pack
from pymtl.pooling import AttentionPooling
from pymtl.recurrent import GRU, LSTM, RNN, convert, describe, freeze, frozen_bytes, revert, set_variants, unfreeze
from pymtl.serving.generation import Hypothesis, Search

if TYPE_CHECKING:
    from pymtl.training.predictor import Predictor, load

_OF_TRAINING = ("Predictor", "load")  # what needs more than torch and numpy, imported when it is asked for


def __getattr__(name: str) -> Any:
    if name in _OF_TRAINING:
        from pymtl.training import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "AttentionPooling",
    "BinaryCrossEntropy",
    "CRF",
    "CRFHead",
    "CRFLoss",
    "CTCHead",
    "CTCLoss",
    "CharacterCNN",
    "CharacterLSTM",
    "ClassificationHead",
    "CrossEntropy",
    "DecoderHead",
    "Head",
    "Hypothesis",
    "JointLoss",
    "JointLossResult",
    "LanguageModelHead",
    "Logits",
    "MeanSquaredError",
    "MultiLabelHead",
    "MultiTaskModel",
    "OrdinalHead",
    "OrdinalLoss",
    "Predictor",
    "Reads",
    "RegressionHead",
    "Search",
    "TokenClassificationHead",
    "TokenFeatures",
    "__version__",
    "balancing",
    "convert",
    "ctc_beam",
    "ctc_greedy",
    "describe",
    "export",
    "export_step",
    "freeze",
    "frozen_bytes",
    "language_model_targets",
    "load",
    "pack",
    "revert",
    "set_variants",
    "sharing",
    "unfreeze",
]
