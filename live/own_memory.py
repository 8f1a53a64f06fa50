"""Processes that share their memory with another one: after vfork, posix_spawn, or clone with CLONE_VM.

An int3 written into one of them is in both, and SIGTRAP's action is not: the other one would end by its first hit. As a
rule they part after an instant, when the child calls execve or ends.
"""

from __future__ import annotations

import time
from contextlib import suppress

from dynacut.shared.address_space import shares_memory
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import children, task_status

_LOOK_PAUSE = 0.002


class SharedMemoryError(DynacutError):
    """The process shares its memory with another one, at this moment."""


def await_own_memory(pid: int, deadline: float) -> None:
    """Waits until a process has its memory for itself. deadline: of time.monotonic().

    Raises:
        SharedMemoryError: it has not by then. OSError: the process is gone.
    """
    while (other := _partner(pid)) is not None:
        if time.monotonic() > deadline:
            name = ""
            with suppress(OSError):
                name = f" ({task_status(other).name})"
            raise SharedMemoryError(
                f"process {pid} ({task_status(pid).name}) shares its memory with process {other}{name}, as after vfork",
                "try again: this takes an instant as a rule",
            )
        time.sleep(_LOOK_PAUSE)


def _partner(pid: int) -> int | None:
    """The parent or the child that has the same memory; None if there is none."""
    parent = task_status(pid).ppid
    relatives = [*([parent] if parent else []), *children(pid)]
    return next((other for other in relatives if shares_memory(pid, other)), None)
