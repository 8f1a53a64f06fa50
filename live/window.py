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
from dynacut.live.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.target import PAGE_SIZE

_INT3 = 0xCC
_STOP_TIMEOUT = 0.5
_PAUSE = 0.002


def write_in_window(process: Process, edits: Sequence[ByteEdit], clock: StopClock, deadline: float) -> None:
    """Writes edits while every thread is stopped and none is, or will return, amid one of them.

    Raises:
        DynacutError: until the deadline (of time.monotonic()) there was always one; nothing was written.
    """
    inner = _Inner(edits)
    runs = list(_runs(sorted(edits, key=lambda edit: edit.address)))
    while True:
        # Everything that can be known before is found out before: while the threads are stopped, only what may differ
        # then is looked at, and each run of neighbouring edits is one write.
        process.refresh()
        prepared = [_Prepared.of(process, run) for run in runs]
        started = time.perf_counter_ns()
        with all_stopped(process) as tracees:
            busy = inner.find_thread(process, tracees)
            if busy is None:
                for part in prepared:
                    part.write(process)
        clock.add(time.perf_counter_ns() - started)
        if busy is None:
            return
        if time.monotonic() > deadline:
            raise DynacutError(
                f"{process.label}: {busy}",
                "try again with a longer --timeout, or use --scope entry, which needs only the first byte",
            )
        time.sleep(_PAUSE)


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

    def __init__(self, edits: Sequence[ByteEdit]) -> None:
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

    def find_thread(self, process: Process, tracees: dict[int, Tracee]) -> str | None:
        """Says which thread is amid an edit, or has an address on its stack that is; None if none has."""
        if not self._starts:
            return None
        for tid, tracee in tracees.items():
            rip, stack_pointer = tracee.registers["rip"], tracee.registers["rsp"]
            index = self._index(rip)
            # Right behind the first byte and with a SIGTRAP pending it has hit the int3 there, and is on its way out.
            trapped = index is not None and rip == self._starts[index] and tracee.pending_signals() & SIGTRAP_BIT
            if index is not None and not trapped:
                return f"thread {tid} is at {rip:#x}, amid the bytes to change"
            address = self._on_stack(process, stack_pointer)
            if address is not None:
                return f"thread {tid} may return to {address:#x}, amid the bytes to change"
        return None

    def _index(self, address: int) -> int | None:
        """Which of the places contains an address."""
        index = bisect_right(self._starts, address) - 1
        return index if index >= 0 and address < self._ends[index] else None

    def _on_stack(self, process: Process, stack_pointer: int) -> int | None:
        """An aligned word of the stack that points amid an edit: a return address, or what looks like one.

        The stack pointer itself if it points to no mapping known of: then there is no telling.
        """
        mapping = next((part for part in process.mappings if part.start <= stack_pointer < part.end), None)
        if mapping is None:
            return stack_pointer
        first = stack_pointer & ~7
        stack = process.read(first, mapping.end - first)
        for pattern in self._patterns:
            position = stack.find(pattern)
            while position >= 0:
                if position % 8 == 3:
                    (word,) = struct.unpack_from("<Q", stack, position - 3)
                    if self._index(word) is not None:
                        return int(word)
                position = stack.find(pattern, position + 1)
        return None


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
