"""Signal masks that would turn an int3 into a sudden death: cleared of SIGTRAP, recorded, and put back.

The kernel ends a process whose thread runs into an int3 while it blocks SIGTRAP (force_sig_info_to_task in
kernel/signal.c). Three things block it: a thread's mask, the sa_mask of a handler while that runs, and the temporary
mask of ppoll and its like, which lasts only as long as the thread sleeps and so needs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynacut.handlers.table import KernelAction, Repair, RepairKind, Table
from dynacut.live.proc import start_time, task_status, thread_ids
from dynacut.live.process import Process, gone
from dynacut.live.region import Region, write_all
from dynacut.live.remote import Remote, StopClock
from dynacut.live.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import SIGTRAP

SIGTRAP_BIT = 1 << (SIGTRAP - 1)
_PASSING = 0.03
"""Seconds after which a mask that blocks SIGTRAP is taken to be meant: glibc blocks all signals while it makes a
thread, and a signal handler's mask goes when it returns."""
_STOP_TIMEOUT = 0.5


def blocking_threads(pid: int) -> list[int]:
    """The threads that block SIGTRAP at this instant.

    Raises:
        DynacutError: the process is gone.
    """
    found = []
    try:
        tids = thread_ids(pid)
    except OSError:
        raise gone(pid) from None
    for tid in tids:
        try:
            if task_status(pid, tid).blocked & SIGTRAP_BIT:
                found.append(tid)
        except OSError:
            continue
    return found


def unblock_threads(process: Process, region: Region, table: Table, clock: StopClock) -> list[Repair]:
    """Makes every thread accept SIGTRAP; returns all repairs now on record.

    Each repair is recorded before it is made: a patcher that is killed in between leaves a record too many, never one
    too few.

    Raises:
        DynacutError: a thread cannot be stopped.
    """
    repairs = list(table.repairs)
    seen = blocking_threads(process.pid)
    until = time.monotonic() + _PASSING
    while seen and time.monotonic() < until:
        time.sleep(0.002)
        seen = [tid for tid in blocking_threads(process.pid) if tid in seen]
    for tid in seen:
        try:
            repair = Repair(RepairKind.THREAD_MASK, tid, start_time(process.pid, tid))
            with Tracee(tid) as tracee:
                tracee.interrupt(_STOP_TIMEOUT)
                mask = tracee.blocked_signals()
                if mask & SIGTRAP_BIT:
                    if repair not in repairs:
                        repairs.append(repair)
                        write_all(process, region, table.repair_writes(repairs))
                    tracee.set_blocked_signals(mask & ~SIGTRAP_BIT)
            clock.add(tracee.stopped_ns)
        except (ThreadGoneError, FileNotFoundError, ProcessLookupError):
            continue
        except NoStopError:
            raise DynacutError(
                f"thread {tid} of {process.label} blocks SIGTRAP and could not be stopped to change that",
                "nothing was disabled; use `dynacut offline` on a checkpoint of it",
            ) from None
    return repairs


def block_threads_again(process: Process, repairs: Sequence[Repair], clock: StopClock) -> None:
    """Puts the masks of threads back as they were. Threads that ended meanwhile are passed over."""
    for repair in repairs:
        if repair.kind is not RepairKind.THREAD_MASK:
            continue
        try:
            if start_time(process.pid, repair.id) != repair.start_time:
                continue
            with Tracee(repair.id) as tracee:
                tracee.interrupt(_STOP_TIMEOUT)
                tracee.set_blocked_signals(tracee.blocked_signals() | SIGTRAP_BIT)
            clock.add(tracee.stopped_ns)
        except (ThreadGoneError, FileNotFoundError, ProcessLookupError):
            continue
        except NoStopError:
            raise DynacutError(
                f"thread {repair.id} of {process.label} could not be stopped to put its signal mask back",
                "run --undo again",
            ) from None


def caught_signals(pid: int) -> list[int]:
    """The signals that the process handles itself, SIGTRAP apart."""
    caught = task_status(pid).caught
    return [number for number in range(1, 65) if caught >> (number - 1) & 1 and number != SIGTRAP]


def unmask_handlers(
    process: Process, region: Region, table: Table, remote: Remote, actions: dict[int, KernelAction]
) -> list[Repair]:
    """Clears SIGTRAP from the sa_mask of the process's own handlers; returns all repairs now on record.

    actions: what is in force for caught_signals(). Should the process set an action of its own meanwhile, that
    one is taken instead, and repaired in turn.
    """
    repairs = list(table.repairs)
    while masked := {number: action for number, action in actions.items() if action.mask & SIGTRAP_BIT}:
        for number in masked:
            repair = Repair(RepairKind.SIGNAL_MASK, number, 0)
            if repair not in repairs:
                repairs.append(repair)
        write_all(process, region, table.repair_writes(repairs))
        replaced = remote.sigactions(
            region,
            {number: replace(action, mask=action.mask & ~SIGTRAP_BIT) for number, action in masked.items()},
        )
        actions = {number: action for number, action in replaced.items() if action != masked[number]}
        if actions:
            remote.sigactions(region, actions)
    return repairs


def masked_signals(table: Table) -> list[int]:
    """The signals whose sa_mask was cleared of SIGTRAP."""
    return [repair.id for repair in table.repairs if repair.kind is RepairKind.SIGNAL_MASK]


def masked_again(actions: Mapping[int, KernelAction]) -> dict[int, KernelAction]:
    """The actions to set so that these handlers block SIGTRAP again; a handler that is gone is left alone."""
    return {
        number: replace(action, mask=action.mask | SIGTRAP_BIT)
        for number, action in actions.items()
        if action.handler > 1 and not action.mask & SIGTRAP_BIT
    }
