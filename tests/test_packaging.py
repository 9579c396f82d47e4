"""What wheels promise: which system they need, and the names they are given."""

import importlib.util
import sys
from pathlib import Path

import pytest

from pymtl import _native

PACKAGING = Path(__file__).parents[1] / "packaging"


def program(name):
    spec = importlib.util.spec_from_file_location(name, PACKAGING / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needed_symbols = program("needed_symbols")
make_wheels = program("make_wheels")
LIBRARIES = sorted(Path(_native.__file__).parent.glob("*.so"))


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's libraries")
@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_what_is_installed_loads_on_the_oldest_system(path):
    with path.open("rb") as file:
        needs = needed_symbols.Needs.of(needed_symbols.ELFFile(file))
    assert list(needs.broken(needed_symbols.torch_has(), musl=False)) == []


def test_what_breaks_the_promise_is_named():
    needs = needed_symbols.Needs(
        libraries=["libc.so.6", "libfoo.so.1"],
        versions={("GLIBC", (2, 28)): {"fcntl64"}, ("GLIBC", (2, 34)): {"dlopen"}, ("GLIBC_PRIVATE", ()): {"__secret"}},
        torch={"aoti_torch_known", "aoti_torch_new"},
    )
    assert list(needs.broken({"aoti_torch_known"}, musl=False)) == [
        "GLIBC_2.34: dlopen",
        "GLIBC_PRIVATE: __secret",
        "not in torch 2.10's stable interface: aoti_torch_new",
        "libraries that the system, Python and torch may lack: libfoo.so.1",
    ]
    assert needs.newest("GLIBC") == "2.34"


@pytest.mark.parametrize(
    ("name", "arch", "tag", "has_torch"),
    [
        (make_wheels.HERE, make_wheels.HERE, f"linux_{make_wheels.HERE}", True),
        ("aarch64", "aarch64", "linux_aarch64", True),
        ("musl-x86_64", "x86_64", "musllinux_1_2_x86_64", False),
        ("musl-aarch64", "aarch64", "musllinux_1_2_aarch64", False),
        ("macos-arm64", "arm64", "macosx_11_0_arm64", False),
    ],
)
def test_wheels_for_other_platforms_are_named_after_them(monkeypatch, name, arch, tag, has_torch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    target = make_wheels.Target.named(name)
    assert (target.arch, target.tag, target.has_torch) == (arch, tag, has_torch)
    assert name == make_wheels.HERE or (make_wheels.TOOLCHAINS / f"{name}.cmake").exists()


def test_every_toolchain_is_known():
    assert set(make_wheels.others()) == {"aarch64", "musl-x86_64", "musl-aarch64", "macos-arm64"} - {make_wheels.HERE}
