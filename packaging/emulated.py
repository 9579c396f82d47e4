"""Runs a Python program on arm64 under emulation, with the wheels in dist/ that are for it.

    python packaging/emulated.py packaging/smoke_test.py
    python packaging/emulated.py -m pytest -n 2 tests/ops

It needs qemu-aarch64 and debootstrap (Debian's packages qemu-user and debootstrap). A small Debian with its Python,
torch and what the tests need are unpacked below build/aarch64 when they are first needed; the wheels each time. The
emulated CPU has NEON and the products of 8-bit integers; a program takes 10 to 50 times as long there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "aarch64"
SYSTEM = HOME / "system"
PACKAGES = HOME / "packages"
RELEASE, VERSION = "bookworm", "3.11"  # of Debian, of its Python
TORCH = "torch==2.10.0"  # the newest without CUDA that PyPI has for arm64
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")  # pip would ask for x86-64's
TESTS_NEED = ("numpy", "safetensors", "pytest", "pytest-xdist", "hypothesis", "expecttest", "mpmath")
# Programs are started by this machine's kernel, which knows nothing of the emulator.
SHELL = """#!/bin/sh
exec qemu-aarch64 -L {system} -E PYTHONPATH={packages} {system}/usr/bin/python{version} "$@"
"""
CUSTOM = """import sys
sys.executable = {python!r}
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def make_system() -> None:
    for tool in ("debootstrap", "qemu-aarch64"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} was not found: install Debian's packages debootstrap and qemu-user")
    unpacking = HOME / "unpacking"
    shutil.rmtree(unpacking, ignore_errors=True)
    needs = "python3,libgomp1,libstdc++6"
    run("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", f"--include={needs}", RELEASE, unpacking)
    for package in (unpacking / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, unpacking)
    unpacking.rename(SYSTEM)  # whole or not at all


def install(to: Path, *what: str | Path) -> None:
    options = ["--only-binary=:all:", "--python-version", VERSION]
    for name in ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28"):
        options += ["--platform", f"{name}_aarch64"]
    run(sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", to, *options, *what)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not SYSTEM.exists():
        make_system()
    if not PACKAGES.exists():
        unpacking = HOME / "unpacking"
        shutil.rmtree(unpacking, ignore_errors=True)
        install(unpacking, "--no-deps", TORCH)
        install(unpacking, *TORCH_NEEDS, *TESTS_NEED)
        unpacking.rename(PACKAGES)
    wheels = sorted((ROOT / "dist").glob("*aarch64.whl"))
    if not wheels:
        raise SystemExit("dist holds no wheel for arm64: make wheels FOR=aarch64")
    install(PACKAGES, "--no-deps", *wheels)
    python = HOME / "python"
    python.write_text(SHELL.format(system=SYSTEM, packages=PACKAGES, version=VERSION))
    python.chmod(0o755)
    (PACKAGES / "sitecustomize.py").write_text(CUSTOM.format(python=str(python)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([python, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
