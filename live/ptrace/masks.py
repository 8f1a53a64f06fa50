"""Signal masks that would turn an int3 into a sudden death: cleared of SIGTRAP, recorded, and put back.

The kernel ends a process whose thread runs into an int3 while it blocks SIGTRAP (force_sig_info_to_task in
kernel/signal.c). Four things block it: a thread's mask, the sa_mask of a handler while that runs, the mask that the
thread gets back when it returns from the handler, and the temporary mask of ppoll and its like. The last one lasts only
as long as the thread sleeps and needs nothing itself, but /proc shows it instead of the thread's own;
PTRACE_GETSIGMASK gives that.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from dynacut.handlers.table import REPAIR_CAPACITY, KernelAction, Repair, RepairKind, Table
from dynacut.live.process import Process, gone
from dynacut.live.ptrace.shots import Remote
from dynacut.live.ptrace.slots import write_all
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.apply import SIGTRAP_BIT
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.proc import blocked_in, is_kernels_own, ran_ns, start_time, task_status, thread_ids
from dynacut.shared.region import Region
from dynacut.shared.signal_frames import saved_masks
from dynacut.shared.target import SIGTRAP

_PASSING = 0.03
"""Seconds after which a mask that blocks SIGTRAP is taken to be meant: glibc blocks all signals while it makes a
thread, and a signal handler's mask goes when it returns."""
_STARVING = 1.0
"""Seconds that such a thread, ready to run, is waited for at most."""
_MASK = struct.Struct("<Q")
_LOOK_PAUSE = 0.002
_QUIET_LOOKS = 3
_STOP_TIMEOUT = 0.5
# rt_sigtimedwait, rt_sigsuspend, pselect6, ppoll, epoll_pwait, io_pgetevents, epoll_pwait2
WITH_TEMPORARY_MASK = frozenset({128, 130, 270, 271, 281, 333, 441})


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
            if task_status(pid, tid).blocked & SIGTRAP_BIT and not is_kernels_own(pid, tid):
                found.append(tid)
        except OSError:
            continue
    return found


def unblock_threads(
    process: Process, region: Region, table: Table, restorers: Collection[int], clock: StopClock, deadline: float
) -> list[Repair]:
    """Makes every thread accept SIGTRAP, also when it returns from a signal handler; returns all repairs now on record.

    restorers: the trampolines by which the program's handlers return.

    Each repair is recorded before it is made: a patcher that is killed in between leaves a record too many, never one
    too few. Threads are looked at again until nothing more is found: one that was amid pthread_create puts back the
    mask it had before, and the new thread inherits it.

    Raises:
        DynacutError: a thread cannot be stopped, the threads never come to rest, or they are too many.
    """
    repairs = [
        each for each in table.repairs if each.kind is not RepairKind.THREAD_MASK or _is_the_same(process.pid, each)
    ]
    known = len(repairs)
    quiet = 0
    looked_at: set[int] = set()
    while quiet < _QUIET_LOOKS:
        made = 0
        suspects = _suspects(process.pid, looked_at)
        recorded = {repair.id for repair in repairs if repair.kind is RepairKind.THREAD_MASK}
        if len(repairs) + len(set(suspects) - recorded) > REPAIR_CAPACITY:
            raise DynacutError(
                f"{len(suspects)} threads of {process.label} block SIGTRAP, more than can be recorded",
                "nothing was disabled; let the program block SIGTRAP in fewer threads",
            )
        if suspects:
            process.refresh()  # the stacks
        for tid in suspects:
            try:
                with urgent(), Tracee(tid) as tracee:
                    tracee.interrupt(_STOP_TIMEOUT)
                    mask = tracee.blocked_signals()
                    saved = [
                        each
                        for each in saved_masks(process, tracee.registers["rsp"], restorers)
                        if each.mask & SIGTRAP_BIT and each.mask == each.original
                    ]
                    if mask & SIGTRAP_BIT or saved:
                        made += 1
                        started = start_time(process.pid, tid)
                        for blocked in (mask, *(each.mask for each in saved)):
                            repair = Repair(RepairKind.THREAD_MASK, tid, started, blocked)
                            if blocked & SIGTRAP_BIT and repair not in repairs:
                                repairs.append(repair)
                                write_all(process, region, table.repair_writes(repairs))
                        for each in saved:
                            process.write(each.address, _MASK.pack(each.mask & ~SIGTRAP_BIT))
                        tracee.set_blocked_signals(mask & ~SIGTRAP_BIT)
                clock.add(tracee.stopped_ns)
            except (ThreadGoneError, FileNotFoundError, ProcessLookupError):
                continue
            except NoStopError:
                raise NeedsCheckpointError(
                    f"thread {tid} of {process.label} blocks SIGTRAP and could not be stopped to change that",
                    "nothing was disabled; try again",
                ) from None
        if not made and not repairs[known:]:
            break
        quiet = 0 if made else quiet + 1
        if time.monotonic() > deadline:
            raise DynacutError(
                f"threads of {process.label} keep blocking SIGTRAP", "nothing was disabled; try again later"
            )
        time.sleep(_LOOK_PAUSE)
    return repairs


