"""Signal masks that would turn an int3 into a sudden death: cleared of SIGTRAP, recorded, and put back.

The kernel ends a process whose thread runs into an int3 while it blocks SIGTRAP (force_sig_info_to_task in
kernel/signal.c). Three masks can block it for long: a thread's own, the sa_mask of a handler while that runs, and the
one that a thread gets back when it returns from a handler, which waits in the handler's frame on its stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from dynacut.handlers.table import REPAIR_CAPACITY, KernelAction, Repair, RepairKind, Table
from dynacut.shared.errors import DynacutError
from dynacut.shared.region import Region
from dynacut.shared.region_writing import write_table
from dynacut.shared.signal_frames import blocking_masks, clear_masks, put_masks_back
from dynacut.shared.stopped import StoppedTarget
from dynacut.shared.target import SIGTRAP, SIGTRAP_BIT, Target, Writable


def record(target: Writable, region: Region, table: Table, repairs: Iterable[Repair]) -> Table:
    """Makes the table record further repairs, which comes before they are made; returns the table as it is then.

    Raises:
        DynacutError: they are more than a table can record.
    """
    new = [repair for repair in dict.fromkeys(repairs) if repair not in table.repairs]
    write_further(target, region, table, new)
    return replace(table, repairs=(*table.repairs, *new))


def write_further(target: Writable, region: Region, table: Table, new: Sequence[Repair]) -> None:
    """As record(), of repairs that are not on record yet; the table that the caller has stays as it is.

    Raises:
        DynacutError: they are more than a table can record.
    """
    if len(table.repairs) + len(new) > REPAIR_CAPACITY:
        raise too_many_masks(target, len(table.repairs) + len(new))
    write_table(target, region, table.further_repair_writes(new))


def forget_ended(target: Writable, region: Region, table: Table, standing: Sequence[Repair]) -> Table:
    """Takes the repairs of threads that have ended off the record; returns the table as it is then."""
    if len(standing) < len(table.repairs):
        write_table(target, region, table.repair_writes(standing))
    return replace(table, repairs=tuple(standing))


def too_many_masks(target: Target, count: int) -> DynacutError:
    """The error for masks that are more than a table can record."""
    return DynacutError(
        f"{count} threads and signal handlers of {target.label} block SIGTRAP, more than can be recorded",
        "nothing was disabled; let the program block SIGTRAP in fewer threads",
    )


def standing_repairs(
    repairs: Iterable[Repair], started: Callable[[int], int | None], process_started: int
) -> list[Repair]:
    """The repairs that can still be taken back: those of threads that have ended are left out.

    A thread is known by its id and start time. A record from before the process started is one that CRIU has restored
    with it, its threads with the ids they had; one made in an image says 0. started: when the thread of an id did, None
    if there is none, 0 if that is not known.
    """
    standing = []
    for repair in repairs:
        if repair.kind is RepairKind.THREAD_MASK:
            now = started(repair.id)
            if now is None or (now not in (0, repair.start_time) and repair.start_time >= process_started):
                continue
        standing.append(repair)
    return standing


def masks_before(repairs: Iterable[Repair]) -> dict[int, set[int]]:
    """The masks that each thread had, on its own or waiting in a signal frame, by its id."""
    before: dict[int, set[int]] = {}
    for repair in repairs:
        if repair.kind is RepairKind.THREAD_MASK:
            before.setdefault(repair.id, set()).add(repair.mask)
    return before


def masked_signals(table: Table) -> list[int]:
    """The signals whose sa_mask was cleared of SIGTRAP."""
    return [repair.id for repair in table.repairs if repair.kind is RepairKind.SIGNAL_MASK]


def masked_again(actions: Mapping[int, KernelAction]) -> dict[int, KernelAction]:
    """The actions to set so that these handlers block SIGTRAP again; a handler that is gone is left alone."""
    return {
        number: replace(action, mask=action.mask | SIGTRAP_BIT)
        for number, action in actions.items()
        if action.handler > 1 and not action.mask & SIGTRAP_BIT
    }


def restorers_of(actions: Iterable[KernelAction]) -> frozenset[int]:
    """The trampolines by which handlers return."""
    return frozenset(action.restorer for action in actions if action.handler > 1)


def restorers_in(target: StoppedTarget) -> frozenset[int]:
    """The trampolines by which all handlers in force return."""
    return restorers_of(target.action(number) for number in target.caught_signals())


def unmask_handlers(target: StoppedTarget, region: Region, table: Table) -> Table:
    """Clears SIGTRAP from the sa_mask of the target's own handlers; returns the table as it is then.

    Raises:
        DynacutError: it cannot be done.
    """
    masked = {
        number: action
        for number in target.caught_signals()
        if number != SIGTRAP and (action := target.action(number)).mask & SIGTRAP_BIT
    }
    repairs = (Repair(RepairKind.SIGNAL_MASK, number, 0, action.mask) for number, action in masked.items())
    table = record(target, region, table, repairs)
    if masked:
        target.set_actions(
            {number: replace(action, mask=action.mask & ~SIGTRAP_BIT) for number, action in masked.items()}
        )
    return table


def unblock_threads(target: StoppedTarget, region: Region, table: Table) -> Table:
    """Makes every thread accept SIGTRAP, also when it returns from a signal handler; returns the table as it is then.

    Raises:
        DynacutError: it cannot be done.
    """
    # First what may need system calls, for which a target is let go: frames are written as they are found.
    restorers = restorers_in(target)
    masked = {tid: mask for tid, mask in target.blocked_signals().items() if mask & SIGTRAP_BIT}
    threads = {thread.tid: thread for thread in target.threads}
    started = {tid: thread.started for tid, thread in threads.items()}
    saved = {tid: blocking_masks(target, thread.rsp, restorers) for tid, thread in threads.items()}
    found = [
        *masked.items(),
        *((tid, each.mask) for tid, masks in saved.items() for each in masks),
    ]
    repairs = [Repair(RepairKind.THREAD_MASK, tid, started.get(tid, 0), mask) for tid, mask in found]
    table = forget_ended(target, region, table, standing_repairs(table.repairs, started.get, target.started))
    table = record(target, region, table, repairs)
    for masks in saved.values():
        clear_masks(target, masks)
    if masked:
        target.block_sigtrap(masked, block=False)
    return table


def block_threads_again(target: StoppedTarget, table: Table) -> bool:
    """Puts the masks of threads back as they were, those too that wait in the frames of signal handlers.

    Returns whether a thread is left that has yet another mask: amid pthread_create or a signal handler of the program,
    for the moment; or one that it has set meanwhile, which stays.

    Raises:
        DynacutError: it cannot be done.
    """
    if not masks_before(table.repairs):
        return False
    restorers = restorers_in(target)
    blocked = target.blocked_signals()
    threads = {thread.tid: thread for thread in target.threads}
    started = {tid: thread.started for tid, thread in threads.items()}
    standing = masks_before(standing_repairs(table.repairs, started.get, target.started))
    before = {tid: masks for tid, masks in standing.items() if tid in blocked}
    for tid, masks in before.items():
        put_masks_back(target, threads[tid].rsp, restorers, masks)
    again = {tid: blocked[tid] | SIGTRAP_BIT for tid in before if not blocked[tid] & SIGTRAP_BIT}
    again = {tid: mask for tid, mask in again.items() if mask in before[tid]}
    if again:
        target.block_sigtrap(again, block=True)
    return any(tid not in again and blocked[tid] not in before[tid] for tid in before)
