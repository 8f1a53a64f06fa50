"""What a plan is resolved against: anything that has modules, memory, threads and signal actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dynacut.handlers.layout import PAGE_SIZE as PAGE_SIZE

if TYPE_CHECKING:
    from dynacut.shared.binary.elf import ElfFile

SIGTRAP = 5
SIGTRAP_BIT = 1 << (SIGTRAP - 1)
"""In a mask of signals."""


@dataclass(frozen=True)
class Mapping:
    """One VMA of the target, as in proc_pid_maps(5). Addresses are absolute and end is exclusive, in bytes."""

    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool
    private: bool
    file_offset: int
    path: str
    """The mapped file, a pseudo-path such as ``[vdso]``, or empty for anonymous memory."""
    inode: int

    @property
    def size(self) -> int:
        """The mapping's length in bytes."""
        return self.end - self.start

    @property
    def is_file(self) -> bool:
        """Whether a file on a disk is mapped."""
        return self.inode != 0 and self.path.startswith("/")


@dataclass(frozen=True)
class Module:
    """An ELF file mapped into the target.

    path is what the target calls it; file is where this process can read the same bytes (for a live process a link
    below /proc/PID/map_files or /proc/PID/root, which also reaches deleted files and other mount namespaces).
    base is the load base: the address at which module offset 0 lies. names are all names it may be called by in a
    site: its file name, the soname without its version, and for the executable also argv[0] and comm.
    """

    name: str
    names: frozenset[str]
    path: str
    file: Path
    root: Path
    """The root of the target's file system, where separate debug information is looked for."""
    base: int
    end: int
    is_executable: bool
    mappings: tuple[Mapping, ...]

    @cached_property
    def executable_mappings(self) -> tuple[Mapping, ...]:
        """The mappings that hold code."""
        return tuple(mapping for mapping in self.mappings if mapping.executable)

    @cached_property
    def elf(self) -> ElfFile:
        """The file, read once; DynacutError if it cannot be read or is malformed."""
        from dynacut.shared.binary.elf import ElfFile

        return ElfFile.open(self.file)

    def take(self, elf: ElfFile) -> None:
        """Makes an ELF file that has been read before this module's, whose very file it is."""
        vars(self)["elf"] = elf  # where the cached property keeps it


class Target(Protocol):
    """A running process or a process in a CRIU image."""

    @property
    def label(self) -> str:
        """How to call the target in messages, such as ``process 4711 (redis-server)``."""

    @property
    def exe(self) -> str:
        """The path of the executable, as the target sees it."""

    @property
    def modules(self) -> Sequence[Module]:
        """Every ELF file that is mapped with code, the executable first."""

    @property
    def mappings(self) -> Sequence[Mapping]:
        """Every VMA, ascending by address."""

    @property
    def has_shadow_stack(self) -> bool:
        """Whether a thread uses a shadow stack, which a forged return would not fit."""

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """The addresses of the pages of a private file mapping that were written to, and so are copies."""

    def read(self, address: int, size: int) -> bytes:
        """Return exactly size bytes of memory at an absolute address; DynacutError if they are not all mapped."""


class Writable(Target, Protocol):
    """A target whose memory can be written to."""

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes, whatever the protection there; DynacutError if they are not all mapped."""
