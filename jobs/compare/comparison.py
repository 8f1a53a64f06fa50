"""The comparison itself: each way disables and undoes the plan under the eyes of clients, in turns."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from dynacut.jobs.compare.prober import Prober
from dynacut.jobs.compare.probes import Probe
from dynacut.jobs.compare.results import Facts, Failure, Measured, Observed, Results
from dynacut.jobs.compare.target import State, living_tree, memory_of, state_of
from dynacut.jobs.compare.ways import Run, Settings, Step, Way, fill_caches, run_step
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.plan_file import load
from dynacut.shared.proc import executable, is_alive, resident_bytes, task_status, thread_ids
from dynacut.shared.resolve import disable

Target = Callable[[], AbstractContextManager[tuple[int, Probe]]]
"""Gives the root of the process tree to work on, and how it is asked: the same each time, or a new one."""

_UNTOUCHED = (ExitStatus.REFUSED, ExitStatus.USAGE)
_QUIET_SECONDS = 1.0
_PATIENCE_SECONDS = 15.0
"""For so long after a command the last request may go unanswered: TCP repeats what was not acknowledged ever later."""
_AFTERWARDS_SECONDS = 0.3
"""For so long after a command clients are still watched: what it did may take effect with the next requests."""


class Comparison:
    """Runs the ways.

    renewed: whether the target is a new process each time, so that one that was lost does not matter. tell: is told
    in a few words what is being done; warn: what a user should know.
    """

    def __init__(
        self,
        settings: Settings,
        ways: Sequence[Way],
        images: Path | None,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
        *,
        renewed: bool,
    ) -> None:
        self._renewed = renewed
        self._settings = settings
        self._ways = ways
        self._images = images
        self._tell = tell
        self._warn = warn
        self._reference: State | None = None
        self.results = Results(steps={way: {step: [] for step in Step} for way in ways})

    def run(self, target: Target, repeat: int) -> Results:
        """Lets the ways take turns. A way that is refused, or fails, is left out from then on.

        Raises:
            DynacutError: the plan does not fit, with nothing changed; or no way has been measured.
        """
        try:
            self._take_turns(target, repeat)
        except (DynacutError, KeyboardInterrupt) as error:
            if not self.results.undone:
                raise
            self.results.broken_off = error  # what was measured until then is worth telling
        if not self.results.undone:
            raise self._nothing_measured()
        return self.results

    def _take_turns(self, target: Target, repeat: int) -> None:
        for repetition in range(repeat):
            first = repetition % len(self._ways)
            for way in [*self._ways[first:], *self._ways[:first]]:
                if way in self.results.left_out or way in self.results.failures:
                    continue
                self._tell(f"{way}, repetition {repetition + 1} of {repeat}")
                with target() as (pid, probe):
                    self._turn(way, pid, probe)

    def _nothing_measured(self) -> DynacutError:
        """One failure is told as such; several reasons, a line each."""
        results = self.results
        if len(results.failures) == 1 and not results.left_out:
            (failure,) = results.failures.values()
            return failure.error
        reasons = [f"{way}: {reason}" for way, reason in results.left_out.items()]
        reasons += [f"{way}: {failure.reason}" for way, failure in results.failures.items()]
        what = "no way could do and undo it" if results.failures else "no way could apply the plan"
        return DynacutError(
            f"{what}; everything is as before",
            "see above",
            details=reasons,
            status=ExitStatus.CHECK_FAILED if results.failures else ExitStatus.REFUSED,
        )

    def _turn(self, way: Way, pid: int, probe: Probe) -> None:
        pids = living_tree(pid)
        before = self._look_before(pids, probe)
        with ExitStack() as stack:
            kept = stack.enter_context(Prober(probe, keep=True)) if probe.kept_pause is not None else None
            fresh = stack.enter_context(Prober(probe, keep=False))
            window = _Window(kept, fresh, pids, talks=probe.talks)
            with window:
                time.sleep(_QUIET_SECONDS)
            self.results.quiet.append(window.observed)
            step = Step.DISABLE
            try:
                if way is Way.CHECKPOINT:
                    _check_dumpable(pid)
                disabled = self._measured(way, step, pids, window)
                self._compare(way, state_of(pids))
                step = Step.UNDO
                undone = self._measured(way, step, pids, window)
            except _RefusedError as refused:
                self.results.left_out[way] = refused.reason
                return
            except DynacutError as error:
                restored = self._put_back(pids) and state_of(pids) == before
                if not restored and not self._renewed:
                    raise
                self.results.failures[way] = Failure(step, error, restored)
                return
            except BaseException:
                self._put_back(pids)
                raise
            self.results.steps[way][Step.DISABLE].append(disabled)
            self.results.steps[way][Step.UNDO].append(undone)
            self.results.undone[way] = self.results.undone.get(way, True) and state_of(pids) == before

    def _look_before(self, pids: Sequence[int], probe: Probe) -> State:
        before = state_of(pids)
        if before.features:
            raise DynacutError(
                f"process {pids[0]} has features disabled already: {', '.join(before.features)}",
                f"a comparison would undo them as well; `dynacut live --pid {pids[0]} --tree --undo` first",
            )
        if self.results.facts is None:
            self._rehearse(pids[0])
            self.results.facts = _facts(pids)
            self.results.probe = probe.label
        return before

    def _rehearse(self, pid: int) -> None:
        """Verifies the plan without a stop. Whether a way can be gone is another question, and each answers it."""
        from dynacut.live.rehearsal import rehearsed

        plan = load(self._settings.plan).only(list(self._settings.features))
        try:
            with rehearsed(pid, lambda target, table: disable(plan, target, table, None), tree=True):
                pass
        except DynacutError as error:
            raise DynacutError(
                f"the plan cannot be applied to process {pid}", "see above", details=[error.problem, *error.details]
            ) from None
        fill_caches(pid, self._settings)

    def _measured(self, way: Way, step: Step, pids: Sequence[int], window: _Window) -> Measured:
        """Raises:
        _RefusedError: the way has refused to disable, with nothing changed.
        DynacutError: it has failed, or the clients are no longer answered.
        """
        with self._folder(pids) as images:
            memory = memory_of(pids)
            with window:
                run = run_step(way, step, pids, self._settings, images)
                time.sleep(_AFTERWARDS_SECONDS)
            if run.status or not run.report or not all(map(is_alive, pids)):
                if step is Step.DISABLE and run.status in _UNTOUCHED and all(map(is_alive, pids)):
                    raise _RefusedError("; ".join(run.errors))
                raise self._failed(way, step, run, pids, images)
            if not window.observed.answered:
                raise DynacutError(
                    f"after {way.description} ({step}) clients are no longer answered",
                    "give a probe that the plan does not refuse",
                    status=ExitStatus.CHECK_FAILED,
                )
            self.results.warnings.update({f"{way}: {line}": None for line in run.report.get("warnings", ())})
            added = memory_of(pids).since(memory)
            files = sum(int(run.report.get(name, 0)) for name in ("image_bytes", "layer_bytes"))
            return Measured(window.observed, run, added, files)

    @contextmanager
    def _folder(self, pids: Sequence[int]) -> Iterator[Path]:
        """A folder for images; it stays where somebody's processes are gone, and may be restored from them."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="dynacut-compare-", dir=self._images))
        except OSError as error:
            raise DynacutError(
                f"no folder for images can be made: {error.strerror}", "give another place by --images"
            ) from None
        try:
            yield folder
        finally:
            if self._renewed or all(map(is_alive, pids)) or not any(folder.iterdir()):
                shutil.rmtree(folder)

    def _compare(self, way: Way, state: State) -> None:
        self._reference = self._reference or state
        results, reference = self.results, self._reference
        results.same_text[way] = results.same_text.get(way, True) and state.text == reference.text
        results.same_tables[way] = results.same_tables.get(way, True) and state.tables == reference.tables

    def _failed(self, way: Way, step: Step, run: Run, pids: Sequence[int], images: Path) -> DynacutError:
        gone = [pid for pid in pids if not is_alive(pid)]
        if not gone:
            return run.error(f"{way.description} could not {step} the plan on process {pids[0]}")
        error = run.error(f"process {gone[0]} is gone after {way.description} ({step})", ExitStatus.UNKNOWN)
        if any(images.iterdir()) and not self._renewed:
            error.advice = f"its image is in {images}: dynacut restore {images}/image"
        else:
            error.advice = "start it again"
        return error

    def _put_back(self, pids: Sequence[int]) -> bool:
        """Undoes what is in force when a turn ends midway; whether that was done."""
        if not is_alive(pids[0]):
            return False
        self._tell("putting everything back")
        run = run_step(Way.LIVE, Step.UNDO, pids, self._settings, Path())
        if run.status:
            self._warn(f"process {pids[0]} could not be put back: {'; '.join(run.errors)}")
        return not run.status and all(map(is_alive, pids))


