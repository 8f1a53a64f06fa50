"""Symbols of a module: from its own tables, its separate debug file, and compressed mini debug information.

Layouts: elf(5). Where debug files are: the manual of gdb, "Debugging Information in Separate Files" and
"MiniDebugInfo".
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dynacut.shared.binary.elf import ElfFile, Section
from dynacut.shared.errors import DynacutError

DEBUG_ROOT = Path("usr/lib/debug")
"""Where distributions install separate debug files, below the target's root."""
MINI_DEBUG_LIMIT = 64 << 20
"""The most bytes that .gnu_debugdata may unpack to."""

_SYMBOL = struct.Struct("<IBBHQQ")
# By STT_ type; 10 is STT_GNU_IFUNC. Left out are sections, files, and TLS, whose values are no addresses.
_KINDS = {0: "untyped", 1: "object", 2: "function", 10: "function"}
_SHN_UNDEF, _SHN_ABS, _SHN_COMMON = 0, 0xFFF1, 0xFFF2
_CONTAINMENT_STEPS = 32
_NAME_LIMIT = 1 << 16  # a hostile file could make millions of symbols share one name of megabytes


class Symbol(NamedTuple):
    """A defined symbol: offset is the module offset, size in bytes (0 if not known).

    kind: 'function' (also STT_GNU_IFUNC: the resolver), 'object' or 'untyped' (labels of assembly code).
    table: the section it comes from: '.symtab' (of the module or its debug file), '.dynsym',
    '.gnu_debugdata'. The name has no version.
    """

    name: str
    offset: int
    size: int
    kind: str
    is_local: bool
    table: str


def symbols(elf: ElfFile, table: str | None = None, name: str | None = None) -> Iterator[Symbol]:
    """Yield the defined symbols of a file's .symtab and .dynsym, or of one of them, or those of one name.

    Looking for one name is fast: 1 ms for 4,000 symbols. DynacutError if a table is malformed.
    """
    for section_name in (".symtab", ".dynsym") if table is None else (table,):
        section = elf.section(section_name)
        if section is not None:
            yield from _of_table(elf, section, elf.link_base, section_name, name)


def _of_table(elf: ElfFile, section: Section, link_base: int, table: str, wanted: str | None) -> Iterator[Symbol]:
    if section.link >= len(elf.sections):
        raise elf.malformed(f"{section.name} has no table of names")
    names = bytes(elf.contents(elf.sections[section.link]))
    data = elf.contents(section)
    entries = _SYMBOL.iter_unpack(data[: len(data) - len(data) % _SYMBOL.size])
    if wanted is None:
        chosen: Iterator[tuple[int, ...]] = entries
    else:
        places = _places(names, wanted.encode())
        chosen = (entry for entry in entries if entry[0] in places)
    for name_at, info, _, section_index, value, size in chosen:
        kind = _KINDS.get(info & 0xF)
        if kind is None or section_index in (_SHN_UNDEF, _SHN_ABS, _SHN_COMMON) or not name_at:
            continue
        end = names.find(b"\0", name_at, name_at + _NAME_LIMIT)
        if end < 0 and name_at + _NAME_LIMIT < len(names):
            continue
        if end < 0:
            raise elf.malformed(f"a symbol's name is outside {section.name}'s names")
        name = names[name_at:end].decode("utf-8", "replace").partition("@")[0]
        if name:
            yield Symbol(name, value - link_base, size, kind, info >> 4 == 0, table)


def _places(names: bytes, name: bytes) -> set[int]:
    """Return where in a table of names a name is, also as another name's tail (linkers merge those)."""
    places: set[int] = set()
    for ending in (b"\0", b"@"):
        position = names.find(name + ending)
        while name and position >= 0:
            places.add(position)
            position = names.find(name + ending, position + 1)
    return places


def find_debug_file(elf: ElfFile, path: Path, root: Path = Path("/")) -> ElfFile | None:
    """Return the separate debug file of a module, opened, or None.

    path: what the target calls the module; root: the target's root directory as we can reach it. Looked at
    are the .build-id tree below usr/lib/debug, then the .gnu_debuglink name beside the module, in .debug/
    there, and below usr/lib/debug/DIR. Only a file with the same build-id counts, or, where either has none,
    with the link's CRC-32.
    """
    candidates: list[Path] = []
    if elf.build_id is not None and len(elf.build_id) > 2:
        candidates.append(DEBUG_ROOT / ".build-id" / elf.build_id[:2] / f"{elf.build_id[2:]}.debug")
    link = _debug_link(elf)
    if link is not None:
        folder = path.parent.relative_to(path.anchor)
        candidates += [folder / link[0], folder / ".debug" / link[0], DEBUG_ROOT / folder / link[0]]
    for candidate in candidates:
        try:
            debug = ElfFile.open(candidate, debug_file=True, root=root)
        except DynacutError:
            continue  # not there, or not what it should be: no reason to refuse work on the module itself
        if elf.build_id is not None and debug.build_id is not None:
            matches = elf.build_id == debug.build_id
        else:
            matches = link is not None and zlib.crc32(debug.data) == link[1]
        if matches and debug.data != elf.data:
            return debug
    return None


