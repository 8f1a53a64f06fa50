"""One dynacut at a time works on a process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dynacut.shared.errors import DynacutError
from dynacut.shared.running import gone


@contextmanager
def locked(pid: int) -> Iterator[None]:
    """Keeps other dynacut processes from patching the same process; the lock goes with this process, however it ends.

    Raises:
        DynacutError: another one holds it, or the process is gone.
    """
    try:
        file = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise gone(pid) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DynacutError(f"another dynacut is changing process {pid}", "try again when it has ended") from None
        yield
    finally:
        os.close(file)
