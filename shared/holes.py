"""Pages of code that are unmapped: which ones may be, and how a target with such holes is looked at.

A hole counts as what stood there before it was made, int3 bytes in every place: so all that reads a target's code can
go on as if nothing were missing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from dynacut.handlers.records import INT3
from dynacut.handlers.table import Action, Table, TableSite
from dynacut.shared.code import Code
from dynacut.shared.memory import PageRange
from dynacut.shared.target import PAGE_SIZE, Mapping, Module, Target

_PADDING = re.compile(
    rb"(?:\xcc|\x00|\x66*\x2e?(?:\x90|\x0f\x1f(?:\x00|\x40\x00|\x44\x00\x00|\x80\x00{4}|\x84\x00{5})))*"
)
"""int3, zeros, and the no-operations of one to fifteen bytes that assemblers align by."""


def idle_pages(code: Code, removed: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of whole pages of a module's text that hold nothing once some blocks are removed.

    removed: the ranges of these blocks. All numbers are module offsets, ends exclusive. A page is taken only if every
    byte of it is a removed block's, or padding between functions: what is not known to be code may be data.
    """
    text = code.elf.section(".text")
    if text is None:
        return []
    first = text.address - code.elf.link_base
    end = first + text.size
    gone = bytearray(text.size)
    pages = set()
    for start, stop in removed:
        if first <= start and stop <= end:
            gone[start - first : stop - first] = b"\1" * (stop - start)
            pages |= set(range(start & -PAGE_SIZE, stop, PAGE_SIZE))
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if page < first or page + PAGE_SIZE > end or not _is_idle(code, page, gone, first):
            continue
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + PAGE_SIZE)
        else:
            runs.append((page, page + PAGE_SIZE))
    return runs


def _is_idle(code: Code, page: int, gone: bytearray, first: int) -> bool:
    position = page
    while position < page + PAGE_SIZE:
        index = gone.find(0, position - first, page + PAGE_SIZE - first)
        if index < 0:
            return True
        gap = _gap(code, first + index)
        if gap is None or _PADDING.fullmatch(code.elf.read(gap[0], gap[1] - gap[0])) is None:
            return False
        position = gap[1]
    return True


def _gap(code: Code, offset: int) -> tuple[int, int] | None:
    """The range between two functions that an offset lies in; None if it is in a function, or at the text's ends."""
    functions = code.functions
    index = bisect_right(functions, offset, key=lambda function: function.start)
    if index == 0 or index == len(functions) or offset < functions[index - 1].end:
        return None
    return functions[index - 1].end, functions[index].start


class Patched:
    """A target as it would be read if the pages that its table says are unmapped held int3 bytes.

    holes: those of them that are not mapped at this moment, ascending.
    """

    def __init__(self, target: Target, table: Table | None) -> None:
        self._target = target
        self.holes = tuple(_holes(target, table)) if table else ()
        self._ends = [hole.end for hole in self.holes]

    @property
    def label(self) -> str:
        """The target's."""
        return self._target.label

    @property
    def exe(self) -> str:
        """The target's."""
        return self._target.exe

    @property
    def has_shadow_stack(self) -> bool:
        """The target's."""
        return self._target.has_shadow_stack

    @property
    def modules(self) -> Sequence[Module]:
        """The target's, with the holes filled."""
        if not self.holes:
            return self._target.modules
        return [replace(module, mappings=self._filled(module.mappings, module)) for module in self._target.modules]

    @property
    def mappings(self) -> Sequence[Mapping]:
        """The target's, with the holes filled."""
        return self._filled(self._target.mappings, None) if self.holes else self._target.mappings

    def _filled(self, mappings: Sequence[Mapping], module: Module | None) -> tuple[Mapping, ...]:
        fillers = [
            replace(hole.mapping, start=hole.start, end=hole.end, file_offset=hole.file_offset)
            for hole in self.holes
            if module is None or module.base <= hole.start < module.end
        ]
        return tuple(sorted([*mappings, *fillers], key=lambda mapping: mapping.start))

    def holes_of(self, sites: Iterable[TableSite]) -> tuple[PageRange, ...]:
        """The holes that some of the table's entries describe."""
        starts = {site.address for site in sites if site.action is Action.UNMAP}
        return tuple(hole for hole in self.holes if hole.start in starts)

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """The target's; none in a hole."""
        if any(hole.start == mapping.start for hole in self.holes):
            return ()
        return self._target.private_pages(mapping)

    def read(self, address: int, size: int) -> bytes:
        """The target's bytes, int3 in holes; DynacutError if they are not all mapped."""
        data = b""
        end = address + size
        for hole in self.holes[bisect_right(self._ends, address) :]:
            if end <= hole.start:
                break
            if address < hole.start:
                data += self._target.read(address, hole.start - address)
            stop = min(hole.end, end)
            data += INT3 * (stop - max(address, hole.start))
            address = stop
        return data + self._target.read(address, end - address) if address < end else data


def holes_to_make(target: Patched, sites: Iterable[TableSite]) -> tuple[PageRange, ...]:
    """The pages that some of a table's entries say are to be unmapped, and that are not."""
    missing = {hole.start for hole in target.holes}
    mappings = target.mappings
    starts = [mapping.start for mapping in mappings]
    return tuple(
        PageRange(site.address, site.address + site.range_size, mappings[bisect_right(starts, site.address) - 1])
        for site in sites
        if site.action is Action.UNMAP and site.address not in missing
    )


def _holes(target: Target, table: Table) -> Iterator[PageRange]:
    """Where the table says that pages are unmapped, and they are."""
    starts = [mapping.start for mapping in target.mappings]
    for site in table.sites:
        if site.action is not Action.UNMAP:
            continue
        index = bisect_right(starts, site.address) - 1
        if index >= 0 and target.mappings[index].end > site.address:
            continue
        module = next((module for module in target.modules if module.base <= site.address < module.end), None)
        if module is not None:
            yield PageRange(site.address, site.address + site.range_size, _text_mapping(module, site.address))


def _text_mapping(module: Module, address: int) -> Mapping:
    """A mapping of the module as it would be at an address in its text: of the same file, at the same distance."""
    near = module.executable_mappings[0] if module.executable_mappings else module.mappings[0]
    return replace(
        near,
        start=address,
        file_offset=near.file_offset + address - near.start,
        readable=True,
        writable=False,
        executable=True,
    )
