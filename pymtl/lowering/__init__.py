"""Programs of models: what runtimes without torch run, and what ONNX is written from.

:func:`lower` makes a :class:`Program` of a module, with the instructions that each of its parts stands for;
:func:`write` makes a file of it.
"""

from pymtl.lowering.file import SUFFIXES, export, limit_answers, name_ids, write
from pymtl.lowering.models import lower
from pymtl.lowering.program import Program

__all__ = ["SUFFIXES", "Program", "export", "limit_answers", "lower", "name_ids", "write"]
