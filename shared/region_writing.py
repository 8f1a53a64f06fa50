"""Writing to a region: its handler and its table, the same for a target that runs and for one that stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dynacut.handlers.blob import handler_code
from dynacut.handlers.table import (
    MAGIC,
    RETIRED_MAGICS,
    TRACE_MAGIC,
    Layout,
    Table,
    TableFullError,
    Write,
)
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.region import (
    FoundRegion,
    Region,
    check_room_for_region,
    find_region,
    layout_for,
    new_table,
    read_table,
)
from dynacut.shared.target import Writable

MapRegion = Callable[[Layout, range], Region]
"""Maps a region for a layout outside of a range of addresses, its table marked by its magic, without contents yet."""


def write_table(target: Writable, region: Region, writes: Iterable[Write]) -> None:
    """Writes to the table, in order."""
    for write in writes:
        if write.data:
            target.write(region.table + write.offset, write.data)


def prepare_region(
    target: Writable, patches: PatchSet, map_region: MapRegion, magic: bytes = MAGIC
) -> tuple[Region, Table, Region | None]:
    """A region whose table holds the patch set's contents, and the region that was too small for them.

    Raises:
        DynacutError: no table can hold them, or there is no place for one.
    """
    found = find_region(target, magic)
    old = found.table if found else None
    if found is not None and old is not None:
        try:
            writes = list(old.update(patches.features, patches.sites))
        except TableFullError:
            pass
        else:
            write_table(target, found.region, writes)
            return found.region, read_table(target, found.region), None
    layout = layout_for(patches.features, patches.sites, shared=magic == TRACE_MAGIC)
    if found is not None and old is None and found.region.table_size == layout.size:
        region = found.region  # mapped by a patcher that was killed before it filled it
    else:
        check_room_for_region(target, magic)
        region = map_region(layout, patches.library.range if patches.library else range(0))
    target.write(region.code, handler_code())
    write_table(target, region, new_table(layout, old, patches.features, patches.sites))
    table = read_table(target, region)
    if old is None or found is None:
        return region, table, None
    write_table(target, region, table.carried_hits(old))
    return region, table, found.region


def retire(target: Writable, region: Region) -> None:
    """Marks a table whose contents moved elsewhere."""
    magic = target.read(region.table, len(MAGIC))
    target.write(region.table, RETIRED_MAGICS.get(magic, magic))


def set_contents(target: Writable, patches: PatchSet, magic: bytes = MAGIC) -> None:
    """Makes the table say what it shall say after a change, where that is something else than before."""
    if (patches.features, patches.sites) == (patches.before_features, patches.before_sites):
        return
    found = find_region(target, magic)
    if found is not None and found.table is not None:
        write_table(target, found.region, found.table.update(patches.features, patches.sites))


def put_contents_back(target: Writable, found: FoundRegion, patches: PatchSet) -> None:
    """Makes a table that was there before a change say what it said then."""
    assert found.table is not None
    write_table(target, found.region, patches.before_user.writes())
    write_table(target, found.region, found.table.update(patches.before_features, patches.before_sites))


def empty_table(target: Writable, region: Region, table: Table) -> None:
    """Empties the table of a handler that is out of force."""
    write_table(target, region, table.user.out_of_force().writes())
    write_table(target, region, table.repair_writes(()))
    write_table(target, region, table.update((), ()))
