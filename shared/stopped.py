"""A target that stands still: what can be asked of it and done to it, in an image as in a debugger's hands."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from dynacut.handlers.table import KernelAction
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.target import Writable


class StoppedThread(Protocol):
    """A thread that stands still."""

    @property
    def tid(self) -> int:
        """Its id."""

    @property
    def started(self) -> int:
        """When it started, in clock ticks since boot; 0 where that is not known, or will be another time."""

    @property
    def rip(self) -> int:
        """The address of the next instruction."""

    @property
    def rsp(self) -> int:
        """The stack pointer."""


class StoppedTarget(Writable, Protocol):
    """A target whose threads stand still, to be changed."""

    @property
    def started(self) -> int:
        """When the process started, in clock ticks since boot; 0 where a thread's is not known either."""

    @property
    def threads(self) -> Sequence[StoppedThread]:
        """Every thread."""

    def map_anonymous(self, parts: Sequence[NewMemory]) -> None:
        """Maps memory at just these places, zeros in it for now; DynacutError if they are not free."""

    def map_file(self, pages: PageRange) -> None:
        """Maps unmapped pages of a file back; DynacutError if that is not possible."""

    def unmap(self, pages: PageRange) -> None:
        """Unmaps pages."""

    def caught_signals(self) -> list[int]:
        """The signals that the process handles itself."""

    def action(self, signal: int) -> KernelAction:
        """What is done upon a signal."""

    def set_actions(self, actions: dict[int, KernelAction]) -> None:
        """Changes what is done upon signals."""

    def blocked_signals(self) -> dict[int, int]:
        """The mask of each thread, by its id: the signals it blocks, bit N-1 for signal N."""

    def block_sigtrap(self, tids: Collection[int], *, block: bool) -> None:
        """Makes threads block SIGTRAP or accept it, and nothing else; those that have ended are left out."""
