"""All threads stopped at once, for changes that no thread may be in the midst of: whole blocks, and plain edits."""

from __future__ import annotations

import struct
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from dynacut.live.masks import SIGTRAP_BIT
from dynacut.live.proc import thread_ids
from dynacut.live.process import Process, gone
from dynacut.live.remote import StopClock
from dynacut.live.tracee import NoStopError, ThreadGoneError, Tracee, urgent
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.target import PAGE_SIZE

_INT3 = 0xCC
_STOP_TIMEOUT = 0.5
_PAUSE = 0.002
_OPEN_ATTEMPTS = 25
_CLOSED_SECONDS = 1.0
# struct rt_sigframe (arch/x86/include/asm/sigframe.h): the trampoline's address, then the ucontext, whose registers
# begin at byte 40; rsp is the 16th of them, rip the 17th.
_FRAME_RSP = 8 + 40 + 15 * 8
_FRAME_RIP = _FRAME_RSP + 8


@dataclass(frozen=True)
class SignalFrames:
    """How signal frames are recognised on a stack: by the trampoline that their handler returns by."""

    restorers: frozenset[int]
    """Of the program's own handlers."""
    own: int
    """Of dynacut's handler. A thread in there has hit an int3; it goes on elsewhere than its frame says."""


NO_FRAMES = SignalFrames(frozenset(), 0)


def write_in_window(
    process: Process, edits: Sequence[ByteEdit], clock: StopClock, deadline: float, frames: SignalFrames
) -> None:
    """Writes edits while every thread is stopped and none is, or will return, amid one of them.

    Where threads that run keep coming back amid the edits, their first bytes become int3 beforehand, so that nobody new
    enters; where a thread waits there in a system call, that would not help, and nothing is written.

    Raises:
        DynacutError: until the deadline (of time.monotonic()) there was always one; nothing is left written.
    """
    inner = _Inner(edits, frames)
    runs = list(_runs(sorted(edits, key=lambda edit: edit.address)))
    heads = [(edit.address, edit.old[:1]) for edit in edits if edit.new[0] == _INT3 and edit.old[0] != _INT3]
    attempts = 0
    closed = False
    try:
        while (busy := _attempt(process, inner, runs, clock)) is not None:
            attempts += 1
            if time.monotonic() > deadline:
                raise DynacutError(
                    f"{process.label}: {busy.what}",
                    "try again with a longer --timeout, or use --scope entry, which needs only the first byte",
                )
            if not closed and not busy.waits and attempts >= _OPEN_ATTEMPTS:
                closed = True
                deadline = min(deadline, time.monotonic() + _CLOSED_SECONDS)
                for address, _ in heads:
                    process.write(address, bytes([_INT3]))
            time.sleep(_PAUSE)
        closed = False
    finally:
        if closed:
            for address, old in heads:
                process.write(address, old)


def _attempt(process: Process, inner: _Inner, runs: Sequence[Sequence[ByteEdit]], clock: StopClock) -> _Busy | None:
    """One window; says who is in the way, or has written."""
    # Everything that can be known before is found out before: while the threads are stopped, only what may differ then
    # is looked at, and each run of neighbouring edits is one write.
    process.refresh()
    prepared = [_Prepared.of(process, run) for run in runs]
    started = time.perf_counter_ns()
    with urgent(), all_stopped(process) as tracees:
        busy = inner.find_thread(process, tracees)
        if busy is None:
            for part in prepared:
                part.write(process)
    clock.add(time.perf_counter_ns() - started)
    return busy


@contextmanager
def all_stopped(process: Process) -> Iterator[dict[int, Tracee]]:
    """Stops every thread, those included that are made meanwhile; lets them go at the end.

    Raises:
        DynacutError: a thread cannot be stopped or traced; all are let go.
    """
    held: dict[int, Tracee] = {}
    with ExitStack() as stack:
        while True:
            try:
                new = [tid for tid in thread_ids(process.pid) if tid not in held]
            except OSError:
                raise gone(process.pid) from None
            if not new:
                break
            started: list[Tracee] = []
            for tid in new:
                try:
                    tracee = stack.enter_context(Tracee(tid))
                    tracee.request_interrupt()
                    started.append(tracee)
                except ThreadGoneError:
                    continue
            deadline = time.perf_counter_ns() + int(_STOP_TIMEOUT * 1e9)
            for tracee in started:
                try:
                    tracee.await_stop(deadline)
                    held[tracee.tid] = tracee
                except ThreadGoneError:
                    continue
                except NoStopError:
                    raise DynacutError(
                        f"thread {tracee.tid} of {process.label} does not stop: it sleeps uninterruptibly",
                        "try again, or use `dynacut offline` on a checkpoint of it",
                    ) from None
        yield held


