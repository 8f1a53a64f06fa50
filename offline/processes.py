"""Processes around a checkpoint: what they are called, how they are ended, and when they are gone.

Source: proc(5), PR_SET_CHILD_SUBREAPER in prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dynacut.shared import proc
from dynacut.shared.errors import AS_ROOT, DynacutError

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.001


def threads_of(pid: int) -> Sequence[int]:
    """The thread ids of a process; none if it is gone."""
    try:
        return proc.thread_ids(pid)
    except OSError:
        return ()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells it from a later one of the same pid. None if gone."""
    try:
        return proc.start_time(pid)
    except OSError:
        return None


def described(pid: int) -> str:
    """A process for a message: its pid and its name."""
    try:
        status = proc.task_status(pid)
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({status.name}{', a zombie' if status.has_ended else ''})"


def exe_of(pid: int) -> str:
    """The path of a process's executable; empty if it cannot be read."""
    try:
        return proc.executable(pid)
    except OSError:
        return ""


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process, so that it can reap them. Lasts until it ends.

    To be called before a service is started that is to be checkpointed: after a dump only its parent can reap it.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def wait_until_gone(started: dict[int, int | None], timeout: float) -> list[int]:
    """Reaps those that are children of this process and waits for others to do so; returns the pids that remain.

    started: the pids with their start times. A zombie still has its pid, and a pidfd cannot tell it from one that was
    reaped, so /proc is asked.
    """
    deadline = time.monotonic() + timeout
    remaining = dict(started)
    while True:
        for pid, began in list(remaining.items()):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if start_time(pid) in (None, began) and Path(f"/proc/{pid}").exists():
                continue
            del remaining[pid]
        if not remaining or time.monotonic() > deadline:
            return sorted(remaining)
        time.sleep(_POLL_SECONDS)


def end(pids: Iterable[int], timeout: float = 10.0) -> list[int]:
    """Kills processes and reaps them; returns the pids that remain all the same."""
    started = {pid: start_time(pid) for pid in pids}
    for pid in started:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return wait_until_gone({pid: began for pid, began in started.items() if began is not None}, timeout)


def end_tree(pid: int) -> list[int]:
    """Kills a process with all its descendants and reaps them; returns the pids that remain all the same.

    All are stopped before the first is killed: a server would replace the worker it loses by one that nobody knows of.
    A process forks no more while a stop is pending for it, so a look that finds none new is the last.
    """
    stopped: dict[int, None] = {}
    while new := [each for each in proc.tree_of(pid) if each not in stopped]:
        for each in new:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGSTOP)
            stopped[each] = None
    return end(stopped)


def require_root(what: str) -> None:
    """Raises:
    DynacutError: this process is not root's.
    """
    if os.geteuid() != 0:
        raise DynacutError(f"{what} needs root", AS_ROOT)
