"""System calls made by a thread of the process itself, in one shot that does not need the patcher any more.

The stub is written to a slot of its own, one thread is stopped, its registers are baked into the stub, its rip is set,
and it is let go. Killed at any instant, the patcher leaves a thread that either never saw the stub or runs it to its
end: the registers are restored by the thread itself.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from dynacut.handlers.table import CODE_SIZE, INPUT_OFFSET, MAGIC, OBSERVED_OFFSET, OUTPUT_OFFSET, KernelAction, Layout
from dynacut.live.process import Process, gone, runs_another_program
from dynacut.live.ptrace.passage import all_seen_outside
from dynacut.live.ptrace.ptrace_call import REGISTER_NAMES
from dynacut.live.ptrace.resumption import starts_anew
from dynacut.live.ptrace.slack import find_slack
from dynacut.live.ptrace.slots import MAX_STUB_SIZE, take_slot
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stub import Stub, restarting_stub, restoring_tail
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.holes import Hole
from dynacut.shared.library.library import LibrarySegment
from dynacut.shared.proc import BlockedIn, blocked_in, is_kernels_own, task_status, thread_ids
from dynacut.shared.region import Region, choose_address
from dynacut.shared.target import SIGTRAP

_SYS_MMAP = 9
_SYS_MUNMAP = 11
_MAX_PATH = 64 * 32  # of the table's scratch, the input of 64 signal actions
_SYS_RT_SIGACTION = 13
_SYS_PRCTL = 157
_SYS_IO_URING_ENTER = 426
PR_SET_PDEATHSIG = 1
_SIGSET_SIZE = 8
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x1, 0x2, 0x20, 0x4000, 0x100000
_ACTION_SIZE = 32
_ACTIONS_PER_SHOT = 16
_SEGMENTS_PER_SHOT = 8
_STOP_TIMEOUT = 0.5
_PASSAGE = 0.0003
"""Seconds in which a thread that is let go usually has run through its stub."""
_CHOOSY = 0.2
"""Seconds in which a thread is looked for that will notice nothing at all."""
_LEAVING = 1.0
"""Seconds in which each thread is seen outside of the stubs, where that is needed."""
_RSEQ_CS_OFFSET = 8
_FAILED_WITH_EINTR = (1 << 64) - errno.EINTR
_MSG_WAITALL = 0x100

# System calls that programs wait in, and that go on unnoticed after a stop: read, poll, select, nanosleep, pause,
# accept, recvfrom, recvmsg, wait4, semop, msgrcv, fcntl, flock; rt_sigtimedwait, rt_sigsuspend, futex, io_getevents,
# restart_syscall, semtimedop, clock_nanosleep, epoll_wait, mq_timedreceive, waitid, pselect6, ppoll, epoll_pwait,
# accept4, epoll_pwait2.
_WAITING = frozenset(
    {0, 7, 23, 34, 35, 43, 45, 47, 61, 65, 70, 72, 73}
    | {128, 130, 202, 208, 219, 220, 230, 232, 243, 247, 270, 271, 281, 288, 441}
)


class Remote:
    """Makes threads of one process call the kernel. deadline is a time.monotonic() by which each call must be done."""

    def __init__(self, process: Process, clock: StopClock, deadline: float) -> None:
        self._process = process
        self._clock = clock
        self.deadline = deadline

    def map_region(self, layout: Layout, magic: bytes = MAGIC, taken: range = range(0)) -> Region:
        """Maps a new region, its table marked by the magic but without contents. taken: addresses it must leave free.

        Raises:
            DynacutError: the process does not get the memory, or no thread can be stopped.
        """
        process = self._process
        region = choose_address(process, layout, taken)
        stub = Stub()
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
        code_protection = _PROT_READ | _PROT_EXEC
        stub.syscall(_SYS_MMAP, region.code, CODE_SIZE, code_protection, flags, -1, 0)
        stub.require(region.code)
        stub.syscall(_SYS_MMAP, region.table, layout.size, _PROT_READ | _PROT_WRITE, flags, -1, 0)
        stub.require(region.table)
        if layout.shared:
            shared, size = region.table + layout.size, layout.total_size - layout.size
            flags = flags & ~_MAP_PRIVATE | _MAP_SHARED
            stub.syscall(_SYS_MMAP, shared, size, _PROT_READ | _PROT_WRITE, flags, -1, 0)
            stub.require(shared)
        stub.store(region.table, int.from_bytes(magic, "little"))
        self._shoot(stub, find_slack(process, stub.size))

        def mapped() -> bool:
            try:
                return process.read(region.table, len(MAGIC)) == magic
            except DynacutError:
                return False

        if not self._wait(mapped):
            raise NeedsCheckpointError(
                f"{process.label} could not map {CODE_SIZE + layout.total_size} bytes for the handler",
                "look at its limits of memory (prlimit --as, cgroup)",
            )
        process.refresh()
        return region

    def map_segments(self, region: Region, segments: Sequence[LibrarySegment]) -> None:
        """Maps memory, such as a library's segments, and fills it.

        Raises:
            DynacutError: the process does not get the memory, or no thread can be stopped.
        """
        process = self._process
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
        for first in range(0, len(segments), _SEGMENTS_PER_SHOT):
            stub = Stub()
            for segment in segments[first : first + _SEGMENTS_PER_SHOT]:
                stub.syscall(_SYS_MMAP, segment.address, segment.size, segment.protection, flags, -1, 0)
                stub.require(segment.address)
            if not self._run(stub, region):
                raise NeedsCheckpointError(
                    f"{process.label} could not map memory at {segments[0].address:#x}",
                    "look at its limits of memory (prlimit --as, cgroup)",
                )
        if segments:
            process.refresh()
        for segment in segments:
            process.write(segment.address, segment.contents)

    def unmap(self, region: Region, holes: Sequence[Hole]) -> None:
        """Unmaps pages, in which no thread is nor will be any more.

        Raises:
            DynacutError: not all are gone; what stays mapped stays as it is.
        """
        for first in range(0, len(holes), _SEGMENTS_PER_SHOT):
            stub = Stub()
            for hole in holes[first : first + _SEGMENTS_PER_SHOT]:
                stub.syscall(_SYS_MUNMAP, hole.start, hole.end - hole.start)
                stub.require(0)
            if not self._run(stub, region):
                raise DynacutError(
                    f"{self._process.label} could not unmap all of {len(holes)} runs of pages",
                    "all blocks are disabled nevertheless; the limit of mappings (vm.max_map_count) may be reached",
                    status=ExitStatus.CHECK_FAILED,
                )
        if holes:
            self._process.refresh()

    def map_files(self, region: Region, holes: Sequence[Hole]) -> None:
        """Maps unmapped pages of files back, and verifies that they are those of the same file.

        Where another file has taken its name since, as after an upgrade, the pages are copies of what is still mapped.

        Raises:
            DynacutError: they cannot be had; what could be mapped is mapped, nothing of another file.
        """
        for hole in holes:
            if not self._map_by_name(region, hole) and not self._map_copy(region, hole):
                raise DynacutError(
                    f"{self._process.label} could not map {hole.mapping.path} at {hole.start:#x} again",
                    "the file was replaced, or the process may not read it: only a restart brings the pages back",
                    status=ExitStatus.CHECK_FAILED,
                )

    def _map_by_name(self, region: Region, hole: Hole) -> bool:
        """Maps unmapped pages from what has their file's name; whether it is that file. Else nothing is mapped."""
        process = self._process
        path = os.fsencode(hole.mapping.path) + b"\0"
        if path.endswith(b" (deleted)\0") or len(path) > _MAX_PATH:
            return False
        name = region.table + INPUT_OFFSET
        process.write(name, path)
        stub = Stub()
        size, flags = hole.end - hole.start, _MAP_PRIVATE | _MAP_FIXED_NOREPLACE
        stub.map_opened(name, hole.start, size, _PROT_READ | _PROT_EXEC, flags, hole.file_offset)
        done = self._run(stub, region)
        process.write(name, bytes(len(path)))
        process.refresh()
        new = next((part for part in process.mappings if part.start <= hole.start < part.end), None)
        if done and new is not None and new.inode == hole.mapping.inode:
            return True
        if done and new is not None:
            self.unmap(region, [hole])
        return False

    def _map_copy(self, region: Region, hole: Hole) -> bool:
        """Maps a copy of unmapped pages, from their file as its other pages still hold it; whether it can be read."""
        modules = self._process.modules
        for module in modules:
            part = next((part for part in module.mappings if part.inode == hole.mapping.inode), None)
            if part is None or not module.base <= hole.start < module.end:
                continue
            try:
                data = ElfFile.open(module.file).data
            except DynacutError:
                return False
            contents = bytes(data[hole.file_offset : hole.file_offset + hole.end - hole.start])
            protection = _PROT_READ | _PROT_EXEC
            self.map_segments(region, [LibrarySegment(hole.start, hole.end - hole.start, protection, contents)])
            return True
        return False

    def keep_alive(self, region: Region | None) -> None:
        """Lets the process, of one thread, outlive its parent, whose end would have ended it. region: None if none is
        mapped yet.

        Raises:
            DynacutError: the thread cannot be stopped.
        """
        stub = Stub()
        stub.syscall(_SYS_PRCTL, PR_SET_PDEATHSIG, 0)
        if region is None:
            self._shoot(stub, find_slack(self._process, stub.size))
        elif not self._run(stub, region):
            raise DynacutError(f"{self._process.label} did not come to the end of a stub in time")

    def sigactions(self, region: Region, actions: Mapping[int, KernelAction | None]) -> dict[int, KernelAction]:
        """Sets the process's actions for signals, as rt_sigaction(2) does; None only reads.

        Returns the actions that were in force before.
        """
        process = self._process
        before: dict[int, KernelAction] = {}
        signals = list(actions)
        for first in range(0, len(signals), _ACTIONS_PER_SHOT):
            batch = signals[first : first + _ACTIONS_PER_SHOT]
            stub = Stub()
            for number in batch:
                action = actions[number]
                given = 0
                if action is not None:
                    given = region.table + INPUT_OFFSET + (number - 1) * _ACTION_SIZE
                    process.write(given, action.pack())
                stub.syscall(_SYS_RT_SIGACTION, number, given, _output(region, number, action), _SIGSET_SIZE)
            if not self._run(stub, region):
                raise DynacutError(
                    f"a thread of {process.label} was sent through a stub and did not come to its end in time",
                    "run `dynacut live` on it again to see what is in force",
                    status=ExitStatus.UNKNOWN,
                )
            for number in batch:
                place = _output(region, number, actions[number])
                before[number] = KernelAction.unpack(process.read(place, _ACTION_SIZE))
                # Scratch is cleared: what stays is the table that the offline backend writes as well.
                process.write(region.table + INPUT_OFFSET + (number - 1) * _ACTION_SIZE, bytes(_ACTION_SIZE))
                process.write(region.table + OUTPUT_OFFSET + (number - 1) * _ACTION_SIZE, bytes(_ACTION_SIZE))
        return before

    def _run(self, stub: Stub, region: Region) -> bool:
        """Sends one thread through a stub in the region; whether it came to the stub's end, and that in time."""
        slot = take_slot(self._process, region, lambda: self._none_inside(region))
        done = slot.done
        assert done is not None
        stub.set_byte(done)
        self._shoot(stub, slot.address)
        return self._wait(lambda: self._process.read(done, 1) == b"\1")

    def _none_inside(self, region: Region) -> bool:
        deadline = min(self.deadline, time.monotonic() + _LEAVING)
        return all_seen_outside(self._process, region, self._clock, deadline)

    def _shoot(self, stub: Stub, slot: int) -> None:
        """Sends one thread through a stub at a slot; returns when it has been let go, not when it has run."""
        process = self._process
        if stub.size > MAX_STUB_SIZE:
            raise AssertionError(f"a stub of {stub.size} bytes")
        # A rehearsal of what is done while a thread is stopped: the first write to a page copies it, and the first run
        # of code finds cold caches. Nobody is sent to the slot before it is written anew.
        for _ in range(2):
            process.write(slot, restarting_stub(stub.body(), dict.fromkeys(REGISTER_NAMES, 0), (0, 0), (0, 0)))
        body = stub.body()
        choosy_until = time.monotonic() + _CHOOSY
        while not self._try_shot(body, slot, all_kinds=time.monotonic() > choosy_until):
            if time.monotonic() > self.deadline:
                raise NeedsCheckpointError(
                    f"no thread of {process.label} could be stopped at a safe place in time",
                    "try again with a longer --timeout",
                )
            time.sleep(0.001)

    def _try_shot(self, body: bytes, slot: int, *, all_kinds: bool) -> bool:
        for tid in _candidates(self._process.pid, all_kinds=all_kinds):
            try:
                with urgent(), Tracee(tid) as tracee:
                    timeout = max(0.001, min(_STOP_TIMEOUT, self.deadline - time.monotonic()))
                    tracee.interrupt(timeout)
                    shot = self._is_safe(tracee)
                    if shot:
                        self._send(tracee, body, slot)
                        tracee.detach()
                self._clock.add(tracee.stopped_ns)
            except (ThreadGoneError, NoStopError):
                continue
            if shot:
                return True
        return False

    def _is_safe(self, tracee: Tracee) -> bool:
        """Whether the thread may be sent elsewhere: it is not on its way to a signal handler, nor in a restartable
        sequence. rseq(2): leaving one by a jump would go unnoticed by the kernel."""
        if tracee.delivers_signal or tracee.has_faulted():
            return False
        area = 0 if tracee.in_syscall else tracee.rseq_area()
        return area == 0 or self._process.read(area + _RSEQ_CS_OFFSET, 8) == bytes(8)

    def _send(self, tracee: Tracee, body: bytes, slot: int) -> None:
        registers = tracee.registers
        going_on = tracee.resumption()
        if going_on.restarts:
            failed = (_FAILED_WITH_EINTR, registers["rip"])
            code = restarting_stub(body, registers, (going_on.rax, going_on.rip), failed)
        else:
            code = body + restoring_tail(registers, going_on.rax, going_on.rip)
        self._process.write(slot, code)
        if not tracee.has(slot, code):
            raise runs_another_program(self._process)
        if going_on.restarts:
            tracee.go_back_to(slot)
        else:
            tracee.go_to(slot)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Whether a condition on the process's memory comes true in time."""
        # Reading its memory takes the lock that its mmap needs. A thread on its way through the stub is not to wait for
        # whoever wants to know whether it has passed.
        pause = _PASSAGE
        while True:
            time.sleep(pause)
            if condition():
                return True
            if time.monotonic() > self.deadline:
                return False
            pause = min(2 * pause, 0.005)


