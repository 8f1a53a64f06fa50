"""Where code is entered without a direct branch: pointers in data, exported symbols, jump tables.

Jump tables: what gcc and clang emit for switch statements.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Collection

from dynacut.shared.binary.dynamic import Dynamic
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import landing_pads
from dynacut.shared.binary.symbols import symbols

_TABLE_ENTRY = struct.Struct("<i")
_DT_INIT, _DT_FINI = 12, 13


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
    found.update(address for _, address, _ in Dynamic(elf).own_addresses())
    if elf.is_fixed:
        low, high = start + base, end + base
        for segment in elf.segments:
            skip = -segment.offset % 8
            size = max(0, segment.file_size - skip) & -8
            if size:
                words = elf.view(segment.offset + skip, size).cast("Q")
                found.update(word - base for word in words if low <= word < high)
    return {offset for offset in found if start <= offset < end}


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
