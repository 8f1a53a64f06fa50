"""What a backend applies: exact byte edits with their inverse, and what the table says afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from dynacut.handlers.table import TableSite


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

    edits ascend by address and do not overlap. features and sites are the table's contents afterwards; before_features
    and before_sites are its contents before.
    """

    edits: tuple[ByteEdit, ...]
    handler: HandlerChange
    features: tuple[str, ...]
    sites: tuple[TableSite, ...]
    before_features: tuple[str, ...] = ()
    before_sites: tuple[TableSite, ...] = ()

    def inverse(self) -> PatchSet:
        """The patch set that takes this one back, to be applied after it."""
        back = {HandlerChange.INSTALL: HandlerChange.REMOVE, HandlerChange.REMOVE: HandlerChange.INSTALL}
        handler = back.get(self.handler, HandlerChange.KEEP)
        if handler is HandlerChange.REMOVE and self.before_sites:
            handler = HandlerChange.KEEP  # other features need it
        return PatchSet(
            edits=tuple(edit.inverse() for edit in self.edits),
            handler=handler,
            features=self.before_features,
            sites=self.before_sites,
            before_features=self.features,
            before_sites=self.sites,
        )
