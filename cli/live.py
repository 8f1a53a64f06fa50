"""dynacut live: switch features of a running process off and on again."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import print_json, warn
from dynacut.cli.shown import inspected_document, print_features, print_modules, processes_document
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import ExitStatus
from dynacut.shared.report import SCHEMA, merged_features

if TYPE_CHECKING:
    from dynacut.live.change import Outcome

NAME = "live"
HELP = "switch features of a running process off and on again"
DESCRIPTION = "Switch features of a running process off and on again; without a change to make, show what is in force."
EPILOG = """examples:
  dynacut live --pid 4711
  dynacut live --pid 4711 --disable setCommand --on-hit redirect=readonlyCommand --as set
  dynacut live --pid 4711 --enable set
  dynacut live --name nginx --tree --plan no-webdav.toml
  dynacut live --pid 4711 --undo
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--pid", type=int, metavar="P", help="the process")
    target.add_argument("--name", dest="process_name", metavar="N", help="the only process (or tree) of that name")
    parser.add_argument("--tree", action="store_true", help="all its descendants as well")
    add_options(parser)


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Shows or changes."""
    from dynacut.live.change import change, look

    started = time.perf_counter()
    request = Request(arguments)
    pid = arguments.pid
    if pid is None:
        from dynacut.live.tree import by_name

        pid = by_name(arguments.process_name)
    if request.changes:
        outcome = change(
            pid, request.resolve, tree=arguments.tree, dry_run=arguments.dry_run, timeout=arguments.timeout
        )
    else:
        outcome = look(pid, tree=arguments.tree)
    wall_ms = (time.perf_counter() - started) * 1000
    for line in dict.fromkeys(warning for process in outcome.processes for warning in process.warnings):
        warn(line)
    for line in outcome.skipped:
        warn(f"left alone: {line}")
    if arguments.json:
        print_json(_document(outcome, arguments, wall_ms))
    elif not arguments.quiet:
        if request.changes:
            _print_change(outcome, arguments, wall_ms)
        else:
            print_modules(outcome.processes)
        print_features(outcome.processes, with_sites=arguments.verbose > 0)
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


def _print_change(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float) -> None:
    processes = f"{len(outcome.processes)} processes" if arguments.tree else f"process {outcome.processes[0].pid}"
    places = f"{outcome.edits} place{'' if outcome.edits == 1 else 's'}"
    if arguments.dry_run:
        print(f"{processes}: {places} would be changed; everything fits, nothing was touched")
    elif outcome.changed:
        done = "everything is as it was before" if arguments.undo else "done"
        print(f"{processes}: {done} ({places} changed) in {wall_ms:.0f} ms, {_stops(outcome)}")
    else:
        print(f"{processes}: nothing to change")


def _stops(outcome: Outcome) -> str:
    stops = outcome.clock
    if not stops.stops:
        return "without a stop"
    times = f"{stops.stops} stop{'' if stops.stops == 1 else 's'} of a thread"
    return f"with {times}, {stops.total_ns / 1000:.0f} µs in all, the longest {stops.longest_ns / 1000:.0f} µs"
