"""One thread held by ptrace, from SEIZE to DETACH. See ptrace(2); PTRACE_ATTACH is never used: its SIGSTOP shows."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from ptrace.binding.func import ptrace
from ptrace.binding.linux_struct import user_regs_struct
from ptrace.error import PtraceError

from dynacut.shared.errors import DynacutError

# include/uapi/linux/ptrace.h; python-ptrace knows none of these.
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_PEEKSIGINFO_SHARED = 1
PTRACE_EVENT_STOP = 128

_WALL = 0x40000000
_SIGINFO_SIZE = 128
_PEEKED = 32

# include/linux/errno.h: what a stopped thread's rax shows of an interrupted system call that the kernel will restart.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_RESTART_SYSCALL = 219
# signal(7): these fail with EINTR after any stop, even without a signal, the socket calls where a timeout is set. A
# ptrace stop must not show, so they are started again; having failed with EINTR they have done nothing yet.
# semop, rt_sigtimedwait, semtimedop, io_getevents, epoll_wait, epoll_pwait, epoll_pwait2, io_uring_enter;
# read, write, readv, writev, accept, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg, sendmmsg.
_NEVER_RESTARTED = frozenset({65, 128, 220, 208, 232, 281, 441, 426, 0, 1, 19, 20, 43, 44, 45, 46, 47, 288, 299, 307})


class _PeekArguments(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32))


class _RseqConfiguration(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class ThreadGoneError(Exception):
    """The thread ended meanwhile."""


class NoStopError(Exception):
    """The thread did not stop in time: it sleeps uninterruptibly, as a vfork parent does, or is stopped by a signal."""


@dataclass(frozen=True)
class Resumption:
    """Where an interrupted thread has to go on, and with which rax, for the stop not to show."""

    rip: int
    rax: int
    restarts: bool
    """Whether a system call is made again."""


class Tracee:
    """A seized thread. Use as a context manager: leaving it detaches, and a stop that was made does not show."""

    def __init__(self, tid: int) -> None:
        """Seizes without stopping.

        Raises:
            ThreadGoneError: the thread ended. DynacutError: it may not be traced.
        """
        self.tid = tid
        self.stopped = False
        self._seized = True
        self.stopped_ns = 0
        """How long the thread was stopped, from the interruption to the detachment."""
        self.registers = user_regs_struct()
        self._interrupted_at = 0
        self._signal = 0
        try:
            ptrace(PTRACE_SEIZE, tid)
        except PtraceError as error:
            if error.errno == errno.ESRCH:
                raise ThreadGoneError from None
            raise DynacutError(
                f"thread {tid} may not be traced: {os.strerror(error.errno)}",
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
            # Only a stopped thread can be detached. One that would not stop stays seized until this process ends.
            if isinstance(error, ThreadGoneError | NoStopError):
                return
            try:
                self.interrupt(timeout=0.2)
            except (ThreadGoneError, NoStopError):
                return
        if kind is None:
            self.conceal()
        self.detach()

    def interrupt(self, timeout: float) -> None:
        """Stops the thread and reads its registers.

        Raises:
            ThreadGoneError, NoStopError.
        """
        self._interrupted_at = time.perf_counter_ns()
        self._call(PTRACE_INTERRUPT)
        self.await_stop(self._interrupted_at + int(timeout * 1e9))

    def request_interrupt(self) -> None:
        """Asks for a stop without waiting for it: for stopping many threads, await_stop() waits."""
        self._interrupted_at = time.perf_counter_ns()
        self._call(PTRACE_INTERRUPT)

    def await_stop(self, deadline_ns: int) -> None:
        """Waits for the stop until a time of perf_counter_ns().

        Raises:
            ThreadGoneError, NoStopError.
        """
        while not self.poll():
            left = deadline_ns - time.perf_counter_ns()
            if left <= 0:
                raise NoStopError
            wait_for_stops(left / 1e9)

    def poll(self) -> bool:
        """Whether the thread has stopped, as far as can be told without waiting.

        Raises:
            ThreadGoneError; NoStopError: it is stopped by a signal, and stays so.
        """
        try:
            tid, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
        except ChildProcessError:
            self._seized = False
            raise ThreadGoneError from None
        if tid == 0:
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
        self._call(PTRACE_GETREGS, 0, ctypes.addressof(self.registers))
        return True

    @property
    def delivers_signal(self) -> bool:
        """Whether the thread was caught on its way to a signal handler; it must then go there undisturbed."""
        return self._signal != 0

    def blocked_signals(self) -> int:
        """The blocked mask, also where a system call such as ppoll has replaced it for its duration."""
        mask = ctypes.c_uint64()
        self._call(PTRACE_GETSIGMASK, 8, ctypes.addressof(mask))
        return mask.value

    def set_blocked_signals(self, mask: int) -> None:
        """Sets the blocked mask."""
        self._call(PTRACE_SETSIGMASK, 8, ctypes.addressof(ctypes.c_uint64(mask)))

    def pending_signals(self) -> int:
        """The set of signals that wait for the thread or its process (bit N-1 for signal N)."""
        pending = 0
        buffer = (ctypes.c_char * (_SIGINFO_SIZE * _PEEKED))()
        for flags in (0, PTRACE_PEEKSIGINFO_SHARED):
            arguments = _PeekArguments(0, flags, _PEEKED)
            count = self._call(PTRACE_PEEKSIGINFO, ctypes.addressof(arguments), ctypes.addressof(buffer))
            for index in range(count):
                number = int.from_bytes(buffer.raw[index * _SIGINFO_SIZE : index * _SIGINFO_SIZE + 4], "little")
                pending |= 1 << (number - 1)
        return pending

    def rseq_area(self) -> int:
        """The address of the thread's struct rseq (rseq(2)); 0 if it has none or the kernel does not tell."""
        configuration = _RseqConfiguration()
        try:
            self._call(PTRACE_GET_RSEQ_CONFIGURATION, ctypes.sizeof(configuration), ctypes.addressof(configuration))
        except OSError:
            return 0
        return int(configuration.pointer)

    @property
    def in_syscall(self) -> bool:
        """Whether the stop interrupted a system call rather than the thread's own code."""
        return ctypes.c_int64(self.registers.orig_rax).value >= 0

    def resumption(self) -> Resumption:
        """Where and how the thread has to go on as if it had not been stopped."""
        registers = self.registers
        rip, rax = int(registers.rip), int(registers.rax)
        if not self.in_syscall:
            return Resumption(rip, rax, restarts=False)
        number = int(registers.orig_rax)
        code = -ctypes.c_int64(rax).value
        again = rip - 2  # syscall and int 0x80 are both two bytes long
        if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
            return Resumption(again, number, restarts=True)
        if code == ERESTART_RESTARTBLOCK:
            return Resumption(again, _RESTART_SYSCALL, restarts=True)
        if code == errno.EINTR and number in _NEVER_RESTARTED:
            return Resumption(again, number, restarts=True)
        return Resumption(rip, rax, restarts=False)

    def go_to(self, rip: int) -> None:
        """Lets the thread go on at another address after detach(), all other registers as they are."""
        self.registers.rip = rip
        self.registers.orig_rax = ctypes.c_uint64(-1).value  # or the kernel would restart a system call there
        self._call(PTRACE_SETREGS, 0, ctypes.addressof(self.registers))

    def conceal(self) -> None:
        """Makes a system call that fails with EINTR after any stop start again, unless a signal is why it fails."""
        if not self.in_syscall or ctypes.c_int64(self.registers.rax).value != -errno.EINTR or self._signal:
            return
        resumption = self.resumption()
        if resumption.restarts and not self.pending_signals() & ~self.blocked_signals():
            self.registers.rax = resumption.rax
            self.go_to(resumption.rip)

    def detach(self) -> None:
        """Lets the thread go."""
        if not self.stopped:
            return
        self.stopped = self._seized = False
        with suppress(ThreadGoneError):
            self._call(PTRACE_DETACH, 0, self._signal)
        self.stopped_ns = time.perf_counter_ns() - self._interrupted_at

    def _call(self, request: int, address: int = 0, data: int = 0) -> int:
        try:
            return int(ptrace(request, self.tid, address, data))
        except PtraceError as error:
            if error.errno == errno.ESRCH:
                self.stopped = self._seized = False
                raise ThreadGoneError from None
            raise OSError(error.errno, os.strerror(error.errno)) from None


