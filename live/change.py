"""One change to one process, or to a whole tree of them: everything is verified before the first is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from dynacut.handlers.table import Table
from dynacut.live.admission import admit
from dynacut.live.engine import Engine, Patching, patcher_of
from dynacut.live.inspect import inspect
from dynacut.live.patcher import locked
from dynacut.live.process import Process
from dynacut.live.stop_clock import StopClock
from dynacut.live.trace import stop_trace
from dynacut.live.tree import descendants
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.report import Inspection
from dynacut.shared.target import Target

Resolve = Callable[[Target, Table | None], PatchSet]
"""From a target and its table to what is to be done."""

_MAX_ROUNDS = 20


@dataclass
class Outcome:
    """What a change did. processes are looked at after it, the root of the tree first."""

    processes: list[Inspection] = field(default_factory=list)
    edits: int = 0
    changed: bool = False
    clock: StopClock = field(default_factory=StopClock)
    skipped: list[str] = field(default_factory=list)
    """Processes of the tree that run another program, a line each."""


def look(pid: int, *, tree: bool) -> Outcome:
    """Looks at a process, or at a tree, and changes nothing."""
    outcome = Outcome()
    for each in descendants(pid) if tree else [pid]:
        try:
            admit(each, changing=False)
            with Process(each) as process:
                outcome.processes.append(inspect(process))
        except DynacutError:
            if each == pid or _is_alive(each):
                raise
            continue  # a child that ended meanwhile, or a zombie
    return outcome


def change(
    pid: int, resolve: Resolve, *, tree: bool, dry_run: bool, timeout: float, engine: Engine = Engine.PTRACE
) -> Outcome:
    """Resolves and applies a change to a process, or to it and all its descendants.

    Children that are forked meanwhile are found and changed in turn; those that run another executable than the root,
    and that the change does not fit, are left alone.

    Raises:
        DynacutError: refused, with all processes untouched; or what Patcher.apply() raises.
    """
    outcome = Outcome()
    with ExitStack() as stack:
        opened: dict[int, Process] = {}
        seen: set[int] = set()
        """Those that are opened, and those that were passed over for good."""
        for turn in range(_MAX_ROUNDS):
            new = [each for each in (descendants(pid) if tree else [pid]) if each not in seen]
            if not new:
                break
            seen.update(new)
            try:
                resolved = _resolve_all(new, resolve, pid, opened, stack, outcome, timeout, engine, dry_run=dry_run)
            except DynacutError as error:
                if turn > 0:
                    _blame(error, outcome)
                raise
            for process, patcher, patches in resolved:
                outcome.edits += len(patches.edits)
                if not dry_run:
                    _apply(patcher, patches, outcome, process)
        for process in opened.values():
            try:
                process.refresh()
                outcome.processes.append(inspect(process, thorough=False))
            except DynacutError as error:
                is_alive = _is_alive(process.pid)
                if process.pid == pid and outcome.changed and not is_alive:
                    raise _ended(process) from None
                if outcome.changed and error.status is ExitStatus.REFUSED:
                    error.status = ExitStatus.CHECK_FAILED
                if process.pid == pid or is_alive:
                    raise
    return outcome


def _resolve_all(
    pids: Sequence[int],
    resolve: Resolve,
    root: int,
    opened: dict[int, Process],
    stack: ExitStack,
    outcome: Outcome,
    timeout: float,
    engine: Engine,
    *,
    dry_run: bool,
) -> list[tuple[Process, Patching, PatchSet]]:
    resolved = []
    for pid in pids:
        try:
            admit(pid, changing=True)
            stack.enter_context(locked(pid))
            process = stack.enter_context(Process(pid))
        except DynacutError:
            if pid != root and not _is_alive(pid):
                continue  # a short-lived child
            raise
        if not dry_run:
            left_behind = stop_trace(process, timeout, outcome.clock)  # by a tracer that was killed
            outcome.edits += left_behind
            outcome.changed = outcome.changed or left_behind > 0
        patcher = patcher_of(engine)(process, timeout, outcome.clock)
        try:
            patches = resolve(process, patcher.table())
        except DynacutError as error:
            if pid == root or process.exe == opened[root].exe:
                raise
            outcome.skipped.append(f"{process.label} runs {process.exe}: {error.problem}")
            continue
        opened[pid] = process
        resolved.append((process, patcher, patches))
    return resolved


def _apply(patcher: Patching, patches: PatchSet, outcome: Outcome, process: Process) -> None:
    patcher.restart_clock()
    try:
        patcher.apply(patches)
    except DynacutError as error:
        if not _is_alive(process.pid):
            if outcome.changed:
                return  # a child that ended meanwhile
            raise _ended(process) from None
        _blame(error, outcome)
        raise
    outcome.changed = outcome.changed or patches.changes


def _blame(error: DynacutError, outcome: Outcome) -> None:
    """Makes an error say that it is no refusal of the whole, where other processes have been changed before."""
    if outcome.changed and error.status is ExitStatus.REFUSED:
        error.status = ExitStatus.CHECK_FAILED
        error.details = (*error.details, "other processes of the tree were changed already; --undo takes that back")


def _ended(process: Process) -> DynacutError:
    return DynacutError(
        f"{process.label} ended during the change, perhaps by a hit of it",
        "look at its log, and at how it ended; start it again without the change",
        status=ExitStatus.CHECK_FAILED,
    )


def _is_alive(pid: int) -> bool:
    try:
        admit(pid, changing=False)
    except DynacutError:
        return False
    return True
