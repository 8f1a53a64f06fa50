"""Starting a program that waits at its entry point until it is let go: to trace it from its first block on.

Until then it dies with whoever has started it, however that ends: nobody else would ever let it go.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ptrace.binding.func import PTRACE_TRACEME, ptrace
from ptrace.error import PtraceError

from dynacut.handlers.table import TRACE_MAGIC
from dynacut.live.process import Process
from dynacut.live.ptrace.ptrace_call import PTRACE_DETACH
from dynacut.live.ptrace.remote import Remote
from dynacut.live.ptrace.shots import Shots
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stops import prompt_stops
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.syscalls import PR_SET_PDEATHSIG
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import auxiliary_vector
from dynacut.shared.region import find_region

_AT_ENTRY = 9
_JUMP_TO_ITSELF = b"\xeb\xfe"
_RELEASE_TIMEOUT = 10.0
_prctl = ctypes.PyDLL(None).prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)


class HeldProgram:
    """A program that was just started and spins at its entry point.

    The dynamic linker has not run yet when this returns; it runs at once, and the program's own code begins when
    release() has put the entry's bytes back. Leaving the context without release() kills the program.
    """

    def __init__(self, command: Sequence[str], output: Path | None = None) -> None:
        """Starts it.

        output: the file its output is appended to; it then is a daemon, with a session of its own and no input.

        Raises:
            DynacutError: it cannot be executed.
        """
        self.pid = _start(command, output)
        try:
            self.entry = _entry_point(self.pid)
            with Process(self.pid) as process:
                self.original = process.read(self.entry, len(_JUMP_TO_ITSELF))
                process.write(self.entry, _JUMP_TO_ITSELF)
            ptrace(PTRACE_DETACH, self.pid)
        except BaseException:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        self._held = True

    def __enter__(self) -> HeldProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            os.kill(self.pid, signal.SIGKILL)

    def await_entry(self, process: Process, timeout: float) -> None:
        """Returns when the dynamic linker has mapped the libraries and jumped to the entry point.

        Raises:
            DynacutError: the program ended before, or did not get there in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended, _ = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._held = False
                raise DynacutError("the program ended before its own code began", "start it by hand to see why")
            if self._is_at_entry(_instruction_pointer(self.pid)):
                process.refresh()
                return
            time.sleep(0.001)
        raise DynacutError("the program did not come to its entry point in time", "try again on a less busy machine")

    def release(self, process: Process) -> None:
        """Lets it go: the entry point gets its bytes back, both at once as far as the program can tell.

        process: with the region of its trace. From here on it lives as long as it likes.

        Raises:
            DynacutError: its only thread cannot be stopped.
        """
        found = find_region(process, TRACE_MAGIC)
        with prompt_stops():
            remote = Remote(process, Shots(process, StopClock(), time.monotonic() + _RELEASE_TIMEOUT))
            remote.keep_alive(found.region if found else None)
            while not self._put_back(process):
                time.sleep(0.001)
        self._held = False

    def _put_back(self, process: Process) -> bool:
        """Gives the entry point its bytes back if the thread is there, and so has come to the end of every stub."""
        with Tracee(self.pid) as tracee:
            tracee.interrupt(_RELEASE_TIMEOUT)
            is_there = self._is_at_entry(tracee.registers["rip"])
            if is_there:
                process.write(self.entry, self.original)
        return is_there

    def _is_at_entry(self, rip: int) -> bool:
        return self.entry <= rip < self.entry + len(_JUMP_TO_ITSELF)


def _start(command: Sequence[str], output: Path | None) -> int:
    """Forks and executes; returns with the child stopped behind its execve."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _die_with(parent)
            if output is not None:
                _detach(output)
            ptrace(PTRACE_TRACEME)
            os.execvp(command[0], list(command))
        except (OSError, PtraceError) as error:
            os.write(write_end, str(getattr(error, "strerror", None) or error).encode())
        finally:
            os._exit(127)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        failure = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    if failure or not os.WIFSTOPPED(status):
        raise DynacutError(
            f"{command[0]} cannot be executed: {failure or 'it ended at once'}", "give the path of a program"
        )
    return pid


def _die_with(parent: int) -> None:
    """Makes this process end with the thread that forked it (PR_SET_PDEATHSIG(2const)); exec keeps that."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(127)


def _detach(output: Path) -> None:
    """Makes this process, a child about to execute a program, a daemon whose output is appended to a file."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)
    os.close(log)
    os.close(nothing)


def _entry_point(pid: int) -> int:
    """AT_ENTRY of the auxiliary vector: the program's own entry, not the dynamic linker's."""
    entry = auxiliary_vector(pid).get(_AT_ENTRY)
    if entry is None:
        raise DynacutError(f"process {pid} has no entry point in its auxiliary vector")
    return entry


def _instruction_pointer(pid: int) -> int:
    """Where a process is, by stopping it for an instant."""
    try:
        with prompt_stops(), Tracee(pid) as tracee:
            tracee.interrupt(1.0)
            return tracee.registers["rip"]
    except (ThreadGoneError, NoStopError):
        return 0
