"""Shows that a wheel's op libraries need nothing of torch but the C functions of torch 2.10's stable interface.

Usage: needed_symbols.py WHEEL. Compares the libraries' undefined symbols with the functions that the installed
torch's shim headers declare outside every block guarded by a feature version above 2.10; exit status 1 if one
is missing there.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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


def needed(wheel: Path) -> set[str]:
    """Undefined symbols of the op libraries, the CPU's and if there is one the GPU's, that look like torch's."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"pymtl/libpymtl_ops\w*\.so", name)]
            libraries = [archive.extract(name, folder) for name in names]
        command = ["nm", "-D", "--undefined-only", *libraries]
        listing = subprocess.run(command, check=True, capture_output=True, text=True)
    names = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines() if line.strip()}
    return {name for name in names if re.search(r"torch|aoti|c10|at[0-9]", name) and "pymtl" not in name}


def main() -> int:
    include = Path(importlib.util.find_spec("torch").submodule_search_locations[0], "include")
    symbols = needed(Path(sys.argv[1]))
    missing = symbols - declared(include)
    print(f"the op libraries need {len(symbols)} functions of torch: {', '.join(sorted(symbols))}")
    if missing:
        print(f"not in torch 2.10's stable interface: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    print("all of them are in torch 2.10's stable interface")
    return 0


if __name__ == "__main__":
    sys.exit(main())
