"""A process that gdb holds: its threads stopped all at once, looked at, sent on, and let go again as they were."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dynacut.handlers.records import INT3
from dynacut.live.gdb.session import GdbError, GdbSession
from dynacut.live.gdb.through_gdb import Described, ReadFile, ThroughGdb
from dynacut.live.ptrace.resumption import ERESTARTNOHAND, in_syscall, never_runs, resumption, was_interrupted
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.proc import task_status, thread_ids
from dynacut.shared.target import SIGTRAP

_REGISTERS = ("rax", "rcx", "rdx", "rsi", "rdi", "rsp", "r8", "r9", "r10", "r11", "rip", "orig_rax", "fs_base")
_SI_KERNEL = 0x80  # what an int3's SIGTRAP has for a code (asm/siginfo.h)
PAUSE = 0.002
_STOP_TIMEOUT = 0.5
_SIGSTOP_BIT = 1 << (signal.SIGSTOP - 1)


@dataclass
class HeldThread:
    """A thread for as long as it is held. number: gdb's own name for it. registers: unsigned, by their names."""

    tid: int
    number: str
    registers: dict[str, int]
    moved: bool = False
    """Whether it was sent elsewhere since it was stopped."""


class Held(ThroughGdb):
    """A process in gdb's hands, again and again: hold() and release().

    read_file: None for a process of this machine. clock counts each hold. deadline: the time.monotonic() by which all
    must be done.
    """

    def __init__(
        self, session: GdbSession, process: Described, read_file: ReadFile | None, clock: StopClock, deadline: float
    ) -> None:
        super().__init__(session, process, read_file)
        self.deadline = deadline
        self._clock = clock
        self._threads: dict[int, HeldThread] = {}
        self._since: int | None = None
        self._was_held = False

    @property
    def is_held(self) -> bool:
        """Whether the threads are stopped."""
        return self._since is not None

    def hold(self) -> None:
        """Attaches gdb, which stops every thread.

        Raises:
            DynacutError: it may not, or not in time; the process is let go.
        """
        self._await_stoppable()
        self._since = time.perf_counter_ns()
        try:
            while (error := self._attach()) is not None:
                # Just let go by a gdbserver, a process may not be to be had again for a moment.
                if not self._was_held or time.monotonic() > self.deadline or self.status().state in "ZX":
                    raise DynacutError(
                        f"gdb cannot attach to {self.label}: {error}",
                        "see whether the process is still there, and no other debugger holds it",
                    )
                time.sleep(PAUSE)
            self.look()
        except BaseException:
            self.abandon()
            raise

    def _attach(self) -> GdbError | None:
        """Attaches gdb; returns why that failed."""
        try:
            self.session.forget_stops()
            if self.is_here:
                # Without the program's file gdb takes a process for a 32-bit one until it has looked at it. Before
                # that, it puts a thread back that has just run into an int3, and would cut off its address.
                self.session.command("-gdb-set architecture i386:x86-64")
            self.session.command(f"-target-attach {self.process.pid}")
            self.session.await_stop()
        except GdbError as error:
            return error
        return None

    def _await_stoppable(self) -> None:
        """Waits until no thread sleeps uninterruptibly, as far as can be told: gdb would wait for it, all others
        stopped.

        Raises:
            DynacutError: one does until the deadline.
        """
        pid = self.process.pid
        while True:
            try:
                tids = thread_ids(pid) if self.is_here else (pid,)
                asleep = [tid for tid in tids if self.status(tid).state == "D"]
            except (OSError, DynacutError):  # a thread ended; if the process did, attaching tells
                return
            if not asleep:
                return
            if time.monotonic() > self.deadline:
                raise DynacutError(
                    f"thread {asleep[0]} of {self.label} sleeps uninterruptibly, as a parent after vfork does",
                    "nothing was changed; try again when it goes on, or with a longer --timeout",
                )
            time.sleep(PAUSE)

    def adopt(self) -> None:
        """Takes over a process that gdb holds already: the one that a gdbserver had when gdb connected to it."""
        self._since = time.perf_counter_ns()
        self.look()

    def look(self) -> None:
        """Reads the threads and their registers; who has just run into an int3 is put back before it.

        gdb has taken that thread's SIGTRAP and would not hand it on. Before the int3, the thread runs into it again, or
        finds the old instruction there.
        """
        try:
            names = self.session.command("-data-list-register-names")["register-names"]
            self._numbers = [names.index(name) for name in _REGISTERS]
            self._threads = {}
            for entry in self.session.command("-thread-info")["threads"]:
                tid = int(re.findall(r"\d+", str(entry["target-id"]).partition('"')[0])[-1])
                thread = HeldThread(tid, str(entry["id"]), {})
                self.reread(thread)
                if not never_runs(thread.registers):
                    self._threads[tid] = thread
            for thread in self._threads.values():
                self._put_back_before_int3(thread)
        except (GdbError, ValueError, LookupError) as error:
            raise DynacutError(
                f"gdb does not tell the threads of {self.label}: {error}",
                "this gdb does not work here; use --engine ptrace",
            ) from None

    def reread(self, thread: HeldThread) -> None:
        """Reads a thread's registers again."""
        values = self.session.registers(thread.number, self._numbers)
        thread.registers = dict(zip(_REGISTERS, values, strict=True))

    @property
    def held_threads(self) -> Sequence[HeldThread]:
        """Every thread."""
        return list(self._threads.values())

    def thread(self, tid: int) -> HeldThread | None:
        """The thread of an id; None if it has ended."""
        return self._threads.get(tid)

    def signal_of(self, thread: HeldThread) -> tuple[int, int]:
        """Number and code of the signal that a thread was stopped with; (SIGSTOP, 0) where that is not known."""
        ask = f"-data-evaluate-expression --thread {thread.number} $_siginfo."
        try:
            return (
                int(self.session.command(ask + "si_signo")["value"]),
                int(self.session.command(ask + "si_code")["value"]),
            )
        except (GdbError, ValueError):
            return signal.SIGSTOP, 0

    def delivers_signal(self, thread: HeldThread) -> bool:
        """Whether a thread was stopped on its way to a signal handler."""
        return not thread.moved and self.signal_of(thread)[0] not in (signal.SIGSTOP, SIGTRAP)

    def pending_signals(self, thread: HeldThread) -> int:
        """The signals that wait for a thread and that it does not block; bit N-1 for N."""
        status = self.status(thread.tid)
        return (status.thread_pending | status.shared_pending) & ~status.blocked

    def send(self, thread: HeldThread, rip: int) -> None:
        """Makes a thread go on elsewhere.

        gdb writes one register after the other, and may be killed in between. So first comes what makes the kernel
        leave an interrupted system call alone, which it would start again wherever rip points: it fails with EINTR
        then, and is none any more. Only then rip.
        """
        interrupted = {"rax": -errno.EINTR} if resumption(thread.registers).restarts else {}
        self._set(thread, {**interrupted, "orig_rax": -1, "rip": rip})
        thread.moved = True

    def _set(self, thread: HeldThread, registers: Dictionary[str, int]) -> None:
        assignments = ", ".join(f"${name} = {value}" for name, value in registers.items())
        try:
            self.session.command(f'-data-evaluate-expression --thread {thread.number} "{assignments}"')
            self.reread(thread)
        except GdbError as error:
            raise DynacutError(
                f"the registers of {self.label} cannot be set: {error}",
                "this gdb does not work here; use --engine ptrace",
            ) from None
        if any(thread.registers[name] != value % (1 << 64) for name, value in registers.items()):
            raise DynacutError(
                f"the registers of thread {thread.tid} of {self.label} are not what they were set to",
                "this gdb does not work here; use --engine ptrace",
                status=ExitStatus.UNKNOWN,
            )

    def pause(self, otherwise: DynacutError, seconds: float = PAUSE, patience: float = 0) -> None:
        """Lets the process run for a moment and holds it again. patience: a time.monotonic() that time lasts at least.

        Raises:
            DynacutError: otherwise, if time is up; or the process cannot be held again.
        """
        if time.monotonic() > max(self.deadline, patience):
            raise otherwise
        self.release()
        time.sleep(seconds)
        self.hold()

    def extend_deadline(self, seconds: float) -> None:
        """Gives it some more time, from now, to put things right."""
        self.deadline = max(self.deadline, time.monotonic() + seconds)

    def release(self) -> None:
        """Lets the process go on as if it had not been stopped.

        Raises:
            DynacutError: gdb cannot detach.
        """
        if self._since is None:
            return
        try:
            for thread in self._threads.values():
                self._conceal(thread)
            self.session.command("-target-detach")
        except (GdbError, DynacutError) as error:
            self.abandon()
            raise DynacutError(
                f"gdb could not let {self.label} go as it should: {error}",
                "run `dynacut live` on it to see what is in force",
                status=ExitStatus.UNKNOWN,
            ) from None
        self._clock.add(time.perf_counter_ns() - self._since)
        self._since = None
        self._was_held = True

    def abandon(self) -> None:
        """Ends a gdb that does not do what it should. What it leaves stopped goes on, where it is on this machine."""
        self.session.close()
        if self._since is not None:
            self._clock.add(time.perf_counter_ns() - self._since)
        self._since = None
        self._let_go_on()

    def gone(self) -> DynacutError:
        """The error for a process that has ended."""
        return DynacutError(
            f"{self.label} has ended", "look at its log, and at how it ended", status=ExitStatus.UNKNOWN
        )

    def _let_go_on(self) -> None:
        """A debugger that dies leaves the process to the SIGSTOP that it was attached with, which comes into force when
        the threads run again. It was not stopped before, or it would have been refused."""
        until = time.monotonic() + _STOP_TIMEOUT
        while self.is_here and time.monotonic() < until:
            with suppress(OSError):
                for tid in thread_ids(self.process.pid):
                    status = task_status(self.process.pid, tid)
                    if status.state == "T" or status.thread_pending & _SIGSTOP_BIT:
                        os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(PAUSE)

    def _put_back_before_int3(self, thread: HeldThread) -> None:
        rip = thread.registers["rip"]
        if in_syscall(thread.registers):
            return
        with suppress(GdbError):  # a jump to nowhere, about to end the process
            if self.session.read(rip - 1, 1) == INT3 and self.signal_of(thread) == (SIGTRAP, _SI_KERNEL):
                self.send(thread, rip - 1)

    def _conceal(self, thread: HeldThread) -> None:
        """Has a system call started again that the stop has made fail: by the kernel, unless a signal is why it fails
        (ERESTARTNOHAND, arch_do_signal_or_restart in arch/x86/kernel/signal.c)."""
        if not thread.moved and was_interrupted(thread.registers) and resumption(thread.registers).restarts:
            self._set(thread, {"rax": -ERESTARTNOHAND})
