"""dynacut restore: let the processes of an image run again, by CRIU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.checkpoint import add_criu_options
from dynacut.cli.console import SCHEMA, print_error, print_json
from dynacut.cli.quantities import shown
from dynacut.cli.steps import Steps
from dynacut.shared.errors import DynacutError, ExitStatus, printable

if TYPE_CHECKING:
    from dynacut.offline.restore import Restored

HELP = "let the processes of a checkpoint run again (CRIU)"
USAGE = ("dynacut restore [--pid-file FILE] [--no-rollback] [--tcp-close] [--criu PATH] [--timeout S] IMAGE_DIR",)
DESCRIPTION = (
    "Let the processes of a checkpoint run again, with the pids they had, by CRIU. When an image that was rewritten "
    "cannot be restored, its original is restored instead (exit status 3)."
)
EPILOG = """examples:
  dynacut restore /var/tmp/redis
  dynacut restore --pid-file /run/redis.pid --json /var/tmp/redis.without-set
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("directory", type=Path, metavar="IMAGE_DIR", help="the image")
    parser.add_argument("--pid-file", type=Path, metavar="FILE", help="write the root's pid to a file")
    parser.add_argument("--no-rollback", action="store_true", help="do not restore the original instead")
    parser.add_argument("--tcp-close", action="store_true", help="restore the image's connections as closed ones")
    add_criu_options(parser, timeout="give up after S seconds (default: by the image's size)")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Restores and says what runs now."""
    from dynacut.offline.criu import find_criu
    from dynacut.offline.restore import restore

    criu = find_criu(arguments.criu)
    with Steps(shown=not arguments.quiet) as steps:
        done = restore(
            arguments.directory,
            criu=criu,
            timeout=arguments.timeout,
            rollback=not arguments.no_rollback,
            tcp_close=arguments.tcp_close,
            progress=steps.tell,
        )
    status = ExitStatus.DONE
    if done.rolled_back_from is not None:
        status = ExitStatus.CHECK_FAILED
        problem = f"{done.rolled_back_from} could not be restored; its original, {done.directory}, was"
        print_error(DynacutError(problem, "what the image had disabled is in force no more", details=done.errors))
    if arguments.pid_file is not None:
        _write_pid(arguments.pid_file, done.pid)
    if arguments.json:
        print_json(_document(done))
    elif not arguments.quiet:
        print(f"process {done.pid} ({printable(done.exe)}) runs again, {shown(done.wall_ms, 'ms')} in all")
    return status


def _document(done: Restored) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "target": {"pid": done.pid, "exe": done.exe},
        "image": str(done.directory),
        "restored": done.rolled_back_from is None,
        "rolled_back": done.rolled_back_from is not None,
        "errors": done.errors,
        "criu_ms": round(done.criu_ms, 1),
        "wall_ms": round(done.wall_ms, 1),
    }


def _write_pid(path: Path, pid: int) -> None:
    try:
        path.write_text(f"{pid}\n")
    except OSError as error:
        raise DynacutError(
            f"process {pid} runs again, but {path} cannot be written: {error.strerror}",
            "write the pid there by hand",
            status=ExitStatus.CHECK_FAILED,
        ) from None
