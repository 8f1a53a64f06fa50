"""The region that dynacut maps into a target: the handler's code with slots for stubs, and the table behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dynacut.handlers.blob import HANDLER_ENTRY, HANDLER_RESTORER
from dynacut.handlers.table import (
    CODE_SIZE,
    FEATURE_CAPACITY,
    HEADER_SIZE,
    MAGIC,
    NO_LIBRARY,
    PREVIOUS_OFFSET,
    RETIRED_MAGICS,
    VERSION_OFFSET,
    Header,
    KernelAction,
    Layout,
    Table,
    TableError,
    TableFullError,
    TableSite,
    UserLibrary,
    Write,
)
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Mapping, Target

_SA_SIGINFO = 0x4
_SA_RESTORER = 0x04000000
_SA_ONSTACK = 0x08000000
_SA_RESTART = 0x10000000
_SA_NODEFER = 0x40000000
_PLACE_MASK = ~0x1FFFFF
"""Places begin where a page table does."""
MAX_REGIONS = 1024
"""Of one kind in a target: each was too small for what came after it, and stays mapped. Emptied ones are used again."""


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

    @staticmethod
    def user_action(handler: int) -> KernelAction:
        """How the handler of a user's library, at an absolute address, is called.

        SA_NODEFER: nothing is blocked in it, disabled code may lie in its way, as in ours.
        """
        return KernelAction(handler, _SA_SIGINFO | _SA_NODEFER)

    def contains_code(self, address: int) -> bool:
        """Whether an address lies in the handler or in a stub."""
        return self.code <= address < self.table


@dataclass(frozen=True)
class FoundRegion:
    """A region with what its table says; table is None where a patcher was killed before it had filled it."""

    region: Region
    table: Table | None


def find_region(target: Target, magic: bytes = MAGIC) -> FoundRegion | None:
    """The region of a kind that is in force: of the highest serial; else one mapped but not filled; else None.

    Raises:
        DynacutError: there is a table, but of another version or damaged.
    """
    if (filled := find_layout(target, magic)) is not None:
        return FoundRegion(filled[0], read_table(target, filled[0]))
    for region, head in _regions(target, magic):
        if _is_empty(head, magic):
            return FoundRegion(region, None)
    return None


def find_layout(target: Target, magic: bytes = MAGIC) -> tuple[Region, Layout] | None:
    """The region of a kind that is in force, with its table's layout: cheaper than find_region() by the sites.

    Raises:
        DynacutError: there is a table, but of another version or damaged.
    """
    best: tuple[int, Region, Layout] | None = None
    for region, head in _regions(target, magic):
        if not head.startswith(magic) or _is_empty(head, magic):
            continue
        try:
            header = Header.unpack(target.read(region.table, HEADER_SIZE))
            layout = header.layout()
        except TableError as error:
            raise _unusable(target, region, error) from error
        if best is None or header.serial > best[0]:
            best = header.serial, region, layout
    return best[1:] if best else None


def _is_empty(head: bytes, magic: bytes) -> bool:
    """Whether a table has its magic but no version yet: it was not filled."""
    return head == magic + bytes(4)


def original_action(target: Target, table: Table, magic: bytes = MAGIC) -> KernelAction:
    """SIGTRAP's action before this kind of region came, also where its contents have moved to another one meanwhile."""
    by_handler = {region.handler: region for region, _ in _regions(target, magic)}
    action = table.previous
    while (region := by_handler.pop(action.handler, None)) is not None:
        action = KernelAction.unpack(target.read(region.table + PREVIOUS_OFFSET, 32))
    return action


def is_our_handler(target: Target, handler: int, magic: bytes = MAGIC) -> bool:
    """Whether an address is the entry of a handler of this kind of region, in force or outgrown."""
    return any(region.handler == handler for region, _ in _regions(target, magic))


def check_room_for_region(target: Target, magic: bytes = MAGIC) -> None:
    """Returns if one more region of a kind may be mapped.

    Raises:
        DynacutError: there would be more than are looked at.
    """
    if sum(1 for _ in _regions(target, magic)) >= MAX_REGIONS:
        raise DynacutError(
            f"{target.label} has {MAX_REGIONS:,} of dynacut's tables, and needs another one",
            "--undo empties the one in force, which can be used again then; a restart of the program removes all",
        )


