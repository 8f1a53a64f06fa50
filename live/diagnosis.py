"""Whether a running process can be patched on this machine: tried on a child, not guessed from versions."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dynacut.live.admission import YAMA_3_ADVICE, yama_scope
from dynacut.live.gdb.program import ADVICE as GDB_ADVICE
from dynacut.live.gdb.program import speaks_mi
from dynacut.live.ptrace.tracee import NoStopError, ThreadGoneError, Tracee
from dynacut.shared.diagnosis import Area, Finding, State, capability, program, python_package
from dynacut.shared.errors import AS_ROOT, DynacutError
from dynacut.shared.proc import read_mappings, task_status

_STOP_TIMEOUT = 2.0
_AT_MINSIGSTKSZ = 51  # include/uapi/linux/auxvec.h
_PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h
_CONTAINER = "run dynacut outside of the container, or give the container CAP_SYS_PTRACE"


def diagnose() -> list[Finding]:
    """All that the live backend needs, and its gdb engine."""
    with _child() as pid:
        tried = [_stops(pid), _writes(pid), _priority(pid)]
    return [
        _machine(platform.system(), platform.machine(), platform.release()),
        *tried,
        _user(os.geteuid()),
        yama(yama_scope(), may_trace=_may_trace()),
        capability("CAP_SYS_PTRACE", Area.LIVE, "processes of other users cannot be patched", _CONTAINER),
        _seccomp(),
        _map_files(),
        *_signal_frame(),
        *_gdb(),
    ]


@contextmanager
def _child() -> Iterator[int]:
    """A child that does nothing: whoever may trace at all may trace that. It is dumpable, as programs are as a rule;
    dynacut itself may not be, if it was given capabilities."""
    ready, wrote = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            os.write(wrote, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(0)
    try:
        os.close(wrote)
        os.read(ready, 1)
        os.close(ready)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _machine(system: str, machine: str, release: str) -> Finding:
    if (system, machine) == ("Linux", "x86_64"):
        return Finding("kernel", Area.BASIS, State.OK, f"{system} {release}, {machine}")
    costs, mend = "nothing: the handler and the stubs are x86-64 code for Linux", "use dynacut on x86-64 Linux"
    return Finding("kernel", Area.BASIS, State.MISSING, f"{system} {release}, {machine}", costs, mend, essential=True)


def _stops(pid: int) -> Finding:
    """Stops the child as a thread is stopped for a patch, with all that is asked of it there."""
    try:
        with Tracee(pid) as tracee:
            tracee.interrupt(_STOP_TIMEOUT)
            tracee.blocked_signals()
            tracee.pending_signals()
    except (DynacutError, OSError, NoStopError, ThreadGoneError) as error:
        reason = error.problem if isinstance(error, DynacutError) else str(error) or type(error).__name__
        costs = "nothing can be patched live, not even a process of one's own"
        return Finding("ptrace", Area.LIVE, State.MISSING, reason, costs, _CONTAINER, essential=True)
    return Finding("ptrace", Area.LIVE, State.OK, "a child was stopped")


def _writes(pid: int) -> Finding:
    """Writes a byte of the child's code, the one that is there, without being its tracer, as int3 bytes are written."""
    try:
        address = next(each.start for each in read_mappings(pid) if each.executable and not each.writable)
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), os.pread(memory.fileno(), 1, address), address)
    except OSError as error:
        reason = error.strerror or str(error)
        costs = "no int3 can be written: nothing can be patched live"
        mend = f"start Linux with proc_mem.force_override=always, if it restricts this; else {_CONTAINER}"
        return Finding("/proc/PID/mem", Area.LIVE, State.MISSING, reason, costs, mend, essential=True)
    return Finding("/proc/PID/mem", Area.LIVE, State.OK, "code can be written")


def _priority(pid: int) -> Finding:
    name = "real-time priority"
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        costs = "on a busy machine a stop may take milliseconds instead of a tenth of one"
        mend = "run dynacut with CAP_SYS_NICE, or give the user a limit by `prlimit --rtprio`"
        return Finding(name, Area.LIVE, State.LIMITED, error.strerror or str(error), costs, mend)
    return Finding(name, Area.LIVE, State.OK, "permitted")


