"""Stubs run by a thread of the process itself, in one shot that does not need the patcher any more.

The stub is written to a slot of its own, one thread is stopped, its registers are baked into the stub, its rip is set,
and it is let go. Killed at any instant, the patcher leaves a thread that either never saw the stub or runs it to its
end: the registers are restored by the thread itself.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

from dynacut.live.process import Process, runs_another_program
from dynacut.live.ptrace.passage import all_seen_outside
from dynacut.live.ptrace.ptrace_call import REGISTER_NAMES
from dynacut.live.ptrace.resumption import starts_anew
from dynacut.live.ptrace.slots import MAX_STUB_SIZE, take_slot
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stub import Stub, restarting_stub, restoring_tail
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.live.syscalls import Syscall
from dynacut.shared.proc import BlockedIn, blocked_in, is_kernels_own, task_status, thread_ids
from dynacut.shared.region import Region
from dynacut.shared.running import gone

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


class Shots:
    """Sends threads of one process through stubs. deadline is a time.monotonic() by which each must be done."""

    def __init__(self, process: Process, clock: StopClock, deadline: float) -> None:
        self._process = process
        self._clock = clock
        self.deadline = deadline

    def run(self, stub: Stub, region: Region) -> bool:
        """Sends one thread through a stub in the region; whether it came to the stub's end, and that in time."""
        slot = take_slot(self._process, region, lambda: self._none_inside(region))
        done = slot.done
        assert done is not None
        stub.set_byte(done)
        self.shoot(stub, slot.address)
        return self.wait(lambda: self._process.read(done, 1) == b"\1")

    def _none_inside(self, region: Region) -> bool:
        deadline = min(self.deadline, time.monotonic() + _LEAVING)
        return all_seen_outside(self._process, region, self._clock, deadline)

    def shoot(self, stub: Stub, slot: int) -> None:
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

    def wait(self, condition: Callable[[], bool]) -> bool:
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
        elif waits.number == Syscall.IO_URING_ENTER:
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
