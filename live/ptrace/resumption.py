"""How an interrupted thread has to go on for its stop not to show: what the kernel would do, and a little more."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import NamedTuple

from dynacut.live.syscalls import Syscall

_NEGATIVE = 1 << 63
SYSCALL_SIZE = 2
"""Bytes of a syscall instruction, and of int 0x80."""

# include/linux/errno.h: what a stopped thread's rax shows of an interrupted system call that the kernel will restart.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
STARTS_ANEW = (1 << 64) - ERESTARTNOHAND
"""The rax of an interrupted call that is to be made again as it was, unless a signal is handled first."""
# signal(7): these fail with EINTR after any stop, even without a signal, the socket calls where a timeout is set. A
# ptrace stop must not show, so they are started again; having failed with EINTR they have done nothing yet.
# semop, rt_sigtimedwait, semtimedop, io_getevents, epoll_wait, epoll_pwait, epoll_pwait2, io_uring_enter;
# read, write, readv, writev, accept, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg, sendmmsg.
_NEVER_RESTARTED = frozenset({65, 128, 220, 208, 232, 281, 441, 426, 0, 1, 19, 20, 43, 44, 45, 46, 47, 288, 299, 307})


class Resumption(NamedTuple):
    """Where an interrupted thread has to go on, and with which rax, for the stop not to show."""

    rip: int
    rax: int
    restarts: bool
    """Whether a system call is made again."""
    undecided_rax: int
    """Where one is: the rax that leaves it to the kernel. It starts the call again when the thread goes on, unless a
    signal is handled first, which may be one that arrives until then: that turns it into EINTR, as ever."""


def starts_anew(number: int) -> bool:
    """Whether a system call that a stop has interrupted waits for its whole timeout again.

    Those that the kernel itself starts again go on with what is left of it (restart_syscall(2)).
    """
    return number in _NEVER_RESTARTED


def never_runs(registers: Mapping[str, int]) -> bool:
    """Whether a stopped thread is one of the kernel's own, as io_uring has: it never runs the program's code.

    Its registers say so, for the sake of debuggers (copy_thread in arch/x86/kernel/process.c).
    """
    return registers["rip"] == registers["rsp"] == 0


def in_syscall(registers: Mapping[str, int]) -> bool:
    """Whether a stop interrupted a system call rather than the thread's own code."""
    return registers["orig_rax"] < _NEGATIVE


def was_interrupted(registers: Mapping[str, int]) -> bool:
    """Whether a stop made a system call fail with EINTR, which the kernel will not start again."""
    return in_syscall(registers) and registers["rax"] == (1 << 64) - errno.EINTR


def makes_restart_syscall(registers: Mapping[str, int]) -> bool:
    """Whether a thread goes on by restart_syscall(2) with what a stop has interrupted."""
    return in_syscall(registers) and registers["rax"] == (1 << 64) - ERESTART_RESTARTBLOCK


def resumption(registers: Mapping[str, int]) -> Resumption:
    """Where and how a thread has to go on as if it had not been stopped. registers: unsigned, by their names."""
    rip, rax = registers["rip"], registers["rax"]
    if not in_syscall(registers):
        return Resumption(rip, rax, restarts=False, undecided_rax=rax)
    number = registers["orig_rax"]
    code = (1 << 64) - rax  # the error, of a failed system call
    again = rip - SYSCALL_SIZE
    if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
        return Resumption(again, number, restarts=True, undecided_rax=rax)
    if code == ERESTART_RESTARTBLOCK:
        return Resumption(again, Syscall.RESTART_SYSCALL, restarts=True, undecided_rax=rax)
    if code == errno.EINTR and number in _NEVER_RESTARTED:
        # As after any signal handler, with SA_RESTART or without.
        return Resumption(again, number, restarts=True, undecided_rax=STARTS_ANEW)
    return Resumption(rip, rax, restarts=False, undecided_rax=rax)
