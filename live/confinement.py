"""Whether a process's seccomp filters allow all that a change makes it do: asked of the filters themselves, before it.

The kernel hands a thread's filters out (PTRACE_SECCOMP_GET_FILTER, see seccomp_get_filter in kernel/seccomp.c) to those
with CAP_SYS_ADMIN that run under none themselves, while the thread is stopped.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dynacut.handlers.table import Action
from dynacut.live.admission import FILTERED
from dynacut.live.process import Process
from dynacut.live.ptrace.ptrace_call import PTRACE_SECCOMP_GET_FILTER, call
from dynacut.live.ptrace.resumption import makes_restart_syscall
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stops import prompt_stops
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.live.ptrace.urgency import urgent
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.live.seccomp import Call, Filter, MalformedFilterError
from dynacut.live.syscalls import (
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    O_RDONLY_CLOEXEC,
    O_RDWR_CLOEXEC,
    SIGSET_SIZE,
    Syscall,
)
from dynacut.shared.on_hit import DIE_BY_SIGTRAP
from dynacut.shared.patch_set import HandlerChange, PatchSet
from dynacut.shared.proc import task_status, thread_ids
from dynacut.shared.running import gone
from dynacut.shared.target import SIGTRAP

_STOP_TIMEOUT = 0.5
_PAUSE = 0.002
_INSTRUCTION_SIZE = 8
_CODE, _DATA = mmap.PROT_READ | mmap.PROT_EXEC, mmap.PROT_READ | mmap.PROT_WRITE
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
_NO_FILE = (1 << 64) - 1


def _call(number: Syscall, arguments: tuple[int | None, ...] = ()) -> Call:
    return Call(number.name.lower(), number, arguments)


_RESTART = _call(Syscall.RESTART_SYSCALL)
_CLOSE, _GETPID = _call(Syscall.CLOSE), _call(Syscall.GETPID)
_ALWAYS = (
    _RESTART,  # what the kernel makes of some calls that a stop has interrupted
    _call(Syscall.RT_SIGRETURN),
    _call(Syscall.RT_SIGACTION, (None, None, None, SIGSET_SIZE)),
)
_UNMAP = _call(Syscall.MUNMAP)
# The region, or where it is not to be had no part of it; a trap that is not ours, passed on to the program's handler,
# or to its death (pass_on in trap.c).
_INSTALLING = (
    _call(Syscall.MMAP, (None, None, _CODE, _FLAGS | MAP_NORESERVE, _NO_FILE, 0)),
    _call(Syscall.MMAP, (None, None, _DATA, _FLAGS | MAP_NORESERVE, _NO_FILE, 0)),
    _UNMAP,
    _call(Syscall.RT_SIGPROCMASK, (0, None, 0, SIGSET_SIZE)),
    _GETPID,
    _call(Syscall.GETTID),
    _call(Syscall.TGKILL, (None, None, SIGTRAP)),
)
_FILLING = (  # from what has the file's name, or by a copy
    _call(Syscall.OPEN, (None, O_RDONLY_CLOEXEC)),
    _call(Syscall.MMAP, (None, None, _CODE, mmap.MAP_PRIVATE | MAP_FIXED_NOREPLACE)),
    _CLOSE,
    _UNMAP,
    _call(Syscall.MMAP, (None, None, _CODE, _FLAGS, _NO_FILE, 0)),
)
_LEARNING = (  # write_text in trap.c, by either of its ways
    _call(Syscall.OPEN, (None, O_RDWR_CLOEXEC, 0, 0)),
    _call(Syscall.PWRITE64),
    _CLOSE,
    _call(Syscall.MPROTECT, (None, None, _CODE | mmap.PROT_WRITE, 0)),
    _call(Syscall.MPROTECT, (None, None, _CODE, 0)),
    _GETPID,
    _call(Syscall.PROCESS_VM_WRITEV, (None, None, 1, None, 1, 0)),
)


def calls_of(patches: PatchSet) -> Iterator[Call]:
    """All system calls that a process makes for a change: in stubs, and in the handler when a site is hit. Those that
    taking it back will need are among them. A handler library's own are not."""
    yield from _ALWAYS
    parts = [patches]
    if patches.handler is HandlerChange.INSTALL:
        yield from _INSTALLING
        parts.append(patches.inverse())
        for site in patches.sites:
            if site.action is Action.LEARN:
                yield from _LEARNING
            elif site.action is Action.TERMINATE and site.argument != DIE_BY_SIGTRAP:
                yield _call(Syscall.EXIT_GROUP, (site.argument, 0, 0, 0))
    for part in parts:
        for memory in part.add:
            yield _call(Syscall.MMAP, (None, None, memory.protection, _FLAGS, _NO_FILE, 0))
        if part.fill:
            yield from _FILLING
        if part.unmap or part.drop:
            yield _UNMAP


