"""A user's handler library as a file: checked once, then loaded for as many targets as need it."""

from __future__ import annotations

import difflib
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from dynacut.handlers.table import NO_LIBRARY, Table, UserLibrary
from dynacut.shared.binary.dynamic import Dynamic, Rela, SymbolType
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import symbols
from dynacut.shared.errors import DynacutError
from dynacut.shared.library.library import Library
from dynacut.shared.library.linker import Linker, page, page_end
from dynacut.shared.region import Region, free_place
from dynacut.shared.target import PAGE_SIZE, Target

DEFAULT_SYMBOL = "trap_handler"
MAX_FILE_SIZE = 16 << 20
MAX_MEMORY_SIZE = 64 << 20
"""Bytes from its first page to its last one."""
_MAX_SEGMENTS = 32
_MAX_ADDRESS = 1 << 47
_MIN_ADDRESS = 1 << 16
_DISTANCE = 3 << 27
"""From the libraries, in bytes: below where a new region of dynacut comes."""
_PT_TLS, _PT_GNU_STACK = 7, 0x6474E551
_PF_X = 1
_DT_TEXTREL, _DT_FLAGS, _DT_FLAGS_1 = 22, 30, 0x6FFFFFFB
_DF_TEXTREL, _DF_1_PIE = 4, 0x08000000
_DT_INIT_ARRAY, _DT_INIT_ARRAYSZ = 25, 27
_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_JMP_REL32 = 0xE9
_WORD = struct.Struct("<Q")


