"""dynacut checkpoint: dump a process with its descendants, by CRIU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.arguments import add_output_options, seconds
from dynacut.cli.console import SCHEMA, print_json, warn
from dynacut.cli.quantities import counted, shown
from dynacut.cli.steps import Steps
from dynacut.shared.errors import ExitStatus, printable

if TYPE_CHECKING:
    from dynacut.offline.checkpoint import Checkpoint

HELP = "dump a process with its descendants into a directory (CRIU)"
USAGE = ("dynacut checkpoint --pid P [--leave-running] [--criu PATH] [--timeout S] IMAGE_DIR",)
DESCRIPTION = (
    "Dump a process with its descendants into a new directory, by CRIU. The options that CRIU needs are found by "
    "looking at the process. Open TCP connections are kept, and go on after `dynacut restore`."
)
EPILOG = """examples:
  dynacut checkpoint --pid 4711 /var/tmp/redis
  dynacut checkpoint --pid 4711 --leave-running /var/tmp/redis
  dynacut restore /var/tmp/redis
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--pid", type=int, required=True, metavar="P", help="the process, root of the tree to dump")
    parser.add_argument("directory", type=Path, metavar="IMAGE_DIR", help="a new or empty directory")
    parser.add_argument("--leave-running", action="store_true", help="let the processes go on afterwards")
    add_criu_options(parser, timeout="give up if the processes cannot be frozen in S seconds (default: 10)")


def add_criu_options(parser: argparse.ArgumentParser, *, timeout: str) -> None:
    """Adds what every command that runs CRIU takes. timeout: the help for --timeout."""
    parser.add_argument(
        "--criu", type=Path, metavar="PATH", help="the CRIU to use (default: DYNACUT_CRIU, PATH, that of `make criu`)"
    )
    parser.add_argument("--timeout", type=seconds, metavar="S", help=timeout)
    add_output_options(parser)


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Dumps and says what was dumped."""
    from dynacut.offline.checkpoint import checkpoint
    from dynacut.offline.criu import find_criu

    criu = find_criu(arguments.criu)
    with Steps(shown=not arguments.quiet) as steps:
        done = checkpoint(
            arguments.pid,
            arguments.directory,
            leave_running=arguments.leave_running,
            criu=criu,
            timeout=arguments.timeout,
            progress=steps.tell,
        )
    for line in done.warnings:
        warn(line)
    if arguments.json:
        print_json(_document(done))
    elif not arguments.quiet:
        _print(done)
    return ExitStatus.DONE


def _document(done: Checkpoint) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "target": {"pid": done.pid, "exe": done.exe},
        "image": str(done.directory.absolute()),
        "pids": done.pids,
        "options": done.options.arguments(),
        "left_running": done.left_running,
        "frozen_us": done.frozen_us,
        "dumped_bytes": done.dumped_bytes,
        "size_bytes": done.size_bytes,
        "criu_ms": round(done.criu_ms, 1),
        "wall_ms": round(done.wall_ms, 1),
        "remaining": done.remaining,
        "warnings": done.warnings,
    }


def _print(done: Checkpoint) -> None:
    others = len(done.pids) - 1
    tree = f" with {counted(others, 'descendant')}" if others else ""
    print(f"process {done.pid}{tree} ({printable(done.exe)}): dumped to {printable(str(done.directory))}")
    options = f", options {' '.join(done.options.arguments())}" if done.options.arguments() else ""
    print(
        f"frozen for {shown(done.frozen_us, 'us')}, {done.dumped_bytes / 1e6:.1f} MB of memory dumped, "
        f"{done.size_bytes / 1e6:.1f} MB on disk, {shown(done.wall_ms, 'ms')} in all{options}"
    )
    if done.left_running:
        print("it runs on")
    else:
        print(f"it has ended; back by: dynacut restore {printable(str(done.directory))}")
