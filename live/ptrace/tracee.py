"""One thread held by ptrace, from SEIZE to DETACH. See ptrace(2); PTRACE_ATTACH is never used: its SIGSTOP shows."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dynacut.live.ptrace import ptrace_call
from dynacut.live.ptrace.ptrace_call import (
    PTRACE_DETACH,
    PTRACE_EVENT_STOP,
    PTRACE_GETSIGMASK,
    PTRACE_INTERRUPT,
    PTRACE_SEIZE,
    PTRACE_SETSIGMASK,
    Registers,
)
from dynacut.live.ptrace.resumption import (
    STARTS_ANEW,
    SYSCALL_SIZE,
    Resumption,
    in_syscall,
    resumption,
    was_interrupted,
)
from dynacut.shared.errors import DynacutError

_WALL = 0x40000000
_PF_EXITING = 0x4  # include/linux/sched.h
_NO_SYSCALL = (1 << 64) - 1
_FAULTS = sum(
    1 << (number - 1)
    for number in (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)
)
"""SYNCHRONOUS_MASK in kernel/signal.c."""
_SPIN_NS = 60_000
LATE_TIMEOUT = 0.2
"""Seconds for a thread to stop that is only to be let go."""
_LOOK_AGAIN = 0.0003
_late: list[Tracee] = []
"""Threads that were asked to stop and have not yet: ptrace keeps them for the whole process, and so must we."""


class ThreadGoneError(Exception):
    """The thread ended meanwhile."""


class NoStopError(Exception):
    """The thread did not stop in time: it sleeps uninterruptibly, as a vfork parent does, or is stopped by a signal."""


class Tracee:
    """A seized thread. Use as a context manager: leaving it detaches, and a stop that was made does not show."""

    def __init__(self, tid: int) -> None:
        """Seizes without stopping.

        Raises:
            ThreadGoneError: the thread ended. NoStopError: an earlier request to stop it is still on its way.
            DynacutError: it may not be traced.
        """
        if tid in late_tids():
            release_late(0)
            if tid in late_tids():
                raise NoStopError
        self.tid = tid
        self.stopped = False
        self._seized = True
        self.stopped_ns = 0
        """How long the thread was stopped, at most: from when it was last known to run to the detachment."""
        self.registers: dict[str, int] = {}
        """The registers by their names in struct user_regs_struct, once the thread is stopped."""
        self._raw_registers = Registers()
        self._mask = ctypes.c_uint64()
        self._runs_until = 0
        self._signal = 0
        try:
            ptrace_call.call(PTRACE_SEIZE, tid)
        except OSError as error:
            if isinstance(error, ProcessLookupError) or _is_ending(tid):
                raise ThreadGoneError from None
            raise DynacutError(
                f"thread {tid} may not be traced: {error.strerror}",
                "see whether another debugger or tracer holds it",
            ) from None

    def __enter__(self) -> Tracee:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._seized:
            return
        if not self.stopped:
            if isinstance(error, ThreadGoneError):
                return
            try:
                self.interrupt(timeout=0 if isinstance(error, NoStopError) else LATE_TIMEOUT)
            except NoStopError:
                # Only a stopped thread can be detached. This one will stop when it can, and must not stay so.
                if self._seized:
                    give_up([self])
                return
            except ThreadGoneError:
                return
        with suppress(ThreadGoneError):
            self.conceal()
        self.detach()

    def interrupt(self, timeout: float) -> None:
        """Stops the thread and reads its registers.

        Raises:
            ThreadGoneError, NoStopError.
        """
        self.request_interrupt()
        self.await_stop(self._runs_until + int(timeout * 1e9))

    def request_interrupt(self) -> None:
        """Asks for a stop without waiting for it: for stopping many threads, await_stop() waits."""
        self._runs_until = time.perf_counter_ns()
        self._call(PTRACE_INTERRUPT)

    def await_stop(self, deadline_ns: int) -> None:
        """Waits for the stop until a time of perf_counter_ns().

        Raises:
            ThreadGoneError, NoStopError.
        """
        # A thread on another processor stops within a few microseconds; sleeping and waking would take ten times that.
        spin_until = time.perf_counter_ns() + _SPIN_NS
        while not self.poll():
            now = time.perf_counter_ns()
            if now >= deadline_ns:
                raise NoStopError
            if now > spin_until:
                wait_for_stops((deadline_ns - now) / 1e9)

    def poll(self) -> bool:
        """Whether the thread has stopped, as far as can be told without waiting.

        Raises:
            ThreadGoneError; NoStopError: it is stopped by a signal, and stays so.
        """
        now = time.perf_counter_ns()
        try:
            tid, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
        except ChildProcessError:
            self._seized = False
            raise ThreadGoneError from None
        if tid == 0:
            self._runs_until = now
            return False
        if not os.WIFSTOPPED(status):
            self._seized = False
            raise ThreadGoneError
        self.stopped = True
        if status >> 16 == PTRACE_EVENT_STOP:
            if os.WSTOPSIG(status) != signal.SIGTRAP:
                self.detach()  # a group-stop: detaching leaves it stopped
                raise NoStopError
        else:
            self._signal = os.WSTOPSIG(status)  # about to be delivered: handed on by detach()
        try:
            self.registers = self._raw_registers.read(self.tid)
        except ProcessLookupError:
            raise self._gone() from None
        return True

    @property
    def delivers_signal(self) -> bool:
        """Whether the thread was caught on its way to a signal handler; it must then go there undisturbed."""
        return self._signal != 0

    def blocked_signals(self) -> int:
        """The blocked mask, also where a system call such as ppoll has replaced it for its duration."""
        self._call(PTRACE_GETSIGMASK, 8, ctypes.addressof(self._mask))
        return self._mask.value

    def set_blocked_signals(self, mask: int) -> None:
        """Sets the blocked mask."""
        self._mask.value = mask
        self._call(PTRACE_SETSIGMASK, 8, ctypes.addressof(self._mask))

    def pending_signals(self) -> int:
        """The signals that wait for the thread or its process (bit N-1 for N), the one on its way included."""
        try:
            return ptrace_call.pending_signals(self.tid) | (1 << (self._signal - 1) if self._signal else 0)
        except ProcessLookupError:
            raise self._gone() from None

    def has_faulted(self) -> bool:
        """Whether the thread's last instruction was a fault, a trap or a forbidden system call, of which its signal
        handler is yet to be told.

        A requested stop comes before such a signal (get_signal in kernel/signal.c), and the handler, dynacut's own for
        one, takes rip for where that was. A signal that is blocked was sent by somebody: the kernel unblocks its own.
        """
        if self.resumption().restarts:
            return False
        pending = self.pending_signals() & _FAULTS
        return pending != 0 and pending & ~self.blocked_signals() != 0

    def rseq_area(self) -> int:
        """The address of the thread's struct rseq (rseq(2)); 0 if it has none or the kernel does not tell."""
        try:
            return ptrace_call.rseq_area(self.tid)
        except ProcessLookupError:
            raise self._gone() from None

    @property
    def in_syscall(self) -> bool:
        """Whether the stop interrupted a system call rather than the thread's own code."""
        return in_syscall(self.registers)

    def resumption(self) -> Resumption:
        """Where and how the thread has to go on as if it had not been stopped."""
        return resumption(self.registers)

    def has(self, address: int, data: bytes) -> bool:
        """Whether the thread's memory has these bytes, 8 at least, of which the first and the last 8 are looked at.

        It has other memory than that which was opened if it has called execve(2) since; the old one is still there
        where somebody shares it.

        Raises:
            ThreadGoneError.
        """
        try:
            return all(
                ptrace_call.peek(self.tid, address + place) == data[place : place + 8] for place in {0, len(data) - 8}
            )
        except ProcessLookupError:
            raise self._gone() from None
        except OSError:
            return False

    def go_to(self, rip: int) -> None:
        """Lets the thread go on at another address after detach(), all other registers as they are.

        The kernel starts no system call again there.
        """
        self._set_registers(rip=rip, orig_rax=_NO_SYSCALL)

    def go_back_to(self, rip: int) -> None:
        """Lets the thread, stopped in a system call, go on at another address as if the call's instruction were there.

        The kernel steps back over it to make the call again, or goes on behind it if a signal handler is to run.
        """
        self._set_registers(rip=rip + SYSCALL_SIZE, rax=self.resumption().undecided_rax)

    def conceal(self) -> None:
        """Makes a system call that fails with EINTR after any stop start again, unless a signal is handled first."""
        if self._signal or not was_interrupted(self.registers):
            return
        again = self.resumption()
        if again.restarts:
            self._set_registers(rax=again.undecided_rax)

    def start_anew(self) -> None:
        """Makes a call that would go on by restart_syscall(2) start again instead, with its whole timeout."""
        self._set_registers(rax=STARTS_ANEW)

    def _set_registers(self, **changed: int) -> None:
        try:
            self._raw_registers.write(self.tid, **changed)
        except ProcessLookupError:
            raise self._gone() from None

    def detach(self) -> None:
        """Lets the thread go."""
        if not self.stopped:
            return
        self.stopped = self._seized = False
        with suppress(ThreadGoneError):
            self._call(PTRACE_DETACH, 0, self._signal)
        self.stopped_ns = time.perf_counter_ns() - self._runs_until

    def _call(self, request: int, address: int = 0, data: int = 0) -> int:
        try:
            return ptrace_call.call(request, self.tid, address, data)
        except ProcessLookupError:
            raise self._gone() from None

    def _gone(self) -> ThreadGoneError:
        self.stopped = self._seized = False
        return ThreadGoneError()


