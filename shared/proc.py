"""What /proc tells about a process and its threads; see proc(5)."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.target import PAGE_SIZE, Mapping

_PF_IO_WORKER, _PF_USER_WORKER = 0x10, 0x4000  # include/linux/sched.h


def read_mappings(pid: int) -> tuple[Mapping, ...]:
    """The VMAs of a process, ascending (proc_pid_maps(5)).

    Raises:
        OSError: no such process, or not permitted.
    """
    return parse_mappings(Path(f"/proc/{pid}/maps").read_bytes())


def parse_mappings(maps: bytes) -> tuple[Mapping, ...]:
    """The VMAs that the contents of a maps file tell of, ascending."""
    mappings = []
    for line in maps.split(b"\n"):  # the kernel escapes no other end of a line: a path may hold \r
        if not line:
            continue
        addresses, permissions, offset, _, inode, *path = line.split(maxsplit=5)
        start, end = addresses.split(b"-")
        mappings.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                readable=permissions[0:1] == b"r",
                writable=permissions[1:2] == b"w",
                executable=permissions[2:3] == b"x",
                private=permissions[3:4] == b"p",
                file_offset=int(offset, 16),
                path=os.fsdecode(path[0]) if path else "",
                inode=int(inode),
            )
        )
    return tuple(mappings)


@dataclass(frozen=True)
class TaskStatus:
    """The fields of proc_pid_status(5) that matter here. Signal sets have bit N-1 for signal N."""

    name: str
    state: str
    """One letter: R, S, D, T, t, Z, X, I."""
    tgid: int
    ppid: int
    tracer: int
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    """Real, effective, saved and file system ids."""
    thread_pending: int
    shared_pending: int
    blocked: int
    ignored: int
    caught: int
    seccomp: int
    """0: none, 1: strict, 2: filter; 0 where the kernel has no seccomp."""
    shadow_stack: bool
    is_kernel_thread: bool
    capabilities: int
    """Those in force (capabilities(7)): bit N for number N."""

    @property
    def has_ended(self) -> bool:
        """Whether it is a zombie, or on its way to be nothing."""
        return self.state in "ZX"


def task_status(pid: int, tid: int | None = None) -> TaskStatus:
    """The status of a process, or of one of its threads.

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    return parse_status(Path(_folder(pid, tid), "status").read_bytes())


def _folder(pid: int, tid: int | None) -> str:
    return f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"


def parse_status(status: bytes) -> TaskStatus:
    """What the contents of a status file tell."""
    fields: dict[str, str] = {}
    for line in status.split(b"\n"):  # a thread may call itself "x\fState:Z", where only \n is escaped
        key, _, content = line.decode(errors="replace").partition(":")
        fields.setdefault(key, content.strip())

    def bits(key: str) -> int:
        return int(fields.get(key, "0"), 16)

    return TaskStatus(
        name=fields["Name"],
        state=fields["State"][0],
        tgid=int(fields["Tgid"]),
        ppid=int(fields["PPid"]),
        tracer=int(fields["TracerPid"]),
        uids=tuple(map(int, fields["Uid"].split())),
        gids=tuple(map(int, fields["Gid"].split())),
        thread_pending=bits("SigPnd"),
        shared_pending=bits("ShdPnd"),
        blocked=bits("SigBlk"),
        ignored=bits("SigIgn"),
        caught=bits("SigCgt"),
        seccomp=int(fields.get("Seccomp", "0")),
        shadow_stack="shstk" in fields.get("x86_Thread_features", "").split(),
        # Kthread: since Linux 6.8; before that a kernel thread is known by having no memory.
        is_kernel_thread=fields.get("Kthread") == "1" or ("VmSize" not in fields and fields["State"][0] not in "ZX"),
        capabilities=bits("CapEff"),
    )


def is_alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        return not task_status(pid).has_ended
    except OSError:
        return False


def executable(pid: int) -> str:
    """The path of a process's executable as /proc/PID/exe has it: with " (deleted)" behind it if it is.

    Raises:
        OSError: it is gone, is a kernel thread, or may not be looked at.
    """
    return str(Path(f"/proc/{pid}/exe").readlink())


