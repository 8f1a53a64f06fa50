"""System calls made by the process's own threads, without gdb's calls of functions and without single steps.

gdb's calls write all registers, which fails where the extended state is larger than gdb knows (AMX), and leave a thread
on a made-up stack should gdb die. A single step is a SIGTRAP: for a thread that blocks or ignores that, the kernel
unblocks it and resets its action (force_sig_info_to_task in kernel/signal.c). So a thread is sent through a stub as by
the ptrace engine: only its rip is set, the process is let go, and held again when the stub, which restores the
registers itself, has run.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynacut.live.gdb.held import PAUSE, Held, HeldThread
from dynacut.live.ptrace.resumption import in_syscall, resumption
from dynacut.live.ptrace.stub import Stub, restoring_tail
from dynacut.shared.binary.dynamic import Dynamic
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError, ExitStatus

_RSEQ_CS_OFFSET = 8
_LONGEST_PAUSE = 0.2
_PATIENCE = 10.0


@dataclass(frozen=True)
class Shot:
    """One stub at its slot, for a thread or, with None, for any; done: whether its effect is there."""

    stub: Stub
    slot: int
    done: Callable[[], bool]
    tid: int | None = None


def shoot(held: Held, shots: Sequence[Shot]) -> None:
    """Sends each shot's thread through its stub, and returns when all are done; the process is held then.

    A shot whose thread has ended is left out.

    Raises:
        DynacutError: a thread is at no safe place until the deadline, or does not come to the stub's end (UNKNOWN).
    """
    waiting, sent = list(shots), list[Shot]()
    pause, patience = PAUSE, time.monotonic() + _PATIENCE  # the timeout is for waiting, not for what goes on already
    while waiting or sent:
        for shot in list(waiting):
            thread = _safe_thread(held, shot.tid)
            if thread is not None:
                _send(held, thread, shot)
                waiting.remove(shot)
                sent.append(shot)
        if sent:
            held.pause(_unfinished(held, sent[0]), pause, patience)
        else:
            held.pause(_not_stopped(held), pause)
        # On a busy machine a thread that is let go gets no processor for a while, and would be held again before that.
        pause = min(2 * pause, _LONGEST_PAUSE)
        sent = [shot for shot in sent if not shot.done() and not _has_ended(held, shot)]
        waiting = [shot for shot in waiting if not _has_ended(held, shot)]


def _send(held: Held, thread: HeldThread, shot: Shot) -> None:
    going_on = resumption(thread.registers)
    held.write(shot.slot, shot.stub.body() + restoring_tail(thread.registers, going_on.rax, going_on.rip))
    held.send(thread, shot.slot)


def _has_ended(held: Held, shot: Shot) -> bool:
    return shot.tid is not None and held.thread(shot.tid) is None


def _safe_thread(held: Held, tid: int | None) -> HeldThread | None:
    """A thread that may be sent elsewhere, best one whose system call the stop has interrupted; None if none may.

    As in the ptrace engine: no signal may be on its way to it, and it must be in no restartable sequence (rseq(2)).
    """
    threads = [thread for thread in held.held_threads if tid in (None, thread.tid) and not thread.moved]
    offset: int | None = None
    for thread in sorted(threads, key=lambda each: not resumption(each.registers).restarts):
        if held.delivers_signal(thread) or held.pending_signals(thread):
            continue
        if in_syscall(thread.registers):
            return thread
        if offset is None:
            offset = _rseq_offset(held)
        area = thread.registers["fs_base"] + offset if offset and thread.registers["fs_base"] else 0
        if not area or held.read(area + _RSEQ_CS_OFFSET, 8) == bytes(8):
            return thread
    return None


def _rseq_offset(held: Held) -> int:
    """Where a thread's struct rseq lies, relative to its thread pointer: glibc's __rseq_offset; 0 if there is none."""
    for module in held.modules:
        if not Path(module.path).name.startswith(("ld-", "libc.")):
            continue
        for symbol in Dynamic(ElfFile.open(module.file)).exported_as("__rseq_offset"):
            (offset,) = struct.unpack("<q", held.read(module.base + symbol.offset, 8))
            return int(offset)
    return 0


def _not_stopped(held: Held) -> DynacutError:
    return DynacutError(
        f"no thread of {held.label} could be stopped at a safe place in time",
        "try again with a longer --timeout, or use --engine ptrace",
    )


def _unfinished(held: Held, shot: Shot) -> DynacutError:
    return DynacutError(
        f"a thread of {held.label} was sent through a stub at {shot.slot:#x}, and what it was to do did not come about",
        "look at the limits of its memory (prlimit --as, cgroup, vm.max_map_count); `dynacut live` on it shows what is "
        "in force",
        status=ExitStatus.UNKNOWN,
    )
