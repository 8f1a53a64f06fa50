"""All threads stopped at once, for changes that no thread may be in the midst of: whole blocks, and plain edits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice

from dynacut.handlers.records import INT3
from dynacut.live.process import Process, runs_another_program
from dynacut.live.ptrace.resumption import never_runs
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.errors import DynacutError
from dynacut.shared.occupancy import Occupancy
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.proc import thread_ids
from dynacut.shared.rollback import standing_edits
from dynacut.shared.running import gone
from dynacut.shared.signal_frames import SignalFrames
from dynacut.shared.target import PAGE_SIZE, SIGTRAP_BIT

_STOP_TIMEOUT = 0.5
_ALL_STOPPED_TIMEOUT = 2.0
_PAUSE = 0.002
_OPEN_ATTEMPTS = 25
_CLOSED_SECONDS = 5.0
"""In which threads that were amid the edits leave them, also where many have to share a busy processor."""


def write_in_window(
    process: Process, edits: Sequence[ByteEdit], clock: StopClock, deadline: float, frames: SignalFrames
) -> None:
    """Writes edits while every thread is stopped and none is, or will return, amid one of them.

    Where threads that run keep coming back amid the edits, their first bytes become int3 beforehand, so that nobody new
    enters; where a thread waits there in a system call, that would not help, and nothing is written.

    Raises:
        DynacutError: until the deadline (of time.monotonic()) there was always one, or memory was unmapped meanwhile;
        what was written is taken back, as far as it can be.
    """
    occupancy = Occupancy(edits, frames)
    runs = list(_runs(sorted(edits, key=lambda edit: edit.address)))
    heads = [(edit.address, edit.old[:1]) for edit in edits if edit.new[:1] == INT3 and edit.old[:1] != INT3]
    attempts = 0
    closed = False
    try:
        while (busy := _attempt(process, occupancy, runs, clock)) is not None:
            attempts += 1
            if time.monotonic() > deadline:
                raise DynacutError(
                    f"{process.label}: {busy.what}",
                    "try a longer --timeout or --scope entry, or leave out what --standing lists (dynacut plan --keep)",
                )
            if not closed and not busy.waits and attempts >= _OPEN_ATTEMPTS:
                closed = True
                deadline = min(deadline, time.monotonic() + _CLOSED_SECONDS)
                for address, _ in heads:
                    process.write(address, INT3)
            time.sleep(_PAUSE)
        closed = False
    finally:
        if closed:
            for address, old in heads:
                with suppress(DynacutError):  # one that was unmapped meanwhile is no reason to leave the others
                    process.write(address, old)


def _attempt(
    process: Process, occupancy: Occupancy, runs: Sequence[Sequence[ByteEdit]], clock: StopClock
) -> _Busy | None:
    """One window; says who is in the way, or has written."""
    # Everything that can be known before is found out before: while the threads are stopped, only what may differ then
    # is looked at, and each run of neighbouring edits is one write.
    process.refresh()
    prepared = [_Prepared.of(process, run) for run in runs]
    edits = [edit for run in runs for edit in run]
    started = time.perf_counter_ns()
    with urgent(), all_stopped(process) as tracees:
        _check_memory(process, tracees, prepared[0].address & ~7)
        busy = _find_thread(process, occupancy, tracees)
        if busy is None:
            try:
                for part in prepared:
                    part.write(process)
            except DynacutError:  # memory was unmapped meanwhile
                for edit in standing_edits(process, edits):
                    with suppress(DynacutError):
                        process.write(edit.address, edit.new)
                raise
    clock.add(time.perf_counter_ns() - started)
    return busy


def _check_memory(process: Process, tracees: dict[int, Tracee], address: int) -> None:
    """Refuses to write to memory that is not the threads' any more: they have called execve(2) since it was opened."""
    word = process.read(address, 8)
    if not all(tracee.has(address, word) for tracee in islice(tracees.values(), 1)):
        raise runs_another_program(process)