def _regions(target: Target, magic: bytes) -> Iterator[tuple[Region, bytes]]:
    """Every region of a kind, outgrown ones too, with the magic and version of its table.

    Raises:
        DynacutError: there are more than dynacut makes.
    """
    mappings = target.mappings
    count = 0
    for code, table in pairwise(mappings):
        if not _looks_like_region(code, table):
            continue
        head = target.read(table.start, VERSION_OFFSET + 4)
        if head[:VERSION_OFFSET] in (magic, RETIRED_MAGICS[magic]):
            count += 1
            if count > MAX_REGIONS:
                raise DynacutError(
                    f"{target.label} has more than {MAX_REGIONS:,} of what look like dynacut's tables",
                    "dynacut makes no such number of them: somebody else did; restart the program",
                )
            yield Region(table.start - CODE_SIZE, table.size), head


def _looks_like_region(code: Mapping, table: Mapping) -> bool:
    """Both may reach further: the kernel shows what the program has mapped directly before or behind as one with it."""
    return (
        code.size >= CODE_SIZE
        and code.executable
        and not code.writable
        and code.end == table.start
        and table.writable
        and not table.executable
        and not code.is_file
        and not table.is_file
    )


def read_table(target: Target, region: Region) -> Table:
    """Reads and checks the table.

    Raises:
        DynacutError: it is damaged, or of another version.
    """
    try:
        layout = Header.unpack(target.read(region.table, HEADER_SIZE)).layout()
        return Table.parse(target.read(region.table, layout.total_size), region.table)
    except TableError as error:
        raise _unusable(target, region, error) from None


def _unusable(target: Target, region: Region, error: TableError) -> DynacutError:
    return DynacutError(
        f"the table in {target.label} at {region.table:#x} cannot be used: {error}",
        "use the version of dynacut that patched the process, or restart the process",
    )


def choose_address(target: Target, layout: Layout, taken: range = range(0)) -> Region:
    """A place for a new region. taken: addresses that are about to be mapped, and so must stay free.

    Raises:
        DynacutError: there is none.
    """
    size = CODE_SIZE + layout.total_size
    near = 1 << 27  # near enough to the libraries to share their page tables: one page to make instead of three
    address = free_place(target, size, near, taken)
    if address is None:
        raise DynacutError(f"{target.label} has no gap in its address space for the handler's table ({size} bytes)")
    return Region(address, layout.size)


def free_place(target: Target, size: int, distance: int, taken: range = range(0)) -> int | None:
    """An address below the libraries where size bytes are free, at a distance that new mappings do not reach soon."""
    mappings = target.mappings
    # The gap below the libraries is the largest one; the kernel places new mappings at its upper end, the heap grows
    # at its lower end. Where the stack may grow without limit, mappings begin far below, and the gap is the stack's.
    gaps = [
        (after.start - before.end, before.end, after.start, after.path == "[stack]")
        for before, after in pairwise(mappings)
        if after.start < 1 << 47
    ]
    for length, start, end, is_stacks in sorted(gaps, reverse=True):
        if length < 4 * size:
            break
        address = (end - (length // 2 if is_stacks else min(max(distance, 2 * size), length // 2))) & _PLACE_MASK
        if address <= taken.stop and taken.start <= address + size:
            address = (taken.start - size - 1) & _PLACE_MASK
        if address > start and address + size < end:
            return address
    return None


def layout_for(features: Sequence[str], sites: Sequence[TableSite], *, shared: bool = False) -> Layout:
    """The layout of a new table with room for these contents.

    Raises:
        DynacutError: they are more than any table can hold.
    """
    if len(features) > FEATURE_CAPACITY:
        raise DynacutError(
            f"{len(features)} features, those known already included, are more than the {FEATURE_CAPACITY} of a table",
            "put several sites into one feature, or undo first what is not needed any more",
        )
    try:
        heap = sum(len(site.old) + len(site.new) for site in sites)
        return Layout.for_contents(len(sites), heap, shared=shared)
    except TableFullError as error:
        raise DynacutError(str(error), "disable less at a time") from None


def user_of(table: Table | None) -> UserLibrary:
    """The user's library that a table records."""
    return table.user if table else NO_LIBRARY


def new_table(
    layout: Layout, old: Table | None, features: Sequence[str], sites: Sequence[TableSite]
) -> Iterator[Write]:
    """The writes, in their order, that fill a new table behind its magic; with the last one it comes into force.

    old: the table it takes over from. Its masks and sites are in force, so the new one must know all that it knew.

    Raises:
        TableFullError: features and sites do not fit.
    """
    fresh = Table.empty(layout, serial=old.serial + 1 if old else 1)
    if old is not None:
        fresh = replace(fresh, previous=old.previous, repairs=old.repairs, user=old.user)
        yield Write(PREVIOUS_OFFSET, old.previous.pack())
        yield from old.user.writes()
        yield from fresh.repair_writes(old.repairs)
    yield from fresh.update(features, sites)
    yield replace(fresh, generation=fresh.generation + 1).header()
