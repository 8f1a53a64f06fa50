"""One change to one process, or to a whole tree of them: everything is verified before the first is touched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from dynacut.live.admission import ANOTHER_ENGINE, ASK_FILTERS, admit, is_there
from dynacut.live.confinement import confinement
from dynacut.live.engine import Engine, Patching, patcher_of
from dynacut.live.inspect import inspect
from dynacut.live.lock import locked
from dynacut.live.own_memory import SharedMemoryError
from dynacut.live.process import Process
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.tracing.trace import stop_trace
from dynacut.live.tree import descendants
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.patch_set import PatchSet, Resolve
from dynacut.shared.report import Inspection

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
            if each == pid or is_there(each):
                raise
            continue  # a child that ended meanwhile, or a zombie
    return outcome


def change(
    pid: int,
    resolve: Resolve,
    *,
    tree: bool,
    dry_run: bool,
    timeout: float,
    engine: Engine = Engine.PTRACE,
    check_seccomp: bool = False,
) -> Outcome:
    """Resolves and applies a change to a process, or to it and all its descendants.

    check_seccomp: also to those under seccomp filters, if these allow all that it needs; for the engine PTRACE.

    Children that are forked meanwhile are found and changed in turn; those that run another executable than the root,
    and that the change does not fit, are left alone.

    Raises:
        DynacutError: refused, with all processes untouched; or what Patcher.apply() raises.
    """
    outcome = Outcome()
    with ExitStack() as stack:
        work = _Work(pid, resolve, timeout, engine, dry_run, check_seccomp, stack, outcome)
        for turn in range(_MAX_ROUNDS):
            new = [each for each in (descendants(pid) if tree else [pid]) if each not in work.seen]
            if not new:
                break
            try:
                resolved = work.resolve_all(new, is_last=turn == _MAX_ROUNDS - 1)
            except DynacutError as error:
                if turn > 0:
                    _blame(error, outcome)
                raise
            for process, patcher, patches in resolved:
                outcome.edits += len(patches.edits)
                if not dry_run:
                    _apply(patcher, patches, outcome, process)
        work.look_again()
    return outcome


@dataclass
class _Work:
    """A change under way. seen: the processes that are opened, and those that are passed over for good."""

    root: int
    resolve: Resolve
    timeout: float
    engine: Engine
    dry_run: bool
    check_seccomp: bool
    stack: ExitStack
    outcome: Outcome
    opened: dict[int, Process] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def resolve_all(self, pids: Sequence[int], *, is_last: bool) -> list[tuple[Process, Patching, PatchSet]]:
        """Opens processes and verifies the change against each. is_last: whether there is no further round.

        Raises:
            DynacutError: the change does not fit one of them.
        """
        resolved = []
        self.seen.update(pids)
        for pid in pids:
            try:
                otherwise = ASK_FILTERS if self.engine is Engine.PTRACE else ANOTHER_ENGINE
                admit(pid, changing=True, filtered=self.check_seccomp, otherwise=otherwise)
                self.stack.enter_context(locked(pid))
                process = self.stack.enter_context(Process(pid))
                confined = confinement(process, self.timeout, self.outcome.clock) if self.check_seccomp else None
            except SharedMemoryError:
                if pid == self.root or is_last:
                    raise
                self.seen.discard(pid)  # amid vfork: looked at again in the next round
                continue
            except DynacutError:
                if pid != self.root and not is_there(pid):
                    continue  # a short-lived child
                raise
            if not self.dry_run:
                left_behind = stop_trace(process, self.timeout, self.outcome.clock)  # by a tracer that was killed
                self.outcome.edits += left_behind
                self.outcome.changed = self.outcome.changed or left_behind > 0
            patcher = patcher_of(self.engine)(process, self.timeout, self.outcome.clock)
            try:
                patches = self.resolve(process, patcher.table())
            except DynacutError as error:
                if pid == self.root or process.exe == self.opened[self.root].exe:
                    raise
                self.outcome.skipped.append(f"{process.label} runs {process.exe}: {error.problem}")
                continue
            if confined is not None:
                confined.check(patches)
            self.opened[pid] = process
            resolved.append((process, patcher, patches))
        return resolved

    def look_again(self) -> None:
        """Looks at all processes as they are now; children that have ended meanwhile are left out.

        Raises:
            DynacutError: the root has ended, or one of them cannot be looked at.
        """
        outcome = self.outcome
        for process in self.opened.values():
            try:
                process.refresh()
                outcome.processes.append(inspect(process, thorough=False))
            except DynacutError as error:
                still_there = is_there(process.pid)
                if process.pid == self.root and outcome.changed and not still_there:
                    raise _ended(process) from None
                if outcome.changed and error.status is ExitStatus.REFUSED:
                    error.status = ExitStatus.CHECK_FAILED
                if process.pid == self.root or still_there:
                    raise


def _apply(patcher: Patching, patches: PatchSet, outcome: Outcome, process: Process) -> None:
    patcher.restart_clock()
    try:
        patcher.apply(patches)
    except DynacutError as error:
        if not is_there(process.pid):
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
