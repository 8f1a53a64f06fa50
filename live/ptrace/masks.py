"""Signal masks that block SIGTRAP (shared/masks.py), cleared while the process runs: one thread is stopped at a time.

The temporary mask of ppoll and its like lasts only as long as the thread sleeps and needs nothing itself, but /proc
shows it instead of the thread's own; PTRACE_GETSIGMASK gives that.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dynacut.handlers.table import REPAIR_CAPACITY, KernelAction, Repair, RepairKind, Table
from dynacut.live.process import Process
from dynacut.live.ptrace.remote import Remote
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.masks import forget_ended, masks_before, record, standing_repairs, too_many_masks, write_further
from dynacut.shared.proc import blocked_in, is_kernels_own, ran_ns, start_time, task_status, thread_ids
from dynacut.shared.region import Region
from dynacut.shared.running import gone
from dynacut.shared.signal_frames import blocking_masks, clear_masks, put_masks_back
from dynacut.shared.target import SIGTRAP, SIGTRAP_BIT

_PASSING = 0.03
"""Seconds after which a mask that blocks SIGTRAP is taken to be meant: glibc blocks all signals while it makes a
thread, and a signal handler's mask goes when it returns."""
_STARVING = 1.0
"""Seconds that such a thread, ready to run, is waited for at most."""
_LOOK_PAUSE = 0.002
_LEAST_LOOKS = 15
"""At a thread that keeps another mask than the one to put back, before it is taken to be meant."""
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
) -> None:
    """Makes every thread accept SIGTRAP, also when it returns from a signal handler.

    restorers: the trampolines by which the program's handlers return.

    Each repair is recorded before it is made: a patcher that is killed in between leaves a record too many, never one
    too few. Threads are looked at again until nothing more is found: one that was amid pthread_create puts back the
    mask it had before, and the new thread inherits it.

    Raises:
        DynacutError: a thread cannot be stopped, the threads never come to rest, or they are too many.
    """
    table = forget_ended(process, region, table, _standing(process.pid, table))
    work = _Unblocking(process, region, table, restorers, clock)
    known = work.table.repairs
    quiet = 0
    while quiet < _QUIET_LOOKS:
        made = work.look()
        if not made and work.table.repairs == known:
            break
        quiet = 0 if made else quiet + 1
        if time.monotonic() > deadline:
            raise DynacutError(
                f"threads of {process.label} keep blocking SIGTRAP", "nothing was disabled; try again later"
            )
        time.sleep(_LOOK_PAUSE)


@dataclass
class _Unblocking:
    """The unblocking of a process's threads. table: with the repairs that are on record."""

    process: Process
    region: Region
    table: Table
    restorers: Collection[int]
    clock: StopClock
    looked_at: set[int] = field(default_factory=set)

    def look(self) -> int:
        """Looks at all threads once, and unblocks those that need it; returns how many did."""
        suspects = _suspects(self.process, self.restorers, self.looked_at)
        recorded = masks_before(self.table.repairs).keys()
        if len(self.table.repairs) + len(suspects - recorded) > REPAIR_CAPACITY:
            raise too_many_masks(self.process, len(suspects))
        if suspects:
            self.process.refresh()  # the stacks
        return sum(self._unblock(tid) for tid in suspects)

    def _unblock(self, tid: int) -> bool:
        """Unblocks a thread; whether that was needed. False if it has ended."""
        new: list[Repair] = []
        try:
            with urgent(), Tracee(tid) as tracee:
                started = start_time(self.process.pid, tid)
                tracee.interrupt(_STOP_TIMEOUT)
                needed = self._unblock_stopped(tracee, started, new)
            self.clock.add(tracee.stopped_ns)
        except (ThreadGoneError, FileNotFoundError, ProcessLookupError):
            return False
        except NoStopError:
            raise NeedsCheckpointError(
                f"thread {tid} of {self.process.label} blocks SIGTRAP and could not be stopped to change that",
                "nothing was disabled; try again",
            ) from None
        finally:
            self.table = replace(self.table, repairs=(*self.table.repairs, *new))
        return needed

    def _unblock_stopped(self, tracee: Tracee, started: int, new: list[Repair]) -> bool:
        """As _unblock(). new: gets the repairs that were put on record."""
        mask = tracee.blocked_signals()
        saved = blocking_masks(self.process, tracee.registers["rsp"], self.restorers)
        if not mask & SIGTRAP_BIT and not saved:
            return False
        for blocked in (mask, *(each.mask for each in saved)):
            repair = Repair(RepairKind.THREAD_MASK, tracee.tid, started, blocked)
            if blocked & SIGTRAP_BIT and repair not in self.table.repairs and repair not in new:
                new.append(repair)
        write_further(self.process, self.region, self.table, new)
        clear_masks(self.process, saved)
        tracee.set_blocked_signals(mask & ~SIGTRAP_BIT)
        return True


