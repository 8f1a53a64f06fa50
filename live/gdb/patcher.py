"""Applies a patch set through gdb: as a rule within one stop of the process, from gdb's attaching to its detaching."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dynacut.handlers.table import Table
from dynacut.live.gdb.session import GdbSession
from dynacut.live.gdb.target import GdbTarget
from dynacut.live.process import Process
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.apply import (
    ThreadAmidError,
    check_written,
    conclude,
    make_ready,
    retreat,
    write_edits,
)
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.masks import block_threads_again, unblock_threads
from dynacut.shared.patch_set import HandlerChange, PatchSet
from dynacut.shared.region import find_region
from dynacut.shared.signal_frames import SignalFrames
from dynacut.shared.target import SIGTRAP_BIT

_RETREAT_TIMEOUT = 5.0
_LOOKS = 10


@dataclass
class GdbPatcher:
    """Patches one process of this machine; the same as the ptrace engine's Patcher, with gdb in between.

    timeout: seconds that a change may take before it is refused or given up.
    """

    process: Process
    timeout: float = 10.0
    clock: StopClock = field(default_factory=StopClock)

    def __post_init__(self) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """Lets the timeout count from now."""
        self._deadline = time.monotonic() + self.timeout

    def table(self) -> Table | None:
        """What the process's table says; None if it has none. Read from /proc, without a stop."""
        found = find_region(self.process)
        return found.table if found else None

    def apply(self, patches: PatchSet) -> None:
        """Applies a patch set that was resolved against the process as it is.

        Raises:
            DynacutError: with status REFUSED nothing but the handler's mapping has changed; CHECK_FAILED: the
            target was changed, but not as it should be; UNKNOWN: it cannot be told.
        """
        if patches.handler is HandlerChange.KEEP and not patches.changes:
            return
        with GdbSession(self.timeout) as session:
            target = GdbTarget(session, self.process, None, self.clock, self._deadline)
            target.hold()
            try:
                apply_held(target, patches)
            finally:
                target.release()
        check_written(self.process, patches)


def apply_held(target: GdbTarget, patches: PatchSet) -> None:
    """Applies a patch set to a process that is held. It is let go in between only where a thread is in the way.

    Raises:
        DynacutError: as GdbPatcher.apply().
    """
    target.process.refresh()
    try:
        frames = make_ready(target, patches)
        _unblock_those_made_meanwhile(target)
        if patches.handler is HandlerChange.INSTALL and not target.status().caught & SIGTRAP_BIT:
            raise DynacutError(
                f"{target.label} does not catch SIGTRAP although the handler was installed",
                "it may set signal actions itself at this moment; try again",
            )
        _write(target, patches, frames)
    except DynacutError as error:
        _retreat(target, patches, error)
        raise
    try:
        if patches.handler is HandlerChange.REMOVE:
            _await_empty_handler(target)
            _block_threads_again(target)
        conclude(target, patches)
    except DynacutError as error:
        if error.status is ExitStatus.REFUSED:  # the code has changed
            error.status = ExitStatus.UNKNOWN
        raise


def _unblock_those_made_meanwhile(target: GdbTarget) -> None:
    """A thread amid pthread_create puts back the mask it had, and the new one inherits it: look until none is."""
    while target.passing:
        target.pause(_keep_blocking(target))
        target.process.refresh()  # the stacks
        target.passing = False
        found = find_region(target)
        assert found is not None
        assert found.table is not None
        unblock_threads(target, found.region, found.table)


def _keep_blocking(target: GdbTarget) -> DynacutError:
    return DynacutError(f"threads of {target.label} keep changing their signal masks", "try again later")


def _write(target: GdbTarget, patches: PatchSet, frames: SignalFrames) -> None:
    while True:
        try:
            write_edits(target, patches, frames)
            return
        except ThreadAmidError as error:
            target.pause(
                DynacutError(
                    error.problem,
                    "try again with a longer --timeout, or use --scope entry, which needs only the first byte",
                )
            )


def _await_empty_handler(target: GdbTarget) -> None:
    """With the old bytes back, waits until no thread is in the handler, nor has a SIGTRAP to come."""
    found = find_region(target)
    while found is not None and any(
        found.region.contains_code(thread.rip) or _has_trap(target, thread.tid) for thread in target.threads
    ):
        target.pause(
            DynacutError(
                f"a thread of {target.label} stays in the handler",
                "all bytes are put back, the handler is still installed; run --undo again",
                status=ExitStatus.CHECK_FAILED,
            )
        )


def _block_threads_again(target: GdbTarget) -> None:
    """A thread that is amid pthread_create has another mask for the moment: look again, for a while."""
    found = find_region(target)
    for _ in range(_LOOKS):
        if found is None or found.table is None or not block_threads_again(target, found.table):
            return
        target.pause(_keep_blocking(target))
        target.process.refresh()  # the stacks


def _has_trap(target: GdbTarget, tid: int) -> bool:
    status = target.status(tid)
    return bool((status.thread_pending | status.shared_pending) & SIGTRAP_BIT)


def _retreat(target: GdbTarget, patches: PatchSet, error: DynacutError) -> None:
    """After a failure, with no code changed: everything as before, or the error says that this is not known."""
    if not target.is_held:
        error.status = ExitStatus.UNKNOWN
        return
    target.extend_deadline(_RETREAT_TIMEOUT)
    try:
        retreat(target, patches)
    except DynacutError:
        error.status = ExitStatus.UNKNOWN
