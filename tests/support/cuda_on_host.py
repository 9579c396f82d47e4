"""A plugin for pytest, ``-p cuda_on_host``: the ops' CUDA kernels run on the CPU, in place of the CPU's.

PYMTL_CUDA_ON_HOST names the library, which ``make test-kernels`` builds. The tests of a GPU then run on tensors of the
CPU.
"""

import os

# The GPU's products are torch's own here, and on a CPU with AMX a NaN in one row would change other rows' last bits.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch

import pymtl.ops.library  # noqa: F401  (the CPU's kernels first, which this replaces)


# Products of 16-bit numbers with results in float32: torch has them on a GPU only.
def _product(a, b, dtype):
    with torch.autocast("cpu", enabled=False):  # which leaves this product alone there, too
        return a.to(dtype) @ b.to(dtype)


_aten = torch.library.Library("aten", "IMPL", "CPU")
_aten.impl("mm.dtype", _product)
_aten.impl("bmm.dtype", _product)

torch.ops.load_library(os.environ["PYMTL_CUDA_ON_HOST"])
