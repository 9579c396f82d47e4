"""The tests of the CUDA kernels, and the CPU's tests of the ops that a GPU has too, with the kernels run on the CPU.

In a process of its own, where the ops' implementations are replaced (see cuda_on_host).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LIBRARY = os.environ.get("PYMTL_CUDA_ON_HOST", "")

# What a GPU promises less of: bits that depend on nothing else, and errors about values, for which it would have to
# wait. It has no prepacked weights. Second derivatives (own_derivative) are the plain recurrence's everywhere.
NOT_PROMISED = (
    "avx2 avx512 same_bits thread refused_by_name_and_values refuses_bad_arguments "
    "reference_agrees_with_nn_lstm index_error frozen opcheck_of_rnn_inference own_derivative"
)
OF_THE_CPU = {
    # Near 1 the slope of tanh multiplies a rounding of h by ten, and of so few numbers one side has the better luck.
    "ops/test_rnn.py": "not (at_every_size and RNN_TANH)",
    "ops/test_packing.py": "",
    "ops/test_pooling.py": "",
    "ops/test_joint_loss.py": "",
    "ops/test_crf.py": "gradcheck or reference or opcheck",
}


def run(files, keywords):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_host", "-p", "no:cacheprovider"]
    command += ["-k", keywords] if keywords else []
    done = subprocess.run([*command, *files], cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


pytestmark = pytest.mark.skipif(not Path(LIBRARY).is_file(), reason="make test-kernels builds the library")


@pytest.mark.parametrize("file", OF_THE_CPU)
def test_the_cpu_s_tests_hold_for_the_cuda_kernels(file):
    words = [f"not {word}" for word in NOT_PROMISED.split()]
    run([f"tests/{file}"], " and ".join([*words, *filter(None, [OF_THE_CPU[file]])]))


@pytest.mark.parametrize(
    "file", sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
)
def test_the_tests_of_a_gpu_pass_on_the_host(file):
    run([f"tests/cuda/{file}"], "")
