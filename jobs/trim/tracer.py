"""The first step of `dynacut trim`: which blocks run at start-up, and which in any later phase."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynacut.jobs.trim.instance import Instance
from dynacut.jobs.trim.rounds import Patience, Round, run_round
from dynacut.jobs.trim.service import Service
from dynacut.shared.modules import chosen_modules
from dynacut.shared.proc import is_alive

if TYPE_CHECKING:
    from dynacut.live.tracing.trace import Trace
    from dynacut.shared.coverage.coverage import Coverage

_POLL = 0.05


@dataclass(frozen=True)
class Phases:
    """What ran, and the round of the workload that showed it. init is None where the program ran already."""

    init: Coverage | None
    serving: Coverage
    round: Round


@dataclass(frozen=True)
class PhaseTracer:
    """How phases are traced.

    modules: names or paths; none for the executable. idle: seconds without a new block after which a pass is over.
    """

    instance: Instance
    modules: tuple[str, ...]
    idle: float
    patience: Patience

    @property
    def service(self) -> Service:
        """The instance's."""
        return self.instance.service

    def tell(self, step: str) -> None:
        """Tells what is being done."""
        self.instance.tell(step)

    def from_start(self, shutdown: str | None) -> Phases:
        """Starts an instance of the service for this alone, and traces it from its entry point to its end.

        shutdown: the command that ends it; None: SIGTERM does.

        Raises:
            DynacutError: its port is in use, it cannot be traced, a command fails, or it does not end.
        """
        from dynacut.live.admission import admit
        from dynacut.live.lock import locked
        from dynacut.live.process import Process
        from dynacut.live.tracing.spawn import HeldProgram
        from dynacut.live.tracing.trace import Trace

        readiness = self.service.before_start()
        with ExitStack() as stack:
            held = stack.enter_context(HeldProgram(self.service.command, self.service.output))
            stack.callback(self.instance.end, held.pid)
            self.instance.note(held.pid)
            admit(held.pid, changing=True)
            stack.enter_context(locked(held.pid))
            process = stack.enter_context(Process(held.pid))
            held.await_entry(process, timeout=10.0)
            trace = Trace(process, chosen_modules(process, self.modules))
            self.tell("finding blocks and arming them")
            trace.arm()
            held.release(process)
            trace.note(held.entry)
            self.tell("waiting until the program is ready")
            self.service.await_ready(readiness, lambda: is_alive(held.pid))
            self._await_quiet(trace)
            init = trace.next_phase()
            done = self._work(trace, held.pid)
            self.tell("shutting the program down")
            self.service.shut_down(held.pid, shutdown)
            return Phases(init, trace.coverage(), done)

    def running(self, pid: int) -> Phases:
        """Traces the workload of a service that runs, with its descendants, and takes the trace out of it again.

        Raises:
            DynacutError: it cannot be traced, or a command fails.
        """
        from dynacut.live.admission import admit
        from dynacut.live.lock import locked
        from dynacut.live.process import Process
        from dynacut.live.tracing.tree import TreeTrace

        with ExitStack() as stack:
            admit(pid, changing=True)
            stack.enter_context(locked(pid))
            process = stack.enter_context(Process(pid))
            trace = stack.enter_context(TreeTrace(process, chosen_modules(process, self.modules)))
            self.tell("finding blocks and arming them")
            trace.arm()
            try:
                done = self._work(trace, pid)
            finally:
                trace.disarm()
            return Phases(None, trace.coverage(), done)

    def _work(self, trace: Trace, pid: int) -> Round:
        """Runs the workload until it reaches nothing new."""

        def work() -> None:
            self.service.work(pid)
            self._await_quiet(trace)

        return run_round(self.patience, work, trace.poll, self.tell, "workload")

    def _await_quiet(self, trace: Trace) -> None:
        """Returns when no block was new for the idle time, or the workload's timeout is over."""
        deadline = time.monotonic() + self.service.timeout
        blocks, since = trace.poll(), time.monotonic()
        while time.monotonic() - since < self.idle and time.monotonic() < deadline:
            time.sleep(min(_POLL, self.idle))
            if trace.poll() != blocks:
                blocks, since = trace.poll(), time.monotonic()
