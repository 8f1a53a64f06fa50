"""dynacut live: switch features of a running process off and on again."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.arguments import seconds
from dynacut.cli.console import SCHEMA, print_error, print_json, warn
from dynacut.cli.live.engine import add_engine_options, behind_gdbserver, check_engine, engine_of, further_names
from dynacut.cli.live.fallback import add_fallback_options, check_usage
from dynacut.cli.quantities import counted, shown
from dynacut.cli.steps import Steps
from dynacut.cli.target_view import inspected_document, print_features, print_processes, processes_document
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.report import merged_features

if TYPE_CHECKING:
    from dynacut.jobs.fallback import Fallback
    from dynacut.live.change import Outcome

HELP = "switch features of a running process off and on again"
USAGE = (
    "dynacut live (--pid P | --name N) [--tree] [WHAT] [HOW]",
    "dynacut live --remote HOST:PORT [--pid P] [WHAT] [HOW]",
)
DESCRIPTION = "Switch features of a running process off and on again; without a change to make, show what is in force."
EPILOG = """examples:
  dynacut live --pid 4711
  dynacut live --pid 4711 --disable setCommand --on-hit redirect=readonlyCommand --as set
  dynacut live --pid 4711 --enable set
  dynacut live --name nginx --tree --plan no-webdav.toml
  dynacut live --pid 4711 --undo
  dynacut live --remote board:2345 --plan no-set.toml
  dynacut live --pid 4711 --plan no-set.toml --fallback checkpoint
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--pid", type=int, metavar="P", help="the process")
    target.add_argument("--name", dest="process_name", metavar="N", help="the only process (or tree) of that name")
    parser.add_argument("--tree", action="store_true", help="all its descendants as well")
    parser.add_argument("-o", dest="output", type=Path, metavar="F", help="of --learned, --standing: the log to write")
    parser.add_argument(
        "--timeout", type=seconds, default=10.0, metavar="S", help="give up after S seconds (default: 10)"
    )
    add_options(parser)
    add_fallback_options(parser)
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Shows or changes."""
    started = time.perf_counter()
    request = Request(arguments)
    if arguments.output is not None and not request.lists:
        raise DynacutError(
            "-o belongs to --learned and --standing", "a running process is changed in place", status=ExitStatus.USAGE
        )
    check_usage(arguments, changes=request.changes)
    check_engine(arguments)
    pid = arguments.pid
    if pid is None and arguments.remote is None:
        from dynacut.live.tree import by_name

        pid = by_name(arguments.process_name)
    if request.lists:
        return _list(pid, arguments)
    with further_names(arguments) as request.ask, Steps(shown=not arguments.quiet) as steps:
        steps.tell("verifying and changing" if request.changes else "looking")
        outcome, fallback = _outcome(pid, arguments, request)
    wall_ms = (time.perf_counter() - started) * 1000
    for line in dict.fromkeys(warning for process in outcome.processes for warning in process.warnings):
        warn(line)
    for line in outcome.skipped:
        warn(f"left alone: {line}")
    if arguments.json:
        document = _document(outcome, arguments, wall_ms)
        print_json(document if fallback is None else document | {"fallback": fallback.document()})
    elif not arguments.quiet:
        if request.changes:
            _print_change(outcome, arguments, wall_ms, fallback)
        else:
            print_processes(outcome.processes, with_modules=arguments.verbose > 0)
        print_features(outcome.processes, with_sites=arguments.verbose > 0)
    return ExitStatus.DONE if fallback is None else fallback.status


def _outcome(pid: int | None, arguments: argparse.Namespace, request: Request) -> tuple[Outcome, Fallback | None]:
    """Looks, or changes, by the way that was chosen; tells also if another way had to be taken."""
    from dynacut.live.change import change, look
    from dynacut.live.refusal import NeedsCheckpointError

    if pid is None or arguments.remote is not None:
        return behind_gdbserver(arguments, request), None
    if not request.changes:
        return look(pid, tree=arguments.tree), None
    try:
        outcome = change(
            pid,
            request.resolve,
            tree=arguments.tree,
            dry_run=arguments.dry_run,
            timeout=arguments.timeout,
            engine=engine_of(arguments),
            check_seccomp=arguments.check_seccomp,
        )
    except NeedsCheckpointError as refused:
        if arguments.fallback is None or refused.status is not ExitStatus.REFUSED:
            raise
        return _by_checkpoint(pid, request, refused, arguments)
    return outcome, None


def _by_checkpoint(
    pid: int, request: Request, refused: DynacutError, arguments: argparse.Namespace
) -> tuple[Outcome, Fallback]:
    from dynacut.jobs.fallback import by_checkpoint

    warn(f"not live: {refused.problem}")
    with Steps(shown=not arguments.quiet) as steps:
        outcome, fallback = by_checkpoint(
            pid,
            request.resolve,
            refused,
            tree=arguments.tree,
            dry_run=arguments.dry_run,
            timeout=arguments.timeout,
            images=arguments.images,
            tell=steps.tell,
        )
    for line in fallback.warnings:
        warn(line)
    if fallback.error is not None:
        print_error(fallback.error)
    return outcome, fallback


def _list(pid: int, arguments: argparse.Namespace) -> ExitStatus:
    """Lists what was learned, or where threads are."""
    from dynacut.cli.block_lists import LEARNED, STANDING, show_blocks
    from dynacut.live.learned import learned, standing

    list_of, kind = (standing, STANDING) if arguments.standing else (learned, LEARNED)
    show_blocks(
        list_of(pid, tree=arguments.tree),
        kind,
        {"pid": pid},
        arguments.output,
        as_json=arguments.json,
        verbose=arguments.verbose > 0,
        quiet=arguments.quiet,
    )
    return ExitStatus.DONE


def _document(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float) -> dict[str, Any]:
    root = outcome.processes[0]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "target": {"pid": root.pid, "exe": root.exe},
        "features": merged_features(outcome.processes, with_sites=arguments.verbose > 0),
        "changed": outcome.changed,
        "stopped_us": round(outcome.clock.total_ns / 1000, 1),
        "longest_stop_us": round(outcome.clock.longest_ns / 1000, 1),
        "wall_ms": round(wall_ms, 1),
    }
    if arguments.dry_run:
        document["edits"] = outcome.edits
    if arguments.tree:
        document["processes"] = processes_document(outcome.processes)
    return document | inspected_document(outcome.processes)


def _print_change(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float, fallback: Fallback | None) -> None:
    root, *others = outcome.processes
    processes = f"{1 + len(others)} processes" if others else f"process {root.pid}"
    places = counted(outcome.edits, "place")
    if arguments.dry_run:
        how = "" if fallback is None else " by a checkpoint"
        print(f"{processes}: {places} would be changed{how}; everything fits, nothing was touched")
    elif outcome.changed:
        done = "everything is as it was before" if arguments.undo else "done"
        how = _stops(outcome) if fallback is None else fallback.summary
        print(f"{processes}: {done} ({places} changed) in {shown(wall_ms, 'ms')}, {how}")
    elif fallback is not None and fallback.trip is not None:
        print(f"{processes}: unchanged, {fallback.summary}")
    else:
        print(f"{processes}: nothing to change")


def _stops(outcome: Outcome) -> str:
    stops = outcome.clock
    if not stops.stops:
        return "without a stop"
    times = counted(stops.stops, "stop")
    return (
        f"with {times} of a thread, {shown(stops.total_ns, 'ns')} in all, the longest {shown(stops.longest_ns, 'ns')}"
    )
