"""pymtl_runtime: answers of models that pymtl has trained, with numpy alone.

:func:`load` loads a run's model, which answers texts; :class:`Model` any model's file, of ids.
"""

from importlib.metadata import PackageNotFoundError, version

from .library import Answer, InputInfo, Model, ModelError, Session, TaskInfo, isa
from .predictor import Predictor, Stream, load
from .serving.errors import DataError
from .serving.generation import Hypothesis, Search

try:
    __version__ = version("pymtl-runtime")
except PackageNotFoundError:  # the sources, not installed
    __version__ = "0"

__all__ = [
    "Answer",
    "DataError",
    "Hypothesis",
    "InputInfo",
    "Model",
    "ModelError",
    "Predictor",
    "Search",
    "Session",
    "Stream",
    "TaskInfo",
    "__version__",
    "isa",
    "load",
]
