"""The C interface, ``pymtl.h``, by ctypes: models, sessions and streams over numpy arrays."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, addressof, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .serving.generation import END, MAX_LENGTH, Banned, Hypothesis, Scores, Search, check_limits, likeliest
from .serving.generation import search as found_by

ABI = (1, 1)  # the interface that this file needs, or one with a larger second number
_FILE = "libpymtl_runtime.dylib" if sys.platform == "darwin" else "libpymtl_runtime.so"

# What a batch has of a field: strings, or ids, or numbers.
Values = Sequence[str] | Sequence[int] | Sequence[float] | np.ndarray
AnswerKind = Literal["logits", "classes", "path", "ctc", "ordinal", "labels", "values", "generated"]
_ANSWER_KINDS: tuple[AnswerKind, ...] = (
    "logits",
    "classes",
    "path",
    "ctc",
    "ordinal",
    "labels",
    "values",
    "generated",
)
InputKind = Literal["ids", "characters", "numbers"]
_INPUT_KINDS: tuple[InputKind, ...] = ("ids", "characters", "numbers")


class ModelError(ValueError):
    """A model's file is missing, damaged, or written by a newer version."""


class _Options(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("threads", c_int64), ("memory_limit", c_size_t))


class _Input(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("kind", c_int32), ("size", c_int64), ("takes_strings", c_int32))


class _Task(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("kind", c_int32),
        ("of_tokens", c_int32),
        ("columns", c_int64),
        ("labels", c_int64),
        ("streams", c_int32),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("strings", c_void_p),
        ("ids", c_void_p),
        ("numbers", c_void_p),
        ("width", c_int64),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("tasks", c_void_p),
        ("task_count", c_int64),
        ("probabilities", c_int32),
        ("by_steps", c_int64),
    )


class _Answer(ctypes.Structure):
    _fields_ = (
        ("ids", c_void_p),
        ("starts", c_void_p),
        ("numbers", c_void_p),
        ("probability", c_void_p),
        ("probabilities", c_void_p),
    )


class _Scores(ctypes.Structure):
    _fields_ = (("logits", c_void_p), ("attention", c_void_p), ("columns", c_int64), ("steps", c_int64))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pymtl_abi_major": (c_int32, []),
    "pymtl_error": (c_char_p, []),
    "pymtl_isa": (c_char_p, []),
    "pymtl_model_load": (c_int32, [c_char_p, POINTER(_Options), POINTER(c_void_p)]),
    "pymtl_model_free": (None, [c_void_p]),
    "pymtl_model_description": (c_char_p, [c_void_p]),
    "pymtl_input_count": (c_int64, [c_void_p]),
    "pymtl_get_input": (c_int32, [c_void_p, c_int64, POINTER(_Input)]),
    "pymtl_input_name": (c_char_p, [c_void_p, c_int64, c_int64]),
    "pymtl_task_count": (c_int64, [c_void_p]),
    "pymtl_get_task": (c_int32, [c_void_p, c_int64, POINTER(_Task)]),
    "pymtl_label": (c_char_p, [c_void_p, c_int64, c_int64]),
    "pymtl_session_new": (c_int32, [c_void_p, POINTER(c_void_p)]),
    "pymtl_stream_new": (c_int32, [c_void_p, POINTER(c_void_p)]),
    "pymtl_session_free": (None, [c_void_p]),
    "pymtl_stream_reset": (c_int32, [c_void_p]),
    "pymtl_stream_state": (c_int32, [c_void_p, POINTER(c_void_p), POINTER(c_int64)]),
    "pymtl_run": (c_int32, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p]),
    "pymtl_get_answer": (c_int32, [c_void_p, c_int64, POINTER(_Answer)]),
    "pymtl_get_logits": (
        c_int32,
        [c_void_p, c_int64, POINTER(c_void_p), POINTER(c_int64), POINTER(c_int64)],
    ),
    "pymtl_step": (c_int32, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, POINTER(_Scores)]),
}


def _library() -> ctypes.CDLL:
    """The library beside this file, or the one that the environment variable PYMTL_RUNTIME_LIBRARY names."""
    path = os.environ.get("PYMTL_RUNTIME_LIBRARY") or str(Path(__file__).with_name(_FILE))
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"{path}: the compiled library of pymtl_runtime cannot be loaded: {error}") from None
    found = (library.pymtl_abi_major(), library.pymtl_abi_minor())
    if found[0] != ABI[0] or found < ABI:
        raise ImportError(f"{path}: expected interface {ABI[0]}.{ABI[1]}, got {found[0]}.{found[1]}: upgrade it")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_LIBRARY = _library()
