"""The comparison itself: each way disables and undoes the plan under the eyes of clients, in turns."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dynacut.cli.compare.prober import Prober, Seen
from dynacut.cli.compare.probes import REPLY_TIMEOUT, Probe
from dynacut.cli.compare.target import State, is_alive, memory_of, state_of, tree_of
from dynacut.cli.compare.ways import Run, Settings, Step, Way, rehearse, run_step
from dynacut.cli.console import warn
from dynacut.shared.errors import DynacutError, ExitStatus

Target = Callable[[], AbstractContextManager[tuple[int, Probe]]]
"""Gives the root of the process tree to work on, and how it is asked: the same each time, or a new one."""

_UNTOUCHED = (ExitStatus.REFUSED, ExitStatus.USAGE)
_QUIET_SECONDS = 1.0
_AFTERWARDS_SECONDS = 0.3
"""For so long after a command clients are still watched: what it did may take effect with the next requests."""


@dataclass(frozen=True)
class Observed:
    """What clients saw. kept: over the connection that was open all the time; None where the probe has none.

    client: what tells how long a client had to wait: kept where requests go over it, else fresh.
    """

    kept: Seen | None
    fresh: Seen
    client: Seen


@dataclass(frozen=True)
class Measured:
    """One step of one way. memory: what was added, in bytes; written_bytes: to files."""

    observed: Observed
    run: Run
    memory: dict[str, int]
    written_bytes: int

    @property
    def stopped_us(self) -> float | None:
        """How long threads were stopped: the longest stop, as the way itself says."""
        report = self.run.report
        stopped = report.get("longest_stop_us", report.get("stopped_us"))
        return None if stopped is None else float(stopped)


@dataclass(frozen=True)
class Facts:
    """The target, as it was found: its processes, threads and resident memory."""

    pid: int
    name: str
    exe: str
    processes: int
    threads: int
    resident_bytes: int


@dataclass
class Results:
    """What came of it. same_text, same_tables: for each way, whether the plan in force was the same as by the first
    way; undone: whether everything was as before afterwards."""

    steps: dict[Way, dict[Step, list[Measured]]] = field(default_factory=dict)
    quiet: list[Observed] = field(default_factory=list)
    same_text: dict[Way, bool] = field(default_factory=dict)
    same_tables: dict[Way, bool] = field(default_factory=dict)
    undone: dict[Way, bool] = field(default_factory=dict)
    left_out: dict[Way, str] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    probe: str = ""
    facts: Facts | None = None

    @property
    def equal(self) -> bool:
        """Whether all ways led to the same, and back."""
        return all([*self.same_text.values(), *self.same_tables.values(), *self.undone.values()])


class Comparison:
    """Runs the ways. tell: is told in a few words what is being done."""

    def __init__(
        self, settings: Settings, ways: Sequence[Way], images: Path | None, tell: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._ways = ways
        self._images = images
        self._tell = tell
        self._reference: State | None = None
        self.results = Results(steps={way: {step: [] for step in Step} for way in ways})

    def run(self, target: Target, repeat: int) -> Results:
        """Lets the ways take turns.

        Raises:
            DynacutError: the plan does not fit, with nothing changed; or a way has failed midway.
        """
        for repetition in range(repeat):
            first = repetition % len(self._ways)
            for way in [*self._ways[first:], *self._ways[:first]]:
                if way not in self.results.left_out:
                    self._tell(f"{way}, repetition {repetition + 1} of {repeat}")
                    with target() as (pid, probe):
                        self._turn(way, pid, probe)
        if not self.results.undone:
            reasons = [f"{way}: {reason}" for way, reason in self.results.left_out.items()]
            raise DynacutError("no way could apply the plan; nothing was changed", "see above", details=reasons)
        return self.results

    def _turn(self, way: Way, pid: int, probe: Probe) -> None:
        pids = tree_of(pid)
        before = self._look_before(pids, probe)
        with ExitStack() as stack:
            kept = stack.enter_context(Prober(probe, keep=True)) if probe.kept_pause is not None else None
            fresh = stack.enter_context(Prober(probe, keep=False))
            window = _Window(kept, fresh, pids, talks=probe.talks)
            with window:
                time.sleep(_QUIET_SECONDS)
            self.results.quiet.append(window.observed)
            try:
                disabled = self._measured(way, Step.DISABLE, pids, window)
                if disabled is None:
                    return
                self._compare(way, state_of(pids))
                undone = self._measured(way, Step.UNDO, pids, window)
                assert undone is not None
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
            rehearsal = rehearse(pids[0], self._settings)
            if rehearsal.status:
                raise rehearsal.error(f"the plan cannot be applied to process {pids[0]}", ExitStatus.REFUSED)
            self.results.facts = _facts(pids)
            self.results.probe = probe.label
        return before

    def _measured(self, way: Way, step: Step, pids: Sequence[int], window: _Window) -> Measured | None:
        """None: the way has refused to disable, with nothing changed, and is left out from now on."""
        with self._folder(pids) as images:
            memory = memory_of(pids)
            with window:
                run = run_step(way, step, pids, self._settings, images)
                time.sleep(_AFTERWARDS_SECONDS)
            if run.status or not run.report or not all(map(is_alive, pids)):
                if step is Step.DISABLE and run.status in _UNTOUCHED and all(map(is_alive, pids)):
                    self.results.left_out[way] = "; ".join(run.errors)
                    return None
                raise _failed(way, step, run, pids, images)
            self.results.warnings.update({f"{way}: {line}": None for line in run.report.get("warnings", ())})
            added = memory_of(pids).since(memory)
            files = sum(int(run.report.get(name, 0)) for name in ("image_bytes", "layer_bytes"))
            return Measured(window.observed, run, added, files)

    @contextmanager
    def _folder(self, pids: Sequence[int]) -> Iterator[Path]:
        """A folder for images; it stays where the processes are gone, and may be restored from them."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="dynacut-compare-", dir=self._images))
        except OSError as error:
            raise DynacutError(
                f"no folder for images can be made: {error.strerror}", "give another place by --images"
            ) from None
        try:
            yield folder
        finally:
            if all(map(is_alive, pids)) or not any(folder.iterdir()):
                shutil.rmtree(folder)

    def _compare(self, way: Way, state: State) -> None:
        self._reference = self._reference or state
        results, reference = self.results, self._reference
        results.same_text[way] = results.same_text.get(way, True) and state.text == reference.text
        results.same_tables[way] = results.same_tables.get(way, True) and state.tables == reference.tables

    def _put_back(self, pids: Sequence[int]) -> None:
        """Undoes what is in force when the comparison ends midway."""
        if is_alive(pids[0]):
            self._tell("putting everything back")
            run = run_step(Way.LIVE, Step.UNDO, pids, self._settings, Path())
            if run.status:
                warn(f"process {pids[0]} could not be put back: {'; '.join(run.errors)}")


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
        patience = REPLY_TIMEOUT if all(map(is_alive, self._pids)) else 0.0
        kept = self._kept.end(patience) if self._kept is not None else None
        fresh = self._fresh.end(patience)
        self.observed = Observed(kept, fresh, kept if kept is not None and self._talks else fresh)


def _failed(way: Way, step: Step, run: Run, pids: Sequence[int], images: Path) -> DynacutError:
    gone = [pid for pid in pids if not is_alive(pid)]
    if not gone:
        return run.error(f"{way.description} could not {step} the plan on process {pids[0]}")
    error = run.error(f"process {gone[0]} is gone after {way.description} ({step})", ExitStatus.UNKNOWN)
    kept = any(images.iterdir())
    error.advice = f"its image is in {images}: dynacut restore {images}/image" if kept else "start it again"
    return error


def _facts(pids: Sequence[int]) -> Facts:
    root = pids[0]
    try:
        threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids)
        resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf(
            "SC_PAGESIZE"
        )
        name = Path(f"/proc/{root}/comm").read_text(errors="replace").strip()
        exe = str(Path(f"/proc/{root}/exe").readlink())
    except OSError as error:
        raise DynacutError(f"process {root} cannot be looked at: {error.strerror}") from None
    return Facts(root, name, exe, len(pids), threads, resident)
