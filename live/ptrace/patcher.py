"""Applies a patch set to a running process, in an order that is safe at every step.

On:   handler and table mapped → the table's new contents in force → SIGTRAP accepted and handled → int3 bytes → check.
Off:  old bytes → no thread on its way to the handler → SIGTRAP's action and the masks as before → table emptied.

Single bytes are written while the process runs: an instruction's first byte is either int3 or what it was. Longer ones
need every thread stopped for a moment (window.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dynacut.handlers.records import INT3
from dynacut.handlers.table import MAGIC, OBSERVED_OFFSET, PREVIOUS_OFFSET, KernelAction, Table, Write
from dynacut.live.own_memory import await_own_memory
from dynacut.live.process import Process
from dynacut.live.ptrace import masks
from dynacut.live.ptrace.passage import all_seen_outside
from dynacut.live.ptrace.remote import Remote
from dynacut.live.ptrace.shots import Shots
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stops import prompt_stops
from dynacut.live.ptrace.window import write_in_window
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.added import untouched
from dynacut.shared.apply import check_written, vacated
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.masks import masked_again, masked_signals, restorers_of
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.proc import task_status
from dynacut.shared.region import Region, find_region, is_our_handler, original_action
from dynacut.shared.region_writing import (
    empty_table,
    prepare_region,
    put_contents_back,
    retire,
    set_contents,
    write_table,
)
from dynacut.shared.rollback import standing_edits
from dynacut.shared.running import gone
from dynacut.shared.signal_frames import NO_FRAMES, SignalFrames
from dynacut.shared.target import SIGTRAP, SIGTRAP_BIT

_HANDLER_STAYS = "all bytes are put back, the handler is still installed; run --undo again"

_SOME_STAY = "some code could not be put back, and stays disabled with the handler; --undo takes it back"
_TAKING_BACK = 3.0
"""Seconds for stopping all threads to put bytes back after a failure."""


def _not_seen(process: Process) -> DynacutError:
    return NeedsCheckpointError(
        f"a thread of {process.label} could not be stopped for an instant",
        "nothing was disabled; try again with a longer --timeout",
    )


def _stays(process: Process) -> DynacutError:
    return DynacutError(
        f"a thread of {process.label} stays in the handler",
        _HANDLER_STAYS,
        status=ExitStatus.CHECK_FAILED,
    )


@dataclass
class Patcher:
    """Patches one process. timeout: seconds that a change may take before it is refused or given up."""

    process: Process
    timeout: float = 10.0
    clock: StopClock = field(default_factory=StopClock)
    magic: bytes = MAGIC
    """The kind of region to work with."""

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.timeout
        self._shots = Shots(self.process, self.clock, self._deadline)
        self._remote = Remote(self.process, self._shots)

    def restart_clock(self) -> None:
        """Lets the timeout count from now: it is for waiting for threads.

        For a trace's 84,000 sites the work before that takes seconds on a busy machine, and would leave no time: of
        threads that nobody has looked at it would be said that they stay.
        """
        self._deadline = self._shots.deadline = time.monotonic() + self.timeout

    def table(self) -> Table | None:
        """What the process's table says; None if it has none."""
        found = find_region(self.process, self.magic)
        return found.table if found else None

    def apply(self, patches: PatchSet) -> None:
        """Applies a patch set that was resolved against the process as it is.

        Raises:
            DynacutError: with status REFUSED nothing but the handler's mapping has changed; CHECK_FAILED: the
            target was changed, but not as it should be; UNKNOWN: it cannot be told.
        """
        try:
            with prompt_stops():
                match patches.handler:
                    case HandlerChange.INSTALL:
                        self._switch_off(patches)
                    case HandlerChange.KEEP:
                        self._fill(patches)
                        self._write([*patches.edits, *vacated(self.process, patches)])
                        self._drop(patches)
                        set_contents(self.process, patches, self.magic)
                    case HandlerChange.REMOVE:
                        self._undo(patches)
            check_written(self.process, patches)
        except OSError as problem:
            error = self._explained(problem)
            error.status = ExitStatus.UNKNOWN
            raise error from problem

    def _explained(self, problem: OSError) -> DynacutError:
        """What the failure of a system call means: as a rule that the process has ended meanwhile."""
        try:
            if task_status(self.process.pid).state not in "ZX":
                return DynacutError(f"{self.process.label} could not be changed: {problem}", "try again")
        except OSError:
            pass
        return gone(self.process.pid)

    def _switch_off(self, patches: PatchSet) -> None:
        region, table, outgrown = prepare_region(
            self.process, patches, lambda layout, taken: self._remote.map_region(layout, self.magic, taken), self.magic
        )
        self.restart_clock()
        try:
            if patches.library is not None:
                if not patches.library.is_mapped:
                    self._remote.map_memory(region, patches.library.segments)
                write_table(self.process, region, patches.library.record.writes())
            self._remote.map_memory(region, patches.add)
            restorers = self._install(region, table)
            if outgrown is not None:
                retire(self.process, outgrown)
            self._write(patches.edits, SignalFrames(restorers, region.restorer))
        except OSError as problem:
            error = self._explained(problem)
            self._retreat(patches, error)
            raise error from problem
        except Exception as problem:
            self._retreat(patches, problem if isinstance(problem, DynacutError) else DynacutError(str(problem)))
            raise
        self._remote.unmap(region, patches.unmap)

    def _install(self, region: Region, table: Table) -> frozenset[int]:
        """Makes the handler SIGTRAP's action, and SIGTRAP deliverable everywhere.

        Returns the trampolines by which the program's own signal handlers return.
        """
        process, remote = self.process, self._remote
        # What the kernel wrote at an earlier installation is overwritten by this one: keep it first.
        write_table(process, region, [Write(PREVIOUS_OFFSET, table.previous.pack())])
        ours = region.action(table.previous)
        wanted: dict[int, KernelAction | None] = {SIGTRAP: ours}
        actions = remote.sigactions(region, wanted | dict.fromkeys(masks.caught_signals(process.pid)))
        replaced = actions.pop(SIGTRAP)
        if replaced.handler != region.handler:
            if not is_our_handler(process, replaced.handler, self.magic):
                write_table(process, region, [Write(PREVIOUS_OFFSET, replaced.pack())])
                if region.action(replaced) != ours:
                    ours = region.action(replaced)
                    remote.sigactions(region, {SIGTRAP: ours})
            write_table(process, region, [Write(OBSERVED_OFFSET, ours.pack())])
            # A fork copies the signal actions before the memory (copy_process in kernel/fork.c): a child of one that
            # began before this must not get an int3 without the handler, nor one that shares the memory.
            if not all_seen_outside(process, region, self.clock, self._deadline, forks=True):
                raise _not_seen(process)
            await_own_memory(process.pid, self._deadline)
        restorers = restorers_of(actions.values())
        table = masks.unmask_handlers(process, region, table, remote, actions)
        masks.unblock_threads(process, region, table, restorers, self.clock, self._deadline)
        if not task_status(process.pid).caught & SIGTRAP_BIT:
            raise DynacutError(
                f"{process.label} does not catch SIGTRAP although the handler was installed",
                "it may set signal actions itself at this moment; try again",
            )
        return restorers

    def _fill(self, patches: PatchSet) -> None:
        """Maps unmapped pages back: first of all, as they hold the old bytes at once."""
        found = find_region(self.process, self.magic) if patches.fill else None
        if found is not None:
            self._remote.map_files(found.region, patches.fill)

    def _drop(self, patches: PatchSet) -> None:
        """Unmaps memory that was added, in which no thread is any more."""
        found = find_region(self.process, self.magic) if patches.drop else None
        if found is None:
            return
        try:
            self._remote.unmap(found.region, patches.drop)
        except DynacutError as error:
            if error.status is ExitStatus.REFUSED:  # what was refused is a part; the bytes are changed
                error.status = ExitStatus.CHECK_FAILED
            raise

    def _undo(self, patches: PatchSet) -> None:
        self._fill(patches)
        self._write([*patches.edits, *vacated(self.process, patches)])
        try:
            self._drop(patches)
            found = find_region(self.process, self.magic)
            if found is not None and found.table is not None:
                self._remove(found.region, found.table)
        except DynacutError as error:
            if error.status is ExitStatus.REFUSED:  # what was refused is a part; the bytes are changed
                error.status = ExitStatus.CHECK_FAILED
                error.details = (*error.details, _HANDLER_STAYS)
            raise

    def _remove(self, region: Region, table: Table) -> None:
        """Takes the handler out of force and empties its table; the sites' bytes are back already."""
        process, remote = self.process, self._remote
        self.restart_clock()
        if not all_seen_outside(process, region, self.clock, self._deadline):
            raise _stays(process)
        masked = masked_signals(table)
        caught = masks.caught_signals(process.pid) if masks.has_thread_masks(table) else []
        actions = remote.sigactions(region, dict.fromkeys([SIGTRAP, *masked, *caught]))
        changed: dict[int, KernelAction] = {}
        if is_our_handler(process, actions.pop(SIGTRAP).handler, self.magic):
            changed[SIGTRAP] = original_action(process, table, self.magic)
        restorers = restorers_of(actions.values())
        changed |= masked_again({number: actions[number] for number in masked})
        if changed:
            remote.sigactions(region, changed)
        masks.block_threads_again(process, table, restorers, self.clock)
        empty_table(process, region, table)

    def _retreat(self, patches: PatchSet, error: DynacutError) -> None:
        """After a failure: everything as before, or the error says that this is not known.

        Where bytes could not be put back, what their hits need stays as well.
        """
        if standing_edits(self.process, patches.edits):
            error.status = ExitStatus.UNKNOWN
            error.details = (*error.details, _SOME_STAY)
            return
        try:
            found = find_region(self.process, self.magic)
            if found is None or found.table is None:
                return
            self._drop(replace(patches, drop=untouched(self.process, patches.add)))
            if patches.had_handler:
                put_contents_back(self.process, found, patches)
            else:
                self.restart_clock()
                self._remove(found.region, found.table)
        except (DynacutError, OSError):
            error.status = ExitStatus.UNKNOWN

    def _write(self, edits: Sequence[ByteEdit], frames: SignalFrames = NO_FRAMES) -> None:
        """Writes edits: int3 bytes, there or back, while the process runs; the rest with its threads stopped.

        Raises:
            DynacutError: not all could be written, and those that were are taken back; with status UNKNOWN, not all.
        """
        single, longer = _by_way(edits)
        try:
            if longer:
                write_in_window(self.process, longer, self.clock, self._deadline, frames)
            for edit in single:
                self.process.write(edit.address, edit.new)
        except DynacutError as error:
            self._take_back(edits, frames)
            if standing_edits(self.process, edits):
                error.status = ExitStatus.UNKNOWN
            raise

    def _take_back(self, edits: Sequence[ByteEdit], frames: SignalFrames) -> None:
        """Puts the old bytes back, each edit for itself: one that cannot be is no reason to leave another."""
        single, longer = _by_way(standing_edits(self.process, edits))
        deadline = time.monotonic() + min(self.timeout, _TAKING_BACK)
        if longer:
            try:
                write_in_window(self.process, longer, self.clock, deadline, frames)
            except DynacutError:
                for edit in longer:
                    with suppress(DynacutError):
                        write_in_window(self.process, [edit], self.clock, deadline, frames)
        for edit in single:
            with suppress(DynacutError):
                self.process.write(edit.address, edit.new)


def _by_way(edits: Sequence[ByteEdit]) -> tuple[list[ByteEdit], list[ByteEdit]]:
    """Edits of single bytes that are, or become, an int3: to be written while the process runs; and all others."""
    ways: tuple[list[ByteEdit], list[ByteEdit]] = [], []
    for edit in edits:
        ways[not (len(edit.new) == 1 and INT3 in (edit.new, edit.old))].append(edit)
    return ways
