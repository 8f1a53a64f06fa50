"""The region that dynacut maps into a process: the handler's code with slots for stubs, and the table behind it."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from dynacut.handlers.blob import HANDLER_ENTRY, HANDLER_RESTORER
from dynacut.handlers.table import (
    CODE_SIZE,
    FIRST_SLOT,
    HEADER_SIZE,
    MAGIC,
    PREVIOUS_OFFSET,
    RETIRED_MAGICS,
    SLOT_COUNT,
    SLOT_DONE_OFFSET,
    SLOT_SIZE,
    VERSION_OFFSET,
    KernelAction,
    Layout,
    Table,
    TableError,
    Write,
)
from dynacut.live.process import Process
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Mapping

_SA_SIGINFO = 0x4
_SA_RESTORER = 0x04000000
_SA_ONSTACK = 0x08000000
_SA_RESTART = 0x10000000
_SA_NODEFER = 0x40000000
_RECYCLING_AGE_NS = 100_000_000
_STAMP = struct.Struct("<Q")
MAX_STUB_SIZE = SLOT_SIZE - _STAMP.size


@dataclass(frozen=True)
class Region:
    """Where the region lies in the process; addresses are absolute, sizes in bytes."""

    code: int
    table_size: int
    """The table's private memory; what it shares with forks lies behind."""

    @property
    def table(self) -> int:
        """The table's address."""
        return self.code + CODE_SIZE

    @property
    def restorer(self) -> int:
        """The trampoline by which the handler returns."""
        return self.code + HANDLER_RESTORER

    @property
    def handler(self) -> int:
        """The handler's entry."""
        return self.code + HANDLER_ENTRY

    def action(self, previous: KernelAction) -> KernelAction:
        """The SIGTRAP action that makes the handler run. previous: the target's own, for when one comes from outside.

        SA_NODEFER: an int3 may lie in the way of a signal handler that interrupts ours, or of a user's handler.
        SA_ONSTACK: a thread with a tiny stack and an alternate one has room for the frame there only.
        SA_RESTART as in the target's own; where that is to ignore SIGTRAP, nothing must be interrupted either.
        """
        flags = _SA_SIGINFO | _SA_RESTORER | _SA_ONSTACK | _SA_NODEFER
        if previous.handler <= 1 or previous.flags & _SA_RESTART:
            flags |= _SA_RESTART
        return KernelAction(self.handler, flags, self.restorer, 0)

    def contains_code(self, address: int) -> bool:
        """Whether an address lies in the handler or in a stub."""
        return self.code <= address < self.table


@dataclass(frozen=True)
class FoundRegion:
    """A region with what its table says; table is None where a patcher was killed before it had filled it."""

    region: Region
    table: Table | None


def find_region(process: Process, magic: bytes = MAGIC) -> FoundRegion | None:
    """The region of a kind that is in force: of the highest serial; else one mapped but not filled; else None.

    Raises:
        DynacutError: there is a table, but of another version or damaged.
    """
    best: FoundRegion | None = None
    for region, head in _regions(process, magic):
        if not head.startswith(magic):
            continue
        if head[VERSION_OFFSET:] == bytes(4):
            best = best or FoundRegion(region, None)
            continue
        found = FoundRegion(region, read_table(process, region))
        if best is None or best.table is None or (found.table and found.table.serial > best.table.serial):
            best = found
    return best


def has_region(process: Process, magic: bytes = MAGIC) -> bool:
    """Whether a region of a kind is mapped, filled or not; cheaper than find_region()."""
    return any(head.startswith(magic) for _, head in _regions(process, magic))


def original_action(process: Process, table: Table, magic: bytes = MAGIC) -> KernelAction:
    """SIGTRAP's action before this kind of region came, also where its contents have moved to another one meanwhile."""
    by_handler = {region.handler: region for region, _ in _regions(process, magic)}
    action = table.previous
    while (region := by_handler.pop(action.handler, None)) is not None:
        action = KernelAction.unpack(process.read(region.table + PREVIOUS_OFFSET, 32))
    return action


def is_our_handler(process: Process, handler: int, magic: bytes = MAGIC) -> bool:
    """Whether an address is the entry of a handler of this kind of region, in force or outgrown."""
    return any(region.handler == handler for region, _ in _regions(process, magic))