def wait_for_stops(seconds: float) -> None:
    """Waits a moment for a tracee to stop.

    SIGCHLD, blocked by prompt_stops(), comes with each stop; the moment is short for one that was missed, and for
    knowing how long a thread was stopped at most.
    """
    signal.sigtimedwait([signal.SIGCHLD], max(0.0, min(seconds, _LOOK_AGAIN)))


def release_late(timeout: float) -> None:
    """Lets those threads go that stopped too late for whoever had asked them to, as far as they do within seconds."""
    deadline = time.monotonic() + timeout
    while _late:
        for tracee in list(_late):
            try:
                if tracee.poll():
                    tracee.conceal()
                    tracee.detach()
                    _late.remove(tracee)
            except (ThreadGoneError, NoStopError):
                _late.remove(tracee)
        if _late:
            if time.monotonic() > deadline:
                return
            wait_for_stops(deadline - time.monotonic())


def late_tids() -> set[int]:
    """The threads that were asked to stop and have not yet."""
    return {tracee.tid for tracee in _late}


def give_up(tracees: Iterable[Tracee]) -> None:
    """No longer waits for threads that were asked to stop; release_late() lets them go when they have."""
    _late.extend(tracees)


def _is_ending(tid: int) -> bool:
    """Whether a thread is on its way out; SEIZE says EPERM then (ptrace_attach in kernel/ptrace.c)."""
    try:
        fields = Path(f"/proc/{tid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return True
    flags = int(fields[6])
    return fields[0] in (b"Z", b"X") or bool(flags & _PF_EXITING)
