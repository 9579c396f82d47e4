"""Loads the op library, so that ``torch.ops.pymtl`` exists."""

from __future__ import annotations

from pathlib import Path

import torch

from pymtl import _native

# The op library stands beside the Python bindings, in an installed wheel and in an editable install alike.
torch.ops.load_library(Path(_native.__file__).with_name("libpymtl_ops.so"))
