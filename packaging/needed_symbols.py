"""Shows what a wheel's libraries need of the system and of torch, and fails where that is more than promised.

Of each library: the newest versions of glibc's, libstdc++'s and the C++
ABI's symbols, and how many functions of torch. Exit status 1 if one is newer than glibc 2.28 or than what torch 2.10
itself needs, if a function of torch is not in torch 2.10's stable interface, or if another library is needed than those
that every such system, Python or torch brings; what breaks the promise is named with the symbols that do. The installed
torch's shim headers tell its stable interface: what they declare outside every block guarded by a version after 2.10.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

# The newest versions: what torch's own wheels, manylinux_2_28, need.
PROMISED = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 11), "GCC": (4, 2, 0)}
LIBRARIES = re.compile(
    r"(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|librt\.so\.1|ld-linux-(x86-64|aarch64)\.so\.[12]"
    r"|libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(torch|torch_cpu|c10|pymtl|pymtl_cuda)\.so)"
)
SHIMS = (
    "csrc/stable/c/shim.h",
    "csrc/inductor/aoti_torch/c/shim.h",
    "csrc/inductor/aoti_torch/generated/c_shim_cpu.h",
    "csrc/inductor/aoti_torch/generated/c_shim_aten.h",
)


def declared(include: Path) -> set[str]:
    """Functions of the shim headers that torch 2.10 has."""
    names: set[str] = set()
    for shim in SHIMS:
        later = 0  # depth of blocks for versions after 2.10
        for line in (include / "torch" / shim).read_text().splitlines():
            directive = re.match(r"\s*#\s*(if|ifdef|ifndef|endif)\b(.*)", line)
            if directive:
                newer = re.search(r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_2_(\d+)_0", directive[2])
                if directive[1] == "endif":
                    later = max(0, later - 1)
                elif later or (newer and int(newer[1]) > 10):
                    later += 1
            if not later:
                names.update(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line))
                names.update(re.findall(r"^\s*((?:aoti_)?torch_\w+)$", line))
    return names


class Needs(NamedTuple):
    """What a library needs: other libraries, symbols by their version ("GLIBC", (2, 28)), functions of torch."""

    libraries: list[str]
    versions: dict[tuple[str, tuple[int, ...]], set[str]]
    torch: set[str]

    @classmethod
    def of(cls, elf: ELFFile) -> Needs:
        names = {}  # of versions, by their number
        table = elf.get_section_by_name(".gnu.version_r")
        for _, needed in table.iter_versions() if table else ():
            names.update({version["vna_other"]: version.name for version in needed})
        numbers = elf.get_section_by_name(".gnu.version")
        versions, torch = defaultdict(set), set()
        for name in names.values():
            versions[cls.version_of(name)]  # also one without a symbol, of which a system has to know all the same
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if symbol["st_shndx"] != "SHN_UNDEF" or not symbol.name:
                continue
            version = names.get(numbers.get_symbol(i)["ndx"]) if numbers else None
            if version is not None:
                versions[cls.version_of(version)].add(symbol.name)
            elif re.search(r"torch|aoti|c10|at[0-9]", symbol.name) and "pymtl" not in symbol.name:
                torch.add(symbol.name)
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        return cls(needed, dict(versions), torch)

    @staticmethod
    def version_of(name: str) -> tuple[str, tuple[int, ...]]:
        match = re.fullmatch(r"([A-Z]+)_(\d[\d.]*)", name)
        return (match[1], tuple(map(int, match[2].split(".")))) if match else (name, ())

    def newest(self, kind: str) -> str:
        numbers = [number for k, number in self.versions if k == kind]
        return ".".join(map(str, max(numbers))) if numbers else "-"

    def broken(self, interface: set[str], musl: bool) -> Iterator[str]:
        for (kind, number), symbols in sorted(self.versions.items()):
            if kind not in PROMISED or number > PROMISED[kind]:
                yield f"{'_'.join([kind, *filter(None, ['.'.join(map(str, number))])])}: {', '.join(sorted(symbols))}"
        if self.torch - interface:
            yield f"not in torch 2.10's stable interface: {', '.join(sorted(self.torch - interface))}"
        others = [name for name in self.libraries if not LIBRARIES.fullmatch(name) and not (musl and name == "libc.so")]
        if others:
            yield f"libraries that the system, Python and torch may lack: {', '.join(others)}"


def libraries(wheel: Path) -> Iterator[tuple[str, Needs]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.search(r"\.so(\.\d+)*$", name):
                yield name, Needs.of(ELFFile(io.BytesIO(archive.read(name))))


def torch_has() -> set[str]:
    """The installed torch's stable interface."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise SystemExit("this needs torch 2.10 or newer beside it, whose headers tell its stable interface")
    return declared(Path(spec.submodule_search_locations[0], "include"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    wheels = parser.parse_args().wheels
    for wheel in wheels:
        if not zipfile.is_zipfile(wheel):
            parser.error(f"{wheel}: expected a wheel")
    interface = torch_has()
    failed = False
    for wheel in wheels:
        print(f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MB")
        read = list(libraries(wheel))
        if not read:
            print("  not checked: no library of Linux")
            continue
        print(f"  {'library':56} {'GLIBC':>7} {'GLIBCXX':>8} {'CXXABI':>7} {'torch':>5}")
        for name, needs in read:
            row = [needs.newest(kind) for kind in ("GLIBC", "GLIBCXX", "CXXABI")]
            print(f"  {name:56} {row[0]:>7} {row[1]:>8} {row[2]:>7} {len(needs.torch):5}")
            for problem in needs.broken(interface, musl="musllinux" in wheel.name):
                print(f"{name}: {problem}", file=sys.stderr)
                failed = True
    if not failed:
        promise = ", ".join(f"{kind}_{'.'.join(map(str, number))}" for kind, number in PROMISED.items())
        print(f"of what was checked, nothing is newer than {promise} and torch 2.10's stable interface")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
