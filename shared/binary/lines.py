"""From FILE:LINE to module offsets, by the DWARF line tables.

Line tables: DWARF 4 and 5, section 6.2. pyelftools (47 ms to import) does the decoding, also of compressed
sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import find_debug_file
from dynacut.shared.errors import DynacutError

if TYPE_CHECKING:
    from elftools.dwarf.compileunit import CompileUnit
    from elftools.dwarf.die import DIE
    from elftools.dwarf.dwarfinfo import DWARFInfo
    from elftools.dwarf.lineprogram import LineProgram

_DIE_LIMIT = 1 << 20
_NEEDLE_LIMIT = 5000
_PATH_LIMIT = 200
_HEAD_SIZE = 512  # bytes; compilers refer to long strings, so DW_AT_stmt_list comes within the first hundred
LINE_SECTIONS = (".debug_line", ".zdebug_line")


@dataclass(frozen=True)
class _Row:
    """A row of a line table: a vaddr, its line (0: of a file that is not wanted), whether to stop there."""

    address: int
    line: int
    is_statement: bool


def has_lines(elf: ElfFile) -> bool:
    """Whether the file has line tables."""
    return any(elf.section(name) is not None for name in LINE_SECTIONS)


def file_with_lines(elf: ElfFile, path: Path, root: Path = Path("/")) -> ElfFile | None:
    """Return the module itself or its separate debug file, whichever has line tables, or None."""
    if has_lines(elf):
        return elf
    debug = find_debug_file(elf, path, root)
    return debug if debug is not None and has_lines(debug) else None


def line_offsets(elf: ElfFile, file: str, line: int) -> tuple[int, ...]:
    """Return the module offsets at which to stop for FILE:LINE, ascending: one per function or inlined copy.

    elf: as file_with_lines gives it. file: the end of a path, whole components (``t_string.c``,
    ``src/t_string.c``). In each function or inlined copy it is the lowest is_stmt row that starts a run of
    the line. () if no code is on exactly that line: see nearest_lines. DynacutError if the debug information
    is malformed.
    """
    dwarf = dwarf_of(elf)
    found: set[int] = set()
    if dwarf is None:
        return ()
    try:
        for unit, program, indexes in _units(dwarf, file):
            addresses = [
                address
                for address in _run_starts(_rows(program, indexes), line)
                if _is_code(elf, address - elf.link_base)
            ]
            found.update(_one_per_scope(dwarf, unit, addresses) if len(addresses) > 1 else addresses)
    except Exception as error:  # pyelftools raises whatever comes up when it reads nonsense
        raise elf.malformed(f"its line tables: {type(error).__name__}: {error}") from error
    return tuple(sorted(address - elf.link_base for address in found))


def nearest_lines(elf: ElfFile, file: str, line: int, count: int = 4) -> tuple[int, ...]:
    """Return up to count lines of the file that have code, the nearest to line, ascending; () without any."""
    dwarf = dwarf_of(elf)
    lines: set[int] = set()
    if dwarf is None:
        return ()
    try:
        for _, program, indexes in _units(dwarf, file):
            lines.update(
                row.line
                for row in _rows(program, indexes)
                if row.line and row.is_statement and _is_code(elf, row.address - elf.link_base)
            )
    except Exception as error:
        raise elf.malformed(f"its line tables: {type(error).__name__}: {error}") from error
    return tuple(sorted(sorted(lines, key=lambda other: (abs(other - line), other))[:count]))


def _is_code(elf: ElfFile, offset: int) -> bool:
    """Whether there is code at an offset: functions that the linker dropped keep rows at 0 or -1."""
    segment = elf.segment_at(offset)
    return segment is not None and segment.executable


def dwarf_of(elf: ElfFile) -> DWARFInfo | None:
    """The debug information of a file that has line tables, else None; DynacutError if it is malformed."""
    if not has_lines(elf):
        return None
    import io

    from elftools.elf.elffile import ELFFile

    try:
        # A BytesIO shares the bytes it is made of. Following links would open files that we did not verify.
        file: Any = ELFFile(io.BytesIO(elf.data.obj if isinstance(elf.data.obj, bytes) else elf.data))
        dwarf: DWARFInfo = file.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)
        return dwarf
    except Exception as error:
        raise elf.malformed(f"its debug information: {type(error).__name__}: {error}") from error


def _units(dwarf: DWARFInfo, file: str) -> Iterator[tuple[CompileUnit, LineProgram, frozenset[int]]]:
    """Yield the units whose line table names the file, and the indexes it has there."""
    seen: set[int] = set()
    wanted = _components(file)
    for unit in _likely_units(dwarf, wanted[-1]) if wanted else ():
        top: Any = unit.get_top_DIE()
        statement_list = top.attributes.get("DW_AT_stmt_list")
        if statement_list is None or statement_list.value in seen:
            continue
        seen.add(statement_list.value)  # several units may share a table
        program: Any = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        folder = top.attributes.get("DW_AT_comp_dir")
        compile_folder = folder.value if folder is not None and isinstance(folder.value, bytes) else b""
        indexes = frozenset(
            index
            for index, path in table_files(program.header, compile_folder)
            if len(wanted) <= len(path) and path[len(path) - len(wanted) :] == wanted
        )
        if indexes:
            yield unit, program, indexes


def _likely_units(dwarf: Any, name: str) -> Iterator[CompileUnit]:
    """Yield the units whose line table may name a file, by a search of the raw bytes.

    pyelftools takes 2 ms to parse the heads of a unit and of its line table: seconds for libc's 1,800 units.
    """
    tables = _bytes_of(dwarf.debug_line_sec)
    # DWARF 5 names files by offsets of strings, which may be another string's tail.
    needles = {name.encode()}
    for strings in (_bytes_of(dwarf.debug_line_str_sec), _bytes_of(dwarf.debug_str_sec)):
        position = strings.find(name.encode() + b"\0")
        while position >= 0 and len(needles) < _NEEDLE_LIMIT:
            first = max(strings.rfind(b"\0", 0, position) + 1, position - _PATH_LIMIT)
            needles.update(start.to_bytes(4, "little") for start in range(first, position + 1))
            position = strings.find(name.encode() + b"\0", position + 1)
    likely = set()
    for offset, start, end in _units_of(tables):
        # After the length: the version (2 bytes), in version 5 two sizes, then the header's length (4 or 8).
        head = tables[start : min(end, start + 16)]
        at = 4 if head[:1] == b"\x05" else 2
        width = 8 if start - offset == 12 else 4
        size = int.from_bytes(head[at : at + width], "little")
        header = tables[start : min(end, start + at + width + size)]
        if any(needle in header for needle in needles):
            likely.add(offset.to_bytes(4, "little"))
    info = _bytes_of(dwarf.debug_info_sec)
    for offset, start, end in _units_of(info):
        # DW_AT_stmt_list is among the first attributes of a unit's first entry.
        head = info[start : min(end, start + _HEAD_SIZE)]
        if any(table in head for table in likely):
            yield dwarf.get_CU_at(offset)


def _bytes_of(section: Any) -> bytes:
    """Return a section's bytes, decompressed."""
    if section is None:
        return b""
    section.stream.seek(0)
    data: bytes = section.stream.read()
    return data


