"""Loads the op libraries, so that ``torch.ops.pymtl`` exists."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pymtl import _native

# The op libraries stand beside the Python bindings, in an installed wheel and in an editable install alike.
_FOLDER = Path(_native.__file__).parent

torch.ops.load_library(_FOLDER / "libpymtl_ops.so")


def _why_no_cuda(compiler: str, runtime: str | None, switch: str = "") -> str:
    """Why the CUDA library made by ``compiler`` is not loaded beside a torch made for ``runtime``; empty if it is."""
    if not compiler:
        return "none in this build"
    if switch == "0":
        return f"CUDA {compiler}, not loaded: PYMTL_CUDA=0"
    if runtime is None:
        return f"CUDA {compiler}, not loaded: this torch has no CUDA"
    if int(compiler.split(".")[0]) > int(runtime.split(".")[0]):
        # A driver may be as old as the CUDA that torch was made for.
        return f"CUDA {compiler}, not loaded: this torch is made for CUDA {runtime}"
    return ""


why_no_cuda = _why_no_cuda(_native.cuda_compiler, torch.version.cuda, os.environ.get("PYMTL_CUDA", ""))
if not why_no_cuda:
    torch.ops.load_library(_FOLDER / "libpymtl_ops_cuda.so")
