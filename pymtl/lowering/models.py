"""The program of a whole model, or of recurrent layers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pymtl.decoder import DecoderHead
from pymtl.lowering.checks import check_plain, refuse
from pymtl.lowering.embeddings import lower_embedding
from pymtl.lowering.heads import decoder_of, lower_head, lower_step
from pymtl.lowering.program import Buffer, Program
from pymtl.lowering.recurrent import lower_recurrent
from pymtl.lowering.sharing import States, lower_encoder
from pymtl.models import MultiTaskModel
from pymtl.recurrent import Recurrent

OUTPUT = "output"  # the only task of recurrent layers alone


def lower(
    module: nn.Module,
    tasks: Sequence[str] | None = None,
    weights: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Program:
    """What a module does in evaluation, as a program.

    Args:
        module: a :class:`pymtl.MultiTaskModel`, or a :class:`pymtl.LSTM`, GRU or RNN, whose only task is
            ``"output"``: the states of its last layer.
        tasks: those of the model that the file shall answer; None: all.
        weights: what matrices of recurrent layers are kept in, as for :func:`pymtl.freeze`.
        sizes: how many numbers a token has of each field that is numbers already; of a single one it follows from the
            encoder's.

    Raises:
        KeyError: a task is unknown.
        TypeError: the module is none, ``tasks`` is a string, or a parameter is not float32.
        ValueError: there are no instructions for a module, or for what was changed in it; the message names it.
        RuntimeError: a layer cannot be kept in ``weights``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a pymtl.MultiTaskModel, LSTM, GRU or RNN, got {type(module).__name__}")
    if isinstance(tasks, str):
        raise TypeError(f"tasks: expected a list of names, got the string {tasks!r}")
    check_plain(module)
    program = Program(weights=None if weights == torch.float32 else weights)
    with torch.no_grad():
        if isinstance(module, Recurrent):
            _check_of_layers(tasks, sizes)
            states = lower_recurrent(program, module, program.numbers("features", module.input_size), "layers")
            program.tasks.append({"name": OUTPUT, "logits": states.name, "decoder": "none"})
        elif type(module) is MultiTaskModel:
            wanted = module.heads if tasks is None else tasks
            _lower_model(program, module, list(dict.fromkeys(wanted)), sizes or {})
        else:
            raise refuse(module, "module", "a pymtl.MultiTaskModel, LSTM, GRU or RNN")
    return program


def _check_of_layers(tasks: Sequence[str] | None, sizes: Mapping[str, int] | None) -> None:
    if tasks is not None and list(tasks) != [OUTPUT]:
        raise KeyError(f"tasks: expected {OUTPUT!r} alone of recurrent layers, got {list(tasks)}")
    if sizes:
        raise KeyError(f"sizes: expected none of recurrent layers, got {list(sizes)}")


def _lower_model(program: Program, model: MultiTaskModel, tasks: Sequence[str], sizes: Mapping[str, int]) -> None:
    for task in tasks:
        if task not in model.heads:
            raise KeyError(f"tasks: unknown task {task!r}, expected one of {list(model.heads)}")
    if not tasks:
        raise ValueError("tasks: expected at least one task, got none")
    if program.weights is not None and not any(isinstance(module, Recurrent) for module in model.modules()):
        raise ValueError(
            f"weights: expected a model with layers of this library to keep in {program.weights}, got none"
        )
    embedded = lower_embedding(program, model.embedding, model.encoder.input_size, sizes)
    order = model._with_those_before(tasks)
    states: dict[str, States] = lower_encoder(program, model.encoder, embedded, order)
    logits: dict[str, Buffer] = {}
    answers: dict[str, dict[str, Any]] = {}
    for task in order:
        head = model.heads[task]
        before = logits.get(head.reads.after)
        if isinstance(head, DecoderHead):
            answers[task] = {"step": lower_step(program, head, task, states[task], embedded, before)}
        else:
            logits[task] = lower_head(program, head, task, states[task], embedded, before)
            answers[task] = {"logits": logits[task].name}
    for task in tasks:
        program.tasks.append({"name": task, **answers[task], **decoder_of(program, model.heads[task], task)})
