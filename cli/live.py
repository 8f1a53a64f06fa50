"""dynacut live: switch features of a running process off and on again."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import print_json, print_table, warn
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import ExitStatus, printable
from dynacut.shared.report import SCHEMA

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
            _print_modules(outcome)
        _print_features(outcome, arguments)
    return ExitStatus.DONE


def _document(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float) -> dict[str, Any]:
    root = outcome.processes[0]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "target": {"pid": root.pid, "exe": root.exe},
        "features": _merged(outcome, with_sites=arguments.verbose > 0),
        "changed": outcome.changed,
        "stopped_us": round(outcome.clock.total_ns / 1000, 1),
        "longest_stop_us": round(outcome.clock.longest_ns / 1000, 1),
        "wall_ms": round(wall_ms, 1),
    }
    if arguments.dry_run:
        document["edits"] = outcome.edits
    if arguments.tree:
        document["processes"] = [
            {
                "pid": process.pid,
                "exe": process.exe,
                "features": [feature.as_json(with_sites=False) for feature in process.features],
            }
            for process in outcome.processes
        ]
    document["modules"] = [
        {"name": module.name, "path": module.path, "base": f"{module.base:#x}"} for module in root.modules
    ]
    document["foreign"] = [
        {
            "pid": process.pid,
            "at": foreign.at,
            "size": foreign.size,
            "found": foreign.found.hex(" "),
            "original": foreign.original.hex(" "),
        }
        for process in outcome.processes
        for foreign in process.foreign
    ]
    document["warnings"] = [warning for process in outcome.processes for warning in process.warnings]
    return document


def _merged(outcome: Outcome, *, with_sites: bool) -> list[dict[str, Any]]:
    """The features of all processes: hits added up; disabled if they are in any process."""
    merged: dict[str, dict[str, Any]] = {}
    for process in outcome.processes:
        for feature in process.features:
            entry = merged.get(feature.name)
            if entry is None:
                merged[feature.name] = feature.as_json(with_sites=with_sites)
                continue
            entry["hits"] += feature.hits
            if feature.state == "disabled":
                entry["state"] = feature.state
                entry["patched"] = max(entry["patched"], feature.patched)
    return list(merged.values())


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


def _print_modules(outcome: Outcome) -> None:
    root = outcome.processes[0]
    print(f"process {root.pid}: {printable(root.exe)}")
    rows = [[module.name, f"{module.base:#x}", f"{module.end - module.base:,}", module.path] for module in root.modules]
    print_table("modules", ["module", "base", "bytes", "path"], rows, right=frozenset({2}))
    foreign = [
        [str(process.pid), each.at, str(each.size), each.original[:8].hex(" "), each.found[:8].hex(" ")]
        for process in outcome.processes
        for each in process.foreign
    ]
    if foreign:
        columns = ["pid", "at", "bytes", "in the file", "in memory"]
        print_table("patched by somebody else", columns, foreign, right=frozenset({0, 2}))


def _print_features(outcome: Outcome, arguments: argparse.Namespace) -> None:
    several = len(outcome.processes) > 1
    rows = []
    sites = []
    for process in outcome.processes:
        pid = [str(process.pid)] if several else []
        for feature in process.features:
            patched = f"{feature.patched}/{len(feature.sites)}"
            rows.append([*pid, feature.name, feature.state, patched, str(feature.hits)])
            for site in feature.sites:
                state = "patched" if site.patched else "original"
                cells = [feature.name, site.at, str(site.length), site.on_hit, state, str(site.hits)]
                sites.append([*pid, *cells])
    if not rows:
        print("no features")
        return
    first = ["pid"] if several else []
    print_table("features", [*first, "feature", "state", "sites", "hits"], rows, right=frozenset({len(first) + 3}))
    if arguments.verbose:
        columns = [*first, "feature", "site", "bytes", "on hit", "text", "hits"]
        print_table("sites", columns, sites, right=frozenset({len(first) + 2, len(first) + 5}))
