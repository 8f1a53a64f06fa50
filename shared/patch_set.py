"""What a backend applies: exact byte edits with their inverse, and what the table says afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from dynacut.handlers.table import NO_LIBRARY, Table, TableSite, UserLibrary
from dynacut.shared.library.library import Library
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.target import Target


@dataclass(frozen=True)
class ByteEdit:
    """A replacement of bytes at an absolute address; old and new are equally long."""

    address: int
    old: bytes
    new: bytes

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + len(self.old)

    def inverse(self) -> ByteEdit:
        """The edit that takes this one back."""
        return replace(self, old=self.new, new=self.old)


class HandlerChange(Enum):
    """What happens to the handler and SIGTRAP's action."""

    INSTALL = "install"
    """Map it if it is not there, and make it SIGTRAP's action."""
    KEEP = "keep"
    REMOVE = "remove"
    """Put the target's own action and signal masks back; the code stays mapped, a thread may be in it."""


@dataclass(frozen=True)
class PatchSet:
    """Everything a backend has to do.

    edits ascend by address and do not overlap. features and sites are the table's contents afterwards; before_features,
    before_sites and before_user are its contents before. library: the user's, to be put in force; None leaves things as
    they are, but that REMOVE takes any out of force.
    """

    edits: tuple[ByteEdit, ...]
    handler: HandlerChange
    features: tuple[str, ...]
    sites: tuple[TableSite, ...]
    before_features: tuple[str, ...] = ()
    before_sites: tuple[TableSite, ...] = ()
    before_user: UserLibrary = NO_LIBRARY
    library: Library | None = None
    unmap: tuple[PageRange, ...] = ()
    """Pages to take away, after the edits."""
    fill: tuple[PageRange, ...] = ()
    """Pages to map back, before the edits."""
    add: tuple[NewMemory, ...] = ()
    """Memory to map, before the edits."""
    drop: tuple[PageRange, ...] = ()
    """Memory that was added before, to take away, after the edits."""

    @property
    def changes(self) -> bool:
        """Whether the target is different afterwards."""
        ends_library = self.handler is HandlerChange.REMOVE and self.before_user.is_in_force
        return (
            bool(self.edits or self.unmap or self.fill or self.add or self.drop)
            or self.features != self.before_features
            or self.library is not None
            or ends_library
        )

    @property
    def had_handler(self) -> bool:
        """Whether the handler was needed before."""
        return bool(self.before_sites) or self.before_user.is_in_force

    def inverse(self) -> PatchSet:
        """The patch set that takes this one back, to be applied after it. Where the handler stays, a library does.

        Memory that this one takes away is not had back: its contents are lost.
        """
        back = {HandlerChange.INSTALL: HandlerChange.REMOVE, HandlerChange.REMOVE: HandlerChange.INSTALL}
        handler = back.get(self.handler, HandlerChange.KEEP)
        if handler is HandlerChange.REMOVE and self.had_handler:
            handler = HandlerChange.KEEP
        return PatchSet(
            edits=tuple(edit.inverse() for edit in self.edits),
            unmap=self.fill,
            fill=self.unmap,
            drop=tuple(part.pages for part in self.add),
            handler=handler,
            features=self.before_features,
            sites=self.before_sites,
            before_features=self.features,
            before_sites=self.sites,
            before_user=self.library.record if self.library else self.before_user,
        )


def outside(edits: Iterable[ByteEdit], holes: Sequence[PageRange]) -> tuple[ByteEdit, ...]:
    """What remains of edits where pages are mapped back from their file, and so have the old bytes again."""
    pieces = list(edits)
    for hole in holes:
        cut: list[ByteEdit] = []
        for edit in pieces:
            for start, end in ((edit.address, min(edit.end, hole.start)), (max(edit.address, hole.end), edit.end)):
                if start < end:
                    part = slice(start - edit.address, end - edit.address)
                    cut.append(ByteEdit(start, edit.old[part], edit.new[part]))
        pieces = cut
    return tuple(pieces)


Resolve = Callable[[Target, Table | None], PatchSet]
"""From a target and its table to what is to be done."""
