"""The parts of a table's bytes: names, sites and repairs, packed and unpacked. What is unpacked is not believed."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynacut.handlers.layout import (
    BANK,
    BANKS_OFFSET,
    FEATURE_CAPACITY,
    MAX_RANGES,
    NAME_SIZE,
    PAGE_SIZE,
    REPAIR,
    SITE,
    Layout,
    TableError,
)
from dynacut.handlers.records import INT3, RANGES, Action, Repair, RepairKind, TableSite

_ACTIONS = {int(action): action for action in Action}
"""A trace has 84,000 sites: Action(number) would take a third of the time of reading them."""
_SIGNALS = range(1, 65)
_COUNTER = struct.Struct("<Q")


class Bank(NamedTuple):
    """One of the two banks of a table: what it holds, and which of the two it is."""

    site_count: int
    feature_count: int
    heap_used: int
    counter_count: int
    number: int

    @classmethod
    def unpack(cls, data: bytes, generation: int) -> Bank:
        """The bank that is in force in this generation, of a table's bytes."""
        number = generation & 1
        sites, features, heap_used, counters = BANK.unpack_from(data, BANKS_OFFSET + number * BANK.size)
        return cls(sites, features, heap_used, counters, number)

    def check(self, layout: Layout) -> None:
        """Returns if it can be one of a table of this layout; else TableError."""
        if (
            self.site_count > layout.site_capacity
            or self.feature_count > FEATURE_CAPACITY
            or self.heap_used > layout.heap_capacity
            or self.counter_count > layout.site_capacity + 1
        ):
            raise TableError("the table's counts are out of range")

    def site_records(self, data: bytes, layout: Layout) -> bytes:
        """The records of its sites, of a table's bytes."""
        start = layout.sites[self.number]
        return data[start : start + self.site_count * SITE.size]


@dataclass(frozen=True, slots=True)
class Placed:
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


def unpack_names(data: bytes, layout: Layout, bank: Bank) -> tuple[str, ...]:
    """The names of the features; TableError if one is not readable."""
    start = layout.features + bank.number * FEATURE_CAPACITY * NAME_SIZE
    return tuple(_unpack_name(data, start + NAME_SIZE * index) for index in range(bank.feature_count))


def unpack_repairs(data: bytes, layout: Layout, count: int) -> tuple[Repair, ...]:
    """The repairs on record; TableError if one cannot be."""
    repairs = []
    for fields in REPAIR.iter_unpack(data[layout.repairs : layout.repairs + count * REPAIR.size]):
        kind, identity, start_time, mask = fields
        if kind not in (RepairKind.THREAD_MASK, RepairKind.SIGNAL_MASK):
            raise TableError(f"a repair of unknown kind {kind}")
        if kind == RepairKind.SIGNAL_MASK and identity not in _SIGNALS:
            raise TableError(f"a repair of the handler of signal {identity}, which there is not")
        repairs.append(Repair(RepairKind(kind), identity, start_time, mask))
    return tuple(repairs)


def unpack_sites(data: bytes, layout: Layout, bank: Bank, features: Sequence[str]) -> Iterator[Placed]:
    """The sites with their hits, by ascending address; TableError if one cannot be, or not beside the others."""
    end = unmapped_end = saved = ranges = 0
    for fields in SITE.iter_unpack(bank.site_records(data, layout)):
        address, argument, counter, bytes_offset, feature, length, size, number = fields
        action = _ACTIONS.get(number)
        if action is None:
            raise TableError(f"a site with unknown action {number}")
        needed = 2 * length if action == Action.EDIT else length
        is_range = action in RANGES
        # Each site has saved bytes of its own, and no page is taken away twice: else a table could name gigabytes.
        saved += needed
        ranges += is_range
        if (
            saved > bank.heap_used
            or ranges > MAX_RANGES
            or (action == Action.UNMAP and address < unmapped_end)
            or (address < end and not is_range)
            or (length == 0) is not is_range
            or (is_range and not _is_page_range(address, argument))
            or address + length >= 1 << 64
            or counter >= bank.counter_count
            or feature >= len(features)
            or bytes_offset + needed > bank.heap_used
        ):
            raise TableError(f"the entry of site {address:#x} does not fit the table")
        end = max(end, address + length)
        unmapped_end = address + argument if action == Action.UNMAP else unmapped_end
        heap = layout.heap + bytes_offset
        old, saved_new = bytes(data[heap : heap + length]), bytes(data[heap + length : heap + needed])
        new = saved_new if action == Action.EDIT else INT3 * length
        (hits,) = _COUNTER.unpack_from(data, layout.counters + _COUNTER.size * counter)
        order = 0
        if action == Action.LEARN:
            hits, order = min(hits, 1), hits
        yield Placed(
            TableSite(address, features[feature], action, argument, size, old, new, hits, order), counter, bytes_offset
        )


def pack_repairs(repairs: Sequence[Repair]) -> bytes:
    """The records of repairs."""
    return b"".join(REPAIR.pack(*repair) for repair in repairs)


def pack_name(name: str) -> bytes:
    """The field of a feature's name; ValueError if that has not 1 to NAME_SIZE - 1 bytes."""
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
    return address % PAGE_SIZE == 0 and size % PAGE_SIZE == 0 and size > 0 and address + size <= 1 << 47
