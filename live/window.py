"""All threads stopped at once, for changes that no thread may be in the midst of: whole blocks, and plain edits."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dynacut.live.masks import SIGTRAP_BIT
from dynacut.live.proc import thread_ids
from dynacut.live.process import Process, gone
from dynacut.live.remote import StopClock
from dynacut.live.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit

INT3 = 0xCC
_STOP_TIMEOUT = 0.5
_PAUSE = 0.002


def write_in_window(process: Process, edits: Sequence[ByteEdit], clock: StopClock, deadline: float) -> None:
    """Writes edits while every thread is stopped and none is, or will return, amid one of them.

    Raises:
        DynacutError: until the deadline (of time.monotonic()) there was always one; nothing was written.
    """
    edits = sorted(edits, key=lambda edit: edit.address)
    while True:
        process.refresh()
        started = time.perf_counter_ns()
        with all_stopped(process) as tracees:
            busy = _busy(process, tracees, edits)
            if busy is None:
                _write_pages(process, edits)
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


def _busy(process: Process, tracees: dict[int, Tracee], edits: Sequence[ByteEdit]) -> str | None:
    """Which thread is amid an edit, or has an address on its stack that is; None if none has."""
    # Where int3 bytes go away nobody is inside: who has hit one is in the handler, and goes on at the old bytes.
    inner = [
        (edit.address + 1, edit.end)
        for edit in edits
        if len(edit.old) > 1 and not (edit.old[0] == INT3 and edit.new[0] != INT3)
    ]
    if not inner:
        return None
    for tid, tracee in tracees.items():
        rip, stack_pointer = tracee.registers["rip"], tracee.registers["rsp"]
        for start, end in inner:
            # Just behind the first byte with a SIGTRAP pending: it has hit the int3 there and is on its way out.
            trapped = rip == start and tracee.pending_signals() & SIGTRAP_BIT
            if start <= rip < end and not trapped:
                return f"thread {tid} is at {rip:#x}, amid the bytes to change at {start - 1:#x}"
        address = _stack_reference(process, stack_pointer, inner)
        if address is not None:
            return f"thread {tid} may return to {address:#x}, amid bytes to change"
    return None


def _stack_reference(process: Process, stack_pointer: int, ranges: Sequence[tuple[int, int]]) -> int | None:
    """An aligned word of the stack that points into one of the ranges: a return address, or what looks like one.

    The stack pointer itself if it points to no mapping known of: then there is no telling.

    Memory is searched for the upper six bytes of each address, which runs at the speed of memchr.
    """
    mapping = next((part for part in process.mappings if part.start <= stack_pointer < part.end), None)
    if mapping is None:
        return stack_pointer
    first = stack_pointer & ~7
    stack = process.read(first, mapping.end - first)
    prefixes = {address >> 16 for start, end in ranges for address in (start, end - 1)}
    for prefix in prefixes:
        pattern = struct.pack("<Q", prefix)[:6]
        position = stack.find(pattern)
        while position >= 0:
            if position % 8 == 2:
                (word,) = struct.unpack_from("<Q", stack, position - 2)
                if any(start <= word < end for start, end in ranges):
                    return int(word)
            position = stack.find(pattern, position + 1)
    return None


def _write_pages(process: Process, edits: Sequence[ByteEdit]) -> None:
    """One write for each run of neighbouring edits: the number of writes is what the window costs."""
    for run in _runs(edits):
        start, end = run[0].address, run[-1].end
        data = bytearray(process.read(start, end - start))
        for edit in run:
            data[edit.address - start : edit.end - start] = edit.new
        process.write(start, bytes(data))


def _runs(edits: Sequence[ByteEdit]) -> Iterator[list[ByteEdit]]:
    run: list[ByteEdit] = []
    for edit in edits:
        if run and edit.address - run[-1].end > 4096:
            yield run
            run = []
        run.append(edit)
    if run:
        yield run