def _suspects(process: Process, restorers: Collection[int], looked_at: set[int]) -> set[int]:
    """Threads that may block SIGTRAP for long: seen to for a while; asleep with a temporary mask, which hides it; or
    asleep in a handler that such a mask has let in, as sigsuspend(2) does, so that only the frame tells.

    looked_at: threads of the second kind that were told of already; each is told of once.
    """
    seen = set(lasting_blockers(process.pid))
    for tid in thread_ids(process.pid):
        waits = blocked_in(process.pid, tid)
        if waits is None:
            continue
        if waits.number in WITH_TEMPORARY_MASK:
            if tid not in looked_at:
                looked_at.add(tid)
                seen.add(tid)
        elif tid not in seen:
            with suppress(DynacutError):  # it has ended meanwhile
                if blocking_masks(process, waits.rsp, restorers):
                    seen.add(tid)
    return seen


def lasting_blockers(pid: int) -> list[int]:
    """The threads that block SIGTRAP, not only for the moment.

    The moment is one of the thread's own: on a busy machine it may get no processor for longer.
    """
    seen = {tid: ran_ns(pid, tid) for tid in blocking_threads(pid)}
    started = time.monotonic()
    while _may_pass(pid, seen, started):
        time.sleep(_LOOK_PAUSE)
        now = blocking_threads(pid)
        seen = {tid: before for tid, before in seen.items() if tid in now}
    return list(seen)


def _may_pass(pid: int, ran: Mapping[int, int], since: float) -> bool:
    """Whether the mask of one of these threads may be there for the moment only, as far as can be told yet.

    ran: how long each had run, in ns, when that began to be waited for; since: the time.monotonic() of that.
    """
    passed = time.monotonic() - since
    if passed < _PASSING:
        return bool(ran)
    return passed < _STARVING and any(_has_hardly_run(pid, tid, before) for tid, before in ran.items())


def _has_hardly_run(pid: int, tid: int, before: int) -> bool:
    try:
        return task_status(pid, tid).state in "RD" and ran_ns(pid, tid) - before < _PASSING * 1e9 / 10
    except OSError:
        return False


def block_threads_again(process: Process, table: Table, restorers: Collection[int], clock: StopClock) -> None:
    """Puts the masks of threads back as they were, those too that wait in the frames of signal handlers.

    Threads that ended meanwhile are passed over, and so are those that keep another mask by now: theirs was a signal
    handler's, or pthread_create's. A thread that is amid such a one at this moment is looked at again.

    Raises:
        DynacutError: a thread cannot be stopped.
    """
    before = masks_before(_standing(process.pid, table))
    ran, began, looks = {tid: ran_ns(process.pid, tid) for tid in before}, time.monotonic(), 0
    if before:
        process.refresh()  # the stacks
    while before:
        for tid in list(before):
            try:
                with urgent(), Tracee(tid) as tracee:
                    tracee.interrupt(_STOP_TIMEOUT)
                    put_masks_back(process, tracee.registers["rsp"], restorers, before[tid])
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
        looks += 1
        hurried = looks < _LEAST_LOOKS and time.monotonic() - began < _STARVING  # it is we who have hardly run
        if not before or not (hurried or _may_pass(process.pid, {tid: ran[tid] for tid in before}, began)):
            return
        time.sleep(_LOOK_PAUSE)


def _standing(pid: int, table: Table) -> list[Repair]:
    """The repairs on record that can still be taken back; none of threads where the process is gone."""
    process_started = _started(pid, pid)
    return standing_repairs(table.repairs, lambda tid: _started(pid, tid), process_started or 0)


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
) -> Table:
    """Clears SIGTRAP from the sa_mask of the process's own handlers; returns the table as it is then.

    actions: what is in force for caught_signals(). Should the process set an action of its own meanwhile, that
    one is taken instead, and repaired in turn.

    Raises:
        DynacutError: it cannot be done.
    """
    while masked := {number: action for number, action in actions.items() if action.mask & SIGTRAP_BIT}:
        repairs = (Repair(RepairKind.SIGNAL_MASK, number, 0, action.mask) for number, action in masked.items())
        table = record(process, region, table, repairs)
        replaced = remote.sigactions(
            region,
            {number: replace(action, mask=action.mask & ~SIGTRAP_BIT) for number, action in masked.items()},
        )
        actions = {number: action for number, action in replaced.items() if action != masked[number]}
        if actions:
            remote.sigactions(region, actions)
    return table


def has_thread_masks(table: Table) -> bool:
    """Whether the mask of a thread was cleared of SIGTRAP."""
    return bool(masks_before(table.repairs))
