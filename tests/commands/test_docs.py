"""Every block of code in the documents runs, in order, in one folder a document."""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
READ_ONLY = ("console", "text", "c")  # what a reader does once, or sees; C is built by tests/runtime/test_examples.py


def blocks(path):
    return [match.groupdict() for match in BLOCK.finditer(path.read_text(encoding="utf-8"))]


def documents():
    return sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("name", documents())
def test_the_blocks_of_a_document_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "deployment.md" and "PYMTL_RUNTIME_LIBRARY" not in os.environ:
        pytest.skip("no PYMTL_RUNTIME_LIBRARY")
    for folder in (ROOT, tmp_path):  # a block may import a file that another one wrote
        monkeypatch.syspath_prepend(str(folder))
    # `pymtl` of this very tree, whatever is installed.
    commands = {"pymtl": "-m pymtl", "python": "", "torchrun": "-m torch.distributed.run"}
    shell = "".join(f'{name}() {{ "{sys.executable}" {start} "$@"; }}\n' for name, start in commands.items())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}", "OMP_NUM_THREADS": "1"}
    names = {}
    for block in blocks(ROOT / "docs" / name):
        if block["file"]:
            Path(block["file"]).write_text(block["code"], encoding="utf-8")
        if block["kind"] == "python":
            exec(compile(block["code"], f"{name}: {block['code'].splitlines()[0]}", "exec"), names)
        elif block["kind"] == "sh":
            done = run_shell(shell + block["code"], environment)
            assert done.returncode == 0, f"{block['code']}\n{done.stdout}\n{done.stderr}"
        elif block["kind"] == "diff":
            subprocess.run(["git", "apply", "-"], input=block["code"], text=True, check=True, timeout=60)
        elif block["kind"] == "toml":
            from pymtl.training.config import tomllib

            tomllib.loads(block["code"])
        else:
            assert block["kind"] in READ_ONLY, block["kind"]


def run_shell(code, environment):
    """On a busy machine gloo sometimes waits for ever, with torch's own modules too: processes get another chance."""
    several = "torchrun --" in code
    for limit in [120, 120, 120] if several else [300]:
        command = ["timeout", "-k", "5", str(limit), "bash", "-euc", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 124:
            break
    return done


def test_the_python_of_the_readme_runs():
    code = [block["code"] for block in blocks(ROOT / "README.md") if block["kind"] == "python"]
    assert len(code) >= 2
    names = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)


def test_the_documents_name_every_scheme_method_and_kind():
    from pymtl.balancing import METHODS
    from pymtl.sharing import SCHEMES
    from pymtl.training.kinds import KINDS

    text = (ROOT / "docs" / "multi_task.md").read_text(encoding="utf-8")
    for name in (*SCHEMES, *METHODS, *KINDS):
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize(("folder", "table"), [("sharing", "SCHEMES"), ("balancing", "METHODS")])
def test_every_scheme_and_method_has_a_page_of_its_own(folder, table):
    for name, made in getattr(import_module(f"pymtl.{folder}"), table).items():
        text = (ROOT / "docs" / folder / f"{name}.md").read_text(encoding="utf-8")
        assert f"pymtl.{folder}.{made.__name__}" in text, name


def test_the_page_of_the_configuration_says_what_the_dataclasses_say():
    spec = spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    writer = module_from_spec(spec)
    spec.loader.exec_module(writer)
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == writer.page()  # python docs/configuration.py writes it
    keys = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(keys) > 70
    assert not [line for line in keys if line.endswith("|  |")]  # each says what it sets


@pytest.mark.parametrize("module", ["pymtl", "pymtl.sharing", "pymtl.balancing", "pymtl.ops", "pymtl.reference"])
def test_the_reference_has_every_public_name(module):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    listed = {name for page in pages for name in re.findall(r"^\.\. auto\w+:: (\S+)", page, re.MULTILINE)}
    public = import_module(module)
    modules = {name for name in public.__all__ if isinstance(getattr(public, name), ModuleType)}
    values = {name for name in public.__all__ if isinstance(getattr(public, name), (str, dict))}
    missing = {f"{module}.{name}" for name in {*public.__all__} - modules - values} - listed
    assert missing == set()