class LibraryFile:
    """A shared object with a handler, opened and found fit to be mapped."""

    def __init__(self, path: Path, symbol: str) -> None:
        """Opens and checks the file. symbol: the name of its handler.

        Raises:
            DynacutError: it cannot be read, is no shared object for x86-64, has no such function, or asks for what
            only the dynamic linker can give.
        """
        self.path = path
        self.elf = ElfFile.open(path)
        self._dynamic = Dynamic(self.elf)
        self._check_form()
        self._check_segments()
        self.digest = hashlib.sha256(self.elf.data).digest()
        self.handler = self._find_handler(symbol)

    @classmethod
    def parse(cls, text: str) -> LibraryFile:
        """Opens what is written ``LIB.so[:SYMBOL]``; a file whose name has a colon can be given as it is."""
        path, colon, symbol = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text), DEFAULT_SYMBOL)
        return cls(Path(path), symbol)

    def _unfit(self, what: str, advice: str) -> DynacutError:
        return DynacutError(f"{self.path} {what}", advice)

    def _check_form(self) -> None:
        elf, dynamic = self.elf, self.elf.dynamic
        if elf.is_fixed or not dynamic or dynamic.get(_DT_FLAGS_1, 0) & _DF_1_PIE:
            raise self._unfit("is a program, not a shared object", "build it by gcc -shared -fPIC")
        if len(elf.data) > MAX_FILE_SIZE:
            raise self._unfit(
                f"has {len(elf.data):,} bytes, more than {MAX_FILE_SIZE:,}", "strip it, or make it smaller"
            )
        if elf.program_header(_PT_TLS) is not None:
            raise self._unfit(
                "has thread-local variables, for which threads that run already have no room",
                "make them ordinary variables (and mind that threads share these)",
            )
        if _DT_TEXTREL in dynamic or dynamic.get(_DT_FLAGS, 0) & _DF_TEXTREL:
            raise self._unfit("needs its code relocated", "build it with -fPIC")
        stack = elf.program_header(_PT_GNU_STACK)
        if stack is not None and stack.flags & _PF_X:
            raise self._unfit("wants executable stacks", "build it with -z noexecstack, and without nested functions")

    def _check_segments(self) -> None:
        segments = self.elf.segments
        if len(segments) > _MAX_SEGMENTS or segments[-1].offset + segments[-1].memory_size > MAX_MEMORY_SIZE:
            raise self._unfit(
                f"takes up more than {MAX_MEMORY_SIZE:,} bytes, or more than {_MAX_SEGMENTS} segments",
                "use memory that it maps itself, at the first trap",
            )
        for segment in segments:
            if segment.writable and segment.executable:
                raise self._unfit("has a segment that is writable and executable", "link it without -z execstack or -N")
        for before, after in pairwise(segments):
            if page_end(before.offset + before.memory_size) > page(after.offset):
                raise self._unfit("has two segments in one page", "link it with the usual page size")

    def _find_handler(self, name: str) -> int:
        """The module offset of the handler."""
        exported = self._dynamic.exported
        for symbol in exported.get(name, ()):
            segment = self.elf.segment_at(symbol.offset)
            if segment is None or not segment.executable or symbol.kind in (SymbolType.IFUNC, SymbolType.TLS):
                raise self._unfit(f"has {name}, but not as a function", "name a function: --handler LIB.so:FUNCTION")
            return symbol.offset
        near = difflib.get_close_matches(name, exported, n=3, cutoff=0.5) or sorted(exported)[:3]
        known = f"it has {', '.join(near)}" if near else "it exports nothing"
        raise self._unfit(f"exports no {name}", f"{known}; name the function: --handler LIB.so:FUNCTION")

    @cached_property
    def constructors(self) -> tuple[str, ...]:
        """The functions that the dynamic linker would run first, but for the one that gcc adds to every library."""
        place = self.elf.dynamic.get(_DT_INIT_ARRAY)
        if place is None:
            return ()
        count = self.elf.dynamic.get(_DT_INIT_ARRAYSZ, 0) // 8
        first = place - self.elf.link_base
        slots = range(first, first + 8 * count, 8)
        names = {symbol.offset: symbol.name for symbol in symbols(self.elf)}
        return tuple(
            names.get(offset, f"{offset:#x}")
            for slot, offset in sorted(self._own_addresses())
            if slot in slots and not self._is_of_the_compiler(offset)
        )

    def _own_addresses(self) -> Iterator[tuple[int, int]]:
        """The places, as module offsets, that relocations make addresses in the library itself, and of what."""
        base, own = self.elf.link_base, self._dynamic.symbols
        for place, kind, index, addend in self._dynamic.relocations():
            if kind == Rela.RELATIVE:
                yield place, addend - base
            elif kind == Rela.ABSOLUTE and index < len(own) and own[index].is_defined:
                yield place, own[index].offset + addend
        for place in self._dynamic.packed_places():
            yield place, _WORD.unpack(self.elf.read(place, 8))[0] - base

    def _is_of_the_compiler(self, offset: int) -> bool:
        """Whether a constructor is frame_dummy of gcc's crtstuff.c, which does nothing but jump to register_tm_clones.

        That begins with the same address in rdi and rsi where the library has no transactional memory, and returns.
        """
        try:
            code = self.elf.read(offset, 9)
            if code.startswith(_ENDBR64):
                offset, code = offset + 4, code[4:]
            if code[0] != _JMP_REL32:
                return False
            target = offset + 5 + int.from_bytes(code[1:5], "little", signed=True)
            begin = self.elf.read(target, 14)
        except DynacutError:
            return False
        first, second = (int.from_bytes(begin[at : at + 4], "little", signed=True) for at in (3, 10))
        return (begin[:3], begin[7:10]) == (b"\x48\x8d\x3d", b"\x48\x8d\x35") and first == second + 7

    def load(self, target: Target, table: Table | None, address: int | None = None) -> Library:
        """The library relocated for a target.

        table: what the target has; if this very library is mapped in it already, at the same address if one is given,
        it is used again. address: where it shall lie, absolute, a multiple of the page size; None: a free place.

        Raises:
            DynacutError: a library or symbol it needs is not there, or the place is not free.
        """
        linker = Linker(self.path, self._dynamic, target)
        known = table.user if table else NO_LIBRARY
        if known.start and known.digest == self.digest and address in (None, known.start):
            again = self._loaded(linker, known.start)
            if _is_in(target, again):
                return replace(again, is_mapped=True)
        return self._loaded(linker, self._place(target, address))

    def _loaded(self, linker: Linker, start: int) -> Library:
        segments = linker.linked(start)
        action = Region.user_action(start + self.handler)
        record = UserLibrary(action, start, self.digest, str(self.path.absolute()))
        return Library(record, segments, is_mapped=False, bound_to=linker.bound_to)

    def _place(self, target: Target, address: int | None) -> int:
        last = self.elf.segments[-1]
        size = page_end(last.offset + last.memory_size)
        if address is None:
            found = free_place(target, size + 2 * PAGE_SIZE, _DISTANCE)
            if found is None:
                raise DynacutError(f"{target.label} has no gap in its address space for {self.path} ({size} bytes)")
            return found + PAGE_SIZE
        if address % PAGE_SIZE or address < _MIN_ADDRESS or address + size > _MAX_ADDRESS - PAGE_SIZE:
            raise DynacutError(
                f"{address:#x} is no address for a library",
                f"it takes a multiple of {PAGE_SIZE:#x} from {_MIN_ADDRESS:#x} to {_MAX_ADDRESS - PAGE_SIZE - size:#x}",
            )
        for mapping in target.mappings:
            if mapping.start < address + size + PAGE_SIZE and address - PAGE_SIZE < mapping.end:
                raise DynacutError(
                    f"{address:#x} is not free in {target.label}: {mapping.path or 'memory'} lies at "
                    f"{mapping.start:#x}-{mapping.end:#x}",
                    f"{self.path} takes {size:#x} bytes, and a free page on either side",
                )
        return address


def _is_in(target: Target, library: Library) -> bool:
    """Whether a target has just this library mapped already; what it may have written itself is not compared."""
    try:
        return all(
            segment.is_writable or target.read(segment.address, len(segment.contents)) == segment.contents
            for segment in library.segments
        )
    except DynacutError:
        return False
