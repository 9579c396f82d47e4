"""Measurements in a process of their own, so that one that crashes, hangs or runs out of memory costs no other."""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Case = TypeVar("Case")
Row = dict[str, Any]
Measure = Callable[[Case], Iterable[Row]]

START_SECONDS = 90.0  # a new process imports torch first
END_SECONDS = 10.0  # a process that waits for a driver may not even be killed


def guarded(
    measure: Measure, cases: Sequence[Case], seconds: float, until: float | None = None
) -> Iterator[tuple[Case, Row]]:
    """Measures the cases one after the other in another process. A case that fails ends this process, and the next case
    gets a new one: after an error on a GPU nothing else runs in the same process.

    Args:
        measure: a function of a module's top level; what it yields for a case has to be picklable, and so has the case.
        cases: what to measure.
        seconds: how long a case may take before its process is ended.
        until: the time by :func:`time.monotonic` after which no case is begun and none goes on.

    Yields:
        Each case with each of its rows as they come; for a case that failed, a last row that holds only ``error``.
    """
    worker: _Worker | None = None
    until = math.inf if until is None else until
    try:
        for case in cases:
            if time.monotonic() >= until:
                yield case, {"error": "not begun: no time left"}
                continue
            try:
                worker = worker or _Worker(measure, until)
                left = min(seconds, until - time.monotonic())
                yield from ((case, row) for row in worker.rows(case, left))
            except _FailedError as failure:
                if worker is not None:
                    worker.end()
                    worker = None
                yield case, {"error": str(failure)}
    finally:
        if worker is not None:
            worker.end()


class _FailedError(Exception):
    """What became of a case or of its process, in words."""


class _Worker:
    def __init__(self, measure: Measure, until: float) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(measure, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            left = min(START_SECONDS, until - time.monotonic())
            self._receive(left, "did not start", left)
        except _FailedError:
            self.end()
            raise

    def rows(self, case: Any, seconds: float) -> Iterator[Row]:
        try:
            self._connection.send(case)
        except ConnectionError:
            raise _FailedError(self._ended()) from None
        deadline = time.monotonic() + seconds
        while True:
            kind, content = self._receive(deadline - time.monotonic(), "did not end", seconds)
            if kind == "done":
                return
            if kind == "error":
                raise _FailedError(content)
            yield content

    def _receive(self, left: float, what: str, seconds: float) -> tuple[str, Any]:
        try:
            if not self._connection.poll(max(0.0, left)):
                raise _FailedError(f"{what} within {seconds:.0f} s")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise _FailedError(self._ended()) from None

    def _ended(self) -> str:
        self._process.join(END_SECONDS)
        return f"the process ended with exit code {self._process.exitcode}"

    def end(self) -> None:
        self._process.kill()
        self._process.join(END_SECONDS)
        self._connection.close()


def _serve(measure: Measure, connection: Connection) -> None:
    connection.send(("ready", None))
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            for row in measure(case):
                connection.send(("row", row))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            connection.send(("error", f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"))
            return
        connection.send(("done", None))