class _RefusedError(Exception):
    """A way refuses, with nothing changed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _check_dumpable(pid: int) -> None:
    """Raises:
    _RefusedError: it can be seen already that the process cannot be dumped, or not be restored afterwards.
    """
    from dynacut.offline.round_trip import check

    try:
        check(pid)
    except DynacutError as error:
        raise _RefusedError("; ".join([error.problem, *error.details])) from None


class _Window:
    """A time in which clients are watched."""

    def __init__(self, kept: Prober | None, fresh: Prober, pids: Sequence[int], *, talks: bool) -> None:
        self._kept = kept
        self._fresh = fresh
        self._pids = pids
        self._talks = talks

    def __enter__(self) -> None:
        for prober in (self._kept, self._fresh):
            if prober is not None:
                prober.begin()

    def __exit__(self, *_: object) -> None:
        patience = _PATIENCE_SECONDS if all(map(is_alive, self._pids)) else 0.0
        kept = self._kept.end(patience) if self._kept is not None else None
        fresh = self._fresh.end(patience)
        self.observed = Observed(kept, fresh, kept if kept is not None and self._talks else fresh)


def _facts(pids: Sequence[int]) -> Facts:
    root = pids[0]
    try:
        threads = sum(len(thread_ids(pid)) for pid in pids)
        resident = sum(map(resident_bytes, pids))
        name, exe = task_status(root).name, executable(root)
    except OSError as error:
        raise DynacutError(
            f"process {root} cannot be looked at: {error.strerror}", "see whether it still runs"
        ) from None
    return Facts(root, name, exe, len(pids), threads, resident)
