"""Errors that a GPU finds while nobody waits for it: raised by a later call, once its work is done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Report(NamedTuple):
    copied: Any  # the event after which `rows` can be read
    rows: Tensor  # int64 [K] on the CPU: where something is wrong, -1 where nothing is
    describe: Callable[[int, int], str]


_reports: deque[_Report] = deque()
_lock = threading.Lock()


def report(rows: Tensor, describe: Callable[[int, int], str]) -> None:
    """Notes what a call found, without waiting for it.

    Nothing is noted while a CUDA graph is recorded, whose replays nobody could tell apart.

    Args:
        rows: int64 [K] on a GPU; -1 where nothing is wrong.
        describe: makes a message of k and ``rows[k]``.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    with torch.cuda.device(rows.device):
        here = rows.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    with _lock:
        _reports.append(_Report(copied, here, describe))


def raise_late_errors(*, wait: bool = True) -> None:
    """Raises what earlier calls of :func:`joint_loss` found on a GPU.

    Args:
        wait: for all such calls; otherwise only those count that the GPU is done with.

    Raises:
        IndexError: what the first call found that found something; the next ``raise_late_errors`` goes on behind it.
    """
    # An event may not be asked for while a CUDA graph is recorded.
    while _reports and (wait or not torch.cuda.is_current_stream_capturing()):
        with _lock:
            if not _reports or not (wait or _reports[0].copied.query()):
                return
            copied, rows, describe = _reports.popleft()
        if wait:
            copied.synchronize()
        found = [describe(k, row) for k, row in enumerate(rows.tolist()) if row >= 0]
        if found:
            raise IndexError("; ".join(found))
