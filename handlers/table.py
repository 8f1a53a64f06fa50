"""The table beside the handler, read and written: the Python side of table.h.

A region is the handler's code (CODE_SIZE bytes, r-x) followed by its table (rw). The patcher changes a table in one
transaction: what is new goes where the bank in force does not point to, and then one byte, the generation, turns the
banks. Killed at any instant, the table is as before or as after.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from dynacut.handlers.blob import HANDLER_ENTRY

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
MAX_SITE_CAPACITY = 1 << 22
MIN_HEAP_CAPACITY = 1 << 16
MAX_HEAP_CAPACITY = 1 << 28

_PAGE = 4096
HEADER_SIZE = 2 * _PAGE
_FIXED = struct.Struct("<8sIB3xQ12I")
_BANK = struct.Struct("<4I")
_SITE = struct.Struct("<QQ5IB3x")
_REPAIR = struct.Struct("<IIQQ")
_ACTION = struct.Struct("<4Q")
_PATH_SIZE = 1024
_LIBRARY = struct.Struct(f"<Q32s{_PATH_SIZE}s")

VERSION_OFFSET = 8
GENERATION_OFFSET = 12
REPAIR_COUNT_OFFSET = 44
BANKS_OFFSET = 72
OBSERVED_OFFSET = BANKS_OFFSET + 2 * _BANK.size
PREVIOUS_OFFSET = OBSERVED_OFFSET + _ACTION.size
INPUT_OFFSET = PREVIOUS_OFFSET + _ACTION.size
OUTPUT_OFFSET = INPUT_OFFSET + 64 * _ACTION.size
SLOT_DONE_OFFSET = OUTPUT_OFFSET + 64 * _ACTION.size
USER_OFFSET = -(-(SLOT_DONE_OFFSET + SLOT_COUNT) // 8) * 8
LIBRARY_OFFSET = USER_OFFSET + _ACTION.size


class TableError(ValueError):
    """A table that does not hold together: not ours, or damaged."""


class TableFullError(ValueError):
    """The contents do not fit the table's capacities; a larger one must be mapped."""


class Action(IntEnum):
    """What a hit does; the values are those of enum dynacut_action."""

    TERMINATE = 1
    REDIRECT = 2
    RETURN = 3
    SKIP = 4
    LEARN = 5
    HANDLER = 6
    EDIT = 7
    UNMAP = 8


class RepairKind(IntEnum):
    """What was changed so that SIGTRAP is not blocked."""

    THREAD_MASK = 1
    SIGNAL_MASK = 2


@dataclass(frozen=True)
class KernelAction:
    """struct kernel_sigaction of x86-64; bit N-1 of mask is signal N."""

    handler: int = 0
    flags: int = 0
    restorer: int = 0
    mask: int = 0

    def pack(self) -> bytes:
        """The 32 bytes that rt_sigaction(2) takes."""
        return _ACTION.pack(self.handler, self.flags, self.restorer, self.mask)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> KernelAction:
        """Reads 32 bytes that rt_sigaction(2) gave."""
        return cls(*_ACTION.unpack_from(data, offset))


@dataclass(frozen=True)
class TableSite:
    """One patched place. old and new have the same length: the number of bytes that are patched."""

    address: int
    feature: str
    action: Action
    argument: int
    size: int
    """Of the basic block that the site stands for, in bytes."""
    old: bytes
    new: bytes
    hits: int = field(default=0, compare=False)
    order: int = field(default=0, compare=False)
    """Of a block that learns: the number of its last hit among all such hits; 0 if it was not hit."""

    @property
    def end(self) -> int:
        """The address behind the last patched byte."""
        return self.address + len(self.old)

    def key(self) -> tuple[int, int]:
        """For sorting: what patches no bytes comes first, or the handler would find it instead of the site it hides."""
        return self.address, len(self.old)


@dataclass(frozen=True)
class Repair:
    """A mask that was cleared of SIGTRAP: of a thread (id, start time in clock ticks) or of a signal's handler."""

    kind: RepairKind
    id: int
    start_time: int
    mask: int = 0
    """As it was before."""


@dataclass(frozen=True)
class Write:
    """Bytes to put at an offset of the table."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class UserLibrary:
    """The user's handler library, as the table records it. It stays mapped when it is out of force."""

    action: KernelAction = KernelAction()
    """How its handler is called; a handler of 0 is out of force."""
    start: int = 0
    """The absolute address it is mapped at; 0: there is none."""
    digest: bytes = bytes(32)
    """SHA-256 of its file."""
    path: str = ""

    @property
    def is_in_force(self) -> bool:
        """Whether traps go to it."""
        return self.action.handler != 0

    def out_of_force(self) -> UserLibrary:
        """The same library, with no trap going to it."""
        return replace(self, action=KernelAction())

    def writes(self) -> Iterator[Write]:
        """The writes, in their order, that record it. The handler's address puts it in force: what belongs to it is
        there before it, and until it is gone.
        """
        path = self.path.encode(errors="surrogateescape")
        if len(path) >= _PATH_SIZE:
            path = b"..." + path[-(_PATH_SIZE - 4) :]
        action = self.action.pack()
        address = Write(USER_OFFSET, action[:8])
        rest = Write(USER_OFFSET + 8, action[8:] + _LIBRARY.pack(self.start, self.digest, path))
        yield from (rest, address) if self.is_in_force else (address, rest)

    @classmethod
    def unpack(cls, data: bytes) -> UserLibrary:
        """Reads what a table's header records."""
        start, digest, path = _LIBRARY.unpack_from(data, LIBRARY_OFFSET)
        name = path.split(b"\0", 1)[0].decode(errors="surrogateescape")
        return cls(KernelAction.unpack(data, USER_OFFSET), start, digest, name)


