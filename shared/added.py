"""Memory that a plan adds to a target: where it may lie, whether it is there, and how it goes again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE

from dynacut.handlers.table import Action, TableSite
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.plan import PlannedMemory
from dynacut.shared.target import PAGE_SIZE, Mapping, Target

_LOWEST = 1 << 16
"""The kernel's vm.mmap_min_addr as a rule."""
_END = 1 << 47


@dataclass(frozen=True)
class Added:
    """Memory of a plan, with its place found. address: absolute."""

    address: int
    planned: PlannedMemory

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.planned.size

    @property
    def protection(self) -> int:
        """PROT_ bits, as of mmap(2)."""
        letters = zip(self.planned.protection, (PROT_READ, PROT_WRITE, PROT_EXEC), strict=True)
        return sum(bit for letter, bit in letters if letter != "-")

    @property
    def memory(self) -> NewMemory:
        """What a backend maps."""
        return NewMemory(self.address, self.planned.size, self.protection, self.planned.contents)

    @property
    def entry(self) -> TableSite:
        """What the table says of it. Its contents are the plan's alone: the program may change them."""
        return TableSite.mapped(self.address, self.planned.feature, self.planned.size, self.protection)

    def problem(self, target: Target) -> str | None:
        """Why it cannot lie there; None if it can."""
        end = self.end
        if self.address % PAGE_SIZE or self.address < _LOWEST or end > _END:
            return f"{self.address:#x} is no address for memory: it is that of a page, from {_LOWEST:#x} on"
        other = next((part for part in target.mappings if part.start < end and self.address < part.end), None)
        return f"{self.address:#x}-{end:#x} is not free: {other.path or 'memory'} is there" if other else None


def is_mapped(target: Target, entry: TableSite) -> bool:
    """Whether memory that a table says was added is there."""
    position = entry.address
    for part in target.mappings:
        if part.start <= position < part.end and position < entry.address + entry.range_size:
            if part.is_file or not part.private or _protection(part) != entry.protection:
                return False
            position = part.end
    return position >= entry.address + entry.range_size


def _protection(mapping: Mapping) -> int:
    return PROT_READ * mapping.readable | PROT_WRITE * mapping.writable | PROT_EXEC * mapping.executable


def in_place(target: Target, sites: Iterable[TableSite]) -> tuple[PageRange, ...]:
    """The memory that some of a table's entries say was added, and that is there, to be unmapped."""
    return tuple(
        NewMemory(site.address, site.range_size, site.protection).pages
        for site in sites
        if site.action is Action.MAP and is_mapped(target, site)
    )


def untouched(target: Target, parts: Iterable[NewMemory]) -> tuple[PageRange, ...]:
    """Those of some parts that are mapped just as they were written, to be unmapped: what else may have come to
    lie there meanwhile is the program's own.
    """
    found = []
    for part in parts:
        pages = part.pages
        is_there = any(each.start <= part.address and pages.end <= each.end for each in target.mappings)
        if is_there and target.read(part.address, part.size) == part.contents.ljust(part.size, b"\0"):
            found.append(pages)
    return tuple(found)


def code_in(target: Target, drop: Iterable[PageRange]) -> Iterator[tuple[int, bytes]]:
    """Memory that is to go and that threads may run in: its address and bytes."""
    for pages in drop:
        if pages.mapping.executable:
            yield pages.start, target.read(pages.start, pages.size)
