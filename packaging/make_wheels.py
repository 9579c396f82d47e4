"""Builds the wheels of pymtl and pymtl-runtime, checks what they need, and tries them in fresh environments.

Only the bindings, one small library, depend on Python's version: a single wheel of pymtl holds them for every Python
from 3.10 on that is found here, and all of these install it. The wheels need no newer glibc than 2.28, also where they
are built with a newer one; packaging/needed_symbols.py stops the build if they do. They go to dist/.

Wheels for arm64 are made on x86-64 too, with GCC's cross compiler and the libraries of a torch for arm64, which is
downloaded. `make test-aarch64` tries them under emulation.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "wheels"
HERE = platform.machine()
# Torch and its OpenMP runtime must be those of the environment, never copies in the wheel.
NOT_OURS = ("libtorch*", "libc10*", "libgomp*", "libcudart*")


class Python(NamedTuple):
    path: str
    version: tuple[int, int]
    suffix: str  # of extension modules
    include: str

    @property
    def tag(self) -> str:
        return "cp{}{}".format(*self.version)

    @classmethod
    def at(cls, path: str) -> Python:
        program = (
            "import sys, sysconfig as s; "
            "print(*sys.version_info[:2], s.get_config_var('EXT_SUFFIX'), s.get_path('include'), "
            "sys.implementation.name == 'cpython' and not sys.abiflags, sep='\\n')"
        )
        major, minor, suffix, include, ordinary = output(path, "-c", program).split("\n")
        if ordinary != "True":
            raise ValueError("a debug or free-threaded build, or another Python than CPython")
        return cls(path, (int(major), int(minor)), suffix, include)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def find_pythons(named: list[str]) -> list[Python]:
    """Those that are named, or the first of each version from 3.10 on that PATH or pyenv has, with its headers."""
    paths = list(named)
    if not named:
        folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
        folders += sorted(path / "bin" for path in pyenv.glob("3.*"))
        files = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
        paths = [sys.executable, *(str(path) for path in files if re.fullmatch(r"python3\.\d\d", path.name))]
    found: dict[tuple[int, int], Python] = {}
    for path in paths:
        try:
            python = Python.at(path)
        except (subprocess.CalledProcessError, ValueError, OSError) as error:
            if named:
                raise SystemExit(f"{path}: expected an ordinary CPython, got {error}") from error
            continue  # another kind of Python, or a launcher of one that is not there
        if python.version >= (3, 10) and Path(python.include, "Python.h").exists():
            found.setdefault(python.version, python)
        elif named:
            raise SystemExit(f"{path}: expected Python 3.10 or newer with its headers in {python.include}")
    return [found[version] for version in sorted(found)]


class Target(NamedTuple):
    """The CPU that wheels are for."""

    arch: str
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def of(cls, arch: str, torch: str) -> Target:
        if arch == HERE:
            return cls(arch)
        toolchain = ROOT / "packaging" / f"{arch}.cmake"
        if not toolchain.exists():
            raise SystemExit(f"--arch: expected {HERE}, or aarch64 on another machine, got {arch}")
        return cls(
            arch, (f"cmake.define.CMAKE_TOOLCHAIN_FILE={toolchain}",), {"PYMTL_TORCH": str(cls.torch_of(arch, torch))}
        )

    @staticmethod
    def torch_of(arch: str, torch: str) -> Path:
        """The folder of a torch for another CPU, downloaded once."""
        folder = ROOT / "build" / f"torch-{arch}"
        if not (folder / torch).is_dir():
            of_arch = ("--only-binary=:all:", "--platform", f"manylinux_2_28_{arch}")
            output(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *of_arch, "-d", folder, torch)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "unpacking")
            wheel.unlink()
            (folder / "unpacking").rename(folder / torch)  # whole or not at all
        return folder / torch / "torch"


def build(project: Path, target: Target, *settings: str) -> Path:
    """A wheel of the project, with the torch beside this Python or the target's."""
    folder = BUILD / project.resolve().name
    log = folder.with_suffix(".log")
    folder.mkdir(parents=True)
    place = f"build-dir={ROOT / 'build' / target.arch / folder.name}"  # never that of an editable installation
    options = [option for setting in (place, *target.settings, *settings) for option in ("-C", setting)]
    with log.open("wb") as to:
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, *options, project]
        if subprocess.run(command, env={**os.environ, **target.environment}, stdout=to, stderr=subprocess.STDOUT).returncode:
            sys.stdout.write(log.read_text()[-5000:])
            raise SystemExit(f"{project}: the build failed, see {log}")
    return only(folder)


