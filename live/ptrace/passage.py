"""Seeing each thread once outside of dynacut's own code: whoever was in it, or on the way to it, has left it then."""

from __future__ import annotations

import time

from dynacut.live.process import Process
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stops import each_stopped
from dynacut.shared.proc import BlockedIn, blocked_in, task_status, thread_ids
from dynacut.shared.region import Region
from dynacut.shared.running import gone
from dynacut.shared.target import SIGTRAP_BIT

_LOOK_PAUSE = 0.001
_FORKS = frozenset({56, 57, 58, 435})
"""clone, fork, vfork, clone3"""


def all_seen_outside(
    process: Process, region: Region, clock: StopClock, deadline: float, *, forks: bool = False
) -> bool:
    """Waits until each thread has been seen outside of the handler and the stubs, with no SIGTRAP pending.

    A thread that has run into an int3 gets its SIGTRAP before it returns from the kernel, and is seen with it pending.
    So after the int3 bytes have gone, none is on its way into the handler any more; and after a stub has run to its
    end, and nobody is sent to it again, none is in it. deadline: of time.monotonic(); False if it has passed before.

    forks: also waits for forks that are under way. One copies the signal actions first and the memory later, and may
    wait in between, uninterruptibly, for a lock of the memory (copy_process in kernel/fork.c).

    Raises:
        DynacutError: the process is gone.
    """
    pid = process.pid
    clean: set[int] = set()
    while True:
        try:
            unseen = [tid for tid in thread_ids(pid) if tid not in clean]
        except OSError:
            raise gone(pid) from None
        if not unseen:
            return True
        waits = {tid: blocked_in(pid, tid) for tid in unseen}
        forking = {tid for tid, call in waits.items() if forks and call is not None and call.number in _FORKS}
        waiting = {tid for tid in unseen if tid not in forking and _waits_outside(pid, tid, waits[tid], region, forks)}
        clean |= waiting
        left = max(0.0, deadline - time.monotonic())
        for tracee in each_stopped([tid for tid in unseen if tid not in waiting | forking], left, clock):
            inside = region.contains_code(tracee.registers["rip"])
            if not inside and not tracee.pending_signals() & SIGTRAP_BIT:
                clean.add(tracee.tid)
        if any(tid not in clean for tid in unseen):
            time.sleep(_LOOK_PAUSE)  # or a thread in the handler would be stopped again before it gets on
        if time.monotonic() > deadline:
            return False


def _waits_outside(pid: int, tid: int, waits: BlockedIn | None, region: Region, forks: bool) -> bool:
    """Whether a thread sleeps in a system call of the program's own. waits: in which, as was seen just now."""
    try:
        status = task_status(pid, tid)
    except OSError:
        return True  # it ended
    if status.state == "D" and forks and waits is None:
        return False  # it may have begun to fork
    if status.state in "DZX":
        return True  # uninterruptible, as a vfork parent: in a system call, not in an exception
    return waits is not None and not region.contains_code(waits.rip) and not status.thread_pending & SIGTRAP_BIT