_ERRORS = {1: ModelError, 2: ValueError, 3: MemoryError}


def _check(status: int) -> None:
    if status != 0:
        raise _ERRORS.get(status, RuntimeError)(_LIBRARY.pymtl_error().decode())


def isa() -> str:
    """The instruction set whose kernels run; the environment variable PYMTL_ISA names another one.

    Raises:
        RuntimeError: PYMTL_ISA names none that this machine has.
    """
    name = _LIBRARY.pymtl_isa()
    if name is None:
        raise RuntimeError(_LIBRARY.pymtl_error().decode())
    return name.decode()


@dataclass(frozen=True)
class InputInfo:
    """What a model reads of a token: ``kind`` ``"ids"`` and ``"characters"`` are below ``size``; of ``"numbers"`` a
    token has so many."""

    name: str
    kind: InputKind
    size: int
    takes_strings: bool


@dataclass(frozen=True)
class TaskInfo:
    """A task: ``columns`` of its logits, of which there is a row for each token or for each sequence, and of generated
    answers a row for each hypothesis of a step; ``labels``, the names of its ids; ``streams``: whether a stream has its
    logits, and, but of paths and of CTC, its answers."""

    name: str
    kind: AnswerKind
    of_tokens: bool
    columns: int
    labels: list[str]
    streams: bool


@dataclass(frozen=True)
class Answer:
    """What a task says of each sequence of a batch.

    ``ids``: of each sequence its class, tags, labels, or what was generated, int64; ``numbers`` float64 [B, C] of a
    task of numbers, else None; ``probability`` float64 [B] of each whole answer, NaN if it was not asked for or is not
    known; ``probabilities``: of each sequence those of its tokens' tags, or of its generated ids, float32, None if they
    were not asked for.
    """

    ids: list[np.ndarray]
    numbers: np.ndarray | None
    probability: np.ndarray
    probabilities: list[np.ndarray] | None


class Model:
    """A model's file, for any number of threads.

    Args:
        path: what ``pymtl export`` or ``pymtl.export`` wrote. Nobody may shorten the file while the model is in use;
            to replace it, move another one into its place.
        threads: that a call may run on; 0: as many as there are cores for this process.
        memory_limit: bytes that packed weights may take, and the buffers of a batch; 0: 4 GiB.

    Raises:
        MemoryError: the packed weights take more than ``memory_limit``.
        ModelError: the file is missing, damaged, or written by a newer version.
        TypeError, ValueError: a number is none, or out of range.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, memory_limit: int = 0) -> None:
        for name, number in (("threads", threads), ("memory_limit", memory_limit)):  # ctypes would take it modulo 2^64
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name}: expected a whole number, got {number!r}")
            if not 0 <= number < 2**63:
                raise ValueError(f"{name}: expected a number from 0 to 2^63 - 1, got {number}")
        encoded_path = os.fsencode(path)
        if not encoded_path or b"\0" in encoded_path:
            raise ValueError(f"path: expected the name of a file, got {os.fspath(path)!r}")
        self._arguments = (os.path.abspath(path), threads, memory_limit)
        options = _Options(ctypes.sizeof(_Options), threads, memory_limit)
        pointer = c_void_p()
        _check(_LIBRARY.pymtl_model_load(encoded_path, byref(options), byref(pointer)))
        self._pointer = pointer
        self.description: str = _LIBRARY.pymtl_model_description(pointer).decode()
        self.inputs = [self._input(i) for i in range(_LIBRARY.pymtl_input_count(pointer))]
        self.tasks = [self._task(i) for i in range(_LIBRARY.pymtl_task_count(pointer))]
        self._by_name = {each.name: each for each in self.inputs}
        self._places = {task.name: i for i, task in enumerate(self.tasks)}

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            _LIBRARY.pymtl_model_free(self._pointer)

    def __reduce__(self) -> Any:
        """A copy, or one in another process, loads the file again."""
        return Model, self._arguments

    def __repr__(self) -> str:
        return f"Model({self._arguments[0]!r}, tasks={list(self._places)})"

    def _input(self, index: int) -> InputInfo:
        info = _Input()
        _check(_LIBRARY.pymtl_get_input(self._pointer, index, byref(info)))
        return InputInfo(info.name.decode(), _INPUT_KINDS[info.kind], info.size, bool(info.takes_strings))

    def _task(self, index: int) -> TaskInfo:
        info = _Task()
        _check(_LIBRARY.pymtl_get_task(self._pointer, index, byref(info)))
        labels = [_LIBRARY.pymtl_label(self._pointer, index, i).decode() for i in range(info.labels)]
        kind = _ANSWER_KINDS[info.kind]
        return TaskInfo(info.name.decode(), kind, bool(info.of_tokens), info.columns, labels, bool(info.streams))

    def names(self, input: str) -> list[str]:
        """The names of an input's ids, in their order; none if it has none, or there is no such input."""
        for index, info in enumerate(self.inputs):
            if info.name == input and info.takes_strings:
                found = (_LIBRARY.pymtl_input_name(self._pointer, index, i) for i in range(info.size))
                return [name.decode() for name in found if name is not None]
        return []

    def place(self, task: str) -> int:
        """The number of a task.

        Raises:
            KeyError: there is no such task.
        """
        if task not in self._places:
            raise KeyError(f"task: expected one of {list(self._places)}, got {task!r}")
        return self._places[task]

    def session(self) -> Session:
        """For batches of whole sequences; one thread at a time may use it."""
        return Session(self, stream=False)

    def stream(self) -> Session:
        """For one sequence, whose tokens come in several calls: each goes on from where the one before ended. It has
        answers of the tasks whose ``streams`` is true; of a task of sequences the answer for all tokens so far.

        Raises:
            ValueError: there is no such task.
        """
        return Session(self, stream=True)


