"""The system calls that dynacut makes a process make: their numbers, and what of their arguments Python does not name.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl in Linux. Flags: mmap(2), open(2), sigprocmask(2), prctl(2).
"""

from __future__ import annotations

from enum import IntEnum


class Syscall(IntEnum):
    """Numbers on x86-64."""

    OPEN = 2
    CLOSE = 3
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    RT_SIGACTION = 13
    RT_SIGPROCMASK = 14
    RT_SIGRETURN = 15
    PWRITE64 = 18
    GETPID = 39
    PRCTL = 157
    GETTID = 186
    RESTART_SYSCALL = 219
    EXIT_GROUP = 231
    TGKILL = 234
    PROCESS_VM_WRITEV = 311
    IO_URING_ENTER = 426


MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
O_RDONLY_CLOEXEC = 0o2000000
O_RDWR_CLOEXEC = 0o2000002
PR_SET_PDEATHSIG = 1
SIG_BLOCK = 0
SIG_UNBLOCK = 1
SIGSET_SIZE = 8
"""Of the kernel's sigset_t, in bytes."""
