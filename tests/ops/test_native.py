import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymtl
from pymtl import _native, ops
from pymtl.ops.library import _why_no_cuda

# The bindings alone: they need neither torch nor the rest of the package.
BINDINGS = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", {_native.__file__!r})
_native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_native)
"""
OPS = """
import torch
from pymtl import _native, ops
from pymtl.ops.library import _why_no_cuda
weights = ops.RNNWeights([torch.ones(4, 1)], [torch.ones(4, 1)], [], [], [False])
"""


def python(code, **environment):
    """Runs code in a new interpreter."""
    clean = {name: value for name, value in os.environ.items() if name != "PYMTL_ISA"}
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_available_instruction_sets_are_compiled_and_end_with_the_best():
    available = _native.available_isas()
    assert available
    assert [isa for isa in _native.compiled_isas() if isa in available] == available
    if os.environ.get("PYMTL_ISA", "") == "":
        assert python(BINDINGS + "print(_native.active_isa())").stdout.split() == [available[-1]]


def test_force_isa_is_active_from_the_next_call_on(every_isa):
    assert _native.active_isa() == every_isa


def test_an_unknown_instruction_set_is_a_value_error_and_changes_nothing():
    before = _native.active_isa()
    with pytest.raises(ValueError, match=r"'sse9' is unknown: expected one of .*" + _native.compiled_isas()[0]):
        _native.force_isa("sse9")
    assert _native.active_isa() == before


@pytest.mark.parametrize("name", ["", "AVX2", "avx2 ", "unknown"])
def test_names_are_exact(name):
    with pytest.raises(ValueError, match="is unknown"):
        _native.force_isa(name)


def test_an_instruction_set_of_another_architecture_is_a_runtime_error():
    known = {"baseline", "avx2", "avx512", "neon"}
    for missing in known - set(_native.available_isas()):
        with pytest.raises(RuntimeError, match=f"'{missing}'"):
            _native.force_isa(missing)


def test_weights_packed_for_another_width_of_registers_are_refused():
    if len(_native.available_isas()) < 2 or "neon" in _native.available_isas():
        pytest.skip("all registers of this CPU are of one width")
    before = _native.active_isa()
    weights = ops.RNNWeights([torch.ones(20, 3)], [torch.ones(20, 5)], [], [], [False])
    first, last = _native.available_isas()[0], _native.available_isas()[-1]
    try:
        _native.force_isa(first)
        prepacked = ops.rnn_prepack(weights)
        _native.force_isa(last)
        with pytest.raises(RuntimeError, match=r"prepacked: expected weights prepacked for vectors of"):
            ops.rnn(torch.ones(2, 1, 3), None, weights, prepacked=prepacked)
    finally:
        _native.force_isa(before)


@pytest.mark.parametrize("name", _native.available_isas())
def test_the_environment_variable_forces_an_instruction_set(name):
    result = python(BINDINGS + "print(_native.active_isa())", PYMTL_ISA=name)
    assert result.stdout.split() == [name], result.stderr


def test_an_empty_environment_variable_forces_nothing():
    result = python(BINDINGS + "print(_native.active_isa())", PYMTL_ISA="")
    assert result.stdout.split() == [_native.available_isas()[-1]], result.stderr


def test_the_ops_run_under_the_instruction_set_of_the_environment_variable():
    name = _native.available_isas()[0]
    code = "print(ops.rnn_prepack(weights).numel(), _native.active_isa())"
    result = python(OPS + code, PYMTL_ISA=name)
    before = _native.active_isa()
    try:
        _native.force_isa(name)
        size = ops.rnn_prepack(ops.RNNWeights([torch.ones(4, 1)], [torch.ones(4, 1)], [], [], [False])).numel()
    finally:
        _native.force_isa(before)
    assert result.stdout.split() == [str(size), name], result.stderr


def test_an_unknown_name_in_the_environment_is_a_runtime_error_at_every_use():
    code = """
print("imported", _native.available_isas())
for use in (_native.active_isa, lambda: ops.rnn(torch.ones(1, 1, 1), None, weights), _native.active_isa):
    try:
        use()
    except RuntimeError as error:
        print(error)
"""
    result = python(OPS + code, PYMTL_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("imported")
    assert result.stdout.count("PYMTL_ISA: instruction set 'sse9' is unknown: expected one of") == 3, result.stdout


def test_force_isa_overrules_a_wrong_environment_variable():
    name = _native.available_isas()[0]
    result = python(BINDINGS + f"_native.force_isa({name!r}); print(_native.active_isa())", PYMTL_ISA="sse9")
    assert result.stdout.split() == [name], result.stderr


def test_the_build_is_described():
    assert all(isinstance(text, str) and text for text in (_native.version, _native.compiler, _native.build_type))


@pytest.mark.parametrize("imported", ["pymtl", "pymtl.ops", "pymtl.__main__"])
def test_imports_stay_light(imported):
    heavy = ["torch._dynamo", "sympy", "matplotlib", "pandas", "rich", "seqeval", "safetensors"]
    result = python(f"import sys, {imported}; print([name for name in {heavy} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_predicting_imports_no_more_than_its_extra():
    code = (
        "import sys, torch; before = set(sys.modules); import pymtl.training.predictor, pymtl.commands.predict; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    others = {"pymtl", "safetensors", "numpy", "tomli", "torch", "_editable_skbc_pymtl"}
    assert set(ast.literal_eval(result.stdout)) <= others


def test_without_the_compiled_module_the_error_says_what_to_do(tmp_path):
    source = Path(pymtl.__file__).parent
    shutil.copytree(source, tmp_path / "pymtl", ignore=shutil.ignore_patterns("*.so*"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pymtl"
    # Without site-packages: an editable install would find the module all the same.
    command = [sys.executable, "-I", "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "ImportError: the compiled module of pymtl is not in" in result.stderr
    assert "pip install -e ." in result.stderr


def test_the_bindings_alone_do_not_import_torch():
    result = python(BINDINGS + "_native.active_isa(); print('torch' in sys.modules)")
    assert result.stdout.split() == ["False"], result.stderr


@pytest.mark.parametrize(
    ("compiler", "runtime", "reason"),
    [
        ("", "13.0", "none in this build"),
        ("", None, "none in this build"),
        ("13.0.88", None, "CUDA 13.0.88, not loaded: this torch has no CUDA"),
        ("13.0.88", "12.6", "CUDA 13.0.88, not loaded: this torch is made for CUDA 12.6"),
        ("13.0.88", "13.0", ""),
        ("12.9.1", "13.0", ""),
    ],
)
def test_the_cuda_library_is_loaded_where_torch_and_its_driver_can_use_it(compiler, runtime, reason):
    assert _why_no_cuda(compiler, runtime) == reason
    assert _why_no_cuda(compiler, runtime, "1") == reason


def test_the_environment_switches_the_cuda_library_off():
    assert _why_no_cuda("13.0.88", "13.0", "0") == "CUDA 13.0.88, not loaded: PYMTL_CUDA=0"
    assert _why_no_cuda("", "13.0", "0") == "none in this build"
    printed = python("from pymtl.ops.library import why_no_cuda; print(why_no_cuda)", PYMTL_CUDA="0")
    expected = "PYMTL_CUDA=0" if _native.cuda_compiler else "none in this build"
    assert printed.stdout.strip().endswith(expected), printed.stderr
