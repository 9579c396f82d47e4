"""Runs a Python program on arm64 under emulation, with the wheels in dist/ that are for it.

    python packaging/emulated.py packaging/smoke_test.py
    python packaging/emulated.py -m pytest -n 2 tests/ops/test_packing.py

It needs qemu-aarch64 and debootstrap (Debian's packages qemu-user and debootstrap). A small Debian with its Python,
torch and what the tests need are unpacked below build/aarch64 when they are first needed; the wheels each time. The
emulated CPU has NEON and the products of 8-bit integers; a program takes 10 to 50 times as long there. debootstrap,
which is run once, has to be run by root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "aarch64"
SYSTEM = HOME / "system"
RELEASE, VERSION = "bookworm", "3.11"  # of Debian, of its Python
TORCH = "torch==2.10.0"  # the newest without CUDA that PyPI has for arm64
PACKAGES = HOME / TORCH
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")  # pip would ask for x86-64's
TESTS_NEED = ("numpy", "safetensors", "pytest", "pytest-xdist", "hypothesis", "expecttest", "mpmath")
# Away from the current folder, where the sources are, so that the wheel is imported.
SHELL = """#!/bin/sh
exec qemu-aarch64 -L {system} -E PYTHONSAFEPATH=1 -E PYTHONPATH={packages} {system}/usr/bin/python{version} "$@"
"""
# Python starts another by sys.executable, which has to be what starts the emulator.
SITE = """import sys
sys.executable = {python!r}
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def make_system() -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise SystemExit("run this once as root, with Debian's package debootstrap installed: sudo -E python ...")
    unpacking = HOME / "unpacking"
    shutil.rmtree(unpacking, ignore_errors=True)
    needs = "python3,libgomp1,libstdc++6"
    run("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", f"--include={needs}", RELEASE, unpacking)
    for package in (unpacking / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, unpacking)
    unpacking.rename(SYSTEM)  # whole or not at all


def install(to: Path, *what: str | Path) -> None:
    options = ["--only-binary=:all:", "--python-version", VERSION]
    for name in ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 29))):
        options += ["--platform", f"{name}_aarch64"]
    run(sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", to, *options, *what)


def newest_wheel(name: str) -> Path:
    tag = "cp" + VERSION.replace(".", "") if name == "pymtl" else "py3"
    wheels = [path for path in (ROOT / "dist").glob(f"{name}-*-manylinux_*_aarch64.whl") if tag in path.name]
    if not wheels:
        raise SystemExit(f"dist holds no wheel of {name} for arm64 and Python {VERSION}: make wheels FOR=aarch64")
    return max(wheels, key=lambda path: path.stat().st_mtime)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    if shutil.which("qemu-aarch64") is None:
        raise SystemExit("qemu-aarch64 was not found: install Debian's package qemu-user")
    if not SYSTEM.exists():
        make_system()
    if not PACKAGES.exists():
        unpacking = HOME / "unpacking"
        shutil.rmtree(unpacking, ignore_errors=True)
        install(unpacking, "--no-deps", TORCH)
        install(unpacking, *TORCH_NEEDS, *TESTS_NEED)
        unpacking.rename(PACKAGES)
    install(PACKAGES, "--no-deps", *(newest_wheel(name) for name in ("pymtl", "pymtl_runtime")))
    python = HOME / "python"
    places = {"system": shlex.quote(str(SYSTEM)), "packages": shlex.quote(str(PACKAGES))}
    python.write_text(SHELL.format(**places, version=VERSION))
    python.chmod(0o755)
    (PACKAGES / "sitecustomize.py").write_text(SITE.format(python=str(python)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([python, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
