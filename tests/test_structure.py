"""Arrows point down: who may import whom, in Python and in C++ (see CONTRIBUTING's layers)."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports():
    """Of each module or folder directly in pymtl, those that it imports."""
    found = {}
    for path in (ROOT / "pymtl").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        part = parts[1] if parts[1] != "__init__" else "pymtl"
        own = found.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pymtl":
                own |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pymtl."):
                own.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                own |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pymtl.")}
        own.discard(part)
    return found


def test_no_part_of_the_package_imports_one_that_imports_it():
    known = imports()
    known.pop("pymtl")  # the package itself names everything
    graph = {part: {other for other in others if other in known} for part, others in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle


@pytest.mark.parametrize(
    ("part", "below"),
    [("reference", set()), ("ops", {"_native", "reference"}), ("recurrent", {"_native", "ops", "reference"})],
)
def test_the_lowest_layers_import_only_what_is_below_them(part, below):
    helpers = {"dropout", "packing"} if part == "recurrent" else set()
    assert imports()[part] <= below | helpers


@pytest.mark.parametrize("above", ["training", "commands", "benchmark"])
def test_the_library_does_not_import_what_is_built_with_it(above):
    users = {part for part, others in imports().items() if above in others}
    # The package itself names pymtl.load, and imports it when it is asked for (see test_imports_stay_light).
    assert users <= {"training", "commands", "__main__"} | ({"pymtl"} if above == "training" else set())


INCLUDE = re.compile(r'^\s*#include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [
        ("kernels", ("torch/", "pybind11/", "ops/", "Python.h")),
        ("bindings", ("torch/", "ops/")),
        ("ops", ("pybind11/", "Python.h")),
        ("runtime", ("torch/", "pybind11/", "ops/", "c/", "Python.h")),
        ("c", ("torch/", "pybind11/", "ops/", "Python.h")),
    ],
)
def test_sources_include_only_what_is_below_them(folder, strangers):
    files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 0
    for path in files:
        for name in INCLUDE.findall(path.read_text()):
            assert not name.startswith(strangers), f"{path.relative_to(ROOT)} includes {name}"


def test_serving_imports_its_own_modules_and_numpy_alone():
    for path in (ROOT / "pymtl" / "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module.split(".")[0]]
            else:
                continue
            assert set(names) <= {*sys.stdlib_module_names, "numpy"}, f"{path.name} imports {names}"
    assert (ROOT / "runtime" / "pymtl_runtime" / "serving").resolve() == ROOT / "pymtl" / "serving"


def test_private_parts_of_torch_stand_in_one_file_for_each_language():
    private = re.compile(r"torch\._C\.|torch\._dynamo|_dynamo_marked|forward_ad\._|torch::stable::detail")
    users = {
        str(path.relative_to(ROOT))
        for folder in ("pymtl", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp") and private.search(path.read_text())
    }
    assert users <= {"pymtl/ops/autograd.py", "csrc/ops/stable_values.h"}
