"""Which modules may be traced: not those that run code of their own with every signal blocked.

The kernel ends a process that runs into an int3 while SIGTRAP is blocked (force_sig_info_to_task in kernel/signal.c).
The masks that threads keep for long are seen to when blocks are armed (live/ptrace/masks.py). The C library is
different: it blocks all signals for the moment in which it makes a thread or a process (pthread_create, posix_spawn,
and since glibc 2.41 fork), and the dynamic linker works for it meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dynacut.live.process import Process
from dynacut.shared.code import Code
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import auxiliary_vector
from dynacut.shared.target import Module

_AT_BASE = 7
# mov $14, %eax (__NR_rt_sigprocmask), then not far off syscall: whoever blocks signals without asking the C library.
_OWN_SIGPROCMASK = re.compile(rb"\xb8\x0e\0\0\0.{0,32}?\x0f\x05", re.DOTALL)
_MASKING_IMPORTS = re.compile(rb"\0(?:pthread_sigmask|sigprocmask)\0")
_SETTING_IMPORTS = re.compile(rb"\0(?:pthread_sigmask|sigprocmask|sigaction|sigsuspend)\0")


def obstacle(process: Process, module: Module) -> str:
    """Why a module cannot be traced; empty if it can.

    Raises:
        DynacutError: its file cannot be read.
    """
    if module.base == auxiliary_vector(process.pid).get(_AT_BASE):
        return "it is the dynamic linker, which works while every signal is blocked"
    elf = Code(module).elf
    for segment in elf.segments:
        if segment.executable and _OWN_SIGPROCMASK.search(elf.view(segment.offset, segment.file_size)):
            return "it blocks every signal while it makes threads, and an int3 hit meanwhile ends the process"
    return ""


def changes_masks(module: Module) -> bool:
    """Whether a library asks the C library to block signals: it may run armed blocks meanwhile, as jemalloc does."""
    elf = Code(module).elf
    names = elf.section(".dynstr")
    return names is not None and _MASKING_IMPORTS.search(elf.contents(names)) is not None


def may_block_all_signals(module: Module) -> bool:
    """Whether a module's own code may block all signals some time: it asks for a full set of them, and sets masks.

    Threads and handlers that do so already are seen to when blocks are armed; not those that come later.
    """
    elf = Code(module).elf
    names = elf.section(".dynstr")
    contents = bytes(elf.contents(names)) if names is not None else b""
    return b"\0sigfillset\0" in contents and _SETTING_IMPORTS.search(contents) is not None


def without_untraceable(process: Process, modules: Iterable[Module]) -> tuple[list[Module], list[Module]]:
    """The modules that can be traced without a doubt, and those that are to be left out where all are asked for."""
    kept: list[Module] = []
    left_out: list[Module] = []
    for module in modules:
        doubtful = bool(obstacle(process, module)) or (not module.is_executable and changes_masks(module))
        (left_out if doubtful else kept).append(module)
    return kept, left_out


def check_traceable(process: Process, modules: Iterable[Module]) -> None:
    """Returns if all of the modules can be traced.

    Raises:
        DynacutError: one cannot.
    """
    for module in modules:
        if reason := obstacle(process, module):
            advice = "trace the program and its other libraries; --all-modules leaves out what must be"
            if module.is_executable:
                advice = "the C library, or a runtime of its own, is part of it: build it with a shared C library"
            raise DynacutError(f"{module.name} of {process.label} cannot be traced: {reason}", advice)
