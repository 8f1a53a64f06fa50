"""Whether a number is that of a program that runs: what both backends ask first."""

from __future__ import annotations

from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import TaskStatus, task_status


def program_status(pid: int) -> TaskStatus:
    """The status of a program that runs and may be worked on.

    Raises:
        DynacutError: the number is that of no process, of process 1, or of something else than a program that runs.
    """
    check_not_first(pid)
    try:
        status = task_status(pid)
    except (OSError, OverflowError):
        raise gone(pid) from None
    check_kind(pid, f"process {pid} ({status.name})", status)
    return status


def check_not_first(pid: int) -> None:
    """Refuses process 1."""
    if pid == 1:
        raise DynacutError(
            "process 1 keeps the whole system (or container) alive: it is neither patched nor checkpointed",
            "give the pid of the server itself",
        )


def check_kind(pid: int, label: str, status: TaskStatus) -> None:
    """Refuses what is no running program: a thread of one, a thread of the kernel, a zombie."""
    if status.tgid != pid:
        raise DynacutError(f"{pid} is a thread of process {status.tgid}", f"use --pid {status.tgid}")
    if status.is_kernel_thread:
        raise DynacutError(f"{label} is a kernel thread", "give the pid of a program")
    if status.has_ended:
        raise DynacutError(f"{label} is a zombie: it has ended", "its parent has yet to reap it")


def gone(pid: int) -> DynacutError:
    """The error for a process that does not exist, or no longer does."""
    return DynacutError(f"there is no process {pid}", "`ps -e` lists the processes; a restarted server has a new pid")
