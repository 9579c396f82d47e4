"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place, flushes it to disk, and moves it there in one step.

    Args:
        target: the file; one that is there is replaced.
        write: is given the path to write to.

    Raises:
        OSError: it cannot be written; the message names ``target``.
    """
    if target.is_symlink():
        target = target.resolve()  # the link stays one
    if target.is_dir():
        raise IsADirectoryError(f"{target}: is a folder: name a file")
    # Of this thread: two that write one file must not write one draft.
    draft = target.with_name(f".{target.stem}.{os.getpid()}.{threading.get_ident()}.part{target.suffix}")
    try:
        try:
            draft.touch()
        except FileNotFoundError:
            raise FileNotFoundError(f"{target}: there is no folder {target.parent}") from None
        except OSError as error:
            raise type(error)(f"{target}: cannot be written: {error.strerror}") from None
        mode = draft.stat().st_mode & 0o777  # as the umask says; some writers make a file for its owner alone
        write(draft)
        draft.chmod(mode)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):  # of a folder that is not there, or of which we may not know
            draft.unlink(missing_ok=True)