class _Alone:
    """Refuses a second thread, which would find the memory of the first one's call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("session: in use by another thread: make one for each, by Model.session()")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Session:
    """A thread's use of a model; made by :meth:`Model.session` and :meth:`Model.stream`."""

    def __init__(self, model: Model, stream: bool) -> None:
        make = _LIBRARY.pymtl_stream_new if stream else _LIBRARY.pymtl_session_new
        pointer = c_void_p()
        _check(make(model._pointer, byref(pointer)))
        self._pointer = pointer
        self.model = model  # and so the model outlives it
        self._fields = (_Field * len(model.inputs))()
        self._request = _Request(ctypes.sizeof(_Request), None, 0, False, False)
        self.lengths = np.zeros(0, dtype=np.int64)  # of the last batch's sequences
        self._alone = _Alone()

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            _LIBRARY.pymtl_session_free(self._pointer)

    def run(
        self,
        lengths: Sequence[int] | np.ndarray,
        fields: Mapping[str, Values],
        tasks: Sequence[str] | None = None,
        probabilities: bool = False,
        by_steps: bool = False,
    ) -> None:
        """Runs a batch; :meth:`logits` and :meth:`answer` then have what was found, until the next batch.

        Args:
            lengths: of the sequences, each at least 1.
            fields: of each input what the tokens of all sequences have, one sequence after the other, as lists or
                arrays: strings; ids, int64 [N], of characters [N, W] with 0 behind a word's end; or numbers, float32
                [N, F]. Characters may be missing where words are strings. A task that copies has a field
                ``"<task>/sources"``: which of its ids each token is, from C on for tokens that it does not know. That
                may be missing if the task is not wanted.
            tasks: those wanted; all by default.
            probabilities: whether answers of tokens, and generated ones, say how probable each of their ids is.
            by_steps: whether answers that are generated are left to :meth:`generate` and :meth:`step`; otherwise
                :meth:`answer` has those of the likeliest id at each step.

        Raises:
            KeyError: a task is unknown.
            TypeError, ValueError: something does not fit the model.
            MemoryError: the batch takes more memory than the limit.
            RuntimeError: another thread is using the session.
        """
        with self._alone:
            self.lengths = self.lengths[:0]  # should this one fail, there are no answers
            self._run(lengths, fields, tasks, probabilities, by_steps)

    def _run(
        self,
        lengths: Sequence[int] | np.ndarray,
        fields: Mapping[str, Values],
        tasks: Sequence[str] | None,
        probabilities: bool,
        by_steps: bool,
    ) -> None:
        given = np.asarray(lengths)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and len(given) > 0):
            raise TypeError(f"lengths: expected a list of whole numbers, got {lengths!r}")
        numbers = given.tolist()  # of few numbers Python's min, max and sum are faster than numpy's
        if not numbers or min(numbers) < 1 or max(numbers) >= 1 << 31:
            raise ValueError(f"lengths: expected numbers from 1 to {(1 << 31) - 1}, at least one, got {lengths!r}")
        given = np.ascontiguousarray(given, np.int64)
        known = self.model._by_name
        for name in fields:
            if name not in known:
                raise ValueError(f"fields: expected some of {list(known)}, got {name!r}")
        count = sum(numbers)
        # What the call's pointers lead to, which has to live as long.
        kept: list[Any] = [
            _fill(field, known[name], values, count) for field, (name, values) in zip(self._fields, fields.items())
        ]
        self._request.probabilities, self._request.by_steps = probabilities, by_steps
        if tasks is None:
            self._request.tasks, self._request.task_count = None, 0
        elif isinstance(tasks, str) or not isinstance(tasks, Iterable):
            raise TypeError(f"tasks: expected a list of names, got {tasks!r}")
        else:
            places = np.array([self.model.place(task) for task in tasks], np.int64)
            if len(places) == 0:
                raise ValueError("tasks: expected at least one name, got none")
            kept.append(places)
            self._request.tasks, self._request.task_count = _address(places), len(places)
        _check(
            _LIBRARY.pymtl_run(
                self._pointer,
                len(given),
                _address(given),
                len(fields),
                addressof(self._fields),
                addressof(self._request),
            )
        )
        self.lengths = given.copy()

    def __reduce__(self) -> Any:
        raise TypeError("a session cannot be copied or sent to another process: make one there, by Model.session()")

    def logits(self, task: str) -> np.ndarray:
        """float32 [N, C] of a task of tokens, one sequence after the other, or [B, C].

        Raises:
            KeyError: the task is unknown.
            ValueError: the last batch was not asked for it, or failed; or its answers are generated.
        """
        data, rows, columns = c_void_p(), c_int64(), c_int64()
        place = self.model.place(task)
        with self._alone:
            self._check_answered(task)
            _check(_LIBRARY.pymtl_get_logits(self._pointer, place, byref(data), byref(rows), byref(columns)))
            return _copy(data.value, (rows.value, columns.value), np.float32)

    def answer(self, task: str) -> Answer:
        """What the task says.

        Raises:
            KeyError, ValueError: as :meth:`logits`; a stream has no answers of paths and of CTC.
        """
        place = self.model.place(task)
        with self._alone:
            self._check_answered(task)
            return self._answer(place)

    def _check_answered(self, task: str) -> None:
        """Refuses what an older batch left, where the last one was refused before it came to the library."""
        if len(self.lengths) == 0:
            raise ValueError(f"task {task!r}: there are no answers: run a batch that asks for it first")

    def _answer(self, place: int) -> Answer:
        found = _Answer()
        _check(_LIBRARY.pymtl_get_answer(self._pointer, place, byref(found)))
        batch = len(self.lengths)
        starts = _copy(found.starts, (batch + 1,), np.int64).tolist()

        def split(address: int | None, dtype: type) -> list[np.ndarray]:
            whole = _copy(address, (starts[-1],), dtype)
            return [whole[first:last] for first, last in pairwise(starts)]

        numbers = None
        if found.numbers:
            numbers = _copy(found.numbers, (batch, self.model.tasks[place].columns), np.float64)
        # Of answers without an id there is nothing to point at.
        nothing = starts[-1] == 0 and self._request.probabilities and self.model.tasks[place].kind == "generated"
        each = split(found.probabilities, np.float32) if found.probabilities or nothing else None
        return Answer(split(found.ids, np.int64), numbers, _copy(found.probability, (batch,), np.float64), each)

    def step(
        self,
        task: str,
        ids: np.ndarray,
        parents: np.ndarray | None = None,
        sequences: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A step of hypotheses of a task's answers to the last batch: each reads an id. :meth:`generate` makes a search
        of such steps.

        Args:
            task: one whose answers are generated.
            ids: int64 [M]; 0, the end, at the first step.
            parents: int64 [M], the hypotheses of the step before that they go on from.
            sequences: in the place of ``parents``, int64 [M]: the sequences of the batch that they begin with.

        Returns:
            Logits of each hypothesis' next id, float32 [M, C]; and how much each has read of each token of its
            sequence, float32 [M, T], zero behind the last, or None if the model attends to nothing. Of a task that
            copies there are more than C columns where the batch has further tokens: the ids that ``"<task>/sources"``
            gave them. A column is -inf if its token stands in other sequences alone.

        Raises:
            KeyError, ValueError: as :meth:`logits`; or a number does not fit.
            MemoryError: the step takes more memory than the limit.
        """
        self.model.place(task)
        if (parents is None) == (sequences is None):
            raise ValueError("parents: expected these or sequences, got " + ("neither" if parents is None else "both"))
        own_ids = _whole(ids, "ids")
        whose = "sequences" if parents is None else "parents"
        rows = _whole(sequences if parents is None else parents, whose)
        if len(rows) != len(own_ids):
            raise ValueError(f"{whose}: expected one for each of the {len(own_ids)} ids, got {len(rows)}")
        with self._alone:
            self._check_answered(task)
            return self._step(task, own_ids, rows, parents is None)

    def _step(self, task: str, ids: np.ndarray, rows: np.ndarray, begins: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """``rows``: the hypotheses' parents; where they begin, their sequences."""
        found = _Scores()
        whose = (None, _address(rows)) if begins else (_address(rows), None)
        _check(
            _LIBRARY.pymtl_step(self._pointer, self.model.place(task), len(ids), _address(ids), *whose, byref(found))
        )
        logits = _copy(found.logits, (len(ids), found.columns), np.float32)
        return logits, _copy(found.attention, (len(ids), found.steps), np.float32) if found.attention else None

    def generate(
        self,
        task: str,
        search: Search | None = None,
        max_length: int = MAX_LENGTH,
        attention: bool = False,
        never: Sequence[int] = (),
        numbers: Sequence[int] | None = None,
    ) -> list[list[Hypothesis]]:
        """Answers to the last batch's sequences, by a search or by sampling.

        Args:
            task: one whose answers are generated.
            search: how answers are looked for, or drawn; None: the likeliest id at each step.
            max_length: ids at most, where ``search`` says nothing.
            attention: whether to give what each step has read.
            never: ids that are not to come, as that of unknown tokens.
            numbers: of the sequences, by which samples are drawn; by default from 0 on.

        Returns:
            For each sequence its ``nbest`` answers, the best first; samples in the order in which they were drawn.

        Raises:
            KeyError, ValueError, MemoryError: as :meth:`step`.
            RuntimeError: a logit is nan, or another thread uses the session.
        """
        info = self.model.tasks[self.model.place(task)]
        if info.kind != "generated":
            raise ValueError(f"task: expected one whose answers are generated, got {task!r}")
        check_limits(max_length, never, info.columns)
        settings = search or Search()
        with self._alone:
            self._check_answered(task)
            steps = _Steps(self, task, attention or settings.coverage_penalty > 0, list(never))
            return found_by(steps, settings, max_length, numbers)

    def reset(self) -> None:
        """Begins a new sequence of a stream. Raises ValueError if it is none."""
        with self._alone:
            _check(_LIBRARY.pymtl_stream_reset(self._pointer))

    @property
    def state(self) -> np.ndarray:
        """A stream's states, float32 [S], to keep and to put back: ``stream.state = kept``. Raises ValueError if it is
        none, or if another number of states is put back."""
        with self._alone:
            address, count = self._state()
            return _copy(address, (count,), np.float32)

    @state.setter
    def state(self, kept: np.ndarray) -> None:
        given = np.asarray(kept)
        if given.dtype.kind not in "iuf":
            raise TypeError(f"state: expected numbers, got {given.dtype}")
        values = np.ascontiguousarray(given, np.float32)
        with self._alone:
            address, count = self._state()
            if values.shape != (count,):
                raise ValueError(f"state: expected {count} numbers, got shape {list(values.shape)}")
            if count > 0:
                ctypes.memmove(address, _address(values), values.nbytes)

    def _state(self) -> tuple[int | None, int]:
        data, count = c_void_p(), c_int64()
        _check(_LIBRARY.pymtl_stream_state(self._pointer, byref(data), byref(count)))
        return data.value, count.value


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _copy(address: int | None, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory of the library's, which it will use again."""
    found = np.empty(shape, dtype)
    if found.size > 0:
        ctypes.memmove(_address(found), address, found.nbytes)
    return found


def _fill(field: _Field, info: InputInfo, values: Values, count: int) -> Any:
    """Points a field at its values, and returns what has to stay alive for that."""
    name = info.name
    field.name = encoded_name = name.encode()
    field.strings = field.ids = field.numbers = None
    is_array = isinstance(values, np.ndarray)
    is_list = is_array or isinstance(values, Sequence) or hasattr(values, "__array__")
    if not is_list or isinstance(values, str | bytes | bytearray):
        raise TypeError(f"fields[{name!r}]: expected a list with a value for each token, got {values!r:.80}")
    if not is_array or values.dtype.kind in "UO":
        strings = [isinstance(value, str) for value in values]
        if info.kind != "numbers" and all(strings):
            return _fill_strings(field, name, list(values), count), encoded_name
        if any(strings) and not all(strings):
            odd = strings.index(not strings[0])
            raise TypeError(f"{_expected(info, count)}, got {list(values)[odd]!r} at {odd} among others")
        try:
            values = np.asarray(values)
        except ValueError as error:  # lists of several lengths
            raise ValueError(f"{_expected(info, count)}: {error}") from None
    if values.dtype.kind not in ("iuf" if info.kind == "numbers" else "iu"):
        raise TypeError(f"{_expected(info, count)}, got {values.dtype} {list(values.shape)}")
    if info.kind == "numbers" and info.size == 1 and values.ndim == 1:
        values = values[:, None]
    if values.ndim != (1 if info.kind == "ids" else 2) or len(values) != count:
        raise ValueError(f"{_expected(info, count)}, got {values.dtype} {list(values.shape)}")
    if info.kind == "numbers":
        kept = _floats(values, name)
        field.numbers = _address(kept)
    else:
        if values.dtype.kind == "u" and values.size > 0 and values.max() >= 2**63:
            raise ValueError(f"fields[{name!r}]: expected ids below {info.size}, got {values.max()}")
        kept = np.ascontiguousarray(values, np.int64)
        field.ids = _address(kept)
    field.width = kept.shape[1] if kept.ndim == 2 else 1
    return kept, encoded_name


class _Steps:
    """The hypotheses of a task's answers to a session's last batch, for a search.

    Args:
        attention: whether to say what each step reads.
        never: ids that are not to come.
    """

    ends = True

    def __init__(self, session: Session, task: str, attention: bool, never: list[int]) -> None:
        self.lengths = session.lengths
        self.first = np.full(len(self.lengths), END, dtype=np.int64)
        self._session, self._task, self._attention, self._never = session, task, attention, never
        self._began = False

    def step(
        self, tokens: np.ndarray, parents: np.ndarray, sentences: np.ndarray, count: int, banned: Banned
    ) -> Scores:
        read, rows = (np.ascontiguousarray(each, np.int64) for each in (tokens, parents))
        logits, attention = self._session._step(self._task, read, rows, not self._began)
        self._began = True
        values, ids = likeliest(logits, count, banned, self._never)
        return Scores(values, ids, attention.astype(np.float64) if self._attention and attention is not None else None)


def _whole(values: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    """Whole numbers of one dimension, as int64."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"{name}: expected a list of whole numbers, got {values!r}")
    if given.dtype.kind not in "iu" and len(given) > 0:
        raise TypeError(f"{name}: expected whole numbers, got {given.dtype}")
    if given.dtype.kind == "u" and len(given) > 0 and given.max() >= 1 << 63:
        raise ValueError(f"{name}: expected numbers below 2^63, got {given.max()}")
    return np.ascontiguousarray(given, np.int64)


def _expected(info: InputInfo, count: int) -> str:
    """How an error about a field begins."""
    what = {
        "ids": f"strings or whole numbers [{count}]",
        "characters": f"strings [{count}] or whole numbers [{count}, W]",
        "numbers": f"numbers [{count}, {info.size}]",
    }
    return f"fields[{info.name!r}]: expected {what[info.kind]}"


def _floats(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.float32:
        return np.ascontiguousarray(values)
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(values, np.float32)
    except FloatingPointError:
        raise ValueError(f"fields[{name!r}]: expected numbers that float32 can hold, got larger ones") from None


def _fill_strings(field: _Field, name: str, values: list[str], count: int) -> Any:
    if len(values) != count:
        raise ValueError(f"fields[{name!r}]: expected {count} strings, one a token, got {len(values)}")
    try:
        encoded = [value.encode() for value in values]
    except UnicodeEncodeError as error:
        raise ValueError(f"fields[{name!r}]: expected text, got {error.object!r}: {error.reason}") from None
    for value in encoded:
        if b"\0" in value:
            raise ValueError(f"fields[{name!r}]: expected strings without a zero character, got {value.decode()!r}")
    strings = (c_char_p * max(count, 1))(*encoded)
    field.strings = addressof(strings)
    return strings, encoded
