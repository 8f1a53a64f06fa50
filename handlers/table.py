"""The table beside the handler, read and written: the Python side of table.h.

A region is the handler's code (CODE_SIZE bytes, r-x) followed by its table (rw). The patcher changes a table in one
transaction: what is new goes where the bank in force does not point to, and then one byte, the generation, turns the
banks. Killed at any instant, the table is as before or as after.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dynacut.handlers.blob import HANDLER_ENTRY
from dynacut.handlers.layout import (
    BANK,
    BANKS_OFFSET,
    CODE_SIZE,
    FEATURE_CAPACITY,
    FIRST_SLOT,
    GENERATION_OFFSET,
    HEADER_SIZE,
    INPUT_OFFSET,
    LIBRARY_OFFSET,
    MAGIC,
    MAX_HEAP_CAPACITY,
    MAX_RANGES,
    MAX_SITE_CAPACITY,
    NAME_SIZE,
    OBSERVED_OFFSET,
    OUTPUT_OFFSET,
    PREVIOUS_OFFSET,
    REPAIR,
    REPAIR_CAPACITY,
    REPAIR_COUNT_OFFSET,
    RETIRED_MAGICS,
    SITE,
    SLOT_COUNT,
    SLOT_DONE_OFFSET,
    SLOT_SIZE,
    TRACE_MAGIC,
    USER_OFFSET,
    VERSION,
    VERSION_OFFSET,
    Header,
    Layout,
    TableError,
    TableFullError,
)
from dynacut.handlers.parts import Bank, Placed, pack_name, pack_repairs, unpack_names, unpack_repairs, unpack_sites
from dynacut.handlers.records import NO_LIBRARY, Action, KernelAction, Repair, RepairKind, TableSite, UserLibrary, Write

__all__ = [
    "BANKS_OFFSET",
    "CODE_SIZE",
    "FEATURE_CAPACITY",
    "FIRST_SLOT",
    "GENERATION_OFFSET",
    "HEADER_SIZE",
    "INPUT_OFFSET",
    "LIBRARY_OFFSET",
    "MAGIC",
    "MAX_HEAP_CAPACITY",
    "MAX_RANGES",
    "MAX_SITE_CAPACITY",
    "NAME_SIZE",
    "NO_LIBRARY",
    "OBSERVED_OFFSET",
    "OUTPUT_OFFSET",
    "PREVIOUS_OFFSET",
    "REPAIR_CAPACITY",
    "REPAIR_COUNT_OFFSET",
    "RETIRED_MAGICS",
    "SLOT_COUNT",
    "SLOT_DONE_OFFSET",
    "SLOT_SIZE",
    "TRACE_MAGIC",
    "USER_OFFSET",
    "VERSION",
    "VERSION_OFFSET",
    "Action",
    "Header",
    "KernelAction",
    "Layout",
    "Repair",
    "RepairKind",
    "Table",
    "TableError",
    "TableFullError",
    "TableSite",
    "UserLibrary",
    "Write",
]


@dataclass(frozen=True)
class Table:
    """What a table says: the features, and the sites by ascending address."""

    layout: Layout
    generation: int
    serial: int
    features: tuple[str, ...]
    placed: tuple[Placed, ...]
    heap_used: int
    counter_count: int
    observed: KernelAction
    previous: KernelAction
    repairs: tuple[Repair, ...]
    user: UserLibrary = NO_LIBRARY

    @property
    def sites(self) -> tuple[TableSite, ...]:
        """The sites by ascending address, with their hits."""
        return tuple(placed.site for placed in self.placed)

    @classmethod
    def empty(cls, layout: Layout, serial: int = 1) -> Table:
        """A table without features."""
        return cls(layout, 0, serial, (), (), 0, 0, KernelAction(), KernelAction(), ())

    def header(self) -> Write:
        """The fixed part of a new table behind its magic: everything but what update() writes."""
        layout = self.layout
        header = Header(
            magic=MAGIC,
            version=VERSION,
            generation=self.generation,
            size=layout.size,
            serial=self.serial,
            site_capacity=layout.site_capacity,
            feature_capacity=FEATURE_CAPACITY,
            heap_capacity=layout.heap_capacity,
            repair_capacity=REPAIR_CAPACITY,
            repair_count=len(self.repairs),
            features=layout.features,
            repairs=layout.repairs,
            counters=layout.counters,
            heap=layout.heap,
            first_sites=layout.sites[0],
            second_sites=layout.sites[1],
        )
        return Write(len(MAGIC), header.pack()[len(MAGIC) :])

    def update(self, features: Sequence[str], sites: Sequence[TableSite]) -> Iterator[Write]:
        """The writes, in their order, that make the table hold just these features and sites.

        Sites that stay the same keep their hits. The last write is one byte and turns the banks.

        Raises:
            TableFullError: they do not fit.
        """
        layout = self.layout
        if len(sites) > layout.site_capacity:
            raise TableFullError(f"{len(sites)} sites, room for {layout.site_capacity}")
        if len(features) > FEATURE_CAPACITY:
            raise TableFullError(f"{len(features)} features, room for {FEATURE_CAPACITY}")
        # What the bank in force refers to is left alone even if the new contents do not need it: killed before the last
        # write, the table is still the old one.
        heap_used = self.heap_used if self.placed else 0
        placed, heap = self._place(sites, heap_used)
        if heap_used + len(heap) > layout.heap_capacity:
            raise TableFullError(f"{heap_used + len(heap)} saved bytes, room for {layout.heap_capacity}")
        counter_count = max((one.counter + 1 for one in placed), default=0)
        if counter_count > layout.site_capacity + 1:
            raise TableFullError(f"{len(sites)} sites besides {len(self.placed)}, room for {layout.site_capacity}")
        used_counters = {one.counter for one in self.placed}
        new_counters = [one.counter for one in placed if one.counter not in used_counters]
        feature_index = {name: index for index, name in enumerate(features)}
        records = b"".join(one.pack(feature_index[one.site.feature]) for one in placed)

        names = b"".join(pack_name(name) for name in features)
        generation = (self.generation + 1) & 0xFF
        bank = generation & 1
        yield Write(layout.features + bank * FEATURE_CAPACITY * NAME_SIZE, names)
        yield Write(layout.heap + heap_used, heap)
        for first, count in _runs(sorted(new_counters)):
            yield Write(layout.counters + 8 * first, bytes(8 * count))
        yield Write(layout.sites[bank], records)
        yield Write(
            BANKS_OFFSET + bank * BANK.size,
            BANK.pack(len(sites), len(features), heap_used + len(heap), counter_count),
        )
        yield Write(GENERATION_OFFSET, bytes([generation]))

    def _place(self, sites: Sequence[TableSite], heap_used: int) -> tuple[list[Placed], bytes]:
        """The sites in order, known ones where they are, new ones where nothing is yet; and the bytes these save."""
        known = {placed.site: placed for placed in self.placed}
        used_counters = {placed.counter for placed in self.placed}
        free_counters = (index for index in itertools.count(1) if index not in used_counters)
        heap = bytearray()
        placed = []
        for site in sorted(sites, key=TableSite.key):
            one = known.get(site)
            if one is None:
                one = Placed(site, next(free_counters), heap_used + len(heap))
                heap += site.old + (site.new if site.action == Action.EDIT else b"")
            placed.append(one)
        return placed, bytes(heap)

    def carried_hits(self, old: Table) -> Iterator[Write]:
        """The writes that give the sites of this table, just made in a new place, the hits they had in an old one."""
        before = {placed.site: placed.site for placed in old.placed}
        for placed in self.placed:
            site = before.get(placed.site)
            if site is not None and (site.hits or site.order):
                yield Write(self.layout.counters + 8 * placed.counter, struct.pack("<Q", site.order or site.hits))

    def repair_writes(self, repairs: Sequence[Repair]) -> Iterator[Write]:
        """The writes, in their order, that make the table record just these repairs, the count last."""
        if len(repairs) > REPAIR_CAPACITY:
            raise TableFullError(f"{len(repairs)} repaired signal masks, room for {REPAIR_CAPACITY}")
        yield Write(self.layout.repairs, pack_repairs(repairs))
        yield Write(REPAIR_COUNT_OFFSET, struct.pack("<I", len(repairs)))

    def further_repair_writes(self, repairs: Sequence[Repair]) -> Iterator[Write]:
        """The writes, in their order, that make the table record these repairs behind those it has, the count last."""
        count = len(self.repairs)
        if count + len(repairs) > REPAIR_CAPACITY:
            raise TableFullError(f"{count + len(repairs)} repaired signal masks, room for {REPAIR_CAPACITY}")
        if repairs:
            yield Write(self.layout.repairs + count * REPAIR.size, pack_repairs(repairs))
            yield Write(REPAIR_COUNT_OFFSET, struct.pack("<I", count + len(repairs)))

    @staticmethod
    def counters_of(data: bytes) -> dict[int, int]:
        """The index of the hit counter of each site's address, of the bytes of a whole table.

        Raises:
            TableError: they are not a table's.
        """
        header = Header.unpack(data)
        bank = Bank.unpack(data, header.generation)
        records = SITE.iter_unpack(bank.site_records(data, header.layout()))
        return {address: counter for address, _, counter, *_ in records}

    @classmethod
    def parse(cls, data: bytes, address: int) -> Table:
        """Reads a whole table.

        data: the table's bytes, from its start; address: where it is mapped, to tell the handler's own action from
        the target's.

        Raises:
            TableError: the bytes are not a table, or its parts do not fit together.
        """
        header = Header.unpack(data)
        layout = header.layout()
        if len(data) < layout.total_size:
            raise TableError("the table is cut off")
        bank = Bank.unpack(data, header.generation)
        bank.check(layout)
        features = unpack_names(data, layout, bank)
        observed = KernelAction.unpack(data, OBSERVED_OFFSET)
        previous = KernelAction.unpack(data, PREVIOUS_OFFSET)
        if observed.handler != address - CODE_SIZE + HANDLER_ENTRY:
            previous = observed  # the patcher was killed before it copied what the kernel had written
        return cls(
            layout,
            header.generation,
            header.serial,
            features,
            tuple(unpack_sites(data, layout, bank, features)),
            bank.heap_used,
            bank.counter_count,
            observed,
            previous,
            unpack_repairs(data, layout, header.repair_count),
            UserLibrary.unpack(data),
        )


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive runs of ascending indices, as (first, count)."""
    first, count = -1, 0
    for index in indices:
        if index == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = index, 1
    if count:
        yield first, count
