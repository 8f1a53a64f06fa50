"""One step of `dynacut compare` by checkpoint: dump, rewrite, restore, in a process of its own like any command.

    python -m dynacut.jobs.compare.checkpoint_step --pid P --images DIR (--plan FILE [--feature NAME …] | --undo)

Everything that can be done before the processes stand still is done before: imports, the plan, CRIU's trial, and a
rehearsal on the running processes, which verifies the change and fills the caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dynacut.shared import resolve
from dynacut.shared.code import KnownFiles
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import Resolve
from dynacut.shared.plan_file import load


def main() -> int:
    """Does the step and prints what it cost, as JSON; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynacut.jobs.compare.checkpoint_step")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder; it gets the image and the rewritten one")
    parser.add_argument("--criu", type=Path)
    parser.add_argument("--feature", action="append", default=[])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path)
    what.add_argument("--undo", action="store_true")
    arguments = parser.parse_args()
    try:
        print(json.dumps(_step(arguments)))
    except DynacutError as error:
        print(error.problem, *error.details, error.advice, sep="\n", file=sys.stderr)
        return int(error.status)
    return 0


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    from dynacut.live.rehearsal import rehearsed
    from dynacut.offline.criu import find_criu
    from dynacut.offline.round_trip import round_trip

    criu = find_criu(arguments.criu)
    change = _change(arguments)
    with rehearsed(arguments.pid, change, tree=True):
        trip = round_trip(arguments.pid, change, arguments.images, criu=criu)
    if trip.restored.rolled_back_from is not None:
        raise DynacutError(
            "the rewritten image could not be restored; the original was, and the process runs as before",
            "look at CRIU's log",
            details=trip.restored.errors,
        )
    assert trip.changed.written is not None
    return {
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


def _change(arguments: argparse.Namespace) -> Resolve:
    if arguments.undo:
        return resolve.undo
    plan = load(arguments.plan)
    if arguments.feature:
        plan = plan.only(arguments.feature)
    known = KnownFiles()
    return lambda target, table: resolve.disable(plan, target, table, known=known)


if __name__ == "__main__":
    sys.exit(main())
