"""The build backend: scikit-build-core, with the torch that is installed already.

The kernels' op library needs torch's headers. Build isolation hides the environment's packages, so a plain
``requires = ["torch"]`` would download a second torch, by default gigabytes of CUDA. Instead this backend
looks for the one that is there and asks for torch only if there is none.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

from scikit_build_core import build as backend
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HEADER = Path("include", "torch", "csrc", "stable", "library.h")


def find_torch() -> Path | None:
    """The folder of a torch with stable-ABI headers: named, importable, or in the target environment."""
    candidates = []
    if os.environ.get("PYMTL_TORCH"):
        candidates.append(Path(os.environ["PYMTL_TORCH"]))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates.append(Path(spec.submodule_search_locations[0]))
    # Under pip's build isolation sys.path is cut down, but these still name the target environment.
    candidates.extend(Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib"))
    return next((path for path in candidates if (path / HEADER).exists()), None)


def _torch_if_missing() -> list[str]:
    return [] if find_torch() is not None else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return backend.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return backend.get_requires_for_build_editable(config_settings) + _torch_if_missing()


def _use_torch() -> None:
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            "pymtl: no torch >= 2.10 found to build against. Install one first, for example "
            "`pip install torch==2.13.0`, or name its folder in the environment variable PYMTL_TORCH."
        )
    os.environ["PYMTL_TORCH"] = str(torch)


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    _use_torch()
    return backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    _use_torch()
    return backend.build_editable(wheel_directory, config_settings, metadata_directory)