def children(pid: int) -> list[int]:
    """The children of all threads of a process, zombies too; fewer where threads end meanwhile.

    Source: /proc/PID/task/TID/children, proc_pid_task(5).
    """
    found: list[int] = []
    with suppress(OSError):
        for tid in thread_ids(pid):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return found


def tree_of(pid: int) -> list[int]:
    """The process and all that descend from it, parents before children, zombies too; only itself if it is gone.

    By the parent that each process names (proc_pid_stat(5)): the children files of proc_pid_task(5) leave out processes
    while others end, and are not in every kernel. A process that is older than its parent has it of a number used
    again.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    began = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208 - half the cost
        with suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_bytes()
            began[int(name)] = start = parse_start_time(stat)
            found.setdefault(_parent_of(stat), []).append((int(name), start))
    tree = [pid]
    for parent in tree:  # grows while it is walked
        tree += [child for child, start in found.get(parent, ()) if start >= began.get(parent, 0)]
    return tree


def resident_bytes(pid: int) -> int:
    """How much memory of a process is resident (proc_pid_statm(5)).

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE


def thread_ids(pid: int) -> tuple[int, ...]:
    """The threads of a process, ascending.

    Raises:
        FileNotFoundError, ProcessLookupError: the process is gone.
    """
    return tuple(sorted(int(name) for name in os.listdir(f"/proc/{pid}/task")))  # noqa: PTH208 - half the cost


def start_time(pid: int, tid: int | None = None) -> int:
    """When a process, or one of its threads, started: in clock ticks since boot (field 22 of proc_pid_stat(5)).

    Tells it from a later one of the same number.

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    return parse_start_time(Path(_folder(pid, tid), "stat").read_bytes())


def parse_start_time(stat: bytes) -> int:
    """The start time that the contents of a stat file tell, in clock ticks since boot."""
    return int(stat.rpartition(b")")[2].split()[19])


def _parent_of(stat: bytes) -> int:
    return int(stat.rpartition(b")")[2].split()[1])


def ran_ns(pid: int, tid: int) -> int:
    """How long a thread has had a processor, in ns (/proc/PID/schedstat, Documentation/scheduler/sched-stats.rst).

    0 where it has ended, or the kernel does not tell.
    """
    try:
        return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_bytes().split()[0])
    except (OSError, IndexError):
        return 0


def is_kernels_own(pid: int, tid: int) -> bool:
    """Whether a thread is one that the kernel has made for a process, as io_uring does, and that never runs its code.

    Known by its flags, field 9 of proc_pid_stat(5). False if it has ended.
    """
    try:
        stat = Path(f"/proc/{pid}/task/{tid}/stat").read_bytes()
    except OSError:
        return False
    return int(stat.rpartition(b")")[2].split()[6]) & (_PF_IO_WORKER | _PF_USER_WORKER) != 0


def auxiliary_vector(pid: int) -> dict[int, int]:
    """What the kernel told the program at its start, by type (getauxval(3))."""
    return dict(struct.iter_unpack("<QQ", Path(f"/proc/{pid}/auxv").read_bytes()))


@dataclass(frozen=True)
class BlockedIn:
    """A system call that a thread waits in: its number, the stack pointer, and the address behind its instruction."""

    number: int
    arguments: tuple[int, ...]
    rsp: int
    rip: int


def blocked_in(pid: int, tid: int) -> BlockedIn | None:
    """The system call a thread is blocked in (proc_pid_syscall(5)); None if it runs or cannot be looked at."""
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    except OSError:
        return None
    if len(fields) != 9 or not fields[0].isdigit():
        return None
    numbers = [int(field, 16) for field in fields[1:]]
    return BlockedIn(int(fields[0]), tuple(numbers[:6]), *numbers[6:])


def command_line(pid: int) -> tuple[str, ...]:
    """The arguments of a process; empty for a zombie or kernel thread."""
    return parse_command_line(Path(f"/proc/{pid}/cmdline").read_bytes())


def parse_command_line(cmdline: bytes) -> tuple[str, ...]:
    """The arguments that the contents of a cmdline file tell."""
    return tuple(os.fsdecode(argument) for argument in cmdline.split(b"\0")[:-1])
