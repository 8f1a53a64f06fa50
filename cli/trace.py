"""dynacut trace: block coverage of a running process, or of a program from its start; and sets of such coverage."""

from __future__ import annotations

import argparse
import re
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dynacut.cli import show
from dynacut.cli.console import print_json, warn
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.report import SCHEMA

if TYPE_CHECKING:
    from dynacut.live.phases import PhaseListener
    from dynacut.live.process import Process
    from dynacut.live.spawn import HeldProgram
    from dynacut.live.trace import Trace
    from dynacut.shared.coverage import Coverage
    from dynacut.shared.target import Module

HELP = "collect block coverage of a running process (drcov)"
DESCRIPTION = (
    "Collect block coverage of a running process, or of a program from its start, as drcov logs. A phase (start-up, "
    "wanted requests, unwanted ones) ends when the next one begins; each has a log of its own."
)
EPILOG = """examples:
  dynacut trace --pid 4711 -o redis.drcov --phase-name wanted      ends with Ctrl-C
  dynacut trace --pid 4711 --phase unwanted                        in another terminal: the next phase begins
  dynacut trace -o nginx.drcov --ready-port 80 --for 60 -- nginx -g 'daemon off;'
  dynacut trace --subtract unwanted.drcov wanted.drcov -o set.drcov
  dynacut trace --show redis.start.drcov redis.wanted.drcov --html redis.html
"""
_TICK = 0.2


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--pid", type=int, metavar="P", help="the process")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="the log; with phases: FILE.PHASE.drcov")
    what = parser.add_argument_group("what to trace")
    what.add_argument("--module", action="append", default=[], metavar="M", help="this one (default: the executable)")
    what.add_argument("--all-modules", action="store_true", help="every module, but those that block signals")
    what.add_argument("--tree", action="store_true", help="also the descendants that run already, such as workers")
    end = parser.add_argument_group("when to end (default: Ctrl-C)")
    end.add_argument("--for", dest="seconds", type=float, metavar="S", help="after S seconds")
    end.add_argument("--until-exit", action="store_true", help="when the process ends")
    end.add_argument("--until-quiet", type=float, metavar="S", help="when for S seconds no new block was hit")
    phases = parser.add_argument_group("phases")
    phases.add_argument("--phase-name", default="start", metavar="NAME", help="of the first phase (default: start)")
    phases.add_argument("--phase", metavar="NAME", help="tell the trace that runs on --pid that this phase begins")
    phases.add_argument("--ready-port", type=int, metavar="N", help="phase `serving` begins when TCP port N answers")
    phases.add_argument("--ready-log", nargs=2, metavar=("FILE", "REGEX"), help="… when FILE has a line like REGEX")
    sets = parser.add_argument_group("sets of logs, by module and offset")
    sets.add_argument("--merge", nargs="+", type=Path, metavar="F", help="what any of them has")
    sets.add_argument("--intersect", nargs="+", type=Path, metavar="F", help="what all of them have")
    sets.add_argument("--subtract", nargs="+", type=Path, metavar="F", help="what the first has and no other")
    show.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="twice: trace back errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD …", help="the program to start")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Traces, names a phase, combines logs, or draws them."""
    sets = [name for name in ("merge", "intersect", "subtract") if getattr(arguments, name)]
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if len(sets) + (arguments.pid is not None) + bool(command) + bool(arguments.show) != 1:
        raise _usage("give one of --pid, -- CMD, --merge, --intersect, --subtract, --show")
    if arguments.html and not arguments.show:
        raise _usage("--html needs --show")
    if arguments.show:
        if arguments.output:
            raise _usage("--show writes no log; --html FILE writes the picture")
        return show.run(arguments)
    if arguments.phase:
        from dynacut.live.phases import begin_phase

        if arguments.pid is None:
            raise _usage("--phase needs --pid")
        begin_phase(arguments.pid, arguments.phase)
        return ExitStatus.DONE
    if arguments.output is None:
        raise _usage("-o FILE is missing")
    if sets:
        return _combine(arguments, sets[0])
    return _Session(arguments, command).run()


def _combine(arguments: argparse.Namespace, operation: str) -> ExitStatus:
    from dynacut.shared.drcov import read_log, write

    coverages = []
    for path in getattr(arguments, operation):
        log = read_log(path)
        for line in log.warnings:
            warn(f"{path}: {line}")
        coverages.append(log.coverage)
    first, *others = coverages
    if operation == "merge":
        result = first.union(*others)
    elif operation == "subtract":
        result = first.difference(*others)
    else:
        result = first
        for other in others:
            result = result.intersection(other)
    write(arguments.output, result)
    _report(arguments, {"result": (arguments.output, result)})
    return ExitStatus.DONE


class _Session:
    """One trace from arming to the last log."""

    def __init__(self, arguments: argparse.Namespace, command: list[str]) -> None:
        from dynacut.live.phases import check_phase_name

        self._arguments = arguments
        self._command = command
        self._phase = check_phase_name(arguments.phase_name)
        self._logs: dict[str, tuple[Path, Coverage]] = {}
        self._log_position = 0
        self._ready = arguments.ready_port is None and arguments.ready_log is None

    def run(self) -> ExitStatus:
        """Starts or attaches, traces until it shall end, disarms, writes the logs."""
        from contextlib import ExitStack

        from dynacut.live.admission import admit
        from dynacut.live.patcher import locked
        from dynacut.live.phases import PhaseListener
        from dynacut.live.process import Process
        from dynacut.live.spawn import HeldProgram
        from dynacut.live.trace import Trace
        from dynacut.live.trace_tree import TreeTrace

        with ExitStack() as stack:
            held = stack.enter_context(HeldProgram(self._command)) if self._command else None
            pid = held.pid if held else self._arguments.pid
            admit(pid, changing=True)
            stack.enter_context(locked(pid))
            process = stack.enter_context(Process(pid))
            if held:
                held.await_entry(process, timeout=10.0)
            modules = self._modules(process)
            tree = self._arguments.tree
            trace = stack.enter_context(TreeTrace(process, modules)) if tree else Trace(process, modules)
            listener = stack.enter_context(PhaseListener(pid))
            self._arm(trace, held, process)
            # In the background of a script SIGINT is ignored from the start; and SIGTERM must not leave blocks armed.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            try:
                self._watch(trace, listener)
            except KeyboardInterrupt:
                pass
            finally:
                trace.disarm()
            self._close_phase(trace, None)
        self._write(trace)
        _report(self._arguments, self._logs)
        return ExitStatus.DONE

    def _modules(self, process: Process) -> list[Module]:
        modules = list(process.modules)
        if self._arguments.all_modules:
            from dynacut.live.traceable import without_untraceable

            modules, left_out = without_untraceable(process, modules)
            if left_out:
                names = ", ".join(module.name for module in left_out)
                warn(f"not traced, as code in there runs while signals are blocked: {names}")
            return modules
        if not self._arguments.module:
            return modules[:1]
        chosen = []
        for name in self._arguments.module:
            found = [module for module in modules if name in module.names]
            if not found:
                known = ", ".join(module.name for module in modules)
                raise DynacutError(f"{process.label} has no module {name!r}", f"it has {known}")
            chosen += found
        return chosen

    def _arm(self, trace: Trace, held: HeldProgram | None, process: Process) -> None:
        self._say("finding blocks and arming them …")
        trace.arm()
        if held:
            held.release(process)
            trace.note(held.entry)
        self._say(f"{trace.armed:,} blocks armed; phase {self._phase}; Ctrl-C ends, a name and Enter begins a phase\n")

    def _watch(self, trace: Trace, listener: PhaseListener) -> None:
        started = last_new = time.monotonic()
        before = 0
        sources: list[PhaseListener | TextIO] = [listener]
        if sys.stdin.isatty():
            sources.append(sys.stdin)
        while True:
            readable, _, _ = select.select(sources, [], [], _TICK)
            for source in readable:
                name = listener.receive() if source is listener else self._typed(sources)
                if name:
                    self._close_phase(trace, name)
                    before = 0
            now = time.monotonic()
            blocks = trace.poll()
            if blocks != before:
                last_new = now
            self._say(f"phase {self._phase}: {blocks:,} blocks, {(blocks - before) / _TICK:,.0f} new per second")
            before = blocks
            if not self._ready and self._is_ready():
                self._ready = True
                self._close_phase(trace, "serving")
                before, last_new = 0, now
            arguments = self._arguments
            if not trace.is_running:
                return
            if arguments.seconds is not None and now - started >= arguments.seconds:
                return
            if arguments.until_quiet is not None and self._ready and now - last_new >= arguments.until_quiet:
                return

    def _typed(self, sources: list[PhaseListener | TextIO]) -> str | None:
        from dynacut.live.phases import check_phase_name

        line = sys.stdin.readline()
        if not line:
            sources.remove(sys.stdin)
            return None
        try:
            return check_phase_name(line.strip() or f"phase{len(self._logs) + 2}")
        except DynacutError as error:
            warn(error.problem)
            return None

    def _is_ready(self) -> bool:
        if self._arguments.ready_port is not None:
            try:
                socket.create_connection(("127.0.0.1", self._arguments.ready_port), 0.05).close()
            except OSError:
                return False
            return True
        path, pattern = self._arguments.ready_log
        try:
            with Path(path).open(errors="replace") as file:
                return any(re.search(pattern, line) for line in file)
        except OSError:
            return False
        except re.error as error:
            raise _usage(f"{pattern!r} is no regular expression: {error}") from None

    def _close_phase(self, trace: Trace, name: str | None) -> None:
        coverage = trace.next_phase() if name else trace.coverage()
        earlier = self._logs.get(self._phase)
        if earlier:
            coverage = earlier[1].union(coverage)
        self._logs[self._phase] = (self._arguments.output, coverage)
        if name:
            self._say(f"phase {self._phase}: {coverage.count:,} blocks; phase {name} begins\n")
            self._phase = name

    def _write(self, trace: Trace) -> None:
        from dynacut.shared.drcov import write

        output: Path = self._arguments.output
        for name, (_, coverage) in self._logs.items():
            path = output
            if len(self._logs) > 1:
                path = output.with_name(f"{output.name.removesuffix('.drcov')}.{name}.drcov")
            write(path, coverage, trace.extents())
            self._logs[name] = (path, coverage)

    def _say(self, line: str) -> None:
        if self._arguments.quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif line.endswith("\n"):
            print(line, end="", file=sys.stderr)


def _report(arguments: argparse.Namespace, logs: dict[str, tuple[Path, Coverage]]) -> None:
    if arguments.json:
        phases = [
            {
                "phase": name,
                "file": str(path),
                "blocks": coverage.count,
                "modules": [
                    {"name": module.name, "path": module.path, "blocks": module.count, "bytes": module.size_bytes}
                    for module in coverage.modules
                ],
            }
            for name, (path, coverage) in logs.items()
        ]
        print_json({"schema": SCHEMA, "phases": phases})
    elif not arguments.quiet:
        for name, (path, coverage) in logs.items():
            print(f"{name}: {coverage.count:,} blocks, {coverage.size_bytes:,} bytes → {path}")


def _usage(problem: str) -> DynacutError:
    return DynacutError(problem, "see dynacut trace --help", status=ExitStatus.USAGE)
