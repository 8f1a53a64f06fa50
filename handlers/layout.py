"""Where things lie in a table: the numbers and struct formats of table.h."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = b"dynacut\0"
TRACE_MAGIC = b"dyntrac\0"
"""Of a table that collects coverage: it comes and goes by itself, its handler passes on what is not its own."""
RETIRED_MAGICS = {MAGIC: b"dynacu-\0", TRACE_MAGIC: b"dyntra-\0"}
"""Of a table whose contents moved to a larger one; it stays mapped, a thread may still read it."""
VERSION = 1
CODE_SIZE = 0x20000
SLOT_SIZE = 1024
FIRST_SLOT = 4096
SLOT_COUNT = (CODE_SIZE - FIRST_SLOT) // SLOT_SIZE
NAME_SIZE = 64
FEATURE_CAPACITY = 256
REPAIR_CAPACITY = 4096
MIN_SITE_CAPACITY = 4096
MAX_SITE_CAPACITY = 1 << 21
MAX_RANGES = 1 << 16
"""Of pages taken away or added: more mappings than a process may have (vm.max_map_count) would come of them."""
MIN_HEAP_CAPACITY = 1 << 16
MAX_HEAP_CAPACITY = 1 << 28

PAGE_SIZE = 4096
"""Of x86-64, in bytes."""
HEADER_SIZE = 2 * PAGE_SIZE
FIXED = struct.Struct("<8sIB3xQ12I")
BANK = struct.Struct("<4I")
SITE = struct.Struct("<QQ5IB3x")
REPAIR = struct.Struct("<IIQQ")
ACTION = struct.Struct("<4Q")
PATH_SIZE = 1024
LIBRARY = struct.Struct(f"<Q32s{PATH_SIZE}s")

VERSION_OFFSET = 8
GENERATION_OFFSET = 12
REPAIR_COUNT_OFFSET = 44
BANKS_OFFSET = 72
OBSERVED_OFFSET = BANKS_OFFSET + 2 * BANK.size
PREVIOUS_OFFSET = OBSERVED_OFFSET + ACTION.size
INPUT_OFFSET = PREVIOUS_OFFSET + ACTION.size
OUTPUT_OFFSET = INPUT_OFFSET + 64 * ACTION.size
SLOT_DONE_OFFSET = OUTPUT_OFFSET + 64 * ACTION.size
USER_OFFSET = -(-(SLOT_DONE_OFFSET + SLOT_COUNT) // 8) * 8
LIBRARY_OFFSET = USER_OFFSET + ACTION.size


class TableError(ValueError):
    """A table that does not hold together: not ours, or damaged."""


class TableFullError(ValueError):
    """The contents do not fit the table's capacities; a larger one must be mapped."""


@dataclass(frozen=True)
class Layout:
    """Where things lie in a table of given capacities. Offsets are from the table's start, in bytes."""

    site_capacity: int
    heap_capacity: int
    features: int
    repairs: int
    counters: int
    sites: tuple[int, int]
    heap: int
    size: int
    """Of the table's private memory, a multiple of the page size."""
    shared: bool = False
    """Whether the counters lie behind it in memory that the process shares with what it forks."""

    @property
    def total_size(self) -> int:
        """The table with its counters, wherever these lie; a multiple of the page size."""
        return self.size + (pages(8 * (self.site_capacity + 1)) if self.shared else 0)

    @classmethod
    def for_contents(cls, site_count: int, heap_bytes: int, *, shared: bool = False) -> Layout:
        """A layout with room for twice what is needed now; memory that is never written costs nothing."""
        site_capacity = MIN_SITE_CAPACITY
        while site_capacity < 2 * site_count:
            site_capacity *= 2
        heap_capacity = MIN_HEAP_CAPACITY
        while heap_capacity < 2 * heap_bytes:
            heap_capacity *= 2
        if site_capacity > MAX_SITE_CAPACITY or heap_capacity > MAX_HEAP_CAPACITY:
            raise TableFullError(f"{site_count} sites with {heap_bytes} bytes are more than a table can hold")
        return cls.of_capacities(site_capacity, heap_capacity, shared=shared)

    @classmethod
    def of_capacities(cls, site_capacity: int, heap_capacity: int, *, shared: bool = False) -> Layout:
        """The layout that follows from the capacities alone."""
        features = HEADER_SIZE
        repairs = features + 2 * FEATURE_CAPACITY * NAME_SIZE
        counters = repairs + REPAIR_CAPACITY * REPAIR.size
        first = counters if shared else counters + 8 * (site_capacity + 1)
        second = first + SITE.size * site_capacity
        heap = second + SITE.size * site_capacity
        size = pages(heap + heap_capacity)
        counters = size if shared else counters
        return cls(site_capacity, heap_capacity, features, repairs, counters, (first, second), heap, size, shared)


class Header(NamedTuple):
    """The fixed part of a table, in the order of FIXED. The last six are offsets from the table's start."""

    magic: bytes
    version: int
    generation: int
    size: int
    serial: int
    site_capacity: int
    feature_capacity: int
    heap_capacity: int
    repair_capacity: int
    repair_count: int
    features: int
    repairs: int
    counters: int
    heap: int
    first_sites: int
    second_sites: int

    def pack(self) -> bytes:
        """The bytes that a table begins with."""
        return FIXED.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Reads what a table's first HEADER_SIZE bytes say; layout() tells whether they are a table's.

        Raises:
            TableError: they are fewer.
        """
        if len(data) < HEADER_SIZE:
            raise TableError("no dynacut table")
        return cls(*FIXED.unpack_from(data))

    def layout(self) -> Layout:
        """Where things lie in the table.

        Raises:
            TableError: it is none, of another version, or its parts do not lie where they should.
        """
        if self.magic not in (MAGIC, TRACE_MAGIC):
            raise TableError("no dynacut table")
        if self.version != VERSION:
            raise TableError(f"a dynacut table of version {self.version}; this program knows version {VERSION}")
        if not (
            0 < self.site_capacity <= MAX_SITE_CAPACITY
            and 0 < self.heap_capacity <= MAX_HEAP_CAPACITY
            and self.feature_capacity == FEATURE_CAPACITY
            and self.repair_capacity == REPAIR_CAPACITY
            and self.repair_count <= REPAIR_CAPACITY
        ):
            raise TableError("the table's capacities are out of range")
        layout = Layout.of_capacities(self.site_capacity, self.heap_capacity, shared=self.counters == self.size)
        offsets = (layout.features, layout.repairs, layout.counters, layout.heap, *layout.sites)
        if self[-len(offsets) :] != offsets or self.size != layout.size:
            raise TableError("the table's parts do not lie where they should")
        return layout


def pages(size: int) -> int:
    """A size rounded up to whole pages, in bytes."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE
