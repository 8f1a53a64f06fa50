"""Processes around a checkpoint: what /proc says of them, which belong together, and when they are gone.

Source: proc(5), PR_SET_CHILD_SUBREAPER in prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dynacut.shared.errors import DynacutError

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.001


def status_of(pid: int, tid: int | None = None) -> dict[str, str]:
    """The lines of /proc/PID/status, or of one of its threads, by their names.

    Raises:
        OSError: it is gone.
    """
    folder = f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"
    lines = Path(folder, "status").read_bytes().decode(errors="replace").split("\n")  # see live/proc.py
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def threads_of(pid: int) -> list[int]:
    """The thread ids of a process; none if it is gone."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - half the cost
    except OSError:
        return []


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells it from a later one of the same pid. None if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(stat.rpartition(b")")[2].split()[19])


def described(pid: int) -> str:
    """A process for a message: its pid and its name."""
    try:
        status = status_of(pid)
    except OSError:
        return f"process {pid}"
    zombie = ", a zombie" if status["State"][0] in "ZX" else ""
    return f"process {pid} ({status['Name']}{zombie})"


def exe_of(pid: int) -> str:
    """The path of a process's executable; empty if it cannot be read."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def tree_of(pid: int) -> list[int]:
    """The process and all its descendants, parents first; zombies too."""
    tree = [pid]
    for parent in tree:  # grows while it is walked
        for tid in threads_of(parent):
            with suppress(OSError):
                tree += map(int, Path(f"/proc/{parent}/task/{tid}/children").read_text().split())
    return tree


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


def require_root(what: str) -> None:
    """Raises:
    DynacutError: this process is not root's.
    """
    if os.geteuid() != 0:
        raise DynacutError(f"{what} needs root: CRIU does", "run dynacut as root, by sudo")
