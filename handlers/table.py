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
    FIXED,
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
    PAGE,
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
    Layout,
    TableError,
    TableFullError,
)
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


@dataclass(frozen=True, slots=True)
class _Placed:
    """A site with its places in counters and heap."""

    site: TableSite
    counter: int
    bytes_offset: int

    def pack(self, feature: int) -> bytes:
        """The site's record; feature: the index of its feature's name."""
        site = self.site
        return SITE.pack(
            site.address,
            site.argument,
            self.counter,
            self.bytes_offset,
            feature,
            len(site.old),
            site.size,
            site.action,
        )


@dataclass(frozen=True)
class Table:
    """What a table says: the features, and the sites by ascending address."""

    layout: Layout
    generation: int
    serial: int
    features: tuple[str, ...]
    placed: tuple[_Placed, ...]
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
        fixed = FIXED.pack(
            MAGIC,
            VERSION,
            self.generation,
            layout.size,
            self.serial,
            layout.site_capacity,
            FEATURE_CAPACITY,
            layout.heap_capacity,
            REPAIR_CAPACITY,
            len(self.repairs),
            layout.features,
            layout.repairs,
            layout.counters,
            layout.heap,
            *layout.sites,
        )
        return Write(8, fixed[8:])

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

        names = b"".join(_pack_name(name) for name in features)
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

    def _place(self, sites: Sequence[TableSite], heap_used: int) -> tuple[list[_Placed], bytes]:
        """The sites in order, known ones where they are, new ones where nothing is yet; and the bytes these save."""
        known = {placed.site: placed for placed in self.placed}
        used_counters = {placed.counter for placed in self.placed}
        free_counters = (index for index in itertools.count(1) if index not in used_counters)
        heap = bytearray()
        placed = []
        for site in sorted(sites, key=TableSite.key):
            one = known.get(site)
            if one is None:
                one = _Placed(site, next(free_counters), heap_used + len(heap))
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
        yield Write(self.layout.repairs, _pack_repairs(repairs))
        yield Write(REPAIR_COUNT_OFFSET, struct.pack("<I", len(repairs)))

    def further_repair_writes(self, repairs: Sequence[Repair]) -> Iterator[Write]:
        """The writes, in their order, that make the table record these repairs behind those it has, the count last."""
        count = len(self.repairs)
        if count + len(repairs) > REPAIR_CAPACITY:
            raise TableFullError(f"{count + len(repairs)} repaired signal masks, room for {REPAIR_CAPACITY}")
        if repairs:
            yield Write(self.layout.repairs + count * REPAIR.size, _pack_repairs(repairs))
            yield Write(REPAIR_COUNT_OFFSET, struct.pack("<I", count + len(repairs)))

    @staticmethod
    def serial_of(data: bytes) -> int:
        """The serial that a table's first HEADER_SIZE bytes have."""
        serial: int = FIXED.unpack_from(data)[4]
        return serial

    @staticmethod
    def counters_of(data: bytes) -> dict[int, int]:
        """The index of the hit counter of each site's address, of the bytes of a whole table."""
        layout = Table.layout_of(data)
        bank = data[GENERATION_OFFSET] & 1
        count, *_ = BANK.unpack_from(data, BANKS_OFFSET + bank * BANK.size)
        start = layout.sites[bank]
        records = SITE.iter_unpack(data[start : start + count * SITE.size])
        return {address: counter for address, _, counter, *_ in records}

    @classmethod
    def layout_of(cls, data: bytes) -> Layout:
        """The layout that a table's first HEADER_SIZE bytes describe.

        Raises:
            TableError: they are not a table's, or its parts do not lie where they should.
        """
        if len(data) < HEADER_SIZE:
            raise TableError("no dynacut table")
        (magic, version, _, size, _, site_capacity, feature_capacity, heap_capacity, repair_capacity,
         repair_count, *offsets) = FIXED.unpack_from(data)  # fmt: skip
        if magic not in (MAGIC, TRACE_MAGIC):
            raise TableError("no dynacut table")
        if version != VERSION:
            raise TableError(f"a dynacut table of version {version}; this program knows version {VERSION}")
        if not (
            0 < site_capacity <= MAX_SITE_CAPACITY
            and 0 < heap_capacity <= MAX_HEAP_CAPACITY
            and feature_capacity == FEATURE_CAPACITY
            and repair_capacity == REPAIR_CAPACITY
            and repair_count <= REPAIR_CAPACITY
        ):
            raise TableError("the table's capacities are out of range")
        counters = offsets[2]
        layout = Layout.of_capacities(site_capacity, heap_capacity, shared=counters == size)
        placed_offsets = [layout.features, layout.repairs, layout.counters, layout.heap, *layout.sites]
        if offsets != placed_offsets or size != layout.size:
            raise TableError("the table's parts do not lie where they should")
        return layout

    @classmethod
    def parse(cls, data: bytes, address: int) -> Table:
        """Reads a whole table.

        data: the table's bytes, from its start; address: where it is mapped, to tell the handler's own action from
        the target's.

        Raises:
            TableError: the bytes are not a table, or its parts do not fit together.
        """
        layout = cls.layout_of(data)
        (_, _, generation, _, serial, site_capacity, _, heap_capacity, _, repair_count, *_) = FIXED.unpack_from(data)
        if len(data) < layout.total_size:
            raise TableError("the table is cut off")
        site_count, feature_count, heap_used, counter_count = BANK.unpack_from(
            data, BANKS_OFFSET + (generation & 1) * BANK.size
        )
        if (
            site_count > site_capacity
            or feature_count > FEATURE_CAPACITY
            or heap_used > heap_capacity
            or counter_count > site_capacity + 1
        ):
            raise TableError("the table's counts are out of range")
        names = layout.features + (generation & 1) * FEATURE_CAPACITY * NAME_SIZE
        features = tuple(_unpack_name(data, names + NAME_SIZE * index) for index in range(feature_count))
        placed = tuple(_parse_sites(data, layout, generation & 1, site_count, features, heap_used, counter_count))
        repairs = []
        for index in range(repair_count):
            kind, identity, start_time, mask = REPAIR.unpack_from(data, layout.repairs + index * REPAIR.size)
            if kind not in (RepairKind.THREAD_MASK, RepairKind.SIGNAL_MASK):
                raise TableError(f"a repair of unknown kind {kind}")
            repairs.append(Repair(RepairKind(kind), identity, start_time, mask))
        observed = KernelAction.unpack(data, OBSERVED_OFFSET)
        previous = KernelAction.unpack(data, PREVIOUS_OFFSET)
        if observed.handler != address - CODE_SIZE + HANDLER_ENTRY:
            previous = observed  # the patcher was killed before it copied what the kernel had written
        return cls(
            layout,
            generation,
            serial,
            features,
            placed,
            heap_used,
            counter_count,
            observed,
            previous,
            tuple(repairs),
            UserLibrary.unpack(data),
        )