def _user(uid: int) -> Finding:
    if uid == 0:
        return Finding("user", Area.LIVE, State.OK, "root")
    costs = "only processes of this user can be patched, and none that gave up privileges"
    return Finding("user", Area.LIVE, State.LIMITED, f"uid {uid}, not root", costs, AS_ROOT)


def _may_trace() -> bool:
    return capability("CAP_SYS_PTRACE", Area.LIVE, "", "").state is State.OK


def yama(scope: int | None, *, may_trace: bool) -> Finding:
    """What Yama's ptrace_scope permits. may_trace: whether CAP_SYS_PTRACE is in force.

    Source: Documentation/admin-guide/LSM/Yama.rst.
    """
    if scope is None:
        return Finding("Yama", Area.LIVE, State.OK, "not there")
    found = f"ptrace_scope {scope}"
    if scope == 3:
        costs = "nothing can be patched live: all tracing is forbidden, root's too"
        return Finding("Yama", Area.LIVE, State.MISSING, found, costs, YAMA_3_ADVICE, essential=True)
    if scope == 0 or may_trace:
        return Finding("Yama", Area.LIVE, State.OK, found)
    mend = f"{AS_ROOT}; or sysctl kernel.yama.ptrace_scope=0"
    if scope == 1:
        return Finding("Yama", Area.LIVE, State.LIMITED, found, "only descendants of dynacut can be patched", mend)
    costs = "nothing can be patched live: tracing is for those with CAP_SYS_PTRACE"
    return Finding("Yama", Area.LIVE, State.MISSING, found, costs, AS_ROOT, essential=True)


def _seccomp() -> Finding:
    if task_status(os.getpid()).seccomp != 0:
        costs = "the filter may forbid ptrace and what CRIU calls; what was tried here shows"
        return Finding("seccomp", Area.LIVE, State.LIMITED, "dynacut itself runs under a filter", costs, _CONTAINER)
    reading = capability("CAP_SYS_ADMIN", Area.LIVE, "`dynacut live --check-seccomp` cannot read filters", _CONTAINER)
    found = {State.OK: "dynacut runs without a filter, and may read others'"}.get(reading.state, "no CAP_SYS_ADMIN")
    return replace(reading, name="seccomp", found=found)


def _map_files() -> Finding:
    name = "/proc/PID/map_files"
    try:
        for entry in os.scandir("/proc/self/map_files"):
            os.close(os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC))
            break
    except OSError as error:
        costs = "a program whose file was replaced, as by an upgrade, cannot be compared with what it runs: refused"
        mend = "run dynacut as root, with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE"
        return Finding(name, Area.LIVE, State.LIMITED, error.strerror or str(error), costs, mend)
    return Finding(name, Area.LIVE, State.OK, "readable")


def _signal_frame() -> list[Finding]:
    """How large a signal frame is here (AT_MINSIGSTKSZ of getauxval(3)); kernels before 5.14 do not tell."""
    size = int(ctypes.CDLL(None).getauxval(_AT_MINSIGSTKSZ))
    found = f"{size:,} bytes: what a thread needs on its alternate stack, if it has one"
    return [Finding("signal frame", Area.LIVE, State.OK, found)] if size else []


def _gdb() -> list[Finding]:
    without = "`--engine gdb` does not work"
    gdb = program("gdb", Area.GDB, costs=without, package="gdb")
    remote = "programs cannot be started behind a gdbserver here, for `--remote`; one elsewhere can be used"
    path = shutil.which("gdb")
    if gdb.state is State.OK and path is not None and not speaks_mi(path):
        gdb = replace(gdb, state=State.MISSING, found=f"{gdb.found}: too old", costs=without, mend=GDB_ADVICE)
    return [
        gdb if gdb.state is State.OK else replace(gdb, essential=True),
        python_package("pygdbmi", Area.GDB, without),
        program("gdbserver", Area.GDB, costs=remote, package="gdbserver"),
    ]