NO_LIBRARY = UserLibrary()


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
        return self.size + (_pages(8 * (self.site_capacity + 1)) if self.shared else 0)

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
        counters = repairs + REPAIR_CAPACITY * _REPAIR.size
        first = counters if shared else counters + 8 * (site_capacity + 1)
        second = first + _SITE.size * site_capacity
        heap = second + _SITE.size * site_capacity
        size = _pages(heap + heap_capacity)
        counters = size if shared else counters
        return cls(site_capacity, heap_capacity, features, repairs, counters, (first, second), heap, size, shared)


@dataclass(frozen=True)
class _Placed:
    """A site with its places in counters and heap."""

    site: TableSite
    counter: int
    bytes_offset: int


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
        fixed = _FIXED.pack(
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
        known = {placed.site: placed for placed in self.placed}
        # What the bank in force refers to is left alone even if the new contents do not need it: killed before the last
        # write, the table is still the old one.
        heap_used = self.heap_used if self.placed else 0
        used_counters = {placed.counter for placed in self.placed}
        free_counters = (index for index in itertools.count(1) if index not in used_counters)

        if len(sites) > layout.site_capacity:
            raise TableFullError(f"{len(sites)} sites, room for {layout.site_capacity}")
        if len(features) > FEATURE_CAPACITY:
            raise TableFullError(f"{len(features)} features, room for {FEATURE_CAPACITY}")
        feature_index = {name: index for index, name in enumerate(features)}
        heap = bytearray()
        records = bytearray()
        counter_count = 0
        new_counters = []
        for site in sorted(sites, key=TableSite.key):
            placed = known.get(site)
            if placed is None:
                placed = _Placed(site, next(free_counters), heap_used + len(heap))
                heap += site.old
                if site.action == Action.EDIT:
                    heap += site.new
                new_counters.append(placed.counter)
            counter_count = max(counter_count, placed.counter + 1)
            if placed.counter > layout.site_capacity:
                raise TableFullError(
                    f"{len(sites)} sites besides {len(used_counters)}, room for {layout.site_capacity}"
                )
            records += _SITE.pack(
                site.address,
                site.argument,
                placed.counter,
                placed.bytes_offset,
                feature_index[site.feature],
                len(site.old),
                site.size,
                site.action,
            )
        if heap_used + len(heap) > layout.heap_capacity:
            raise TableFullError(f"{heap_used + len(heap)} saved bytes, room for {layout.heap_capacity}")

        names = b"".join(_pack_name(name) for name in features)
        generation = (self.generation + 1) & 0xFF
        bank = generation & 1
        yield Write(layout.features + bank * FEATURE_CAPACITY * NAME_SIZE, names)
        yield Write(layout.heap + heap_used, bytes(heap))
        for first, count in _runs(sorted(new_counters)):
            yield Write(layout.counters + 8 * first, bytes(8 * count))
        yield Write(layout.sites[bank], bytes(records))
        yield Write(
            BANKS_OFFSET + bank * _BANK.size,
            _BANK.pack(len(sites), len(features), heap_used + len(heap), counter_count),
        )
        yield Write(GENERATION_OFFSET, bytes([generation]))

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
        packed = b"".join(_REPAIR.pack(repair.kind, repair.id, repair.start_time, repair.mask) for repair in repairs)
        yield Write(self.layout.repairs, packed)
        yield Write(REPAIR_COUNT_OFFSET, struct.pack("<I", len(repairs)))

    @classmethod
    def layout_of(cls, data: bytes) -> Layout:
        """The layout that a table's first HEADER_SIZE bytes describe.

        Raises:
            TableError: they are not a table's, or its parts do not lie where they should.
        """
        if len(data) < HEADER_SIZE:
            raise TableError("no dynacut table")
        (magic, version, _, size, _, site_capacity, feature_capacity, heap_capacity, repair_capacity,
         repair_count, *offsets) = _FIXED.unpack_from(data)  # fmt: skip
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
        (_, _, generation, _, serial, site_capacity, _, heap_capacity, _, repair_count, *_) = _FIXED.unpack_from(data)
        if len(data) < layout.total_size:
            raise TableError("the table is cut off")
        site_count, feature_count, heap_used, counter_count = _BANK.unpack_from(
            data, BANKS_OFFSET + (generation & 1) * _BANK.size
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
            kind, identity, start_time, mask = _REPAIR.unpack_from(data, layout.repairs + index * _REPAIR.size)
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
    end = 0
    for fields in _SITE.iter_unpack(data[start : start + count * _SITE.size]):
        address, argument, counter, bytes_offset, feature, length, size, number = fields
        try:
            action = Action(number)
        except ValueError:
            raise TableError(f"a site with unknown action {number}") from None
        needed = 2 * length if action == Action.EDIT else length
        is_unmapping = action == Action.UNMAP
        if (
            (address < end and not is_unmapping)
            or (length == 0) is not is_unmapping
            or (is_unmapping and not _is_page_range(address, argument))
            or address + length >= 1 << 64
            or counter >= counter_count
            or feature >= len(features)
            or bytes_offset + needed > heap_used
        ):
            raise TableError(f"the entry of site {address:#x} does not fit the table")
        end = max(end, address + length)
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


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _is_page_range(address: int, size: int) -> bool:
    return address % _PAGE == 0 and size % _PAGE == 0 and size > 0 and address + size <= 1 << 47


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
