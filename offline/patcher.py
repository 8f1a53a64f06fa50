"""Applies a patch set to a process of an image, in memory: the same table, handler, action and masks as live."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dynacut.handlers.blob import handler_code
from dynacut.handlers.table import (
    CODE_SIZE,
    MAGIC,
    OBSERVED_OFFSET,
    PREVIOUS_OFFSET,
    RETIRED_MAGICS,
    Layout,
    Repair,
    RepairKind,
    Table,
    TableFullError,
    Write,
)
from dynacut.offline.images.memory import PROT_EXEC, PROT_READ, PROT_WRITE
from dynacut.offline.images.process import ImageProcess
from dynacut.shared.errors import DynacutError
from dynacut.shared.holes import Hole
from dynacut.shared.library import Library
from dynacut.shared.occupancy import NO_FRAMES, Occupancy, SignalFrames
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.region import (
    Region,
    choose_address,
    find_region,
    is_our_handler,
    new_table,
    original_action,
    read_table,
)
from dynacut.shared.target import SIGTRAP

SIGTRAP_BIT = 1 << (SIGTRAP - 1)


def apply(process: ImageProcess, patches: PatchSet) -> None:
    """Applies a patch set that was resolved against the process as it is in the image.

    Raises:
        DynacutError: it is not possible; the process in memory is then of no more use, the image is as it was.
    """
    library = patches.library
    for address in {*(edit.address for edit in patches.edits), *(library.bound_to if library else ())}:
        process.check_file(address)
    match patches.handler:
        case HandlerChange.INSTALL:
            region, table = _prepare(process, patches)
            if library is not None:
                _map_library(process, region, library)
            restorers = {process.action(number).restorer for number in process.caught_signals()}
            _install(process, region, table)
            _write(process, patches.edits, SignalFrames(frozenset(restorers), region.restorer))
            for hole in patches.unmap:
                process.memory.unmap(hole.start, hole.end)
        case HandlerChange.KEEP:
            _fill(process, patches.fill)
            _write(process, patches.edits)
            found = find_region(process)
            if found is not None and found.table is not None and _differs(patches):
                _write_table(process, found.region, found.table.update(patches.features, patches.sites))
        case HandlerChange.REMOVE:
            _fill(process, patches.fill)
            _write(process, patches.edits)
            found = find_region(process)
            if found is not None and found.table is not None:
                _remove(process, found.region, found.table)


def _differs(patches: PatchSet) -> bool:
    return (patches.features, patches.sites) != (patches.before_features, patches.before_sites)


def _prepare(process: ImageProcess, patches: PatchSet) -> tuple[Region, Table]:
    """The region with a table of the patch set's contents: the one that is there, or a new one."""
    found = find_region(process)
    old = found.table if found else None
    if found is not None and old is not None:
        try:
            _write_table(process, found.region, list(old.update(patches.features, patches.sites)))
        except TableFullError:
            pass
        else:
            return found.region, read_table(process, found.region)
    heap = sum(len(site.old) + len(site.new) for site in patches.sites)
    layout = Layout.for_contents(len(patches.sites), heap)
    region = choose_address(process, layout, patches.library.range if patches.library else range(0))
    process.memory.map_anonymous(region.code, CODE_SIZE, PROT_READ | PROT_EXEC)
    process.memory.map_anonymous(region.table, layout.size, PROT_READ | PROT_WRITE)
    process.write(region.code, handler_code())
    _write_table(process, region, [Write(0, MAGIC)])
    _write_table(process, region, new_table(layout, old, patches.features, patches.sites))
    table = read_table(process, region)
    if old is not None and found is not None:
        _write_table(process, region, table.carried_hits(old))
        process.write(found.region.table, RETIRED_MAGICS[MAGIC])
    return region, table


def _fill(process: ImageProcess, holes: Iterable[Hole]) -> None:
    """Maps unmapped pages of files back."""
    for hole in holes:
        process.memory.map_file(hole.start, hole.end, hole.mapping)


def _map_library(process: ImageProcess, region: Region, library: Library) -> None:
    """Maps a user's library where it is not mapped yet, and puts it in force."""
    for segment in () if library.is_mapped else library.segments:
        process.memory.map_anonymous(segment.address, segment.size, segment.protection)
        process.write(segment.address, segment.contents)
    _write_table(process, region, library.record.writes())


def _install(process: ImageProcess, region: Region, table: Table) -> None:
    """Makes the handler SIGTRAP's action, and SIGTRAP deliverable everywhere."""
    replaced = process.action(SIGTRAP)
    previous = table.previous
    if not is_our_handler(process, replaced.handler):
        previous = replaced
        _write_table(process, region, [Write(PREVIOUS_OFFSET, previous.pack())])
    ours = region.action(previous)
    process.set_action(SIGTRAP, ours)
    _write_table(process, region, [Write(OBSERVED_OFFSET, ours.pack())])
    repairs = list(table.repairs)
    for number in process.caught_signals():
        action = process.action(number)
        if number != SIGTRAP and action.mask & SIGTRAP_BIT:
            repairs.append(Repair(RepairKind.SIGNAL_MASK, number, 0, action.mask))
            process.set_action(number, replace(action, mask=action.mask & ~SIGTRAP_BIT))
    for thread in process.threads:
        if thread.blocked & SIGTRAP_BIT:
            # No start time: an image does not keep it, and the restored thread has another one.
            repairs.append(Repair(RepairKind.THREAD_MASK, thread.tid, 0, thread.blocked))
            thread.blocked &= ~SIGTRAP_BIT
    if tuple(repairs) != table.repairs:
        _write_table(process, region, table.repair_writes(list(dict.fromkeys(repairs))))


def _remove(process: ImageProcess, region: Region, table: Table) -> None:
    """Takes the handler out of force and empties its table; the code stays mapped, a thread may be in it."""
    if is_our_handler(process, process.action(SIGTRAP).handler):
        process.set_action(SIGTRAP, original_action(process, table))
    threads = {thread.tid: thread for thread in process.threads}
    for repair in table.repairs:
        if repair.kind is RepairKind.SIGNAL_MASK:
            action = process.action(repair.id)
            if action.handler > 1:
                process.set_action(repair.id, replace(action, mask=action.mask | SIGTRAP_BIT))
        elif (thread := threads.get(repair.id)) is not None and thread.blocked | SIGTRAP_BIT == repair.mask:
            thread.blocked = repair.mask
    _write_table(process, region, table.user.out_of_force().writes())
    _write_table(process, region, table.repair_writes(()))
    _write_table(process, region, table.update((), ()))


def _write_table(process: ImageProcess, region: Region, writes: Iterable[Write]) -> None:
    for write in writes:
        if write.data:
            process.write(region.table + write.offset, write.data)


def _write(process: ImageProcess, edits: Iterable[ByteEdit], frames: SignalFrames = NO_FRAMES) -> None:
    edits = list(edits)
    occupancy = Occupancy(edits, frames)
    for thread in process.threads if not occupancy.is_free else ():
        inside = thread.rip if occupancy.contains(thread.rip) else occupancy.on_stacks(process, thread.rsp)
        if inside is not None:
            raise DynacutError(
                f"thread {thread.tid} of {process.label} is at {inside:#x}, or returns there, amid the bytes to change",
                "make the image at another moment, or use --scope entry, which needs only the first byte",
            )
    for edit in edits:
        if process.read(edit.address, len(edit.old)) != edit.old:
            raise DynacutError(f"other bytes than expected at {edit.address:#x} of {process.label}")
        process.write(edit.address, edit.new)
