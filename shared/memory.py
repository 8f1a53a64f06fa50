"""Memory of a target that a change maps or takes away, always in whole pages at absolute addresses."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE

from dynacut.shared.target import Mapping


@dataclass(frozen=True)
class NewMemory:
    """Private memory to map, of no file. size: in bytes; protection: PROT_ bits, as of mmap(2)."""

    address: int
    size: int
    protection: int
    contents: bytes = b""
    """What it begins with; zeros follow."""

    @property
    def is_writable(self) -> bool:
        """Whether the program may change it."""
        return bool(self.protection & PROT_WRITE)

    @property
    def pages(self) -> PageRange:
        """The same, to be unmapped once it is there."""
        readable, writable, executable = (bool(self.protection & bit) for bit in (PROT_READ, PROT_WRITE, PROT_EXEC))
        end = self.address + self.size
        mapping = Mapping(self.address, end, readable, writable, executable, True, 0, "", 0)
        return PageRange(self.address, end, mapping)


@dataclass(frozen=True)
class PageRange:
    """Pages to unmap, or to map back from their file. mapping: what is, or was, mapped there, or around them."""

    start: int
    end: int
    mapping: Mapping

    @property
    def size(self) -> int:
        """Their length in bytes."""
        return self.end - self.start

    @property
    def file_offset(self) -> int:
        """Where their bytes begin in the file."""
        return self.mapping.file_offset + self.start - self.mapping.start
