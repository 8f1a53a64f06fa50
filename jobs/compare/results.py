"""What a comparison has measured and found."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynacut.jobs.compare.prober import Seen
from dynacut.jobs.compare.ways import Run, Step, Way
from dynacut.shared.errors import DynacutError


@dataclass(frozen=True)
class Observed:
    """What clients saw. kept: over the connection that was open all the time; None where the probe has none.

    client: what tells how long a client had to wait: kept where requests go over it, else fresh.
    """

    kept: Seen | None
    fresh: Seen
    client: Seen

    @property
    def answered(self) -> bool:
        """Whether the last request of every client was answered."""
        return self.fresh.answered and (self.kept is None or self.kept.answered)


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


@dataclass(frozen=True)
class Failure:
    """What a way could not do, and why. restored: whether the process was as before afterwards, or was replaced."""

    step: Step
    error: DynacutError
    restored: bool

    @property
    def reason(self) -> str:
        """Why, on one line."""
        return "; ".join([self.error.problem, *self.error.details])


@dataclass
class Results:
    """What came of it.

    same_text, same_tables: for each way, whether the plan in force was the same as by the first way; undone: whether
    everything was as before afterwards. left_out: why a way was refused, with nothing changed. failures: what a way
    began and could not do. broken_off: why the comparison ended before all turns were done.
    """

    steps: dict[Way, dict[Step, list[Measured]]] = field(default_factory=dict)
    quiet: list[Observed] = field(default_factory=list)
    same_text: dict[Way, bool] = field(default_factory=dict)
    same_tables: dict[Way, bool] = field(default_factory=dict)
    undone: dict[Way, bool] = field(default_factory=dict)
    left_out: dict[Way, str] = field(default_factory=dict)
    failures: dict[Way, Failure] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    broken_off: DynacutError | KeyboardInterrupt | None = None
    probe: str = ""
    facts: Facts | None = None

    @property
    def equal(self) -> bool:
        """Whether all ways led to the same, and back."""
        return all([*self.same_text.values(), *self.same_tables.values(), *self.undone.values()])
