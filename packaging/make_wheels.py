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
import importlib.util
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

    @property
    def number(self) -> str:
        return "{}.{}".format(*self.version)

    @classmethod
    def at(cls, path: str) -> Python:
        program = (
            "import sys, sysconfig as s; "
            "print(*sys.version_info[:2], s.get_config_var('EXT_SUFFIX'), s.get_path('include'), "
            "sys.implementation.name == 'cpython' and not sys.abiflags, sep='\\n')"
        )
        major, minor, suffix, include, ordinary = output(path, "-c", program, quietly=True).split("\n")
        if ordinary != "True":
            raise ValueError("a debug or free-threaded build, or another Python than CPython")
        return cls(path, (int(major), int(minor)), suffix, include)


def output(*command: str | Path, quietly: bool = False) -> str:
    errors = subprocess.DEVNULL if quietly else None
    environment = {**os.environ, **REPRODUCIBLE}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    return done.stdout.strip()


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
                raise SystemExit(f"{path}: expected an ordinary CPython") from error
            continue  # another kind of Python, or a launcher of one that is not there
        if python.version >= (3, 10) and Path(python.include, "Python.h").exists():
            found.setdefault(python.version, python)
        elif named:
            what = f"{python.number}, headers in {python.include}"
            raise SystemExit(f"{path}: expected Python 3.10 or newer with its headers, got {what}")
    return [found[version] for version in sorted(found)]


class Target(NamedTuple):
    """What wheels are for: a CPU, and a system."""

    arch: str
    tag: str  # of the platform, in the wheel's name
    settings: tuple[str, ...] = ()
    has_torch: bool = True  # where there is none, only pymtl-runtime is made

    @classmethod
    def named(cls, name: str) -> Target:
        if name == HERE:
            return cls(name, f"linux_{name}")
        system, _, arch = name.rpartition("-")
        tag = {"": "linux", "musl": "musllinux_1_2", "macos": "macosx_11_0"}[system]
        toolchain = f"cmake.define.CMAKE_TOOLCHAIN_FILE={TOOLCHAINS / name}.cmake"
        if system == "":
            return cls(arch, f"{tag}_{arch}", (toolchain,))
        if importlib.util.find_spec("ziglang") is None:
            raise SystemExit(f"--for {name} needs the package ziglang: pip install ziglang")
        return cls(arch, f"{tag}_{arch}", (toolchain, "install.strip=false"), has_torch=False)  # it is linked without


def others() -> list[str]:
    """What this machine can make wheels for besides itself."""
    return sorted(path.stem for path in TOOLCHAINS.glob("*.cmake") if path.stem != HERE)


def headers_serve(python: Python, arch: str) -> bool:
    """Whether a Python's headers can be compiled for another 64-bit Linux: all but those that have one per CPU."""
    if arch == HERE:
        return True
    configuration = Path(python.include, "pyconfig.h").read_text()
    return f"<{HERE}-linux-gnu/" not in configuration or Path("/usr/include", f"{arch}-linux-gnu").exists()


def torch_of(arch: str, wanted: str) -> Path:
    """The folder of a torch for another CPU; one of a certain version is downloaded once."""
    folder = ROOT / "build" / f"torch-{arch}-{re.sub('[^A-Za-z0-9.]+', '-', wanted)}"
    if "==" not in wanted or not folder.is_dir():
        unpacking = folder.with_name("unpacking")
        for old in (unpacking, folder):
            shutil.rmtree(old, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", unpacking]
        if subprocess.run([*command, "--platform", f"manylinux_2_28_{arch}", wanted]).returncode:
            raise SystemExit(f"no torch for {arch} was found as {wanted}: name another by --torch")
        wheel = only(unpacking)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacking)
        wheel.unlink()
        unpacking.rename(folder)  # whole or not at all
    return folder / "torch"