def wait_for_stops(seconds: float) -> None:
    """Waits a moment for a tracee to stop.

    SIGCHLD, blocked by blocked_sigchld(), comes with each stop; the moment is short for one that was missed.
    """
    signal.sigtimedwait([signal.SIGCHLD], max(0.0, min(seconds, 0.002)))


def each_stopped(tids: Iterable[int], timeout: float) -> Iterator[Tracee]:
    """Stops threads and yields each as it stops, then lets it go; so none waits for another.

    Threads that end, or do not stop within timeout seconds, are passed over.
    """
    waiting: list[Tracee] = []
    for tid in tids:
        try:
            tracee = Tracee(tid)
            tracee.request_interrupt()
            waiting.append(tracee)
        except ThreadGoneError:
            continue
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        remaining = []
        for tracee in waiting:
            try:
                if not tracee.poll():
                    remaining.append(tracee)
                    continue
                with tracee:
                    yield tracee
            except (ThreadGoneError, NoStopError):
                continue
        if len(remaining) == len(waiting):
            wait_for_stops(deadline - time.monotonic())
        waiting = remaining


class blocked_sigchld:  # noqa: N801 - reads as what it does: with blocked_sigchld():
    """Blocks SIGCHLD, so that await_stop() can wait for it instead of polling."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
