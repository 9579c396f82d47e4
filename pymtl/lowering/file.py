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
from pymtl.serving.generation import END, MAX_LENGTH, check_limits
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
    max_length: int = MAX_LENGTH,
    never: Mapping[str, Sequence[int]] | None = None,
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
        max_length: how many tokens a generated answer may have at most. It is for the likeliest answers, which the
            file's reader finds by itself; a search by :meth:`pymtl_runtime.Session.generate` has its own.
        never: of tasks whose answers are generated, ids that are not to come; for the likeliest answers too.

    Raises:
        ImportError: there is no safetensors, or no onnx.
        KeyError: a task, or a field of ``names``, is unknown.
        TypeError, ValueError, RuntimeError: as :func:`pymtl.lowering.lower`, or a number does not fit; nothing is
            written then.
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
    generated = {each["name"]: each for each in program.tasks if "step" in each}
    for each in generated.values():
        limit_answers(each, max_length)
    for task, own in (never or {}).items():
        if task not in generated:
            raise KeyError(f"never: expected tasks whose answers are generated, {list(generated)}, got {task!r}")
        limit_answers(generated[task], max_length, own)
    for task, own in (labels or {}).items():
        known = next((each for each in program.tasks if each["name"] == task), None)
        if known is None:
            raise KeyError(f"labels: expected tasks among {[each['name'] for each in program.tasks]}, got {task!r}")
        count = count_ids(module.heads[task]) if isinstance(module, MultiTaskModel) else 0
        if isinstance(own, str):
            raise TypeError(f"labels of {task!r}: expected a list of {count}, got the string {own!r}")
        if len(own) != count:
            raise ValueError(f"labels of {task!r}: expected {count}, got {len(own)}")
        known["labels"] = list(map(str, own))
        _check_names(known["labels"], f"labels of {task!r}")
    write(program, path, {})


def name_ids(field: dict[str, Any], names: Sequence[str], unknown: int | None) -> None:
    """Gives the ids of a program's field their names.

    Raises:
        TypeError: they are one string, or ``unknown`` is no number.
        ValueError: one is no string or comes twice, there are too many or none, or ``unknown`` is no id.
    """
    what = f"names of {field['name']!r}"
    if isinstance(names, str):
        raise TypeError(f"{what}: expected a list of strings, got the string {names!r}")
    if not 1 <= len(names) <= field["count"]:
        raise ValueError(f"{what}: expected from 1 to {field['count']}, got {len(names)}")
    _check_names(names, what)
    if unknown is not None and (isinstance(unknown, bool) or not isinstance(unknown, int)):
        raise TypeError(f"unknown of {field['name']!r}: expected an id, a whole number, got {unknown!r}")
    if unknown is not None and not 0 <= unknown < field["count"]:
        raise ValueError(f"unknown of {field['name']!r}: expected an id below {field['count']}, got {unknown}")
    field["names"] = list(names)
    if unknown is not None:
        field["unknown"] = unknown


def limit_answers(task: dict[str, Any], max_length: int, never: Sequence[int] = ()) -> None:
    """Says of a program's task whose answers are generated how long they may be, and what does not come.

    Raises:
        TypeError, ValueError: a number is none, or does not fit. The end always may come, or an answer had none.
    """
    check_limits(max_length, never, task["step"]["count"])
    if END in never:
        raise ValueError(f"never of {task['name']!r}: expected other ids than {END}, which ends an answer")
    task |= {"max_length": int(max_length), "never": [int(token) for token in never]}


def _check_names(names: Sequence[str], what: str) -> None:
    seen = set()
    for name in names:
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{what}: expected strings without a zero character, got {name!r}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what}: expected text, got {name!r}: {error.reason}") from None
        if name in seen:
            raise ValueError(f"{what}: expected different ones, got {name!r} twice")
        seen.add(name)


def write(program: Program, path: str | Path, description: Mapping[str, Any]) -> None:
    """Writes a program, as ONNX if the file's name ends so: the whole file or none.

    Args:
        description: what is said of the model besides, as JSON has it.

    Raises:
        ImportError: there is no safetensors, or no onnx.
        ValueError: the file's name ends otherwise, a number is not finite, or ONNX has no operators for an instruction.
        OSError: the file cannot be written.
    """
    program.check_finite()
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
