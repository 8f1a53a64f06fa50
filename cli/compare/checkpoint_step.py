"""One step of `dynacut compare` by checkpoint: dump, rewrite, restore, in a process of its own like any command.

    python -m dynacut.cli.compare.checkpoint_step --pid P --images DIR (--plan FILE [--feature NAME …] | --undo) --json

Everything that can be done before the processes stand still is done before: imports, the plan, CRIU's trial, and a
rehearsal on the running processes, which verifies the change and fills the caches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dynacut.cli.console import SCHEMA, print_error, print_json
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import DynacutError, ExitStatus


def main() -> int:
    """Does the step; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynacut.cli.compare.checkpoint_step")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder; it gets the image and the rewritten one")
    parser.add_argument("--criu", type=Path)
    add_options(parser)
    arguments = parser.parse_args()
    try:
        return int(_step(arguments))
    except DynacutError as error:
        print_error(error)
        return int(error.status)


def _step(arguments: argparse.Namespace) -> ExitStatus:
    from dynacut.live.rehearsal import rehearsed
    from dynacut.offline.criu import find_criu
    from dynacut.offline.round_trip import round_trip

    criu = find_criu(arguments.criu)
    request = Request(arguments)
    with rehearsed(arguments.pid, request.resolve, tree=True):
        trip = round_trip(arguments.pid, request.resolve, arguments.images, criu=criu)
    if trip.restored.rolled_back_from is not None:
        raise DynacutError(
            "the rewritten image could not be restored; the original was, and the process runs as before",
            "look at CRIU's log",
            details=trip.restored.errors,
        )
    assert trip.changed.written is not None
    print_json(
        {
            "schema": SCHEMA,
            "stopped_us": trip.frozen_ms * 1000,
            "frozen_us": trip.dumped.frozen_us,
            "dump_ms": trip.dumped.wall_ms,
            "rewrite_ms": trip.rewrite_ms,
            "restore_ms": trip.restored.wall_ms,
            "image_bytes": trip.dumped.size_bytes,
            "layer_bytes": trip.changed.written.bytes_written,
            "options": trip.dumped.options.arguments(),
            "warnings": trip.dumped.warnings,
        }
    )
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