def _suspects(pid: int, looked_at: set[int]) -> list[int]:
    """Threads that may block SIGTRAP for long: seen to for a while; or asleep with a temporary mask, which hides it.

    looked_at: threads of the second kind that were told of already; each is told of once.
    """
    seen = lasting_blockers(pid)
    for tid in thread_ids(pid):
        waits = blocked_in(pid, tid)
        if waits is not None and waits.number in WITH_TEMPORARY_MASK and tid not in looked_at:
            looked_at.add(tid)
            seen.append(tid)
    return seen


def lasting_blockers(pid: int) -> list[int]:
    """The threads that block SIGTRAP, not only for the moment.

    The moment is one of the thread's own: on a busy machine it may get no processor for longer.
    """
    seen = {tid: ran_ns(pid, tid) for tid in blocking_threads(pid)}
    started = time.monotonic()
    while seen and (
        (passed := time.monotonic() - started) < _PASSING
        or (passed < _STARVING and any(_has_hardly_run(pid, tid, before) for tid, before in seen.items()))
    ):
        time.sleep(_LOOK_PAUSE)
        now = blocking_threads(pid)
        seen = {tid: before for tid, before in seen.items() if tid in now}
    return list(seen)


def _has_hardly_run(pid: int, tid: int, before: int) -> bool:
    try:
        return task_status(pid, tid).state in "RD" and ran_ns(pid, tid) - before < _PASSING * 1e9 / 10
    except OSError:
        return False


def block_threads_again(
    process: Process, repairs: Sequence[Repair], restorers: Collection[int], clock: StopClock
) -> None:
    """Puts the masks of threads back as they were, those too that wait in the frames of signal handlers.

    Threads that ended meanwhile are passed over, and so are those that keep another mask by now: theirs was a signal
    handler's, or pthread_create's. A thread that is amid such a one at this moment is looked at again.

    Raises:
        DynacutError: a thread cannot be stopped.
    """
    before: dict[int, set[int]] = {}
    for repair in repairs:
        if repair.kind is RepairKind.THREAD_MASK and _is_the_same(process.pid, repair):
            before.setdefault(repair.id, set()).add(repair.mask)
    until = time.monotonic() + _PASSING
    if before:
        process.refresh()  # the stacks
    while before:
        for tid in list(before):
            try:
                with urgent(), Tracee(tid) as tracee:
                    tracee.interrupt(_STOP_TIMEOUT)
                    for each in saved_masks(process, tracee.registers["rsp"], restorers):
                        if each.original in before[tid] and each.original & ~SIGTRAP_BIT == each.mask:
                            process.write(each.address, _MASK.pack(each.original))
                    mask = tracee.blocked_signals()
                    if not mask & SIGTRAP_BIT and mask | SIGTRAP_BIT in before[tid]:
                        tracee.set_blocked_signals(mask | SIGTRAP_BIT)
                        del before[tid]
                clock.add(tracee.stopped_ns)
            except ThreadGoneError:
                before.pop(tid, None)
            except NoStopError:
                raise DynacutError(
                    f"thread {tid} of {process.label} could not be stopped to put its signal mask back",
                    "run --undo again",
                    status=ExitStatus.CHECK_FAILED,
                ) from None
        if time.monotonic() > until:
            return
        if before:
            time.sleep(_LOOK_PAUSE)


def _is_the_same(pid: int, repair: Repair) -> bool:
    """Whether the thread that a repair was recorded of is still there.

    A record from before the process started is one that CRIU has restored with it, its threads with the ids they had;
    one made in an image says 0.
    """
    started, of_process = _started(pid, repair.id), _started(pid, pid)
    if started is None or of_process is None:
        return False
    return started == repair.start_time or repair.start_time < of_process


def _started(pid: int, tid: int) -> int | None:
    try:
        return start_time(pid, tid)
    except OSError:
        return None


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
        for number, action in masked.items():
            repair = Repair(RepairKind.SIGNAL_MASK, number, 0, action.mask)
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


def restorers_of(actions: Mapping[int, KernelAction]) -> frozenset[int]:
    """The trampolines by which handlers return."""
    return frozenset(action.restorer for action in actions.values() if action.handler > 1)


def has_thread_masks(table: Table) -> bool:
    """Whether the mask of a thread was cleared of SIGTRAP."""
    return any(repair.kind is RepairKind.THREAD_MASK for repair in table.repairs)


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