def only(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def retagged(wheel: Path, target: Target, *tags: str) -> Path:
    tags = (*tags, "--platform-tag", f"linux_{target.arch}")
    name = output(sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel).split("\n")[-1]
    return wheel.with_name(name)


def repaired(wheel: Path) -> Path:
    """The same wheel under the oldest platform tag that auditwheel finds it fits."""
    folder = wheel.parent / "repaired"
    excluded = [option for name in NOT_OURS for option in ("--exclude", name)]
    beside = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", folder, *excluded, wheel]
    done = subprocess.run(command, env=beside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{wheel}: auditwheel failed")
    return only(folder)


# What does not need torch, without the package around it, which does.
BINDINGS = """
import importlib.machinery, importlib.util, sysconfig
folder = sysconfig.get_path("platlib") + "/pymtl"
spec = importlib.machinery.PathFinder.find_spec("_native", [folder])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.active_isa())
"""


def try_wheel(python: Python, wheel: Path, name: str, beside: list[str], *commands: list[str | Path]) -> None:
    """Installs the wheel in a fresh environment with no compiler on PATH, and runs the commands there.

    Args:
        beside: what pip installs before it; ``--no-deps``: nothing, nor what the wheel asks for.
    """
    folder = BUILD / "environments" / f"{name}-{python.tag}"
    subprocess.run([python.path, "-m", "venv", folder], check=True)
    tools = folder / "bin"
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    alone = {**{key: value for key, value in os.environ.items() if key not in ours}, "PATH": str(tools)}
    install = [tools / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    installs = [[*install, *beside, wheel]] if beside == ["--no-deps"] else [[*install, *beside], [*install, wheel]]
    for step in (*installs, *([tools / "python", *command] for command in commands)):
        subprocess.run(step, check=True, env=alone, cwd=BUILD)  # away from the sources, so that the wheel is imported
    shutil.rmtree(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", action="append", default=[], metavar="FILE", help="a Python to serve (default: all found from 3.10)"
    )
    parser.add_argument(
        "--arch", choices=("x86_64", "aarch64"), default=HERE, help=f"the CPU that they are for (default: {HERE})"
    )
    parser.add_argument(
        "--torch",
        default="torch",
        help="what pip installs to try pymtl beside, or downloads to build for another CPU (default: torch)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    parser.add_argument(
        "--cuda",
        choices=("ANY", "ON", "OFF"),
        default="ANY",
        help="hold the CUDA kernels too, and so serve machines with and without a GPU: where nvcc is found (default), "
        "always, never",
    )
    parser.add_argument(
        "--try",
        dest="tried",
        choices=("all", "own", "none"),
        default="all",
        help="for which Pythons to try pymtl beside torch, which each downloads: all, the one that runs this, or none",
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    started = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        print(f"{minutes:3}:{seconds:02}  {text}", flush=True)

    pythons = find_pythons(given.python)
    if not pythons:
        raise SystemExit("no Python from 3.10 on was found with its headers: name one by --python")
    shutil.rmtree(BUILD, ignore_errors=True)
    target = Target.of(given.arch, given.torch)

    say(f"building pymtl for {', '.join('{}.{}'.format(*python.version) for python in pythons)} on {given.arch}")
    # The headers of a Python for another 64-bit Linux say the same.
    bindings = ";".join(f"{p.suffix.replace(HERE, given.arch)}={p.include}" for p in pythons)
    cuda = given.cuda if given.arch == HERE else "OFF"
    wheel = build(ROOT, target, f"cmake.define.PYMTL_CUDA={cuda}", f"cmake.define.PYMTL_PYTHONS={bindings}")
    wheel = repaired(retagged(wheel, target, "--python-tag", ".".join(p.tag for p in pythons), "--abi-tag", "none"))
    say("building pymtl-runtime")
    runtime = repaired(retagged(build(ROOT / "runtime", target), target))

    say("what they need")
    subprocess.run([sys.executable, ROOT / "packaging" / "needed_symbols.py", wheel, runtime], check=True)

    own = Python.at(sys.executable)
    for python in pythons if given.arch == HERE else ():
        version = "{}.{}".format(*python.version)
        try_wheel(python, runtime, "runtime", ["numpy"], ["-c", "import pymtl_runtime as p; print(p.isa())"])
        say(f"Python {version}: pymtl-runtime works, with numpy alone")
        if given.tried == "all" or (given.tried == "own" and python.version == own.version):
            smoke = ROOT / "packaging" / "smoke_test.py"
            try_wheel(python, wheel, "pymtl", [given.torch], [smoke], ["-m", "pymtl", "info"])
            say(f"Python {version}: pymtl works")
        else:
            try_wheel(python, wheel, "bindings", ["--no-deps"], ["-c", BINDINGS])
            say(f"Python {version}: pymtl's bindings load; not tried with torch")
    given.out.mkdir(parents=True, exist_ok=True)
    for made in (wheel, runtime):
        kept = Path(shutil.move(made, given.out / made.name))
        say(f"made {kept}, {kept.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