class _Inner:
    """The places that no thread may be at, or return to: behind the first byte of each edit."""

    def __init__(self, edits: Sequence[ByteEdit], frames: SignalFrames) -> None:
        self._frames = frames
        # Where int3 bytes go away nobody is inside: who has hit one is in the handler, and goes on at the old bytes.
        ranges = sorted(
            (edit.address + 1, edit.end)
            for edit in edits
            if len(edit.old) > 1 and not (edit.old[0] == _INT3 and edit.new[0] != _INT3)
        )
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        # Memory is searched for the upper five bytes of the addresses at the speed of memchr; few patterns suffice.
        self._patterns = {struct.pack("<Q", address >> 24)[:5] for start, end in ranges for address in (start, end - 1)}

    def find_thread(self, process: Process, tracees: dict[int, Tracee]) -> _Busy | None:
        """Says which thread is amid an edit, or has an address on its stack that is; None if none has."""
        if not self._starts:
            return None
        for tid, tracee in tracees.items():
            rip = tracee.registers["rip"]
            index = self._index(rip)
            # Right behind the first byte and with a SIGTRAP pending it has hit the int3 there, and is on its way out.
            trapped = index is not None and rip == self._starts[index] and tracee.pending_signals() & SIGTRAP_BIT
            if index is not None and not trapped:
                return _Busy(f"thread {tid} is at {rip:#x}, amid the bytes to change", waits=False)
            address = self._on_stacks(process, tracee.registers["rsp"])
            if address is not None:
                return _Busy(f"thread {tid} may return to {address:#x}, amid the bytes to change", tracee.in_syscall)
        return None

    def _index(self, address: int) -> int | None:
        """Which of the places contains an address."""
        index = bisect_right(self._starts, address) - 1
        return index if index >= 0 and address < self._ends[index] else None

    def _on_stacks(self, process: Process, stack_pointer: int) -> int | None:
        """An aligned word of the thread's stacks that points amid an edit: a return address, or what looks like one.

        Stacks: the present one, and those that a signal handler on an alternate stack has interrupted. The stack
        pointer itself if it points to no mapping known of: then there is no telling.
        """
        scanned: set[int] = set()
        pending = [stack_pointer]
        while pending:
            pointer = pending.pop()
            mapping = next((part for part in process.mappings if part.start <= pointer < part.end), None)
            if mapping is None:
                if not scanned:
                    return pointer
                continue
            if mapping.start in scanned:
                continue
            scanned.add(mapping.start)
            first = pointer & ~7
            stack = process.read(first, mapping.end - first)
            passing: set[int] = set()
            for restorer in (*self._frames.restorers, self._frames.own):
                for position in _aligned(stack, struct.pack("<Q", restorer), 0):
                    if position + _FRAME_RIP + 8 > len(stack):
                        continue
                    pending.append(struct.unpack_from("<Q", stack, position + _FRAME_RSP)[0])
                    if restorer == self._frames.own:
                        passing.add(position + _FRAME_RIP)
            for pattern in self._patterns:
                for position in _aligned(stack, pattern, 3):
                    (word,) = struct.unpack_from("<Q", stack, position)
                    if self._index(word) is not None and position not in passing:
                        return int(word)
        return None


@dataclass(frozen=True)
class _Busy:
    """A thread that is in the way."""

    what: str
    waits: bool
    """Whether it was in a system call: it may stay there for long."""


def _aligned(stack: bytes, pattern: bytes, shift: int) -> Iterator[int]:
    """The positions of aligned words of which a pattern is the part from byte `shift` on."""
    position = stack.find(pattern)
    while position >= 0:
        if position % 8 == shift:
            yield position - shift
        position = stack.find(pattern, position + 1)


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
