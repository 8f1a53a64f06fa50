"""Applies a patch set to a target that stands still: a process in an image, or one whose threads are all stopped.

Three steps, in an order that is safe at each point should the patcher be killed: make_ready() maps what a hit needs and
makes SIGTRAP deliverable; write_edits() changes the code; conclude() tidies up behind features put back. A backend may
let the target go between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE
from typing import NamedTuple, Protocol

from dynacut.handlers.blob import handler_code
from dynacut.handlers.table import (
    CODE_SIZE,
    MAGIC,
    OBSERVED_OFFSET,
    PREVIOUS_OFFSET,
    RETIRED_MAGICS,
    Action,
    KernelAction,
    Repair,
    RepairKind,
    Table,
    TableFullError,
    Write,
)
from dynacut.shared.added import code_in, untouched
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.holes import Hole, Patched
from dynacut.shared.library.library import Library, LibrarySegment
from dynacut.shared.occupancy import NO_FRAMES, Occupancy, SignalFrames
from dynacut.shared.page_reader import PageReader
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.region import (
    Region,
    choose_address,
    find_region,
    is_our_handler,
    layout_for,
    new_table,
    original_action,
    read_table,
)
from dynacut.shared.rollback import standing_edits
from dynacut.shared.target import SIGTRAP, Target

SIGTRAP_BIT = 1 << (SIGTRAP - 1)


class Area(NamedTuple):
    """Memory to map: absolute address, bytes, and PROT_ flags as in mmap(2)."""

    start: int
    size: int
    protection: int


class StoppedThread(Protocol):
    """A thread that stands still."""

    @property
    def tid(self) -> int:
        """Its id."""

    @property
    def started(self) -> int:
        """When it started, in clock ticks since boot; 0 where that is not known, or will be another time."""

    @property
    def rip(self) -> int:
        """The address of the next instruction."""

    @property
    def rsp(self) -> int:
        """The stack pointer."""


class StoppedTarget(Target, Protocol):
    """A target whose threads stand still, to be changed."""

    @property
    def threads(self) -> Sequence[StoppedThread]:
        """Every thread."""

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes, whatever the protection there; DynacutError if they are not all mapped."""

    def map_anonymous(self, areas: Sequence[Area]) -> None:
        """Maps fresh private memory at just these places; DynacutError if they are not free."""

    def map_file(self, hole: Hole) -> None:
        """Maps unmapped pages of a file back; DynacutError if that is not possible."""

    def unmap(self, hole: Hole) -> None:
        """Unmaps pages."""

    def caught_signals(self) -> list[int]:
        """The signals that the process handles itself."""

    def action(self, signal: int) -> KernelAction:
        """What is done upon a signal."""

    def set_actions(self, actions: dict[int, KernelAction]) -> None:
        """Changes what is done upon signals."""

    def blocked_signals(self) -> dict[int, int]:
        """The mask of each thread, by its id: the signals it blocks, bit N-1 for signal N."""

    def set_blocked_signals(self, masks: dict[int, int]) -> None:
        """Sets the masks of threads; those that have ended are left out."""


def apply(target: StoppedTarget, patches: PatchSet) -> None:
    """Applies a patch set that was resolved against the target as it is.

    Raises:
        DynacutError: it is not possible; part of it may have been done.
    """
    frames = make_ready(target, patches)
    write_edits(target, patches, frames)
    conclude(target, patches)


def make_ready(target: StoppedTarget, patches: PatchSet) -> SignalFrames:
    """Everything that must be there before code is changed; returns how signal frames are recognised.

    INSTALL: handler, table and library are mapped, SIGTRAP is accepted and handled. Else: unmapped pages are back.
    """
    if patches.handler is not HandlerChange.INSTALL:
        for hole in patches.fill:
            target.map_file(hole)
        return NO_FRAMES
    region, table, outgrown = _prepare(target, patches)
    if patches.library is not None:
        _map_library(target, region, patches.library)
    _map(target, patches.add)
    restorers = {target.action(number).restorer for number in target.caught_signals()}
    table = _handle_traps(target, region, table)
    unblock_threads(target, region, table)
    if outgrown is not None:
        target.write(outgrown.table, RETIRED_MAGICS[MAGIC])
    return SignalFrames(frozenset(restorers), region.restorer)


def find_amid(
    target: StoppedTarget, edits: Sequence[ByteEdit], frames: SignalFrames
) -> tuple[StoppedThread, int] | None:
    """A thread that is amid one of the edits, or will return there, and the address; None if there is none."""
    occupancy = Occupancy(edits, frames)
    for thread in target.threads if not occupancy.is_free else ():
        inside = thread.rip if occupancy.contains(thread.rip) else occupancy.on_stacks(target, thread.rsp)
        if inside is not None:
            return thread, inside
    return None


