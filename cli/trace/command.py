"""dynacut trace: block coverage of a running process, or of a program from its start; and sets of such coverage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.cli import picture as show
from dynacut.cli.arguments import add_output_options, command_behind_dashes, pause, tcp_port, wrong_usage
from dynacut.cli.console import SCHEMA, print_json
from dynacut.cli.trace.sets import OPERATIONS, add_options, combine
from dynacut.shared.errors import ExitStatus, printable

if TYPE_CHECKING:
    from dynacut.shared.coverage.coverage import Coverage

HELP = "collect block coverage of a running process (drcov)"
USAGE = (
    "dynacut trace (--pid P | [--end] -- CMD …) -o FILE [WHAT] [END] [PHASES]",
    "dynacut trace --pid P --phase NAME",
    "dynacut trace (--merge | --intersect | --subtract) F … [--normalise] -o FILE",
    "dynacut trace --show [NAME=]F … [--module M] [--html FILE]",
)
DESCRIPTION = (
    "Collect block coverage of a running process, or of a program from its start, as drcov logs. A phase (start-up, "
    "wanted requests, unwanted ones) ends when the next one begins; each has a log of its own."
)
EPILOG = """examples:
  dynacut trace --pid 4711 -o redis.drcov --phase-name wanted      ends with Ctrl-C
  dynacut trace --pid 4711 --phase unwanted                        in another terminal: the next phase begins
  dynacut trace -o nginx.drcov --ready-port 80 --for 60 --end -- nginx -g 'daemon off;'
  dynacut trace --subtract unwanted.drcov wanted.drcov -o set.drcov
  dynacut trace --show redis.start.drcov redis.wanted.drcov --html redis.html
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--pid", type=int, metavar="P", help="the process")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="the log; with phases: FILE.PHASE.drcov")
    what = parser.add_argument_group("what to trace")
    what.add_argument("--module", action="append", default=[], metavar="M", help="this one (default: the executable)")
    what.add_argument("--all-modules", action="store_true", help="every module, but those that block signals")
    what.add_argument("--tree", action="store_true", help="also the descendants that run already, such as workers")
    end = parser.add_argument_group("when to end (default: Ctrl-C)")
    end.add_argument("--for", dest="seconds", type=pause, metavar="S", help="after S seconds")
    end.add_argument("--until-exit", action="store_true", help="when the process ends, and no sooner but by Ctrl-C")
    end.add_argument("--until-quiet", type=pause, metavar="S", help="when for S seconds no new block was hit")
    end.add_argument(
        "--end", action="store_true", help="of -- CMD: end the program then, by SIGTERM (default: it runs on)"
    )
    phases = parser.add_argument_group("phases")
    phases.add_argument("--phase-name", default="start", metavar="NAME", help="of the first phase (default: start)")
    phases.add_argument("--phase", metavar="NAME", help="tell the trace that runs on --pid that this phase begins")
    phases.add_argument(
        "--ready-port", type=tcp_port, metavar="N", help="phase `serving` begins when TCP port N answers"
    )
    phases.add_argument(
        "--ready-log",
        nargs="+",
        metavar=("[FILE]", "REGEX"),
        help="… when a line like REGEX is written to FILE, or to the file that the program's output goes to",
    )
    add_options(parser)
    show.add_options(parser)
    add_output_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD …", help="the program to start")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Traces, names a phase, combines logs, or draws them."""
    sets = [name for name in OPERATIONS if getattr(arguments, name)]
    command = command_behind_dashes(arguments)
    if len(sets) + (arguments.pid is not None) + bool(command) + bool(arguments.show) != 1:
        raise wrong_usage("trace", "give one of --pid, -- CMD, --merge, --intersect, --subtract, --show")
    if arguments.html and not arguments.show:
        raise wrong_usage("trace", "--html needs --show")
    if arguments.normalise and not sets:
        raise wrong_usage("trace", "--normalise belongs to --merge, --intersect or --subtract")
    if arguments.show:
        if arguments.output:
            raise wrong_usage("trace", "--show writes no log; --html FILE writes the picture")
        return show.run(arguments)
    if arguments.phase:
        return _begin_phase(arguments)
    if sets:
        if arguments.output is None:
            raise wrong_usage("trace", "-o FILE is missing")
        _report(arguments, {"result": (arguments.output, combine(arguments, sets[0]))})
        return ExitStatus.DONE
    from dynacut.cli.trace.session import Session, check_options

    check_options(arguments)
    session = Session(arguments, command)
    logs = session.run()
    _report(arguments, logs, session.left_running if command else None)
    return ExitStatus.DONE


def _begin_phase(arguments: argparse.Namespace) -> ExitStatus:
    from dynacut.live.tracing.phases import begin_phase

    if arguments.pid is None:
        raise wrong_usage("trace", "--phase needs --pid")
    said = begin_phase(arguments.pid, arguments.phase)
    if arguments.json:
        print_json({"schema": SCHEMA, "phase": arguments.phase})
    elif not arguments.quiet:
        print(printable(said))
    return ExitStatus.DONE


def _report(
    arguments: argparse.Namespace, logs: dict[str, tuple[Path, Coverage]], left_running: list[int] | None = None
) -> None:
    """left_running: of a program that was started for the trace, its processes that go on."""
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
        document: dict[str, object] = {"schema": SCHEMA, "phases": phases}
        print_json(document if left_running is None else document | {"left_running": left_running})
    elif not arguments.quiet:
        for name, (path, coverage) in logs.items():
            print(f"{name}: {coverage.count:,} blocks, {coverage.size_bytes:,} bytes → {path}")