def build(name: str, project: Path, target: Target, *settings: str, torch: Path | None = None) -> Path:
    """A wheel of the project, built with the torch that is named or is beside this Python."""
    folder = BUILD / name
    log = folder.with_suffix(".log")
    folder.mkdir(parents=True)
    place = f"build-dir={ROOT / 'build' / target.tag / name}"  # never that of an editable installation
    options = [option for setting in (place, *target.settings, *settings) for option in ("-C", setting)]
    environment = {**environment_with_tools(), **({"PYMTL_TORCH": str(torch)} if torch is not None else {})}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, *options, project]
    with (
        log.open("w", buffering=1) as to,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        for line in run.stdout:
            to.write(line)
            count = re.match(r"\s*\[\d+/\d+\]", line)
            if count and sys.stdout.isatty():
                print(f"\r        compiling {count[0].strip()}", end="\r", flush=True)
    if run.returncode:
        sys.stdout.write(log.read_text()[-5000:])
        raise SystemExit(f"{name}: the build failed, see {log}")
    return only(folder)


def environment_with_tools() -> dict[str, str]:
    """With what is installed beside this Python on PATH."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **REPRODUCIBLE, "PATH": tools}


def only(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def retagged(wheel: Path, target: Target, *tags: str) -> Path:
    tags = (*tags, "--platform-tag", target.tag)
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
        try_wheel(python, runtime, "runtime", ["numpy"], ["-c", "import pymtl_runtime as p; print(p.isa())"])
        say(f"Python {python.number}: pymtl-runtime works, with numpy alone")
        if tried == "all" or (tried == "own" and python.version == own.version):
            smoke = ROOT / "packaging" / "smoke_test.py"
            try_wheel(python, wheel, "pymtl", [torch], [smoke], ["-m", "pymtl", "info"])
            say(f"Python {python.number}: pymtl works")
        else:
            try_wheel(python, wheel, "bindings", ["--no-deps"], ["-c", BINDINGS])
            say(f"Python {python.number}: pymtl's bindings load; not tried with torch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", action="append", default=[], metavar="FILE", help="a Python to serve (default: all found from 3.10)"
    )
    parser.add_argument(
        "--for",
        dest="name",
        default=HERE,
        choices=(HERE, *others()),
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
    if sys.platform != "linux":
        raise SystemExit("this makes wheels on Linux: elsewhere `pip wheel .` makes one of this machine")
    started = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        print(f"{minutes:3}:{seconds:02}  {text}", flush=True)

    here = given.name == HERE
    if given.cuda == "ON" and not here:
        raise SystemExit(f"--cuda ON: the CUDA kernels are compiled for {HERE} alone, not for {given.name}")
    missing = [name for name in ("auditwheel", "elftools", "wheel") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}: `make wheels` runs this with what it needs")
    given.out.mkdir(parents=True, exist_ok=True)
    target = Target.named(given.name)
    found = find_pythons(given.python) if target.has_torch else []
    pythons = [python for python in found if headers_serve(python, target.arch)]
    for python in found:
        if python not in pythons:
            say(f"left out: {python.path}, whose headers are for {HERE} alone")
    if target.has_torch and not pythons:
        raise SystemExit("no Python from 3.10 on was found with its headers: name one by --python")
    torch = torch_of(target.arch, given.torch) if target.has_torch and not here else None
    shutil.rmtree(BUILD, ignore_errors=True)
    made = []
    if target.has_torch:
        say(f"building pymtl on {target.tag}, Python {', '.join(python.number for python in pythons)}")
        bindings = ";".join(f"{p.suffix.replace(HERE, target.arch)}={p.include}" for p in pythons)
        settings = [f"PYMTL_CUDA={given.cuda if here else 'OFF'}", f"PYMTL_PYTHONS={bindings}"]
        wheel = build("pymtl", ROOT, target, *(f"cmake.define.{setting}" for setting in settings), torch=torch)
        tags = ("--python-tag", ".".join(python.tag for python in pythons), "--abi-tag", "none")
        made.append(repaired(retagged(wheel, target, *tags)))
    say(f"building pymtl-runtime on {target.tag}")
    runtime = retagged(build("pymtl-runtime", ROOT / "runtime", target), target)
    made.append(repaired(runtime) if target.has_torch else runtime)

    say("what they need")
    subprocess.run([sys.executable, ROOT / "packaging" / "needed_symbols.py", *made], check=True)

    if here:
        try_wheels(pythons, *made, given.torch, given.tried, say)
    else:
        say(f"not tried: this machine is no {given.name}")
    for wheel in made:
        name, version, *_ = wheel.name.split("-")
        for old in given.out.glob(f"{name}-{version}-*{target.tag.removeprefix('linux')}.whl"):
            if target.tag.startswith("linux") == ("manylinux" in old.name):
                old.unlink()  # of the same version and other Pythons, between which pip would have to choose
        kept = Path(shutil.move(wheel, given.out / wheel.name))
        say(f"made {kept}, {kept.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