def _regions(process: Process, magic: bytes) -> Iterator[tuple[Region, bytes]]:
    """Every region of a kind, outgrown ones too, with the magic and version of its table."""
    mappings = process.mappings
    for code, table in pairwise(mappings):
        if not _looks_like_region(code, table):
            continue
        head = process.read(table.start, VERSION_OFFSET + 4)
        if head[:VERSION_OFFSET] in (magic, RETIRED_MAGICS[magic]):
            yield Region(code.start, table.size), head


def _looks_like_region(code: Mapping, table: Mapping) -> bool:
    return (
        code.size == CODE_SIZE
        and code.executable
        and not code.writable
        and code.end == table.start
        and table.writable
        and not table.executable
        and not code.is_file
        and not table.is_file
    )


def read_table(process: Process, region: Region) -> Table:
    """Reads and checks the table.

    Raises:
        DynacutError: it is damaged, or of another version.
    """
    try:
        layout = Table.layout_of(process.read(region.table, HEADER_SIZE))
        return Table.parse(process.read(region.table, layout.total_size), region.table)
    except TableError as error:
        raise DynacutError(
            f"the table in {process.label} at {region.table:#x} cannot be used: {error}",
            "use the version of dynacut that patched the process, or restart the process",
        ) from None


def choose_address(process: Process, layout: Layout) -> Region:
    """A place for a new region: below the libraries, at a distance that new mappings do not reach soon."""
    size = CODE_SIZE + layout.total_size
    distance = 1 << 27  # near enough to share their page tables: one page to make instead of three
    mappings = process.mappings
    # The gap below the libraries is the largest one; the kernel places new mappings at its upper end, the heap grows
    # at its lower end.
    gaps = [
        (after.start - before.end, before.end, after.start)
        for before, after in pairwise(mappings)
        if after.start < 1 << 47
    ]
    for length, start, end in sorted(gaps, reverse=True):
        if length < 4 * size:
            break
        address = (end - min(max(distance, 2 * size), length // 2)) & ~0x1FFFFF
        if address > start and address + size < end:
            return Region(address, layout.size)
    raise DynacutError(f"{process.label} has no gap in its address space for the handler's table ({size} bytes)")


def write_all(process: Process, region: Region, writes: Iterable[Write]) -> None:
    """Writes to the table, in order."""
    for write in writes:
        if write.data:
            process.write(region.table + write.offset, write.data)


def retire(process: Process, region: Region) -> None:
    """Marks a table whose contents moved elsewhere."""
    magic = process.read(region.table, len(MAGIC))
    process.write(region.table, RETIRED_MAGICS.get(magic, magic))


@dataclass(frozen=True)
class Slot:
    """A place for one stub: its address, and the byte it sets as its last act (None: outside of a region)."""

    address: int
    done: int | None


def take_slot(process: Process, region: Region) -> Slot:
    """The next slot that was never used; else the older half of the used ones is cleared first.

    A slot is used again only when its stub had finished and that was long ago: a thread may still be on its way out of
    a stub, and a signal handler may have interrupted it there.

    Raises:
        DynacutError: every slot is in use.
    """
    stamps_start = region.code + FIRST_SLOT
    area = process.read(stamps_start, SLOT_COUNT * SLOT_SIZE)
    done = process.read(region.table + SLOT_DONE_OFFSET, SLOT_COUNT)
    stamps = [_STAMP.unpack_from(area, (index + 1) * SLOT_SIZE - _STAMP.size)[0] for index in range(SLOT_COUNT)]
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    free = next((index for index, stamp in enumerate(stamps) if stamp == 0), None)
    if free is None:
        by_age = sorted(range(SLOT_COUNT), key=stamps.__getitem__)
        reusable = [
            index for index in by_age[: SLOT_COUNT // 2] if done[index] and now - stamps[index] > _RECYCLING_AGE_NS
        ]
        if not reusable:
            raise DynacutError(f"{process.label} was changed too often in the last instants", "try again in a second")
        for index in reusable:
            process.write(stamps_start + index * SLOT_SIZE, bytes(SLOT_SIZE))
        free = reusable[0]
    slot = Slot(stamps_start + free * SLOT_SIZE, region.table + SLOT_DONE_OFFSET + free)
    assert slot.done is not None
    process.write(slot.done, b"\0")
    # From here on the slot counts as used, whatever happens to this patcher.
    process.write(slot.address + SLOT_SIZE - _STAMP.size, _STAMP.pack(now))
    return slot
