"""One step of `dynacut compare` by checkpoint: dump, rewrite, restore, in a process of its own like any command.

    python -m dynacut.cli.compare.checkpoint_step --pid P --images DIR (--plan FILE [--feature NAME …] | --undo) --json

Everything that can be done before the processes stand still is done before: imports, the plan, CRIU's trial.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import threading
import time
from pathlib import Path

from dynacut.cli.console import print_error, print_json
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.report import SCHEMA

IMAGE, LAYER = "image", "rewritten"


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
    from dynacut.offline.change import change
    from dynacut.offline.checkpoint import checkpoint
    from dynacut.offline.criu import find_criu
    from dynacut.offline.images.image import Image
    from dynacut.offline.restore import restore

    criu = find_criu(arguments.criu)
    request = Request(arguments)
    image, layer = arguments.images / IMAGE, arguments.images / LAYER
    end = _End(arguments.pid)
    dumped = checkpoint(arguments.pid, image, criu=criu)
    rewriting = time.perf_counter()
    try:
        with Image(image) as opened:
            written = change(opened, request.resolve, layer, dry_run=False, flat=False).written
    except DynacutError as error:
        restore(image, criu=criu)
        raise DynacutError(error.problem, error.advice, details=error.details) from None
    rewritten = time.perf_counter()
    restored = restore(layer, criu=criu)
    back = time.monotonic()
    assert written is not None
    if restored.rolled_back_from is not None:
        raise DynacutError(
            "the rewritten image could not be restored; the original was, and the process runs as before",
            "look at CRIU's log",
            details=restored.errors,
        )
    print_json(
        {
            "schema": SCHEMA,
            # CRIU's figure ends with the end of the processes.
            "stopped_us": dumped.frozen_us + (back - end.seen()) * 1e6,
            "frozen_us": dumped.frozen_us,
            "dump_ms": dumped.wall_ms,
            "rewrite_ms": (rewritten - rewriting) * 1000,
            "restore_ms": restored.wall_ms,
            "image_bytes": dumped.size_bytes,
            "layer_bytes": written.bytes_written,
            "options": dumped.options.arguments(),
            "warnings": dumped.warnings,
        }
    )
    return ExitStatus.DONE


class _End:
    """Sees when a process ends, whoever's child it is (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        """Raises:
        DynacutError: there is no such process.
        """
        try:
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            raise DynacutError(f"process {pid} cannot be watched: {error.strerror}") from None
        self._seen = 0.0
        self._thread = threading.Thread(target=self._watch, args=(descriptor,), daemon=True)
        self._thread.start()

    def seen(self) -> float:
        """When it ended, as time.monotonic(); it must have ended."""
        self._thread.join()
        return self._seen

    def _watch(self, descriptor: int) -> None:
        select.select([descriptor], [], [])
        self._seen = time.monotonic()
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
