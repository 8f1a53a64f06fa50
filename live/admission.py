"""Whether a process may be patched at all: every reason against it is found before anything is touched."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from dynacut.live.freezer import freezing_cgroup
from dynacut.live.own_memory import await_own_memory
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.errors import AS_ROOT, DynacutError
from dynacut.shared.proc import TaskStatus, task_status, thread_ids
from dynacut.shared.running import gone, program_status

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_ELFCLASS64 = 2
_SHARING = 0.5
"""Seconds in which a vfork is over, as a rule."""
FILTERED = 2
"""The mode of seccomp of a thread that has filters, in /proc/PID/status."""
ASK_FILTERS = "use `dynacut live --check-seccomp`, which asks the filter first"
"""For admit(): where a filter may be asked."""
ANOTHER_ENGINE = "use --check-seccomp, which asks the filter first, without --engine gdb"
"""For admit(): where it may not, but by the ptrace engine."""
YAMA_3_ADVICE = (
    "set kernel.yama.ptrace_scope lower in /etc/sysctl.d and start the machine again: it cannot be lowered before, and "
    "CRIU may not trace either"
)


def admit(pid: int, *, changing: bool, filtered: bool = False, otherwise: str | None = None) -> None:
    """Returns if the process may be looked at or, with changing, patched. filtered: also one with seccomp filters.

    otherwise: what can be done about such a filter, besides a checkpoint; None where an image is of no use either, as
    to what traces or tries.

    Raises:
        DynacutError: it may not; the reason and the way out are named, nothing has been touched.
    """
    if pid == os.getpid():
        raise DynacutError("dynacut does not patch itself", "give the pid of another process")
    status = program_status(pid)
    label = f"process {pid} ({status.name})"
    _check_permission(pid, label, status)
    _check_class(pid, label)
    if not changing:
        return
    check_not_stopped(pid, label, status)
    try:
        _check_not_frozen(pid, label)
        for tid in thread_ids(pid):
            with suppress(OSError):  # a thread that ends meanwhile
                _check_thread(label, task_status(pid, tid), filtered=filtered, otherwise=otherwise)
        await_own_memory(pid, time.monotonic() + _SHARING)
    except OSError:
        raise gone(pid) from None


def is_there(pid: int) -> bool:
    """Whether a process may be looked at: it is there, no zombie, and this user's to look at."""
    try:
        admit(pid, changing=False)
    except DynacutError:
        return False
    return True


def check_not_stopped(pid: int, label: str, status: TaskStatus) -> None:
    """Refuses a process that a signal has stopped."""
    if status.state == "T":
        raise DynacutError(f"{label} is stopped by a signal", f"let it go on first: kill -CONT {pid}")


def _check_not_frozen(pid: int, label: str) -> None:
    frozen = freezing_cgroup(pid)
    if frozen is not None:
        raise DynacutError(
            f"{label} is frozen by its cgroup, {frozen}",
            "let it go on first: systemctl thaw, docker unpause, or whatever froze it",
        )


def check_not_traced(label: str, status: TaskStatus, tracer: str) -> None:
    """Refuses a process that somebody else traces, who is called so."""
    if status.tracer:
        raise DynacutError(
            f"{label} is traced already, by process {status.tracer}{tracer}",
            "end that debugger or tracer first; CRIU cannot dump a traced process either",
        )


def _check_thread(label: str, status: TaskStatus, *, filtered: bool, otherwise: str | None) -> None:
    """Tracers and seccomp filters are a matter of each thread."""
    if status.tracer:
        check_not_traced(label, status, f" ({_name(status.tracer)})")
    if not status.seccomp or (filtered and status.seccomp == FILTERED):
        return
    mode = "a filter" if status.seccomp == FILTERED else "strict mode"
    problem = f"{label} runs under seccomp ({mode}), which may end it when it makes a system call for dynacut"
    if otherwise is None:
        raise DynacutError(problem, "use an instance of the same program that runs without the filter")
    raise NeedsCheckpointError(problem, otherwise if status.seccomp == FILTERED else "")


def _check_permission(pid: int, label: str, status: TaskStatus) -> None:
    """Opening /proc/PID/mem is allowed to just whom ptrace is allowed to (ptrace_may_access)."""
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
        return
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise DynacutError(
                f"the memory of {label} cannot be opened: {error.strerror}", "see whether it still runs"
            ) from None
    raise DynacutError(*_why_not_permitted(pid, label, status))


def _why_not_permitted(pid: int, label: str, status: TaskStatus) -> tuple[str, str]:
    me = os.geteuid()
    if me != 0 and any(uid != me for uid in status.uids[:3]):
        return (
            f"{label} belongs to another user (uid {status.uids[0]})",
            AS_ROOT,
        )
    if me != 0 and Path(f"/proc/{pid}/status").stat().st_uid != me:
        return (
            f"{label} is not dumpable: it changed its privileges, or forbade it by prctl(PR_SET_DUMPABLE)",
            AS_ROOT,
        )
    scope = yama_scope()
    if scope == 3:
        return f"{label} may not be traced: Yama forbids all tracing (ptrace_scope 3)", YAMA_3_ADVICE
    if scope in (1, 2) and me != 0:
        return (
            f"{label} may not be traced: Yama allows {'parents' if scope == 1 else 'root'} only (ptrace_scope {scope})",
            AS_ROOT,
        )
    return (
        f"{label} may not be traced from here: it lies in another user namespace or container, or a security module "
        "forbids it",
        "run dynacut outside of the container, with CAP_SYS_PTRACE",
    )


def yama_scope(setting: Path = _YAMA) -> int | None:
    """Yama's ptrace_scope (Documentation/admin-guide/LSM/Yama.rst); None where Yama is not there."""
    try:
        return int(setting.read_text())
    except (OSError, ValueError):
        return None


def _check_class(pid: int, label: str) -> None:
    try:
        with Path(f"/proc/{pid}/exe").open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise DynacutError(
            f"the executable of {label} cannot be read: {error.strerror}", "see whether it still runs"
        ) from None
    if header[:4] != b"\x7fELF" or header[4] != _ELFCLASS64:
        raise DynacutError(f"{label} is a 32-bit program", "dynacut patches 64-bit x86-64 programs only")
    if header[18:20] != b"\x3e\x00":
        raise DynacutError(f"{label} is not an x86-64 program", "dynacut patches 64-bit x86-64 programs only")


def _name(pid: int) -> str:
    try:
        return task_status(pid).name
    except OSError:
        return "gone"
