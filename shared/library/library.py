"""A user's handler library, ready to be mapped into a target: all its bytes, for their addresses."""

from __future__ import annotations

from dataclasses import dataclass

from dynacut.handlers.table import UserLibrary
from dynacut.shared.memory import NewMemory
from dynacut.shared.target import PAGE_SIZE


@dataclass(frozen=True)
class Library:
    """A library relocated for its place in one target. Segments ascend, and are apart from everything else mapped."""

    record: UserLibrary
    """What the table says of it once it is in force."""
    segments: tuple[NewMemory, ...]
    is_mapped: bool
    """Whether its segments are in the target already."""
    bound_to: tuple[int, ...]
    """The load bases of the target's modules that it holds addresses of."""

    @property
    def range(self) -> range:
        """All its addresses, with a free page on either side: neighbours of the same protection would merge with it."""
        last = self.segments[-1]
        return range(self.segments[0].address - PAGE_SIZE, last.address + last.size + PAGE_SIZE)
