"""What a running process, or a tree of them, tells of its code: blocks it has learned, and where its threads stand."""

from __future__ import annotations

from collections.abc import Iterator

from dynacut.live.admission import admit
from dynacut.live.process import Process
from dynacut.live.ptrace.stops import prompt_stops
from dynacut.live.ptrace.window import all_stopped
from dynacut.live.tree import descendants
from dynacut.shared.coverage.coverage import Coverage, union_of_all
from dynacut.shared.coverage.keep import learned_blocks
from dynacut.shared.coverage.standing import standing_of
from dynacut.shared.errors import DynacutError
from dynacut.shared.region import find_region


def learned(pid: int, *, tree: bool) -> Coverage:
    """The blocks with the action ``learn`` that were hit, in the order of their hits; of a tree, those of any process.

    What a descendant learned that has ended since is not known.

    Raises:
        DynacutError: the process cannot be looked at.
    """
    parts = []
    for process in _opened(pid, tree=tree, changing=False):
        found = find_region(process)
        parts.append(learned_blocks(process, found.table if found else None))
    return union_of_all(parts)


def standing(pid: int, *, tree: bool) -> Coverage:
    """The code that threads are in or return to; they are stopped for a moment, the processes one after the other.

    Raises:
        DynacutError: a thread cannot be stopped.
    """
    parts = []
    for process in _opened(pid, tree=tree, changing=True):
        with prompt_stops(), all_stopped(process) as tracees:
            registers = [tracee.registers for tracee in tracees.values()]
            process.refresh()
            parts.append(standing_of(process, [(each["rip"], each["rsp"]) for each in registers]))
    return union_of_all(parts)


def _opened(pid: int, *, tree: bool, changing: bool) -> Iterator[Process]:
    """The process and, with tree, its descendants that run the same program, opened one after the other."""
    exe = None
    for each in descendants(pid) if tree else [pid]:
        try:
            admit(each, changing=changing)
            process = Process(each)
        except DynacutError:
            if each == pid:
                raise
            continue  # it has ended meanwhile, or is a zombie
        with process:
            exe = exe or process.exe
            if process.exe == exe:
                yield process
