"""The kinds of tasks, each a class in a file of its own."""

from pymtl.training.kinds.base import Kind
from pymtl.training.kinds.classification import Classification
from pymtl.training.kinds.ctc import CTC
from pymtl.training.kinds.generation import Generation
from pymtl.training.kinds.language_model import LanguageModel
from pymtl.training.kinds.log_frequency import LogFrequency
from pymtl.training.kinds.multilabel import Multilabel
from pymtl.training.kinds.ordinal import Ordinal
from pymtl.training.kinds.regression import Regression
from pymtl.training.kinds.tagging import Tagging

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Classification(),
        Tagging(),
        Regression(),
        Multilabel(),
        Ordinal(),
        LanguageModel(),
        LogFrequency(),
        CTC(),
        Generation(),
    )
}

__all__ = ["KINDS", "Kind"]