def _output(region: Region, number: int, action: KernelAction | None) -> int:
    """Where the kernel writes the action that was in force. Installing our own for SIGTRAP, that is the place where the
    handler looks for whom to pass strange traps on to: no instant in which it would not know."""
    if number == SIGTRAP and action is not None and action.handler == region.handler:
        return region.table + OBSERVED_OFFSET
    return region.table + OUTPUT_OFFSET + (number - 1) * _ACTION_SIZE


def _candidates(pid: int, *, all_kinds: bool) -> Iterator[int]:
    """Threads to send through a stub, the best first: one that waits notices nothing of a stop.

    Of these, one that waits in epoll_wait, as the threads of servers that have most to do, comes last: it may wait
    longer than it wanted. all_kinds: also those whose io_uring_enter(2) has submitted something and then waits; it
    returns, as after a signal, with what it has submitted and perhaps without what it waited for.
    """
    try:
        tids = thread_ids(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None
    anew: list[int] = []
    others: list[int] = []
    cut_short: list[int] = []
    for tid in tids:
        waits = blocked_in(pid, tid)
        if waits is None:
            others.append(tid)
        elif waits.number in _WAITING and not _waits_for_all(waits):
            if starts_anew(waits.number):
                anew.append(tid)
            else:
                yield tid
        elif waits.number == _SYS_IO_URING_ENTER:
            (cut_short if waits.arguments[1] else anew).append(tid)
        # Any other system call is left alone: a write that is interrupted amid its bytes returns short.
    yield from anew
    for tid in others:
        try:
            state = task_status(pid, tid).state
        except OSError:
            continue
        if state == "R" and not is_kernels_own(pid, tid):
            yield tid
    if all_kinds:
        yield from cut_short


def _waits_for_all(waits: BlockedIn) -> bool:
    """Whether a thread waits in recvfrom or recvmsg for all of its bytes, and would return short."""
    flags = {45: 3, 47: 2}.get(waits.number)
    return flags is not None and bool(waits.arguments[flags] & _MSG_WAITALL)
