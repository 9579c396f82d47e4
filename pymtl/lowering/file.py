"""The files that runtimes without torch read: safetensors with the program in its metadata, and ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymtl._native import version
from pymtl.lowering.heads import count_ids
from pymtl.lowering.models import lower
from pymtl.lowering.program import Program
from pymtl.models import MultiTaskModel
from pymtl.writing import write_whole

KEY = "pymtl"  # in the metadata
ONNX = ".onnx"  # what the name of such a file ends in
SUFFIXES = (".pymtl", ONNX)


def export(
    module: nn.Module,
    path: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    weights: torch.dtype | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    unknown: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Writes a model to one file, for runtimes without torch: ``pymtl_runtime`` in Python, ``pymtl.h`` in C; or, if its
    name ends in ``.onnx``, for ONNX Runtime and others.

    The file answers as the model does in evaluation, by its parameters: what :func:`pymtl.freeze` has made of them does
    not count, ``weights`` says what the file keeps. A run of ``pymtl train`` is exported by ``pymtl export``.

    Args:
        module: a :class:`pymtl.MultiTaskModel` of float32, or a :class:`pymtl.LSTM`, GRU or RNN.
        path: the file, which ends in ``.pymtl`` or ``.onnx``; one that is there is replaced.
        tasks: those that the file shall answer; None: all.
        weights: ``torch.int8`` or ``torch.bfloat16``: what matrices of recurrent layers are kept in, as for
            :func:`pymtl.freeze`. None: float32.
        names: of the ids of fields, in their order, so that the file reads strings: ``{"words": [...]}`` of a model
            whose embedding is an ``nn.Embedding``; of a :class:`pymtl.TokenFeatures` by its fields. Of characters each
            name is one character.
        unknown: the id that strings not among the names have, by the field; without it they are an error.
        labels: names of all ids of a task's answers: of its classes, tags or labels.
        sizes: how many numbers a token has of each field that is numbers already; of a single one it is known.

    Raises:
        ImportError: there is no safetensors, or no onnx.
        KeyError: a task, or a field of ``names``, is unknown.
        TypeError, ValueError, RuntimeError: as :func:`pymtl.lowering.lower`; nothing is written then.
        OSError: the file cannot be written.

    ::

        pymtl.export(model, "orders.pymtl", names={"words": vocabulary}, unknown={"words": 1},
                     labels={"mood": ["kind", "rude"]})
    """
    program = lower(module, tasks, weights, sizes)
    for field, own in (names or {}).items():
        known = next((each for each in program.inputs if each["name"] == field and each["kind"] != "numbers"), None)
        if known is None:
            fields = [each["name"] for each in program.inputs if each["kind"] != "numbers"]
            raise KeyError(f"names: expected fields of ids among {fields}, got {field!r}")
        name_ids(known, own, (unknown or {}).get(field))
    for field in unknown or {}:
        if field not in (names or {}):
            raise KeyError(f"unknown: expected fields that names has, got {field!r}")
    for task, own in (labels or {}).items():
        known = next((each for each in program.tasks if each["name"] == task), None)
        if known is None:
            raise KeyError(f"labels: expected tasks among {[each['name'] for each in program.tasks]}, got {task!r}")
        count = count_ids(module.heads[task]) if isinstance(module, MultiTaskModel) else 0
        if len(own) != count:
            raise ValueError(f"labels of {task!r}: expected {count}, got {len(own)}")
        known["labels"] = list(map(str, own))
    write(program, path, {})


def name_ids(field: dict[str, Any], names: Sequence[str], unknown: int | None) -> None:
    """Gives the ids of a program's field their names.

    Raises:
        ValueError: one is no string or comes twice, there are too many, or ``unknown`` is no id.
    """
    wrong = next((name for name in names if not isinstance(name, str) or "\0" in name), None)
    if wrong is not None:
        raise ValueError(f"names of {field['name']!r}: expected strings without a zero character, got {wrong!r}")
    if len(names) > field["count"] or len(set(names)) != len(names):
        raise ValueError(
            f"names of {field['name']!r}: expected at most {field['count']}, all different, got {len(names)} of which "
            f"{len(set(names))} are different"
        )
    if unknown is not None and not 0 <= unknown < field["count"]:
        raise ValueError(f"unknown of {field['name']!r}: expected an id below {field['count']}, got {unknown}")
    field["names"] = list(names)
    if unknown is not None:
        field["unknown"] = unknown


def write(program: Program, path: str | Path, description: Mapping[str, Any]) -> None:
    """Writes a program, as ONNX if the file's name ends so: the whole file or none.

    Args:
        description: what is said of the model besides, as JSON has it.

    Raises:
        ImportError: there is no safetensors, or no onnx.
        ValueError: the file's name ends otherwise, or ONNX has no operators for an instruction.
        OSError: the file cannot be written.
    """
    about = {"pymtl": version, **description}
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path: expected a name that ends in {' or '.join(SUFFIXES)}, got {target.name}")
    if target.suffix.lower() == ONNX:
        from pymtl.lowering.onnx import metadata_of, to_onnx

        whole = to_onnx(program, metadata_of(program, about)).SerializeToString()
        write_whole(target, lambda draft: draft.write_bytes(whole))
        return
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("writing a model takes safetensors: pip install 'pymtl[train]'") from None
    try:
        write_whole(target, lambda draft: save_file(program.tensors, draft, {KEY: program.as_json(about)}))
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{target}: cannot be written: {error}") from None
