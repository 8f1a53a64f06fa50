"""An opened ELF file: segments, sections, build-id, soname, and its bytes by module offset.

Only struct on the file's bytes: importing pyelftools costs 47 ms, and a whole dynacut command has 300.
Layouts are those of elf(5). A file may be hostile (it can come out of a container): each length is checked
before its use.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

from dynacut.shared.binary.inside_root import open_inside
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE

MMAP_FROM = 64 << 20
"""Files from this size on (bytes) are mapped; smaller ones are copied: nobody can truncate them under us."""

ET_EXEC = 2
ET_DYN = 3
_ADDRESS_LIMIT = 1 << 47  # the end of user space on x86-64 with four page-table levels
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")
_DYNAMIC = struct.Struct("<qQ")
PT_DYNAMIC = 2
_PT_LOAD, _PT_NOTE, _PT_GNU_EH_FRAME = 1, 4, 0x6474E550
_PF_X, _PF_W = 1, 2
SHT_NOBITS = 8
_SHT_NOTE, _SHF_ALLOC = 7, 2
_PN_XNUM = _SHN_XINDEX = 0xFFFF
_NT_GNU_BUILD_ID = 3
_DT_STRTAB, _DT_SONAME = 5, 14


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD: file_offset in the file, offset in the module; sizes in bytes."""

    file_offset: int
    offset: int
    file_size: int
    memory_size: int
    executable: bool
    writable: bool

    @property
    def file_end(self) -> int:
        """The module offset where the file-backed part ends (exclusive)."""
        return self.offset + self.file_size


@dataclass(frozen=True)
class Section:
    """A section header, as in elf(5): address is the vaddr as linked (0 if not loaded), size in bytes."""

    name: str
    kind: int
    flags: int
    address: int
    file_offset: int
    size: int
    link: int
    info: int
    entry_size: int

    @property
    def is_loaded(self) -> bool:
        """Whether the section occupies memory when the program runs (SHF_ALLOC)."""
        return bool(self.flags & _SHF_ALLOC)


@dataclass(frozen=True)
class ProgramHeader:
    """A program header that is no PT_LOAD: where it lies in the file and as linked; flags are PF_ bits."""

    kind: int
    flags: int
    file_offset: int
    address: int
    size: int
    memory_size: int
    alignment: int