def _parse_sites(
    data: bytes,
    layout: Layout,
    bank: int,
    count: int,
    features: tuple[str, ...],
    heap_used: int,
    counter_count: int,
) -> Iterator[_Placed]:
    start = layout.sites[bank]
    end = unmapped_end = saved = ranges = 0
    actions = {int(action): action for action in Action}  # a trace has 84,000 sites: Action(number) takes a third of it
    for fields in SITE.iter_unpack(data[start : start + count * SITE.size]):
        address, argument, counter, bytes_offset, feature, length, size, number = fields
        action = actions.get(number)
        if action is None:
            raise TableError(f"a site with unknown action {number}")
        needed = 2 * length if action == Action.EDIT else length
        is_range = action in (Action.UNMAP, Action.MAP)
        # Each site has saved bytes of its own, and no page is taken away twice: else a table could name gigabytes.
        saved += needed
        ranges += is_range
        if (
            saved > heap_used
            or ranges > MAX_RANGES
            or (action == Action.UNMAP and address < unmapped_end)
            or (address < end and not is_range)
            or (length == 0) is not is_range
            or (is_range and not _is_page_range(address, argument))
            or address + length >= 1 << 64
            or counter >= counter_count
            or feature >= len(features)
            or bytes_offset + needed > heap_used
        ):
            raise TableError(f"the entry of site {address:#x} does not fit the table")
        end = max(end, address + length)
        unmapped_end = address + argument if action == Action.UNMAP else unmapped_end
        old = bytes(data[layout.heap + bytes_offset : layout.heap + bytes_offset + length])
        new = b"\xcc" * length
        if action == Action.EDIT:
            new = bytes(data[layout.heap + bytes_offset + length : layout.heap + bytes_offset + needed])
        (hits,) = struct.unpack_from("<Q", data, layout.counters + 8 * counter)
        order = 0
        if action == Action.LEARN:
            hits, order = min(hits, 1), hits
        site = TableSite(address, features[feature], action, argument, size, old, new, hits, order)
        yield _Placed(site, counter, bytes_offset)


def _pack_repairs(repairs: Sequence[Repair]) -> bytes:
    return b"".join(REPAIR.pack(*repair) for repair in repairs)


def _pack_name(name: str) -> bytes:
    encoded = name.encode()
    if not encoded or len(encoded) >= NAME_SIZE or 0 in encoded:
        raise ValueError(f"a feature's name has 1 to {NAME_SIZE - 1} bytes: {name!r}")
    return encoded.ljust(NAME_SIZE, b"\0")


def _unpack_name(data: bytes, offset: int) -> str:
    try:
        name = bytes(data[offset : offset + NAME_SIZE]).split(b"\0", 1)[0].decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        raise TableError("a feature's name is not readable")
    return name


def _is_page_range(address: int, size: int) -> bool:
    return address % PAGE == 0 and size % PAGE == 0 and size > 0 and address + size <= 1 << 47


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