def write_edits(target: StoppedTarget, patches: PatchSet, frames: SignalFrames) -> None:
    """Changes the code, or leaves it as it was.

    Raises:
        ThreadAmidError: a thread is amid the bytes to change; nothing is written.
        DynacutError: other bytes are there than when the patch set was made; nothing is written.
    """
    found = find_amid(target, [*patches.edits, *vacated(target, patches)], frames)
    if found is not None:
        thread, inside = found
        does = "is at" if inside == thread.rip else "may return to"
        raise ThreadAmidError(f"thread {thread.tid} of {target.label} {does} {inside:#x}, amid the bytes to change")
    reader = PageReader(target)
    for edit in patches.edits:
        if reader.read(edit.address, len(edit.old)) != edit.old:
            raise DynacutError(f"other bytes than expected at {edit.address:#x} of {target.label}")
    try:
        for edit in patches.edits:
            target.write(edit.address, edit.new)
    except BaseException:
        for edit in standing_edits(target, patches.edits):
            with suppress(DynacutError):
                target.write(edit.address, edit.new)
        raise


def vacated(target: Target, patches: PatchSet) -> list[ByteEdit]:
    """Edits that change nothing, of code that is to be taken away: no thread may be amid them either."""
    return [ByteEdit(address, data, data) for address, data in code_in(target, patches.drop)]


class ThreadAmidError(DynacutError):
    """A thread is amid bytes that are to change, so that this is not the moment to change them."""


def conclude(target: StoppedTarget, patches: PatchSet) -> None:
    """What follows upon the change of code.

    INSTALL: pages left empty are unmapped. KEEP: the table has its new contents. REMOVE: the handler is out of force.
    """
    for hole in (*patches.unmap, *patches.drop):
        target.unmap(hole)
    found = find_region(target)
    if patches.handler is HandlerChange.INSTALL or found is None or found.table is None:
        return
    if patches.handler is HandlerChange.REMOVE:
        _remove(target, found.region, found.table)
    elif (patches.features, patches.sites) != (patches.before_features, patches.before_sites):
        _write_table(target, found.region, found.table.update(patches.features, patches.sites))


def retreat(target: StoppedTarget, patches: PatchSet) -> None:
    """Takes back what make_ready() has done: handler and table as they were before.

    Raises:
        DynacutError: code is still changed, and so what its hits need stays as well; or it cannot be done.
    """
    if standing_edits(target, patches.edits):
        raise DynacutError(f"some code of {target.label} could not be put back")
    found = find_region(target)
    if found is None or found.table is None or patches.handler is not HandlerChange.INSTALL:
        return
    for hole in untouched(target, patches.add):
        target.unmap(hole)
    if patches.had_handler:
        _write_table(target, found.region, patches.before_user.writes())
        _write_table(target, found.region, found.table.update(patches.before_features, patches.before_sites))
    else:
        _remove(target, found.region, found.table)


def check_written(target: Target, patches: PatchSet) -> None:
    """Verifies that the code is as the patch set says.

    Raises:
        DynacutError: it is not; with status CHECK_FAILED.
    """
    found = find_region(target) if patches.unmap else None
    # A block to be learned may have been put back by its first hit already.
    learned = {site.address: site.old for site in patches.sites if site.action is Action.LEARN}
    reader = PageReader(Patched(target, found.table if found else None))
    wrong = [
        edit
        for edit in patches.edits
        if not _is_written(reader.read(edit.address, len(edit.new)), edit, learned.get(edit.address))
    ]
    if wrong:
        raise DynacutError(
            f"{len(wrong)} of {len(patches.edits)} changes are not in {target.label} as written, the first "
            f"at {wrong[0].address:#x}",
            "another tool may be patching it as well; `dynacut live --pid` shows what is in force",
            status=ExitStatus.CHECK_FAILED,
        )


def _is_written(found: bytes, edit: ByteEdit, learned: bytes | None) -> bool:
    """Whether bytes are as an edit says. learned: what the first hit puts back; it may be doing so at this moment."""
    if learned is None or len(learned) != len(found):
        return found == edit.new
    return all(byte in (new, old) for byte, new, old in zip(found, edit.new, learned, strict=True))


def _prepare(target: StoppedTarget, patches: PatchSet) -> tuple[Region, Table, Region | None]:
    """The region with a table of the patch set's contents, and the region that was too small for them."""
    found = find_region(target)
    old = found.table if found else None
    if found is not None and old is not None:
        try:
            _write_table(target, found.region, list(old.update(patches.features, patches.sites)))
        except TableFullError:
            pass
        else:
            return found.region, read_table(target, found.region), None
    layout = layout_for(patches.features, patches.sites)
    if found is not None and old is None and found.region.table_size == layout.size:
        region = found.region  # mapped by a patcher that was killed before it filled it
    else:
        region = choose_address(target, layout, patches.library.range if patches.library else range(0))
        target.map_anonymous(
            [
                Area(region.code, CODE_SIZE, PROT_READ | PROT_EXEC),
                Area(region.table, layout.size, PROT_READ | PROT_WRITE),
            ]
        )
    target.write(region.code, handler_code())
    _write_table(target, region, [Write(0, MAGIC)])
    _write_table(target, region, new_table(layout, old, patches.features, patches.sites))
    table = read_table(target, region)
    if old is None or found is None:
        return region, table, None
    _write_table(target, region, table.carried_hits(old))
    return region, table, found.region