class FileIdentity(NamedTuple):
    """Which file it is, and when it was last changed: stat(2)."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Of what stat(2) says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class ElfFile:
    """A little-endian x86-64 ELF64 program or shared object (ET_EXEC, ET_DYN), its bytes taken once.

    All offsets are module offsets: vaddr - link_base. For a PIE or a shared object that is the vaddr itself.
    """

    path: Path
    data: memoryview
    """All bytes of the file."""
    is_fixed: bool
    """ET_EXEC: linked for a fixed address."""
    entry: int
    """The module offset of the entry point; meaningless if the file has none (a shared object)."""
    link_base: int
    """The lowest PT_LOAD vaddr, rounded down to a page."""
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    """In file order, so that a section's link is an index; empty if the file has no section headers."""
    build_id: str | None
    """NT_GNU_BUILD_ID in hex, or None."""

    def __init__(self, path: Path, data: memoryview, *, debug_file: bool = False) -> None:
        """Parse data; see open. debug_file: separate debug information, whose segments hold nothing."""
        self.path = path
        self.data = data
        self.identity: FileIdentity | None = None
        """Which file it was read from."""
        self._debug_file = debug_file
        try:
            self._parse()
        except struct.error as error:
            raise self.malformed("it ends too early") from error

    @classmethod
    def open(cls, path: Path, *, debug_file: bool = False, root: Path | None = None) -> ElfFile:
        """Read the file at path; DynacutError if it cannot be read, is of another kind, or malformed.

        root: if given, path is what a process with that root calls the file, and links are followed as it would.
        """
        try:
            if root is not None:
                descriptor = open_inside(root, path)
            elif not stat.S_ISREG(path.stat().st_mode):  # opening a device may already do something
                raise DynacutError(f"{path} is not a regular file")
            else:
                # O_NONBLOCK: a FIFO or a device that has just taken the file's place must not hang us.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise DynacutError(f"{path} is not a regular file")
                if status.st_size >= MMAP_FROM:
                    data = memoryview(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
                else:
                    data = memoryview(file.read(MMAP_FROM))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise DynacutError(f"{path} cannot be read: {reason}") from error
        elf = cls(path if root is None else root / path.relative_to(path.anchor), data, debug_file=debug_file)
        elf.identity = FileIdentity.of(status)
        return elf

    def malformed(self, what: str) -> DynacutError:
        """Return the error to raise for a broken file."""
        return DynacutError(f"{self.path} is not a sound ELF file: {what}", "check the file, or install it anew")

    def _parse(self) -> None:
        if bytes(self.data[:4]) != b"\x7fELF":
            raise DynacutError(f"{self.path} is not an ELF file")
        fields = _HEADER.unpack_from(self.data)
        ident, kind, machine, _, entry, program_at, section_at, _, _ = fields[:9]
        program_size, program_count, section_size, section_count, names_index = fields[9:]
        if ident[4] != 2 or ident[5] != 1 or machine != 62:
            raise DynacutError(f"{self.path} is not for x86-64", "dynacut works on x86-64 programs only")
        if kind not in (ET_EXEC, ET_DYN):
            raise DynacutError(f"{self.path} is neither a program nor a shared object (ELF type {kind})")
        first_section = None
        if section_at:
            if section_size != _SECTION_HEADER.size:
                raise self.malformed(f"section headers of {section_size} bytes")
            # Counts that do not fit 16 bits are in the first section header (elf(5), PN_XNUM, SHN_XINDEX).
            first_section = _SECTION_HEADER.unpack_from(self.data, self._checked(section_at, section_size))
            section_count = section_count or first_section[5]
            program_count = first_section[7] if program_count == _PN_XNUM else program_count
            names_index = first_section[6] if names_index == _SHN_XINDEX else names_index
        if program_count and program_size != _PROGRAM_HEADER.size:
            raise self.malformed(f"program headers of {program_size} bytes")
        self.is_fixed = kind == ET_EXEC
        self._parse_segments(self._slice(program_at, program_count * _PROGRAM_HEADER.size))
        self.entry = entry - self.link_base
        self.sections = ()
        if first_section is not None:
            self._parse_sections(self._slice(section_at, section_count * section_size), names_index)
        self.build_id = self._find_build_id()

    def _checked(self, file_offset: int, size: int) -> int:
        if file_offset + size > len(self.data):
            raise self.malformed(f"{size} bytes at {file_offset:#x} lie beyond its end")
        return file_offset

    def _slice(self, file_offset: int, size: int) -> memoryview:
        return self.data[self._checked(file_offset, size) : file_offset + size]

    def _parse_segments(self, table: memoryview) -> None:
        loads = []
        self._headers: list[ProgramHeader] = []
        for kind, flags, offset, vaddr, _, file_size, memory_size, align in _PROGRAM_HEADER.iter_unpack(table):
            if kind == _PT_LOAD:
                if file_size > memory_size or vaddr + memory_size > _ADDRESS_LIMIT:
                    raise self.malformed(f"a segment of {memory_size} bytes at {vaddr:#x}")
                if self._debug_file:
                    # objcopy keeps the header, eu-strip even its size: the contents are elsewhere.
                    file_size = 0
                else:
                    self._checked(offset, file_size)
                loads.append((vaddr, offset, file_size, memory_size, bool(flags & _PF_X), bool(flags & _PF_W)))
            else:
                self._headers.append(ProgramHeader(kind, flags, offset, vaddr, file_size, memory_size, align))
        if not loads:
            raise self.malformed("it has nothing to load")
        self.link_base = min(load[0] for load in loads) & -PAGE_SIZE
        loads.sort()
        for before, after in pairwise(loads):
            if before[0] + before[3] > after[0]:
                raise self.malformed(f"segments overlap at {after[0]:#x}")
        self.segments = tuple(
            Segment(offset, vaddr - self.link_base, file_size, memory_size, executable, writable)
            for vaddr, offset, file_size, memory_size, executable, writable in loads
        )

    def _parse_sections(self, table: memoryview, names_index: int) -> None:
        headers = list(_SECTION_HEADER.iter_unpack(table))
        names = b""
        if names_index:
            if names_index >= len(headers):
                raise self.malformed(f"section names in section {names_index} of {len(headers)}")
            names = bytes(self._slice(headers[names_index][4], headers[names_index][5]))
        sections = []
        for name_at, kind, flags, address, offset, size, link, info, _, entry_size in headers:
            end = names.find(b"\0", name_at)
            if name_at and end < 0:
                raise self.malformed("a section's name is outside the table of names")
            name = names[name_at:end].decode("utf-8", "replace")
            sections.append(Section(name, kind, flags, address, offset, size, link, info, entry_size))
        self.sections = tuple(sections)

    def _find_build_id(self) -> str | None:
        places = [(note.file_offset, note.size, note.alignment) for note in self._headers if note.kind == _PT_NOTE]
        if self._debug_file:  # there, PT_NOTE may still say where the notes were in the stripped file
            places = [(note.file_offset, note.size, 4) for note in self.sections if note.kind == _SHT_NOTE]
        for file_offset, size, alignment in places:
            for kind, name, description in self._notes(self._slice(file_offset, size), alignment):
                if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
                    if not 1 <= len(description) <= 64:
                        raise self.malformed(f"a build-id of {len(description)} bytes")
                    return description.hex()
        return None

    def _notes(self, data: memoryview, alignment: int) -> Iterator[tuple[int, bytes, bytes]]:
        mask = 7 if alignment == 8 else 3
        position = 0
        while position + _NOTE.size <= len(data):
            name_size, description_size, kind = _NOTE.unpack_from(data, position)
            name_at = position + _NOTE.size
            description_at = (name_at + name_size + mask) & ~mask
            end = description_at + description_size
            if end > len(data):
                raise self.malformed("a note is longer than its segment")
            yield kind, bytes(data[name_at : name_at + name_size]), bytes(data[description_at:end])
            position = (end + mask) & ~mask

    def section(self, name: str) -> Section | None:
        """Return the first section of that name, or None."""
        return next((section for section in self.sections if section.name == name), None)

    def contents(self, section: Section) -> memoryview:
        """Return a section's raw bytes (compressed if SHF_COMPRESSED); DynacutError if outside the file."""
        if section.kind == SHT_NOBITS:
            return memoryview(b"")
        return self._slice(section.file_offset, section.size)

    def segment_at(self, offset: int) -> Segment | None:
        """Return the PT_LOAD that holds a module offset in memory, or None."""
        for segment in self.segments:
            if segment.offset <= offset < segment.offset + segment.memory_size:
                return segment
        return None

    def view(self, offset: int, size: int) -> memoryview:
        """Return what read does, without a copy."""
        segment = self.segment_at(offset)
        if segment is None or size < 0 or offset + size > segment.file_end:
            raise DynacutError(f"{self.path} has no {size} bytes at offset {offset:#x}")
        start = segment.file_offset + offset - segment.offset
        return self.data[start : start + size]

    def read(self, offset: int, size: int) -> bytes:
        """Return size bytes at a module offset; DynacutError unless one PT_LOAD has them all in the file."""
        return bytes(self.view(offset, size))

    def program_header(self, kind: int) -> ProgramHeader | None:
        """Return the first program header of a kind (PT_, but PT_LOAD), or None."""
        return next((header for header in self._headers if header.kind == kind), None)

    @cached_property
    def dynamic_entries(self) -> tuple[tuple[int, int], ...]:
        """The dynamic section, in its order, as DT_ tags and values; addresses are vaddrs. Empty without one."""
        place = self.program_header(PT_DYNAMIC)
        if place is None or self._debug_file:
            return ()
        data = self.view(place.address - self.link_base, place.size & -_DYNAMIC.size)
        return tuple(takewhile(lambda entry: entry[0] != 0, _DYNAMIC.iter_unpack(data)))

    @cached_property
    def dynamic(self) -> dict[int, int]:
        """The dynamic section by DT_ tag (the first of each); addresses are vaddrs. Empty without one."""
        entries: dict[int, int] = {}
        for tag, value in self.dynamic_entries:
            entries.setdefault(tag, value)
        return entries

    @cached_property
    def soname(self) -> str | None:
        """DT_SONAME, or None; DynacutError if its string is outside the file."""
        if _DT_SONAME not in self.dynamic or _DT_STRTAB not in self.dynamic:
            return None
        offset = self.dynamic[_DT_STRTAB] + self.dynamic[_DT_SONAME] - self.link_base
        segment = self.segment_at(offset)
        if segment is None or offset >= segment.file_end:
            raise self.malformed("its soname lies outside the file")
        name = bytes(self.view(offset, min(256, segment.file_end - offset)))
        return name.partition(b"\0")[0].decode("utf-8", "replace")

    @cached_property
    def code_digest(self) -> bytes:
        """The SHA-256 of all that functions and blocks are found from: 2 ms for redis."""
        import hashlib

        digest = hashlib.sha256(struct.pack("<QQ", self.link_base, self.entry & 0xFFFF_FFFF_FFFF_FFFF))
        digest.update(repr(self.eh_frame_header).encode())
        for segment in self.segments:
            digest.update(struct.pack("<QQ?", segment.offset, segment.file_size, segment.executable))
            digest.update(self.view(segment.offset, segment.file_size))
        for section in self.sections:  # which parts are stubs, where .eh_frame is, and what is exported
            digest.update(repr(section).encode())
            if section.name == ".dynsym":
                digest.update(self.contents(section))
        return digest.digest()

    @property
    def eh_frame_header(self) -> int | None:
        """The module offset of .eh_frame_hdr (PT_GNU_EH_FRAME): there even without section headers."""
        place = self.program_header(_PT_GNU_EH_FRAME)
        return None if place is None else place.address - self.link_base
