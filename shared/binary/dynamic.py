"""What the dynamic linker reads of an ELF file: needed libraries, symbols with their versions, relocations.

Found by the dynamic section alone, as the linker does: section headers may be missing, or lie. Layouts: elf(5), the
System V ABI, and "Symbol Versioning" of the Linux Standard Base for versions. A file may be hostile: whatever it says
is checked before its use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from dynacut.shared.binary.elf import ElfFile

_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_STRSZ = 1, 4, 5, 6, 7, 8, 10
_DT_PLTRELSZ, _DT_PLTREL, _DT_JMPREL, _DT_RELRSZ, _DT_RELR = 2, 20, 23, 35, 36
_DT_GNU_HASH, _DT_VERSYM = 0x6FFFFEF5, 0x6FFFFFF0
_DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_WORD = struct.Struct("<Q")
_VERDEF = struct.Struct("<HHHHIII")
_VERNEED = struct.Struct("<HHIII")
_VERNAUX = struct.Struct("<IHHII")
_VERSION_HIDDEN, _VERSION_MASK = 0x8000, 0x7FFF
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_STB_WEAK = 2
_STB_EXPORTED = frozenset({1, _STB_WEAK, 10})  # global, weak, and GNU's unique
_STV_EXPORTED = frozenset({0, 3})  # default and protected
_MAX_NAME = 4096


class SymbolType(IntEnum):
    """STT_ values that matter here."""

    TLS = 6
    IFUNC = 10


class Rela(IntEnum):
    """Relocation types of the x86-64 psABI that a linked shared object can have."""

    NONE = 0
    ABSOLUTE = 1
    COPY = 5
    GLOB_DAT = 6
    JUMP_SLOT = 7
    RELATIVE = 8
    DTPMOD = 16
    DTPOFF = 17
    TPOFF = 18
    TLSDESC = 36
    IRELATIVE = 37


class DynamicSymbol(NamedTuple):
    """An entry of the dynamic symbol table. offset is the module offset of a defined one.

    version is the one it has, or, undefined, the one it needs (empty: none); is_default: a reference without a version
    may be bound to it. file: of the library that an undefined one is expected in.
    """

    name: str
    offset: int
    kind: int
    is_defined: bool
    is_exported: bool
    is_weak: bool
    version: str
    is_default: bool
    file: str


class Relocation(NamedTuple):
    """place: module offset of the 8 bytes it fills in; symbol: index in the symbol table."""

    place: int
    kind: int
    symbol: int
    addend: int


class _Version(NamedTuple):
    name: str
    file: str


class Dynamic:
    """The dynamic section of an opened ELF file; everything is read on demand, once."""

    def __init__(self, elf: ElfFile) -> None:
        self.elf = elf

    def _view(self, address: int, size: int) -> memoryview:
        return self.elf.view(address - self.elf.link_base, size)

    def _rest(self, address: int, unit: int) -> memoryview:
        """From an address to the end of its segment, in whole units."""
        segment = self.elf.segment_at(address - self.elf.link_base)
        size = 0 if segment is None else segment.file_end + self.elf.link_base - address
        if size < unit:
            raise self.elf.malformed(f"a table at {address:#x} lies outside the file")
        return self._view(address, size - size % unit)

    @cached_property
    def _strings(self) -> bytes:
        dynamic = self.elf.dynamic
        if _DT_STRTAB not in dynamic:
            return b"\0"
        return bytes(self._view(dynamic[_DT_STRTAB], dynamic.get(_DT_STRSZ, 0)))

    def _string(self, position: int) -> str:
        end = self._strings.find(b"\0", position, position + _MAX_NAME)
        if end < 0:
            raise self.elf.malformed("a name lies outside the table of names, or has no end")
        return self._strings[position:end].decode("utf-8", "replace")

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The sonames of the libraries it needs."""
        return tuple(self._string(value) for tag, value in self.elf.dynamic_entries if tag == _DT_NEEDED)

    @cached_property
    def symbols(self) -> tuple[DynamicSymbol, ...]:
        """All symbols by index."""
        if _DT_SYMTAB not in self.elf.dynamic:
            return ()
        count = self._symbol_count()
        data = self._view(self.elf.dynamic[_DT_SYMTAB], count * _SYMBOL.size)
        numbers = [0] * count
        if _DT_VERSYM in self.elf.dynamic:
            numbers = [
                number for (number,) in struct.iter_unpack("<H", self._view(self.elf.dynamic[_DT_VERSYM], 2 * count))
            ]
        return tuple(
            self._symbol(entry, number) for entry, number in zip(_SYMBOL.iter_unpack(data), numbers, strict=True)
        )

    def _symbol(self, entry: tuple[int, ...], number: int) -> DynamicSymbol:
        name_at, info, other, section, value, _ = entry
        binding = info >> 4
        is_defined = section != _SHN_UNDEF
        versions = self._defined_versions if is_defined else self._needed_versions
        version = versions.get(number & _VERSION_MASK, _Version("", ""))
        return DynamicSymbol(
            name=self._string(name_at),
            offset=value - self.elf.link_base,
            kind=info & 0xF,
            is_defined=is_defined,
            is_exported=is_defined and section != _SHN_ABS and binding in _STB_EXPORTED and other & 3 in _STV_EXPORTED,
            is_weak=binding == _STB_WEAK,
            version=version.name,
            is_default=not number & _VERSION_HIDDEN,
            file=version.file,
        )

    @cached_property
    def exported(self) -> dict[str, list[DynamicSymbol]]:
        """The symbols that others may be bound to, by name; several of a name differ in their versions."""
        found: dict[str, list[DynamicSymbol]] = {}
        for symbol in self.symbols:
            if symbol.is_exported and symbol.name:
                found.setdefault(symbol.name, []).append(symbol)
        return found

    def exported_as(self, name: str) -> Sequence[DynamicSymbol]:
        """The exported symbols of one name; the whole table is read only where the hash table has such a name."""
        return self.exported.get(name, ()) if self._is_hashed(name) else ()

    def _is_hashed(self, name: str) -> bool:
        """Whether there may be a definition of a name: its hash is in the table of definitions, if there is one."""
        if _DT_GNU_HASH not in self.elf.dynamic:
            return True
        first, buckets, chains = self._gnu_hash
        wanted = 5381
        for byte in name.encode():
            wanted = (wanted * 33 + byte) & 0xFFFFFFFF
        index = buckets[wanted % len(buckets)] if buckets else 0
        for found in chains[index - first :] if index >= first else ():
            if found | 1 == wanted | 1:
                return True
            if found & 1:  # the end of its bucket's chain
                break
        return False

    @cached_property
    def _gnu_hash(self) -> tuple[int, memoryview, memoryview]:
        """The table of DT_GNU_HASH: the first symbol in it, where each bucket begins, and the hashes of the symbols."""
        table = self.elf.dynamic[_DT_GNU_HASH]
        bucket_count, first, bloom_count, _ = struct.unpack("<4I", self._view(table, 16))
        buckets_at = table + 16 + 8 * bloom_count
        buckets = self._view(buckets_at, 4 * bucket_count).cast("I")
        if max(buckets, default=0) < first:
            return first, buckets, memoryview(b"").cast("I")
        return first, buckets, self._rest(buckets_at + 4 * bucket_count, 4).cast("I")

    def _symbol_count(self) -> int:
        """The number of symbols: no field has it, only the hash tables tell."""
        dynamic = self.elf.dynamic
        if _DT_HASH in dynamic:
            return int(struct.unpack_from("<II", self._view(dynamic[_DT_HASH], 8))[1])
        if _DT_GNU_HASH not in dynamic:
            return 0
        first, buckets, chains = self._gnu_hash
        last = max(buckets, default=0)
        if last < first:
            return first
        for index in range(last - first, len(chains)):
            if chains[index] & 1:
                return first + index + 1
        raise self.elf.malformed("its hash table has no end")

    @cached_property
    def _defined_versions(self) -> dict[int, _Version]:
        """Versions of defined symbols by number; number 1 names the file itself and is no version."""
        found: dict[int, _Version] = {}
        address = self.elf.dynamic.get(_DT_VERDEF)
        for _ in range(self.elf.dynamic.get(_DT_VERDEFNUM, 0)):
            if address is None:
                break
            _, _, number, _, _, names, after = _VERDEF.unpack(self._view(address, _VERDEF.size))
            if number > 1:
                (name_at,) = struct.unpack("<I", self._view(address + names, 4))
                found[number] = _Version(self._string(name_at), "")
            address = address + after if after else None
        return found

    @cached_property
    def _needed_versions(self) -> dict[int, _Version]:
        """Versions that undefined symbols need, by number."""
        found: dict[int, _Version] = {}
        address = self.elf.dynamic.get(_DT_VERNEED)
        for _ in range(self.elf.dynamic.get(_DT_VERNEEDNUM, 0)):
            if address is None:
                break
            _, count, file_at, first, after = _VERNEED.unpack(self._view(address, _VERNEED.size))
            place = address + first
            for _ in range(count):
                _, _, number, name_at, step = _VERNAUX.unpack(self._view(place, _VERNAUX.size))
                found[number & _VERSION_MASK] = _Version(self._string(name_at), self._string(file_at))
                if not step:
                    break
                place += step
            address = address + after if after else None
        return found

    def relocations(self) -> Iterator[Relocation]:
        """All relocations with an addend of their own, those of the procedure linkage table last.

        Raises:
            DynacutError: a table lies outside the file, or is of another kind.
        """
        base = self.elf.link_base
        for place, info, addend in self._relocation_records():
            yield Relocation(place - base, info & 0xFFFFFFFF, info >> 32, addend)

    def _relocation_records(self) -> Iterator[tuple[int, int, int]]:
        """Those of relocations(): place as linked, type and symbol, addend."""
        dynamic = self.elf.dynamic
        tables = [(dynamic.get(_DT_RELA), dynamic.get(_DT_RELASZ, 0))]
        if _DT_JMPREL in dynamic:
            if dynamic.get(_DT_PLTREL) != _DT_RELA:
                raise self.elf.malformed("its procedure linkage table has relocations without addends")
            tables.append((dynamic[_DT_JMPREL], dynamic.get(_DT_PLTRELSZ, 0)))
        for address, size in tables:
            if address is None or not size:
                continue
            yield from _RELA.iter_unpack(self._view(address, size - size % _RELA.size))

    def own_addresses(self) -> Iterator[tuple[int, int, bool]]:
        """The words that relocations make addresses in this module itself: place and address, as module offsets.

        And whether the address is that of a function that will tell what the word becomes (IFUNC). Left out is what
        another module may define instead: the words of GLOB_DAT and JUMP_SLOT.

        Raises:
            DynacutError: a table lies outside the file, or is of another kind.
        """
        base = self.elf.link_base
        names = self.elf.dynamic.get(_DT_SYMTAB)
        for place, info, addend in self._relocation_records():
            kind = info & 0xFFFFFFFF
            if kind in (Rela.RELATIVE, Rela.IRELATIVE):
                yield place - base, addend - base, kind == Rela.IRELATIVE
            elif kind == Rela.ABSOLUTE and names is not None:
                entry = self._view(names + _SYMBOL.size * (info >> 32), _SYMBOL.size)
                _, _, _, section, value, _ = _SYMBOL.unpack(entry)
                if section != _SHN_UNDEF:
                    yield place - base, value + addend - base, False
        for place in self.packed_places():
            yield place, int.from_bytes(self.elf.view(place, 8), "little") - base, False

    def packed_places(self) -> Iterator[int]:
        """The module offsets of the words that DT_RELR says to add the load base to.

        An even entry is a place; an odd one is a bitmap of the 63 words behind the place before it.
        """
        dynamic, base = self.elf.dynamic, self.elf.link_base
        if _DT_RELR not in dynamic or not dynamic.get(_DT_RELRSZ, 0):
            return
        place = 0
        for (entry,) in _WORD.iter_unpack(self._view(dynamic[_DT_RELR], dynamic[_DT_RELRSZ] & -8)):
            if entry & 1 == 0:
                yield entry - base
                place = entry + 8
                continue
            for index in range(63):
                if entry >> (index + 1) & 1:
                    yield place + 8 * index - base
            place += 63 * 8
