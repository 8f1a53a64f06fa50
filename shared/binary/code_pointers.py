"""Where code is entered without a direct branch: pointers in data, exported symbols, jump tables.

Relocations: the x86-64 psABI, "Relocation Types"; DT_RELR: the generic ABI. Jump tables: what gcc and clang
emit for switch statements.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator

from dynacut.shared.binary.dynamic import Dynamic
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import landing_pads
from dynacut.shared.binary.symbols import symbols

_RELA = struct.Struct("<QQq")
_WORD = struct.Struct("<Q")
_TABLE_ENTRY = struct.Struct("<i")
_SYMBOL_VALUE = struct.Struct("<IBBHQ")
_DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_INIT, _DT_FINI = 6, 7, 8, 12, 13
_R_64, _R_RELATIVE, _R_IRELATIVE = 1, 8, 37


def code_pointers(elf: ElfFile, start: int, end: int) -> set[int]:
    """Return the module offsets in [start, end) that data, the dynamic linker or the unwinder may jump to.

    From relocations, exported functions, the entry point, DT_INIT and DT_FINI, and C++ landing pads. A
    program linked for a fixed address has no relocations that would tell: there, each aligned word with an
    address in the range counts. DynacutError if a table is malformed.
    """
    found = {elf.entry, *landing_pads(elf)}
    found.update(symbol.offset for symbol in symbols(elf, ".dynsym") if symbol.kind == "function")
    base = elf.link_base
    found.update(elf.dynamic[tag] - base for tag in (_DT_INIT, _DT_FINI) if tag in elf.dynamic)
    found.update(value - base for value in _relocated(elf))
    found.update(_WORD.unpack(elf.view(place, 8))[0] - base for place in Dynamic(elf).packed_places())
    if elf.is_fixed:
        low, high = start + base, end + base
        for segment in elf.segments:
            skip = -segment.offset % 8
            size = max(0, segment.file_size - skip) & -8
            if size:
                words = elf.view(segment.offset + skip, size).cast("Q")
                found.update(word - base for word in words if low <= word < high)
    return {offset for offset in found if start <= offset < end}


def _relocated(elf: ElfFile) -> Iterator[int]:
    """Yield the link-time addresses that the relocations in DT_RELA write."""
    table, size = elf.dynamic.get(_DT_RELA), elf.dynamic.get(_DT_RELASZ, 0)
    if table is None or not size:
        return
    names = elf.dynamic.get(_DT_SYMTAB)
    for _, info, addend in _RELA.iter_unpack(elf.view(table - elf.link_base, size - size % _RELA.size)):
        kind = info & 0xFFFF_FFFF
        if kind in (_R_RELATIVE, _R_IRELATIVE):
            yield addend
        elif kind == _R_64 and names is not None:
            entry = elf.view(names - elf.link_base + 24 * (info >> 32), 24)
            _, _, _, section, value = _SYMBOL_VALUE.unpack_from(entry)
            if section:
                yield value + addend


def jump_table_targets(
    elf: ElfFile, candidates: Collection[int], references: Collection[int], is_code: Callable[[int], bool]
) -> set[int]:
    """Return where position-independent jump tables lead: int32 entries, relative to the table.

    candidates: data that functions with an indirect jump take the address of. A table ends before the next
    data that any function takes the address of (references), or at the first entry that does not lead to an
    instruction's start (is_code). The compare that guards the jump is not looked for: entries past the end
    would have to look like one by chance, and would split a block at an instruction's start, no more.
    """
    ordered = sorted(references)
    found: set[int] = set()
    for table in candidates:
        segment = elf.segment_at(table)
        if segment is None or table >= segment.file_end:
            continue
        index = bisect_right(ordered, table)
        limit = min(segment.file_end, ordered[index] if index < len(ordered) else segment.file_end)
        for (entry,) in _TABLE_ENTRY.iter_unpack(elf.view(table, (limit - table) & -4)):
            if not is_code(table + entry):
                break
            found.add(table + entry)
    return found