@dataclass
class Confinement:
    """The filters of a process's threads."""

    label: str
    filters: set[Filter] = field(default_factory=set)

    def check(self, patches: PatchSet) -> None:
        """Returns if every filter allows every call that a change needs.

        Raises:
            DynacutError: one may not.
        """
        if not self.filters:
            return
        if patches.handler is HandlerChange.INSTALL and (
            patches.library is not None or any(site.action is Action.HANDLER for site in patches.sites)
        ):
            raise NeedsCheckpointError(
                f"{self.label} runs under seccomp, and what system calls a handler library makes is not known",
                "use actions that need no library",
            )
        self.require(calls_of(patches))

    def require(self, calls: Iterable[Call] = _ALWAYS) -> None:
        """Returns if every filter allows every call; by default those that any change makes.

        Raises:
            DynacutError: one may not.
        """
        for each in dict.fromkeys(calls):
            for one in self.filters:
                objection = one.objection(each)
                if objection is not None:
                    which = f"{each.name}, which the change needs"
                    raise NeedsCheckpointError(f"{self.label} runs under a seccomp filter that {objection} at {which}")


def confinement(process: Process, timeout: float, clock: StopClock) -> Confinement:
    """Reads the filters of all threads, each stopped for an instant; clock counts the stops.

    Raises:
        DynacutError: a filter cannot be read, or does not allow what any change needs.
    """
    found = Confinement(process.label)
    known: dict[bytes, Filter] = {}
    read: set[int] = set()
    deadline = time.monotonic() + timeout
    with prompt_stops():
        while new := [tid for tid in _threads(process.pid) if tid not in read]:  # more may be made meanwhile
            for tid in new:
                try:
                    if task_status(process.pid, tid).seccomp == FILTERED:
                        found.filters.update(_filters(process, tid, known, clock))
                except (ThreadGoneError, FileNotFoundError, ProcessLookupError):
                    pass
                except NoStopError:
                    if time.monotonic() < deadline:
                        time.sleep(_PAUSE)
                        continue
                    raise NeedsCheckpointError(
                        f"thread {tid} of {process.label} could not be stopped to read its seccomp filters",
                        "try again with a longer --timeout",
                    ) from None
                read.add(tid)
    found.require()
    return found


def _threads(pid: int) -> tuple[int, ...]:
    try:
        return thread_ids(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None


def _filters(process: Process, tid: int, known: dict[bytes, Filter], clock: StopClock) -> list[Filter]:
    """One thread's. known: all that were read so far, by their bytes: most threads have the same."""

    def parsed(raw: bytes) -> Filter:
        if raw not in known:
            known[raw] = Filter(raw)
        return known[raw]

    read: list[bytes] = []
    try:
        with urgent(), Tracee(tid) as tracee:
            tracee.interrupt(_STOP_TIMEOUT)
            may_go_on = not makes_restart_syscall(tracee.registers)
            try:
                while (raw := _raw_filter(tid, len(read))) is not None:
                    read.append(raw)
                may_go_on = may_go_on or not any(parsed(each).objection(_RESTART) for each in read)
            finally:
                if not may_go_on:
                    tracee.start_anew()
        clock.add(tracee.stopped_ns)
        return [parsed(each) for each in read]
    except ProcessLookupError:
        raise ThreadGoneError from None
    except (OSError, MalformedFilterError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error} is not understood"
        raise NeedsCheckpointError(
            f"the seccomp filters of {process.label} cannot be read: {reason}",
            "run dynacut as root, outside of containers and filters (CAP_SYS_ADMIN)",
        ) from None


def _raw_filter(tid: int, index: int) -> bytes | None:
    """The bytes of a stopped thread's filter, the newest being number 0; None behind the oldest.

    Raises:
        OSError: it cannot be read.
    """
    try:
        length = call(PTRACE_SECCOMP_GET_FILTER, tid, index)
    except FileNotFoundError:
        return None
    raw = ctypes.create_string_buffer(length * _INSTRUCTION_SIZE)
    call(PTRACE_SECCOMP_GET_FILTER, tid, index, ctypes.addressof(raw))
    return raw.raw
