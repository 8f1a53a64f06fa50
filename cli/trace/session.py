"""One run of dynacut trace: from arming to the last log."""

from __future__ import annotations

import argparse
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dynacut.cli.arguments import wrong_usage
from dynacut.cli.console import warn
from dynacut.cli.steps import clear_line
from dynacut.cli.trace.progress import Progress
from dynacut.shared.errors import DynacutError

if TYPE_CHECKING:
    from dynacut.live.process import Process
    from dynacut.live.tracing.phases import PhaseListener, PhaseRequest
    from dynacut.live.tracing.readiness import Readiness
    from dynacut.live.tracing.spawn import HeldProgram
    from dynacut.live.tracing.trace import Trace
    from dynacut.shared.coverage.coverage import Coverage
    from dynacut.shared.target import Module

_TICK = 0.2
_SERVING = "serving"


class Session:
    """One trace. Whatever happens, the blocks are put back and what was found is written."""

    def __init__(self, arguments: argparse.Namespace, command: list[str]) -> None:
        """Checks what can be checked without the process.

        Raises:
            DynacutError: a phase cannot be called so, the log cannot be written there, or readiness not be told
                in this way.
        """
        from dynacut.live.tracing.listening import check_unused
        from dynacut.live.tracing.phases import check_phase_name
        from dynacut.live.tracing.readiness import Readiness
        from dynacut.shared.coverage.drcov import check_writable

        self._arguments = arguments
        self._command = command
        self._phase = check_phase_name(arguments.phase_name)
        self._phases: dict[str, Coverage] = {}
        self._asked_to_end = False
        self.left_running: list[int] = []
        """After run(): processes of the program that it has started, which go on without a trace."""
        check_writable(arguments.output)
        Readiness(arguments.ready_port, _pattern(arguments))
        if command and arguments.ready_port is not None:
            check_unused(arguments.ready_port)

    def run(self) -> dict[str, tuple[Path, Coverage]]:
        """Starts or attaches, traces until it shall end, disarms, writes the logs; returns them by phase.

        Raises:
            DynacutError: the process cannot be traced; or not all of it could be put back, with the logs written.
        """
        from dynacut.live.admission import admit
        from dynacut.live.lock import locked
        from dynacut.live.process import Process
        from dynacut.live.tracing.phases import PhaseListener
        from dynacut.live.tracing.spawn import HeldProgram
        from dynacut.live.tracing.trace import Trace
        from dynacut.live.tracing.traceable import may_block_all_signals
        from dynacut.live.tracing.tree import TreeTrace

        with ExitStack() as stack:
            held = stack.enter_context(HeldProgram(self._command)) if self._command else None
            pid = held.pid if held else self._arguments.pid
            admit(pid, changing=True)
            stack.enter_context(locked(pid))
            process = stack.enter_context(Process(pid))
            readiness = self._readiness(pid)
            if held:
                held.await_entry(process, timeout=10.0)
            modules = self._modules(process)
            for module in filter(may_block_all_signals, modules):
                warn(
                    f"{module.name} can block all signals, in threads or handlers that it makes later: a block that is "
                    "first hit by one of them would end the process"
                )
            tree = self._arguments.tree
            names = {module.path: module.name for module in modules}
            progress = Progress(names, shown=not self._arguments.quiet, several=tree)
            progress.say_for_now("finding blocks and arming them …")
            trace = stack.enter_context(TreeTrace(process, modules)) if tree else Trace(process, modules)
            listener = stack.enter_context(PhaseListener(pid))
            stack.enter_context(self._noted_signals())
            failure = self._trace(trace, held, process, listener, readiness, progress)
        logs = self._write(trace)
        if held:
            self._part_with(held, trace)
        if failure is not None:
            raise failure
        return logs

    def _part_with(self, held: HeldProgram, trace: Trace) -> None:
        """Ends the program that was started, if that was asked for, or says that it runs on."""
        from dynacut.cli.trace import parting

        running = trace.running()
        if held.pid in running:  # the others are its descendants, which it ends
            running = [held.pid]
        if running and self._arguments.end:
            running = parting.end(running)
        elif running and not self._arguments.quiet:
            parting.tell(running, self._command[0])
        self.left_running = running

    @contextmanager
    def _noted_signals(self) -> Iterator[None]:
        """Signals that would end dynacut end the trace instead, after what is being done: nothing is left half done.

        Also where SIGINT is ignored, as in the background of a script; but not SIGHUP under nohup.
        """
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._ask_to_end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask_to_end(self, *_: object) -> None:
        self._asked_to_end = True

    def _trace(
        self,
        trace: Trace,
        held: HeldProgram | None,
        process: Process,
        listener: PhaseListener,
        readiness: Readiness,
        progress: Progress,
    ) -> DynacutError | None:
        """Arms, watches, disarms; returns what went wrong once there was something to be written."""
        trace.arm()
        failure = None
        try:
            if held:
                held.release(process)
                trace.note(held.entry)
            progress.say(
                f"{trace.armed:,} blocks of {process.label} armed; phase {self._phase}; "
                "Ctrl-C ends, a name and Enter begins a phase"
            )
            progress.begin()
            self._watch(trace, listener, readiness, progress)
        except DynacutError as error:
            failure = error
        finally:
            try:
                trace.disarm()
            except DynacutError as error:
                failure = failure or error
            self._close_phase(trace, None, progress)
            clear_line()
        return failure

    def _readiness(self, pid: int) -> Readiness:
        from dynacut.live.tracing.readiness import Readiness, output_files

        arguments = self._arguments
        logs: list[Path] = []
        if arguments.ready_log is not None:
            *files, _ = arguments.ready_log
            logs = [Path(file) for file in files] or output_files(pid)
            if not logs:
                raise DynacutError(
                    "the program's output goes to no file, where --ready-log REGEX could look",
                    "give the file: --ready-log FILE REGEX; or redirect the output: > FILE",
                )
        return Readiness(arguments.ready_port, _pattern(arguments), logs)

    def _modules(self, process: Process) -> list[Module]:
        from dynacut.live.tracing.traceable import without_untraceable
        from dynacut.shared.modules import chosen_modules

        if self._arguments.all_modules:
            modules, left_out = without_untraceable(process, process.modules)
            if left_out:
                names = ", ".join(module.name for module in left_out)
                warn(f"not traced, as code in there runs while signals are blocked: {names}")
            return modules
        return chosen_modules(process, self._arguments.module)

    def _watch(self, trace: Trace, listener: PhaseListener, readiness: Readiness, progress: Progress) -> None:
        started = time.monotonic()
        sources: list[PhaseListener | TextIO] = [listener]
        if sys.stdin.isatty():
            sources.append(sys.stdin)
        is_ready = self._arguments.ready_port is None and self._arguments.ready_log is None
        while not self._is_over(trace, started, progress.last_new if is_ready else None):
            readable, _, _ = select.select(sources, [], [], _TICK)
            for source in readable:
                request = listener.receive() if source is listener else self._typed(sources)
                if request is not None:
                    ended = self._close_phase(trace, request.name, progress)
                    listener.answer(request, ended)
            is_new = progress.is_new(trace.poll())
            progress.show(self._phase, trace.poll_modules() if is_new else None)
            if not is_ready and readiness.look():
                is_ready = True
                self._close_phase(trace, _SERVING, progress)

    def _is_over(self, trace: Trace, started: float, quiet_since: float | None) -> bool:
        """quiet_since: when a new block was last seen; None as long as that does not matter."""
        now, arguments = time.monotonic(), self._arguments
        return (
            self._asked_to_end
            or not trace.is_running
            or (arguments.seconds is not None and now - started >= arguments.seconds)
            or (
                arguments.until_quiet is not None
                and quiet_since is not None
                and now - quiet_since >= arguments.until_quiet
            )
        )

    def _typed(self, sources: list[PhaseListener | TextIO]) -> PhaseRequest | None:
        from dynacut.live.tracing.phases import PhaseRequest, check_phase_name

        line = sys.stdin.readline()
        if not line:
            sources.remove(sys.stdin)
            return None
        try:
            return PhaseRequest(check_phase_name(line.strip() or f"phase{len(self._phases) + 2}"), b"")
        except DynacutError as error:
            warn(error.problem)
            return None

    def _close_phase(self, trace: Trace, name: str | None, progress: Progress) -> str:
        """Ends the phase, and begins another one if it has a name; returns what there is to say of it."""
        coverage = trace.next_phase() if name else trace.coverage()
        modules = {module.path: module.count for module in coverage.modules}
        said = f"phase {self._phase}: {coverage.count:,} blocks{progress.by_module(modules)}"
        earlier = self._phases.get(self._phase)
        self._phases[self._phase] = earlier.union(coverage) if earlier else coverage
        if name:
            said += f"; phase {name} begins"
            self._phase = name
            progress.say(said)
            progress.begin()
        return said

    def _write(self, trace: Trace) -> dict[str, tuple[Path, Coverage]]:
        from dynacut.shared.coverage.drcov import write

        output: Path = self._arguments.output
        logs = {}
        for name, coverage in self._phases.items():
            path = output
            if len(self._phases) > 1:
                path = output.with_name(f"{output.name.removesuffix('.drcov')}.{name}.drcov")
            write(path, coverage, trace.extents())
            logs[name] = (path, coverage)
        return logs


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of a trace that do not fit together.

    Raises:
        DynacutError: wrong usage.
    """
    for problem, wrong in (
        ("-o FILE is missing", arguments.output is None),
        ("--until-exit excludes --for and --until-quiet", arguments.until_exit and (
            arguments.seconds is not None or arguments.until_quiet is not None)),
        ("--end is for -- CMD: what was not started here is not ended", arguments.end and arguments.pid is not None),
        ("--module and --all-modules exclude each other", arguments.module and arguments.all_modules),
        ("--ready-log takes a file and a regular expression, or the latter alone", len(arguments.ready_log or ()) > 2),
    ):  # fmt: skip
        if wrong:
            raise wrong_usage("trace", problem)


def _pattern(arguments: argparse.Namespace) -> str | None:
    return arguments.ready_log[-1] if arguments.ready_log else None