def _units_of(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each unit's offset, where it goes on after its length (of 4 or 12 bytes), and its end."""
    offset = 0
    while offset + 4 <= len(data):
        start, length = offset + 4, int.from_bytes(data[offset : offset + 4], "little")
        if length == 0xFFFF_FFFF:
            start, length = offset + 12, int.from_bytes(data[offset + 4 : offset + 12], "little")
        if start + length > len(data):
            raise DynacutError(f"a unit at {offset:#x} is longer than its section")
        yield offset, start, start + length
        offset = start + length


def _components(path: str) -> list[str]:
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def table_files(header: Any, compile_folder: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield each index of a line table's files and the file's path, by components.

    header: of pyelftools' line program.
    """
    # Before DWARF 5 indexes start at 1 and directory 0, which is not in the list, is the compilation's.
    is_new = header.version >= 5
    folders = [bytes(folder) for folder in header.include_directory]
    if not is_new:
        folders.insert(0, compile_folder)
    for index, entry in enumerate(header.file_entry, 0 if is_new else 1):
        place = entry.dir_index
        folder = folders[place] if place < len(folders) else b""
        path = b"/".join((compile_folder, folder, entry.name))
        if entry.name.startswith(b"/"):
            path = entry.name
        elif folder.startswith(b"/"):
            path = folder + b"/" + entry.name
        yield index, _components(path.decode("utf-8", "replace"))


def _rows(program: Any, indexes: frozenset[int]) -> Iterator[_Row]:
    for entry in program.get_entries():
        state = entry.state
        if state is not None:
            here = state.file in indexes and not state.end_sequence
            yield _Row(state.address, state.line if here else 0, bool(state.is_stmt))


def _run_starts(rows: Iterator[_Row], line: int) -> Iterator[int]:
    """Yield the first is_stmt row of each run of consecutive rows on the line."""
    # Rows at the same address as the next one count too: optimizers put many lines at one instruction.
    is_open = False
    for row in rows:
        if row.line != line:
            is_open = False
        elif row.is_statement and not is_open:
            is_open = True
            yield row.address


def _one_per_scope(dwarf: DWARFInfo, unit: CompileUnit, addresses: list[int]) -> set[int]:
    """Return the lowest address in each function or inlined copy (a loop's line has a run at either end)."""
    ranges = _Ranges(dwarf, unit)
    lowest: dict[int, int] = {}
    for address in addresses:
        scope = _scope(ranges, unit.get_top_DIE(), address)
        lowest[scope] = min(address, lowest.get(scope, address))
    return set(lowest.values())


def _scope(ranges: _Ranges, parent: DIE, address: int, innermost: int = -1) -> int:
    """Return the offset of the innermost function or inlined copy below a DIE that has an address, or -1."""
    steps = 0
    while True:
        for child in parent.iter_children():
            steps += 1
            if steps > _DIE_LIMIT:
                raise DynacutError("siblings without end")
            if child.tag in (
                "DW_TAG_subprogram",
                "DW_TAG_inlined_subroutine",
                "DW_TAG_lexical_block",
            ) and ranges.contain(child, address):
                innermost = innermost if child.tag == "DW_TAG_lexical_block" else child.offset
                parent = child
                break
        else:
            return innermost


class _Ranges:
    """Which addresses a DIE covers (DW_AT_low_pc and DW_AT_high_pc, or DW_AT_ranges)."""

    def __init__(self, dwarf: Any, unit: Any) -> None:
        self._unit = unit
        self._lists = dwarf.range_lists()
        low = unit.get_top_DIE().attributes.get("DW_AT_low_pc")
        self._base = low.value if low is not None else 0

    def contain(self, die: Any, address: int) -> bool:
        low, high = die.attributes.get("DW_AT_low_pc"), die.attributes.get("DW_AT_high_pc")
        if low is not None and high is not None:
            end = high.value if high.form == "DW_FORM_addr" else low.value + high.value
            return bool(low.value <= address < end)
        if "DW_AT_ranges" not in die.attributes or self._lists is None:
            return False
        base = self._base
        for entry in self._lists.get_range_list_at_offset(die.attributes["DW_AT_ranges"].value, self._unit):
            if hasattr(entry, "base_address"):
                base = entry.base_address
                continue
            shift = 0 if getattr(entry, "is_absolute", False) else base
            if shift + entry.begin_offset <= address < shift + entry.end_offset:
                return True
        return False
