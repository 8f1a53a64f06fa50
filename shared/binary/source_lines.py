"""From module offsets to FILE:LINE, for people: the other way round than lines.py, by the same tables."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.lines import dwarf_of, table_files


def source_lines(elf: ElfFile, offsets: Iterable[int]) -> dict[int, str]:
    """What is known of the source of some module offsets: ``t_string.c:295`` by offset.

    elf: as lines.file_with_lines gives it. Inlined code is of the file it was written in. Offsets without a line are
    left out. DynacutError if the debug information is malformed.
    """
    dwarf: Any = dwarf_of(elf)
    if dwarf is None:
        return {}
    addresses = sorted({offset + elf.link_base for offset in offsets})
    found: dict[int, str] = {}
    try:
        for unit in _units(dwarf, addresses):
            program = dwarf.line_program_for_CU(unit)
            if program is not None:
                found.update(_lines_in(program, addresses))
    except Exception as error:  # pyelftools raises whatever comes up when it reads nonsense
        raise elf.malformed(f"its line tables: {type(error).__name__}: {error}") from error
    return {address - elf.link_base: line for address, line in found.items()}


def _units(dwarf: Any, addresses: Sequence[int]) -> Iterator[Any]:
    """The units that may have the addresses: by .debug_aranges where they all are in there, else every one."""
    ranges = dwarf.get_aranges()
    offsets = [ranges.cu_offset_at_addr(address) for address in addresses] if ranges is not None else [None]
    if None in offsets:
        yield from dwarf.iter_CUs()
    else:
        for offset in dict.fromkeys(offsets):
            yield dwarf.get_CU_at(offset)


def _lines_in(program: Any, addresses: Sequence[int]) -> Iterator[tuple[int, str]]:
    """FILE:LINE of those addresses that a line table covers. A row is good until the next one of its sequence."""
    names = {index: path[-1] for index, path in table_files(program.header, b"") if path}
    before = None
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if before is not None and before.address < state.address and before.line and before.file in names:
            for index in range(bisect_left(addresses, before.address), bisect_left(addresses, state.address)):
                yield addresses[index], f"{names[before.file]}:{before.line}"
        before = None if state.end_sequence else state