@contextmanager
def all_stopped(process: Process) -> Iterator[dict[int, Tracee]]:
    """Stops every thread, those included that are made meanwhile; lets them go at the end.

    Raises:
        DynacutError: a thread cannot be stopped or traced; all are let go.
    """
    held: dict[int, Tracee] = {}
    ended: set[int] = set()
    """Those listed all the same: a main thread that has ended is a zombie until the others have."""
    give_up = time.monotonic() + _ALL_STOPPED_TIMEOUT
    with ExitStack() as stack:
        while True:
            try:
                new = [tid for tid in thread_ids(process.pid) if tid not in held and tid not in ended]
            except (FileNotFoundError, ProcessLookupError):
                raise gone(process.pid) from None
            if not new:
                break
            if time.monotonic() > give_up:
                raise NeedsCheckpointError(f"{process.label} keeps making threads", "try again")
            started: list[Tracee] = []
            for tid in new:
                try:
                    tracee = stack.enter_context(Tracee(tid))
                    tracee.request_interrupt()
                    started.append(tracee)
                except ThreadGoneError:
                    ended.add(tid)
                except NoStopError:
                    raise _does_not_stop(process, tid) from None
            deadline = time.perf_counter_ns() + int(_STOP_TIMEOUT * 1e9)
            for tracee in started:
                try:
                    tracee.await_stop(deadline)
                    held[tracee.tid] = tracee
                except ThreadGoneError:
                    ended.add(tracee.tid)
                except NoStopError:
                    raise _does_not_stop(process, tracee.tid) from None
        yield held


def _does_not_stop(process: Process, tid: int) -> DynacutError:
    return NeedsCheckpointError(
        f"thread {tid} of {process.label} does not stop: it sleeps uninterruptibly", "try again"
    )


def _find_thread(process: Process, occupancy: Occupancy, tracees: dict[int, Tracee]) -> _Busy | None:
    """Says which thread is amid an edit, or has an address on its stack that is; None if none has.

    Of several, one that waits in a system call: it decides whether it helps to keep others out.
    """
    if occupancy.is_free:
        return None
    runs = None
    for tid, tracee in tracees.items():
        if never_runs(tracee.registers):
            continue
        rip = tracee.registers["rip"]
        # Right behind the first byte and with a SIGTRAP pending it has hit the int3, and is on its way out.
        trapped = occupancy.is_behind_first(rip) and tracee.pending_signals() & SIGTRAP_BIT
        if occupancy.contains(rip) and not trapped:
            runs = _Busy(f"thread {tid} is at {rip:#x}, amid the bytes to change", waits=False)
            continue
        address = occupancy.on_stacks(process, tracee.registers["rsp"])
        if address is not None:
            busy = _Busy(f"thread {tid} may return to {address:#x}, amid the bytes to change", tracee.in_syscall)
            if busy.waits:
                return busy
            runs = busy
    return runs


@dataclass(frozen=True)
class _Busy:
    """A thread that is in the way."""

    what: str
    waits: bool
    """Whether it was in a system call: it may stay there for long."""


@dataclass(frozen=True)
class _Prepared:
    """One write: a run of neighbouring edits, with the bytes between them as they were a moment before the stop."""

    address: int
    before: bytes
    after: bytes
    edits: Sequence[ByteEdit]

    @classmethod
    def of(cls, process: Process, run: Sequence[ByteEdit]) -> _Prepared:
        address, size = run[0].address, run[-1].end - run[0].address
        before = process.read(address, size)
        # The first write to a page copies it, which takes time: let it be done before.
        for page in range(address, address + size, PAGE_SIZE):
            process.write(page, before[page - address : page - address + 1])
        return cls(address, before, _with_edits(address, before, run), run)

    def write(self, process: Process) -> None:
        """Writes; bytes in between that have changed since, a block learned for example, stay as they are now."""
        now = process.read(self.address, len(self.before))
        after = self.after if now == self.before else _with_edits(self.address, now, self.edits)
        process.write(self.address, after)


def _with_edits(address: int, data: bytes, edits: Sequence[ByteEdit]) -> bytes:
    changed = bytearray(data)
    for edit in edits:
        changed[edit.address - address : edit.end - address] = edit.new
    return bytes(changed)


def _runs(edits: Sequence[ByteEdit]) -> Iterator[list[ByteEdit]]:
    run: list[ByteEdit] = []
    for edit in edits:
        if run and edit.address - run[-1].end > PAGE_SIZE:
            yield run
            run = []
        run.append(edit)
    if run:
        yield run
