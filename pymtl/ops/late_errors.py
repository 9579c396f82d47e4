"""Errors that a GPU finds after the call has returned: a later call raises them, once the GPU's work is done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymtl.ops.dtypes import has_cuda


class _Report(NamedTuple):
    copied: Any  # the event after which `numbers` can be read
    numbers: Tensor  # int64 on the CPU
    describe: Callable[[list[int]], str]
    error: type[Exception]
    about: str  # what the message begins with

    def message(self) -> str:
        """Once it is copied; empty if nothing is wrong."""
        found = self.describe(self.numbers.tolist())
        return self.about + found if found else ""


_reports: deque[_Report] = deque()
_lock = threading.Lock()
_about: ContextVar[str] = ContextVar("_about", default="")


def late_errors_about(what: str) -> AbstractContextManager[None]:
    """Messages of late errors noted within begin with ``what``."""
    return nullcontext() if torch.compiler.is_compiling() else _noted_about(what)


@contextmanager
def _noted_about(what: str) -> Iterator[None]:
    token = _about.set(f"{what}: ")
    try:
        yield
    finally:
        _about.reset(token)


def refuse_where(wrong: Tensor, values: Tensor, describe: Callable[[int], str], error: type[Exception]) -> None:
    """Raises an error if ``wrong`` is true anywhere. On a GPU that the kernels run on a later call raises it, so that
    this one does not wait; compiled code does not raise it there.

    Args:
        wrong: bool, of any shape.
        values: of the same shape, what is wrong or not.
        describe: makes a message of the first wrong value.
    """
    if not has_cuda(wrong):
        if bool(wrong.any()):
            raise error(describe(int(values[wrong][0])))
    elif not torch.compiler.is_compiling() and wrong.numel() > 0:
        first = wrong.flatten().int().argmax().view(1)  # an index of no dimension would be waited for
        found = torch.cat([wrong.any().view(1).long(), values.flatten().index_select(0, first).long()])

        def describe_late(found: list[int]) -> str:
            is_wrong, value = found
            return f"{describe(value)}, in an earlier call on the GPU" if is_wrong else ""

        report(found, describe_late, error)


def report(numbers: Tensor, describe: Callable[[list[int]], str], error: type[Exception] = IndexError) -> None:
    """Notes what a call found, without waiting for it.

    Nothing is noted while a CUDA graph is recorded, since its replays could not be told apart, nor for fake tensors,
    which hold no values.

    Args:
        numbers: int64 [K] on a GPU.
        describe: makes a message of them; an empty one if nothing is wrong.
        error: what is raised then.
    """
    if type(numbers) is not Tensor or torch.cuda.is_current_stream_capturing():
        return
    with torch.cuda.device(numbers.device):
        here = numbers.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    with _lock:
        # Drop the reports that are complete and found nothing: raise_late_errors may never be called.
        waiting = [each for each in _reports if not each.copied.query() or each.message()]
        _reports.clear()
        _reports.extend(waiting)
        _reports.append(_Report(copied, here, describe, error, _about.get()))


def raise_late_errors(*, wait: bool = True) -> None:
    """Raises what earlier losses found on a GPU.

    Args:
        wait: for all such calls; otherwise only those count that the GPU is done with.

    Raises:
        IndexError, ValueError: the error of the earliest call that found one; the next ``raise_late_errors`` checks the
            calls after it.
    """
    # An event may not be asked for while a CUDA graph is recorded.
    while _reports and (wait or not torch.cuda.is_current_stream_capturing()):
        with _lock:
            if not _reports or not (wait or _reports[0].copied.query()):
                return
            first = _reports.popleft()
        if wait:
            first.copied.synchronize()
        message = first.message()
        if message:
            raise first.error(message)