def _map_library(target: StoppedTarget, region: Region, library: Library) -> None:
    """Maps a user's library where it is not mapped yet, and puts it in force."""
    if not library.is_mapped:
        _map(target, library.segments)
    _write_table(target, region, library.record.writes())


def _map(target: StoppedTarget, segments: Sequence[LibrarySegment]) -> None:
    """Maps memory and fills it."""
    if segments:
        target.map_anonymous([Area(part.address, part.size, part.protection) for part in segments])
    for segment in segments:
        target.write(segment.address, segment.contents)


def _handle_traps(target: StoppedTarget, region: Region, table: Table) -> Table:
    """Makes the handler SIGTRAP's action, and clears SIGTRAP from the sa_mask of the target's own handlers.

    Returns the table as it is then. Repairs are recorded before they are made.
    """
    replaced = target.action(SIGTRAP)
    previous = table.previous
    if not is_our_handler(target, replaced.handler):
        previous = replaced
    # What was observed at an earlier installation is overwritten by this one: the previous action is kept first.
    _write_table(target, region, [Write(PREVIOUS_OFFSET, previous.pack())])
    ours = region.action(previous)
    if replaced != ours:
        target.set_actions({SIGTRAP: ours})
    _write_table(target, region, [Write(OBSERVED_OFFSET, ours.pack())])
    masked = {
        number: action
        for number in target.caught_signals()
        if number != SIGTRAP and (action := target.action(number)).mask & SIGTRAP_BIT
    }
    repairs = [
        *table.repairs,
        *(Repair(RepairKind.SIGNAL_MASK, number, 0, action.mask) for number, action in masked.items()),
    ]
    table = _recorded(target, region, table, repairs)
    if masked:
        target.set_actions(
            {number: replace(action, mask=action.mask & ~SIGTRAP_BIT) for number, action in masked.items()}
        )
    return replace(table, previous=previous, observed=ours)


def unblock_threads(target: StoppedTarget, region: Region, table: Table) -> Table:
    """Makes every thread accept SIGTRAP; returns the table as it is then. Repairs are recorded before they are made."""
    started = {thread.tid: thread.started for thread in target.threads}
    masked = {tid: mask for tid, mask in target.blocked_signals().items() if mask & SIGTRAP_BIT}
    repairs = (Repair(RepairKind.THREAD_MASK, tid, started.get(tid, 0), mask) for tid, mask in masked.items())
    table = _recorded(target, region, table, [*table.repairs, *repairs])
    if masked:
        target.set_blocked_signals({tid: mask & ~SIGTRAP_BIT for tid, mask in masked.items()})
    return table


def block_threads_again(target: StoppedTarget, table: Table) -> bool:
    """Puts the masks of threads back as they were.

    Returns whether a thread is left that has yet another mask: amid pthread_create or a signal handler of the program,
    for the moment; or one that it has set meanwhile, which stays.
    """
    blocked = target.blocked_signals()
    started = {thread.tid: thread.started for thread in target.threads}
    before: dict[int, set[int]] = {}
    for repair in table.repairs:
        # Not of a later thread of the same id, as far as is known.
        is_same = started.get(repair.id) == repair.start_time or 0 in (started.get(repair.id), repair.start_time)
        if repair.kind is RepairKind.THREAD_MASK and repair.id in blocked and is_same:
            before.setdefault(repair.id, set()).add(repair.mask)
    masks = {tid: blocked[tid] | SIGTRAP_BIT for tid in before if not blocked[tid] & SIGTRAP_BIT}
    masks = {tid: mask for tid, mask in masks.items() if mask in before[tid]}
    if masks:
        target.set_blocked_signals(masks)
    return any(tid not in masks and blocked[tid] not in before[tid] for tid in before)


def _recorded(target: StoppedTarget, region: Region, table: Table, repairs: Iterable[Repair]) -> Table:
    recorded = tuple(dict.fromkeys(repairs))
    if recorded != table.repairs:
        _write_table(target, region, table.repair_writes(recorded))
    return replace(table, repairs=recorded)


def _remove(target: StoppedTarget, region: Region, table: Table) -> None:
    """Takes the handler out of force and empties its table; the code stays mapped, a thread may be in it."""
    actions: dict[int, KernelAction] = {}
    if is_our_handler(target, target.action(SIGTRAP).handler):
        actions[SIGTRAP] = original_action(target, table)
    for repair in table.repairs:
        if repair.kind is RepairKind.SIGNAL_MASK:
            action = target.action(repair.id)
            if action.handler > 1 and not action.mask & SIGTRAP_BIT:
                actions[repair.id] = replace(action, mask=action.mask | SIGTRAP_BIT)
    if actions:
        target.set_actions(actions)
    block_threads_again(target, table)
    _write_table(target, region, table.user.out_of_force().writes())
    _write_table(target, region, table.repair_writes(()))
    _write_table(target, region, table.update((), ()))


def _write_table(target: StoppedTarget, region: Region, writes: Iterable[Write]) -> None:
    for write in writes:
        if write.data:
            target.write(region.table + write.offset, write.data)
