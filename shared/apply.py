"""Applies a patch set to a target that stands still: a process in an image, or one whose threads are all stopped.

Three steps, in an order that is safe at each point should the patcher be killed: make_ready() maps what a hit needs and
makes SIGTRAP deliverable; write_edits() changes the code; conclude() tidies up behind features put back. A backend may
let the target go between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE

from dynacut.handlers.table import (
    CODE_SIZE,
    MAGIC,
    OBSERVED_OFFSET,
    PREVIOUS_OFFSET,
    Action,
    KernelAction,
    Layout,
    Table,
    Write,
)
from dynacut.shared.added import code_in, untouched
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.holes import Patched
from dynacut.shared.library.library import Library
from dynacut.shared.masks import (
    block_threads_again,
    masked_again,
    masked_signals,
    restorers_in,
    unblock_threads,
    unmask_handlers,
)
from dynacut.shared.memory import NewMemory
from dynacut.shared.occupancy import Occupancy
from dynacut.shared.page_reader import PageReader
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.region import Region, choose_address, find_region, is_our_handler, original_action
from dynacut.shared.region_writing import (
    empty_table,
    prepare_region,
    put_contents_back,
    retire,
    set_contents,
    write_table,
)
from dynacut.shared.rollback import standing_edits
from dynacut.shared.signal_frames import NO_FRAMES, SignalFrames
from dynacut.shared.stopped import StoppedTarget, StoppedThread
from dynacut.shared.target import SIGTRAP, Target


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
        for pages in patches.fill:
            target.map_file(pages)
        return NO_FRAMES
    region, table, outgrown = prepare_region(target, patches, partial(_map_region, target))
    if patches.library is not None:
        _map_library(target, region, patches.library)
    _map(target, patches.add)
    restorers = restorers_in(target)
    table = _handle_traps(target, region, table)
    unblock_threads(target, region, table)
    if outgrown is not None:
        retire(target, outgrown)
    return SignalFrames(restorers, region.restorer)


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
            raise DynacutError(
                f"other bytes than expected at {edit.address:#x} of {target.label}",
                "see what else patches it, and try again",
            )
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
    for pages in (*patches.unmap, *patches.drop):
        target.unmap(pages)
    if patches.handler is HandlerChange.KEEP:
        set_contents(target, patches)
    elif patches.handler is HandlerChange.REMOVE:
        found = find_region(target)
        if found is not None and found.table is not None:
            _remove(target, found.region, found.table)


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
    for pages in untouched(target, patches.add):
        target.unmap(pages)
    if patches.had_handler:
        put_contents_back(target, found, patches)
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


def _map_region(target: StoppedTarget, layout: Layout, taken: range) -> Region:
    region = choose_address(target, layout, taken)
    code = NewMemory(region.code, CODE_SIZE, PROT_READ | PROT_EXEC)
    _map(target, [code, NewMemory(region.table, layout.size, PROT_READ | PROT_WRITE, MAGIC)])
    return region


def _map_library(target: StoppedTarget, region: Region, library: Library) -> None:
    """Maps a user's library where it is not mapped yet, and puts it in force."""
    if not library.is_mapped:
        _map(target, library.segments)
    write_table(target, region, library.record.writes())


def _map(target: StoppedTarget, parts: Sequence[NewMemory]) -> None:
    """Maps memory and fills it."""
    if parts:
        target.map_anonymous(parts)
    for part in parts:
        if part.contents:
            target.write(part.address, part.contents)


def _handle_traps(target: StoppedTarget, region: Region, table: Table) -> Table:
    """Makes the handler SIGTRAP's action, and clears SIGTRAP from the sa_mask of the target's own handlers.

    Returns the table as it is then. Repairs are recorded before they are made.
    """
    replaced = target.action(SIGTRAP)
    previous = table.previous
    if not is_our_handler(target, replaced.handler):
        previous = replaced
    # What was observed at an earlier installation is overwritten by this one: the previous action is kept first.
    write_table(target, region, [Write(PREVIOUS_OFFSET, previous.pack())])
    ours = region.action(previous)
    if replaced != ours:
        target.set_actions({SIGTRAP: ours})
    write_table(target, region, [Write(OBSERVED_OFFSET, ours.pack())])
    table = unmask_handlers(target, region, table)
    return replace(table, previous=previous, observed=ours)


def _remove(target: StoppedTarget, region: Region, table: Table) -> None:
    """Takes the handler out of force and empties its table; the code stays mapped, a thread may be in it."""
    actions: dict[int, KernelAction] = {}
    if is_our_handler(target, target.action(SIGTRAP).handler):
        actions[SIGTRAP] = original_action(target, table)
    actions |= masked_again({number: target.action(number) for number in masked_signals(table)})
    if actions:
        target.set_actions(actions)
    block_threads_again(target, table)
    empty_table(target, region, table)
