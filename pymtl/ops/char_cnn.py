"""Convolutions over the characters of words, and their maxima: wrapper, fake kernels and derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pymtl.ops.library  # noqa: F401  (defines torch.ops.pymtl)
from pymtl import reference
from pymtl.ops.autograd import (
    below_autograd,
    below_autograd_in_backward,
    check_one_device,
    needs_reference,
    wants_gradient,
)


def char_cnn(words: Tensor, table: Tensor, widths: Sequence[int]) -> Tensor:
    """The maximum of each filter over the places of each word (Ma & Hovy 2016, "End-to-end Sequence Labeling via
    Bi-directional LSTM-CNNs-CRF", section 2.1).

    A convolution is linear in the characters' embeddings. So ``table`` has, for each character, its embedding times all
    weights, and a filter's value at a place is the sum of its window's entries.

    Dimensions: N words, W characters, C different characters, D widths, F filters of each, S = F * sum(widths).

    Args:
        words: int64 [N, W] below C on the CPU; 0 is no character. A word has as many places as ids that are not 0, but
            at least one; windows end at the borders of W.
        table: [C, S] float32 or float64: for each width, for each place in its window, F numbers.
        widths: D odd numbers.

    Returns:
        [N, D*F]. The gradient of a maximum goes to the first place that has it.

    Raises:
        IndexError: a character is out of range.
        RuntimeError: a size, dtype or device does not fit.
    """
    widths = list(widths)
    if needs_reference(table):
        return reference.char_cnn(words, table, widths)
    try:
        if torch.compiler.is_compiling():
            return torch.ops.pymtl.char_cnn(words, table, widths, wants_gradient(table))[0]
        if wants_gradient(table):
            return _CharCNN.apply(words, table, widths)
        with below_autograd():
            return torch.ops.pymtl.char_cnn(words, table, widths, False)[0]
    except RuntimeError as error:
        # The stable C++ interface knows one type of error only; torch.nn.Embedding raises IndexError here.
        if "words: expected characters from" in str(error):
            raise IndexError(str(error).splitlines()[0]) from None
        raise


@torch.library.register_fake("pymtl::char_cnn")
def _char_cnn_fake(words: Tensor, table: Tensor, widths: Sequence[int], places: bool) -> tuple[Tensor, Tensor]:
    check_one_device(words=words, table=table)
    features = table.shape[1] // sum(widths) * len(widths)
    output = table.new_empty(words.shape[0], features)
    return output, words.new_empty(words.shape[0] if places else 0, features)


@torch.library.register_fake("pymtl::char_cnn_backward")
def _char_cnn_backward_fake(
    grad_output: Tensor, words: Tensor, places: Tensor, widths: Sequence[int], characters: int
) -> Tensor:
    check_one_device(grad_output=grad_output, words=words, places=places)
    return grad_output.new_empty(characters, grad_output.shape[1] // len(widths) * sum(widths))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    words, table, ctx.widths, places = inputs
    if not places:
        raise RuntimeError("torch.ops.pymtl.char_cnn: expected places=True where a gradient is wanted, got False")
    ctx.save_for_backward(words, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.characters = table.shape[0]


def _backward(ctx: Any, grad_output: Tensor, _: Any = None) -> tuple[Any, ...]:
    words, places = ctx.saved_tensors
    with below_autograd_in_backward():
        grad = torch.ops.pymtl.char_cnn_backward(grad_output, words, places, ctx.widths, ctx.characters)
    return None, grad, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, places, ctx.widths, _ = inputs
    ctx.save_for_backward(words, places)


def _double_backward(ctx: Any, grad_table: Tensor) -> tuple[Any, ...]:
    # The derivative is linear in grad_output: the new gradient's values at the same places.
    words, places = ctx.saved_tensors
    return reference.char_cnn_at(words, grad_table, ctx.widths, places), None, None, None, None


torch.library.register_autograd("pymtl::char_cnn", _backward, setup_context=_setup)
torch.library.register_autograd("pymtl::char_cnn_backward", _double_backward, setup_context=_setup_backward)


class _CharCNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, words: Tensor, table: Tensor, widths: list[int]) -> Tensor:
        output, places = torch.ops.pymtl.char_cnn(words, table, widths, True)
        ctx.save_for_backward(words, places)
        ctx.widths, ctx.characters = widths, table.shape[0]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, grad_output)[:3]