def _debug_link(elf: ElfFile) -> tuple[str, int] | None:
    section = elf.section(".gnu_debuglink")
    if section is None:
        return None
    data = bytes(elf.contents(section))
    name, _, _ = data.partition(b"\0")
    crc_at = (len(name) + 4) & ~3
    if not name or b"/" in name or name in (b".", b"..") or crc_at + 4 > len(data):
        return None
    return name.decode("utf-8", "surrogateescape"), int.from_bytes(data[crc_at : crc_at + 4], "little")


def mini_debug(elf: ElfFile) -> ElfFile | None:
    """Return the ELF file inside .gnu_debugdata, or None; DynacutError if it is damaged or too large."""
    section = elf.section(".gnu_debugdata")
    if section is None:
        return None
    import lzma

    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=4 * MINI_DEBUG_LIMIT)
    try:
        data = unpacker.decompress(bytes(elf.contents(section)), max_length=MINI_DEBUG_LIMIT)
    except lzma.LZMAError as error:
        raise elf.malformed(f".gnu_debugdata: {error}") from error
    if not unpacker.eof:
        raise elf.malformed(".gnu_debugdata is cut off or too large")
    return ElfFile(elf.path / ".gnu_debugdata", memoryview(data), debug_file=True)


class SymbolTable:
    """Every symbol known of one module; read on demand, so that looking up one name is fast."""

    def __init__(self, elf: ElfFile, sources: tuple[tuple[ElfFile, str, str], ...], debug: ElfFile | None) -> None:
        """See of. sources: the file, the section in it, and what to call it."""
        self._elf = elf
        self._sources = sources
        self._looked_up: dict[str, tuple[Symbol, ...]] = {}
        self.debug = debug
        """The separate debug file, if there is one."""

    @classmethod
    def of(cls, elf: ElfFile, path: Path, root: Path = Path("/")) -> SymbolTable:
        """Collect where the symbols are; path and root as for find_debug_file. DynacutError if malformed.

        Without .symtab the debug file's is taken, and without that .gnu_debugdata's.
        """
        sources: list[tuple[ElfFile, str, str]] = []
        debug: ElfFile | None = None
        if elf.section(".symtab") is not None:
            sources.append((elf, ".symtab", ".symtab"))
        else:
            debug = find_debug_file(elf, path, root)
            if debug is not None and debug.section(".symtab") is not None:
                sources.append((debug, ".symtab", ".symtab"))
            elif (mini := mini_debug(elf)) is not None:
                sources.append((mini, ".symtab", ".gnu_debugdata"))
        sources.append((elf, ".dynsym", ".dynsym"))
        return cls(elf, tuple(sources), debug)

    def _read(self, name: str | None = None) -> Iterator[Symbol]:
        for file, section_name, table in self._sources:
            section = file.section(section_name)
            if section is not None:
                yield from _of_table(file, section, self._elf.link_base, table, name)

    def lookup(self, name: str) -> tuple[Symbol, ...]:
        """Return the symbols of that name, one per offset, ascending: static functions may share a name."""
        if name not in self._looked_up:
            found: dict[int, Symbol] = {}
            for symbol in self._read(name):
                if symbol.name == name:
                    found.setdefault(symbol.offset, symbol)
            self._looked_up[name] = tuple(found[offset] for offset in sorted(found))
        return self._looked_up[name]

    def near(self, name: str) -> list[str]:
        """Return up to five names like this one, the likeliest first, for an error message."""
        import difflib

        names = sorted({symbol.name for symbol in self._by_offset if symbol.kind == "function"})
        folded = name.lower()
        same = [other for other in names if folded and folded in other.lower()]
        # difflib takes 20 ms for a thousand names: only those of about this length have a chance.
        length = len(name)
        alike = [other for other in names if 0.6 * length <= len(other) <= 1.6 * length][:20_000]
        close = difflib.get_close_matches(name, alike, n=5, cutoff=0.6)
        return list(dict.fromkeys(close + sorted(same, key=len)))[:5]

    def at(self, offset: int) -> tuple[Symbol, int] | None:
        """Return the symbol that contains a module offset and the distance from its start, or None.

        Of several, the innermost; at one offset, functions before others and global names before local ones.
        A symbol of unknown size reaches to the next one in the same segment.
        """
        ordered, starts = self._by_offset, self._starts
        index = bisect_right(starts, offset) - 1
        nearest = starts[index] if index >= 0 else 0
        for symbol in reversed(ordered[max(0, index - _CONTAINMENT_STEPS) : index + 1]):
            distance = offset - symbol.offset
            if distance < symbol.size:
                return symbol, distance
            if symbol.size == 0 and symbol.offset == nearest and self._same_segment(symbol.offset, offset):
                return symbol, distance
        return None

    def _same_segment(self, one: int, other: int) -> bool:
        segment = self._elf.segment_at(one)
        return segment is not None and segment == self._elf.segment_at(other)

    @cached_property
    def _by_offset(self) -> list[Symbol]:
        """All symbols by offset; at one offset the best to name it by comes last."""
        # The last criterion keeps the choice among aliases the same from run to run.
        return sorted(
            set(self._read()),
            key=lambda s: (s.offset, s.size > 0, s.kind == "function", not s.is_local, s.name),
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [symbol.offset for symbol in self._by_offset]
