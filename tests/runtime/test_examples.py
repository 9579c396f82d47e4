"""The examples of examples/runtime, built and run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import toy
from programs import pymtl_runtime

from pymtl.__main__ import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "runtime"
LIBRARY = Path(os.environ.get("PYMTL_RUNTIME_LIBRARY", ""))
WORDS = ["please", "play", "hard", "rock"]
WRITTEN = """
[tasks.written]
kind = "generation"
field = "slots"
decoder_size = 24
decoder_embedding_dim = 8
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The file of a run that reads in one direction."""
    folder = tmp_path_factory.mktemp("toy")
    toml = toy.TOML.replace("dropout = 0.1", "dropout = 0.1\nbidirectional = false") + toy.ALL_KINDS + WRITTEN
    toy.write_files(folder, toml)
    assert main(["train", str(folder / "toy.toml"), "--run", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "toy.pymtl")]) == 0
    return folder / "toy.pymtl"


def built(name, folder):
    """A program, by the compiler of its language."""
    source = EXAMPLES / name
    program = folder / source.stem
    if source.suffix == ".c":
        flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'csrc' / 'c'}"]
        command = ["cc", *flags, str(source), f"-L{LIBRARY.parent}", "-lpymtl_runtime", "-o", str(program)]
    else:
        command = ["rustc", "-O", str(source), "-L", str(LIBRARY.parent), "-l", "pymtl_runtime", "-o", str(program)]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return program


def ran(program, *arguments, text=""):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARY.parent)}
    return subprocess.run(
        [str(program), *map(str, arguments)], input=text, capture_output=True, text=True, check=False, env=environment
    )


def test_predict_in_c(model, tmp_path):
    program = built("predict.c", tmp_path)
    done = ran(program, model, *WORDS)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in done.stdout.splitlines())
    answer = pymtl_runtime.load(model).predict([WORDS])[0]
    assert lines["intent"] == f"{answer['intent']} ({100 * answer['intent/probability']:.1f} %)"
    assert lines["slots"].startswith(" ".join(answer["slots"]) + " (")
    assert lines["politeness"].split()[0] == f"{answer['politeness']:g}"
    assert lines["topics"].split(" (")[0].split() == answer["topics"]
    assert lines["written"] == f"{' '.join(answer['written'])} ({100 * answer['written/probability']:.1f} %)".strip()
    failed = ran(program, "/nowhere.pymtl", "a")
    assert failed.returncode == 1
    assert failed.stderr == "error: /nowhere.pymtl: No such file or directory\n"


def test_predict_in_rust(model, tmp_path):
    done = ran(built("predict.rs", tmp_path), model, *WORDS)
    assert done.returncode == 0, done.stderr
    answer = pymtl_runtime.load(model).predict([WORDS])[0]
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"intent: {answer['intent']}", f"slots: {' '.join(answer['slots'])}"]
    assert lines[-1] == f"written: {' '.join(answer['written'])}"


def test_the_c_of_the_documents(tmp_path):
    """It compiles, and says what is missing."""
    (code,) = re.findall(r"^```c\n(.*?)^```$", (ROOT / "docs" / "c_interface.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "one.c").write_text(code)
    done = ran(built(tmp_path / "one.c", tmp_path))
    assert (done.returncode, done.stderr) == (1, "orders.pymtl: No such file or directory\n")


def test_a_stream_in_c(model, tmp_path):
    done = ran(built("stream.c", tmp_path), model, text="\n".join([*WORDS, "", *WORDS]) + "\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n\n")
    assert first.strip() == second.strip()
    predictor = pymtl_runtime.load(model)
    for n, line in enumerate(first.splitlines(), 1):
        so_far = predictor.predict([WORDS[:n]])[0]
        assert line == f"{WORDS[n - 1]} intent={so_far['intent']} slots={so_far['slots'][-1]}"
