"""Whether the parent of a process will reap it after a dump: until then its pid is taken, and nothing is restored."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from dynacut.offline import processes
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import blocked_in, task_status

_INIT = 1
_SYS_WAIT4, _SYS_WAITID = 61, 247
_ANY = {2**64 - 1, 2**32 - 1}  # -1, as a register may show it
_P_ALL, _P_PID = 0, 1
_STEPS = "do it in steps: `dynacut checkpoint`, `dynacut offline`, `dynacut restore`"
_SIGCHLD_BIT = 1 << (signal.SIGCHLD - 1)


def check_reaped(pid: int) -> None:
    """Returns if the parent of a process can be seen to look after its children.

    That is: process 1, whose task it is; this process; and one that ignores SIGCHLD, so that the kernel reaps, that
    handles it, that blocks it, to fetch it by sigwaitinfo(2) or signalfd(2), or that waits for children right now
    (wait(2)). To be asked before a dump: after one, with a parent that never reaps, the process would be lost.

    Raises:
        DynacutError: it does none of these; or it is systemd with a service, which is started anew when it ends.
    """
    parent = task_status(pid).ppid
    if parent in (0, os.getpid()):
        return
    if unit := service_of(pid, parent):
        raise DynacutError(
            f"{processes.described(pid)} belongs to the service {unit}: systemd takes its dump for its end, and starts "
            "the service anew or gives it up",
            f"{_STEPS}, with Restart=no for {unit}",
        )
    if parent != _INIT and not any(_reaps(parent, tid, pid) for tid in processes.threads_of(parent)):
        raise DynacutError(
            f"the parent of {processes.described(pid)}, {processes.described(parent)}, does not look as if it reaped "
            "its children (no handler for SIGCHLD, no wait): after a dump the pid would stay taken by a zombie",
            f"if it does, {_STEPS}",
        )


def _reaps(parent: int, tid: int, child: int) -> bool:
    try:
        status = task_status(parent, tid)
    except OSError:
        return False
    if (status.ignored | status.caught | status.blocked) & _SIGCHLD_BIT:
        return True
    waits = blocked_in(parent, tid)
    if waits is None:
        return False
    first, second = waits.arguments[:2]
    match waits.number:
        case number if number == _SYS_WAIT4:
            return first in _ANY or first == child
        case number if number == _SYS_WAITID:
            return first == _P_ALL or (first == _P_PID and second == child)
    return False


def service_of(pid: int, parent: int) -> str:
    """The systemd service that a child of systemd is; empty if it is none.

    Its control group is named for the unit (systemd.resource-control(5), cgroups(7)).
    """
    try:
        if task_status(parent).name != "systemd":
            return ""
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return service_in(lines)


def service_in(lines: list[str]) -> str:
    """The service that the lines of a /proc/PID/cgroup name; empty if none."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        unit = path.rpartition("/")[2]
        if controllers in ("", "name=systemd") and unit.endswith(".service"):
            return unit
    return ""
