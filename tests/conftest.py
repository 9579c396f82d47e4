"""Fixtures: the ops' dtypes, what sets something of the whole process and puts it back, and a command that fails."""

import os

# Idle OpenMP threads sleep instead of spinning: on a busy machine the tests' many small calls are ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# As many threads as torch takes by itself, but named: commands then do not take fewer because other tests are running.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
)

import sys

import pytest
import torch
from samples import DTYPES

from pymtl import _native
from pymtl.__main__ import main
from pymtl.ops.library import why_no_cuda


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    """Runs the test in each dtype of the ops."""
    return request.param


# Instruction sets that add nothing but products of 8-bit integers.
OF_INTEGERS = ("avx2_vnni", "avx512_vnni", "amx", "neon_dotprod")


def forced(name):
    before = _native.active_isa()
    _native.force_isa(name)
    yield name
    _native.force_isa(before)


@pytest.fixture(params=[name for name in _native.available_isas() if name not in OF_INTEGERS])
def isa(request):
    """Runs the test under each instruction set of this CPU that has kernels of its own for floating-point numbers."""
    yield from forced(request.param)


@pytest.fixture(params=_native.available_isas())
def every_isa(request):
    """Runs the test under each instruction set of this CPU."""
    yield from forced(request.param)


@pytest.fixture
def threads():
    """A function that sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def filled_memory():
    """A function after which new memory holds NaN and large integers until the test ends."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    def fill():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()

    yield fill
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def gpu():
    """The device for tests of the CUDA kernels: a GPU, or the CPU where these run on it (see cuda_on_host)."""
    if "cuda_on_host" in sys.modules:
        return torch.device("cpu")
    if why_no_cuda or not torch.cuda.is_available():
        pytest.skip(f"needs an NVIDIA GPU and the CUDA kernels: {why_no_cuda or 'no GPU'}")
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        # After a fault nothing more runs on the GPU in this process: pytest-xdist replaces one that ends.
        print(f"the GPU is lost to this process: {error}", file=sys.stderr)
        os._exit(1)
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_float32_on_a_gpu(monkeypatch):
    """Recurrent layers on a GPU compute in float32, not in TF32, as torch's default is."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.fixture
def real_gpu(gpu):
    """A GPU itself, for what the host does not stand in for."""
    if gpu.type != "cuda":
        pytest.skip("of a GPU itself, which the host does not stand in for")
    return gpu


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers on every run."""
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys):
    """A function that runs a command that must fail with one line on stderr; returns the line."""

    def fails(*argv):
        assert main([str(word) for word in argv]) == 1
        error = capsys.readouterr().err
        assert error.startswith("pymtl: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return fails
