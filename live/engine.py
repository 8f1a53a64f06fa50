"""The engines that a running process can be changed by, and the class that each one is."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from dynacut.handlers.table import Table
from dynacut.live.process import Process
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.patch_set import PatchSet


class Engine(StrEnum):
    """How a process is stopped and written to."""

    PTRACE = "ptrace"
    GDB = "gdb"


class Patching(Protocol):
    """What an engine does to one process."""

    def table(self) -> Table | None:
        """What the process's table says; None if it has none."""

    def restart_clock(self) -> None:
        """Lets the timeout count from now."""

    def apply(self, patches: PatchSet) -> None:
        """Applies a patch set that was resolved against the process as it is; DynacutError if that fails."""


def patcher_of(engine: Engine) -> Callable[[Process, float, StopClock], Patching]:
    """The engine's patcher: from a process, a timeout in seconds, and the clock that counts the stops."""
    if engine is Engine.GDB:
        from dynacut.live.gdb.patcher import GdbPatcher

        return GdbPatcher
    from dynacut.live.ptrace.patcher import Patcher

    return Patcher
