"""What a table is made of: actions, sites, repairs, and the user's library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

from dynacut.handlers.layout import ACTION, LIBRARY, LIBRARY_OFFSET, PATH_SIZE, USER_OFFSET

INT3 = b"\xcc"
"""What code is patched with: an instruction of one byte that traps."""


class Action(IntEnum):
    """What a hit does; the values are those of enum dynacut_action."""

    TERMINATE = 1
    REDIRECT = 2
    RETURN = 3
    SKIP = 4
    LEARN = 5
    HANDLER = 6
    EDIT = 7
    UNMAP = 8
    MAP = 9


RANGES = (Action.UNMAP, Action.MAP)
"""Actions of what is no place in code, but a range of pages."""


class RepairKind(IntEnum):
    """What was changed so that SIGTRAP is not blocked."""

    THREAD_MASK = 1
    SIGNAL_MASK = 2


@dataclass(frozen=True)
class KernelAction:
    """struct kernel_sigaction of x86-64; bit N-1 of mask is signal N."""

    handler: int = 0
    flags: int = 0
    restorer: int = 0
    mask: int = 0

    def pack(self) -> bytes:
        """The 32 bytes that rt_sigaction(2) takes."""
        return ACTION.pack(self.handler, self.flags, self.restorer, self.mask)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> KernelAction:
        """Reads 32 bytes that rt_sigaction(2) gave."""
        return cls(*ACTION.unpack_from(data, offset))


@dataclass(frozen=True, slots=True)
class TableSite:
    """One patched place. old and new have the same length: the number of bytes that are patched."""

    address: int
    feature: str
    action: Action
    argument: int
    size: int
    """Of the basic block that the site stands for, in bytes. Of MAP something else: protection."""
    old: bytes
    new: bytes
    hits: int = field(default=0, compare=False)
    order: int = field(default=0, compare=False)
    """Of a block that learns: the number of its last hit among all such hits; 0 if it was not hit."""

    @classmethod
    def unmapped(cls, address: int, feature: str, size: int) -> TableSite:
        """What says that so many bytes of whole pages are unmapped."""
        return cls(address, feature, Action.UNMAP, size, 0, b"", b"")

    @classmethod
    def mapped(cls, address: int, feature: str, size: int, protection: int) -> TableSite:
        """What says that so many bytes of memory were added. protection: PROT_ bits."""
        return cls(address, feature, Action.MAP, size, protection, b"", b"")

    @property
    def is_range(self) -> bool:
        """Whether it is no place in code, but a range of pages that was unmapped or mapped."""
        return self.action in RANGES

    @property
    def range_size(self) -> int:
        """Of a range: its bytes. They are kept as the argument."""
        return self.argument

    @property
    def protection(self) -> int:
        """Of MAP: PROT_ bits. They are kept as the size."""
        return self.size

    @property
    def end(self) -> int:
        """The address behind the last patched byte."""
        return self.address + len(self.old)

    def key(self) -> tuple[int, int]:
        """For sorting: what patches no bytes comes first, or the handler would find it instead of the site it hides."""
        return self.address, len(self.old)


class Repair(NamedTuple):
    """A mask that was cleared of SIGTRAP: of a thread (id, start time in clock ticks) or of a signal's handler."""

    kind: RepairKind
    id: int
    start_time: int
    mask: int = 0
    """As it was before."""


@dataclass(frozen=True)
class Write:
    """Bytes to put at an offset of the table."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class UserLibrary:
    """The user's handler library, as the table records it. It stays mapped when it is out of force."""

    action: KernelAction = KernelAction()
    """How its handler is called; a handler of 0 is out of force."""
    start: int = 0
    """The absolute address it is mapped at; 0: there is none."""
    digest: bytes = bytes(32)
    """SHA-256 of its file."""
    path: str = ""

    @property
    def is_in_force(self) -> bool:
        """Whether traps go to it."""
        return self.action.handler != 0

    def out_of_force(self) -> UserLibrary:
        """The same library, with no trap going to it."""
        return replace(self, action=KernelAction())

    def writes(self) -> Iterator[Write]:
        """The writes, in their order, that record it. The handler's address puts it in force: what belongs to it is
        there before it, and until it is gone.
        """
        path = self.path.encode(errors="surrogateescape")
        if len(path) >= PATH_SIZE:
            path = b"..." + path[-(PATH_SIZE - 4) :]
        action = self.action.pack()
        address = Write(USER_OFFSET, action[:8])
        rest = Write(USER_OFFSET + 8, action[8:] + LIBRARY.pack(self.start, self.digest, path))
        yield from (rest, address) if self.is_in_force else (address, rest)

    @classmethod
    def unpack(cls, data: bytes) -> UserLibrary:
        """Reads what a table's header records."""
        start, digest, path = LIBRARY.unpack_from(data, LIBRARY_OFFSET)
        name = path.split(b"\0", 1)[0].decode(errors="surrogateescape")
        return cls(KernelAction.unpack(data, USER_OFFSET), start, digest, name)


NO_LIBRARY = UserLibrary()
