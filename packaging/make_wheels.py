"""Builds the wheels of pymtl and pymtl-runtime, checks what they need, and tries them in fresh environments.

Only the bindings, one small library, depend on Python's version: a single wheel of pymtl holds them for every Python
from 3.10 on that is found here, and all of these install it. The wheels need no newer glibc than 2.28, also where they
are built with a newer one; packaging/needed_symbols.py stops the build if they do. They go to dist/.

Wheels for arm64 are made on x86-64 too, with GCC's cross compiler and the libraries of a torch for arm64, which is
downloaded; packaging/emulated.py tries them. For musl's Linux and for macOS, pymtl-runtime is made by the package
ziglang.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "wheels"
TOOLCHAINS = ROOT / "packaging" / "toolchains"
HERE = platform.machine()
# The same sources, compiler and torch give the same bytes: an archive's files are of one time, the earliest there is.
REPRODUCIBLE = {"SOURCE_DATE_EPOCH": "315532800"}
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
    """What wheels are for: a CPU, and a system."""

    arch: str
    platform: str  # in the wheel's name
    settings: tuple[str, ...] = ()
    has_torch: bool = True  # where there is none, only pymtl-runtime is made

    @classmethod
    def named(cls, name: str) -> Target:
        if name == HERE:
            return cls(name, f"linux_{name}")
        toolchain = TOOLCHAINS / f"{name}.cmake"
        if not toolchain.exists():
            raise SystemExit(f"--for {name}: expected {', '.join([HERE, *others()])}")
        system, _, arch = name.rpartition("-")
        platform = {"": "linux", "musl": "musllinux_1_2", "macos": "macosx_11_0"}[system]
        return cls(arch, f"{platform}_{arch}", (f"cmake.define.CMAKE_TOOLCHAIN_FILE={toolchain}",), system == "")

    def torch(self, wanted: str) -> Path | None:
        """The folder of a torch for another CPU, downloaded once; None for this one's, which the build finds."""
        if self.arch == HERE or not self.has_torch:
            return None
        folder = ROOT / "build" / f"torch-{self.arch}"
        if not (folder / wanted).is_dir():
            of_arch = ("--only-binary=:all:", "--platform", f"manylinux_2_28_{self.arch}")
            output(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *of_arch, "-d", folder, wanted)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "unpacking")
            wheel.unlink()
            (folder / "unpacking").rename(folder / wanted)  # whole or not at all
        return folder / wanted / "torch"


def others() -> list[str]:
    """What this machine can make wheels for besides itself."""
    return sorted(path.stem for path in TOOLCHAINS.glob("*.cmake") if path.stem != HERE)


def build(project: Path, target: Target, *settings: str, torch: Path | None = None) -> Path:
    """A wheel of the project, built with the torch that is named or is beside this Python."""
    folder = BUILD / project.resolve().name
    log = folder.with_suffix(".log")
    folder.mkdir(parents=True)
    place = f"build-dir={ROOT / 'build' / target.platform / folder.name}"  # never that of an editable installation
    options = [option for setting in (place, *target.settings, *settings) for option in ("-C", setting)]
    with log.open("wb") as to:
        environment = {**environment_with_tools(), **({"PYMTL_TORCH": str(torch)} if torch is not None else {})}
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, *options, project]
        if subprocess.run(command, env=environment, stdout=to, stderr=subprocess.STDOUT).returncode:
            sys.stdout.write(log.read_text()[-5000:])
            raise SystemExit(f"{project}: the build failed, see {log}")
    return only(folder)


def environment_with_tools() -> dict[str, str]:
    """With what is installed beside this Python on PATH."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **REPRODUCIBLE, "PATH": tools}


def only(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def retagged(wheel: Path, target: Target, *tags: str) -> Path:
    tags = (*tags, "--platform-tag", target.platform)
    name = output(sys.executable, "-m", "wheel", "tags", "--remove", *tags, wheel).split("\n")[-1]
    return wheel.with_name(name)


def repaired(wheel: Path) -> Path:
    """The same wheel under the oldest platform tag that auditwheel finds it fits."""
    folder = wheel.parent / "repaired"
    excluded = [option for name in NOT_OURS for option in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", folder, *excluded, wheel]
    done = subprocess.run(
        command, env=environment_with_tools(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
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


def try_wheels(
    pythons: list[Python], wheel: Path, runtime: Path, torch: str, tried: str, say: Callable[[str], None]
) -> None:
    own = Python.at(sys.executable)
    for python in pythons:
        version = "{}.{}".format(*python.version)
        try_wheel(python, runtime, "runtime", ["numpy"], ["-c", "import pymtl_runtime as p; print(p.isa())"])
        say(f"Python {version}: pymtl-runtime works, with numpy alone")
        if tried == "all" or (tried == "own" and python.version == own.version):
            smoke = ROOT / "packaging" / "smoke_test.py"
            try_wheel(python, wheel, "pymtl", [torch], [smoke], ["-m", "pymtl", "info"])
            say(f"Python {version}: pymtl works")
        else:
            try_wheel(python, wheel, "bindings", ["--no-deps"], ["-c", BINDINGS])
            say(f"Python {version}: pymtl's bindings load; not tried with torch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", action="append", default=[], metavar="FILE", help="a Python to serve (default: all found from 3.10)"
    )
    parser.add_argument(
        "--for",
        dest="name",
        default=HERE,
        metavar="PLATFORM",
        help=f"{HERE} (default: this machine's) or one of {', '.join(others())}; of the last three pymtl-runtime alone",
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
    target = Target.named(given.name)
    made = []
    if target.has_torch:
        versions = ", ".join("{}.{}".format(*python.version) for python in pythons)
        say(f"building pymtl on {target.platform}, Python {versions}")
        # The headers of a Python for another 64-bit Linux say the same.
        bindings = ";".join(f"{p.suffix.replace(HERE, target.arch)}={p.include}" for p in pythons)
        cuda = given.cuda if target.arch == HERE else "OFF"
        settings = (f"cmake.define.PYMTL_CUDA={cuda}", f"cmake.define.PYMTL_PYTHONS={bindings}")
        wheel = build(ROOT, target, *settings, torch=target.torch(given.torch))
        tags = ("--python-tag", ".".join(python.tag for python in pythons), "--abi-tag", "none")
        made.append(repaired(retagged(wheel, target, *tags)))
    say(f"building pymtl-runtime on {target.platform}")
    runtime = retagged(build(ROOT / "runtime", target), target)
    made.append(repaired(runtime) if target.has_torch else runtime)

    say("what they need")
    subprocess.run([sys.executable, ROOT / "packaging" / "needed_symbols.py", *made], check=True)

    if given.name == HERE:
        try_wheels(pythons, *made, given.torch, given.tried, say)
    given.out.mkdir(parents=True, exist_ok=True)
    for wheel in made:
        kept = Path(shutil.move(wheel, given.out / wheel.name))
        say(f"made {kept}, {kept.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
