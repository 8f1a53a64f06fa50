"""dynacut offline: switch features of a process in a CRIU image off and on again."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import SCHEMA, print_json, warn
from dynacut.cli.quantities import counted, shown
from dynacut.cli.steps import Steps
from dynacut.cli.target_view import inspected_document, print_features, print_processes, processes_document
from dynacut.cli.what import Request, add_options
from dynacut.shared.errors import DynacutError, ExitStatus, printable
from dynacut.shared.report import merged_features

if TYPE_CHECKING:
    from dynacut.offline.change import Outcome
    from dynacut.offline.images.image import Image

HELP = "the same in a CRIU image, written as a thin layer over it"
USAGE = (
    "dynacut offline IMAGE_DIR [-o OUT_DIR] [--flat] [--pid P …] [--root DIR] [WHAT] [HOW]",
    "dynacut offline IMAGE_DIR --disassemble SITE",
)
DESCRIPTION = (
    "Switch features of the processes in a CRIU image off and on again; without a change to make, show what is in it. "
    "IMAGE_DIR is never modified: the changed image is written to OUT_DIR, as a layer that shares all unchanged files "
    "with it by hard links."
)
EPILOG = """examples:
  dynacut offline image/
  dynacut offline image/ -v --json
  dynacut offline image/ --disassemble setCommand
  dynacut offline image/ --plan no-set.toml -o image-without-set/
  dynacut offline image-without-set/ --undo -o image-as-before/ --flat
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("image", type=Path, metavar="IMAGE_DIR", help="what `criu dump` or `dynacut checkpoint` wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT_DIR", help="where to write the changed image")
    parser.add_argument("--flat", action="store_true", help="write a copy that shares nothing with IMAGE_DIR")
    parser.add_argument(
        "--pid", type=int, action="append", default=[], metavar="P", help="only this process (repeatable)"
    )
    parser.add_argument("--root", default="", metavar="DIR", help="the folder that the image's program files are in")
    parser.add_argument("--disassemble", metavar="SITE", help="show the instructions from SITE on, as in memory")
    add_options(parser)


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Shows or changes."""
    started = time.perf_counter()
    request = Request(arguments)
    _check_usage(arguments, changes=request.changes, lists=request.lists)
    from dynacut.offline.change import change, look
    from dynacut.offline.images.image import Image

    with Image(arguments.image, arguments.root.rstrip("/")) as image:
        if arguments.disassemble:
            from dynacut.cli.offline.look import show_disassembly

            show_disassembly(image, arguments.disassemble, arguments.pid, as_json=arguments.json)
            return ExitStatus.DONE
        if request.lists:
            return _list(image, arguments)
        with Steps(shown=not arguments.quiet) as steps:
            steps.tell("verifying and writing" if request.changes else "looking")
            if request.changes:
                outcome = change(
                    image,
                    request.resolve,
                    arguments.output,
                    pids=arguments.pid,
                    dry_run=arguments.dry_run,
                    flat=arguments.flat,
                )
            else:
                outcome = look(image, arguments.pid)
        wall_ms = (time.perf_counter() - started) * 1000
        _report(image, outcome, arguments, changes=request.changes, wall_ms=wall_ms)
    return ExitStatus.DONE


def _check_usage(arguments: argparse.Namespace, *, changes: bool, lists: bool) -> None:
    def usage(problem: str, advice: str) -> DynacutError:
        return DynacutError(problem, advice, status=ExitStatus.USAGE)

    if changes and arguments.output is None and not arguments.dry_run:
        raise usage("a changed image needs a place", "give a new directory by -o OUT_DIR, or try with --dry-run")
    if not changes and not lists and (arguments.output is not None or arguments.flat):
        raise usage("-o and --flat without a change to write", "add --plan, --disable, --enable or --undo")
    if arguments.disassemble and (changes or lists):
        raise usage("--disassemble only shows instructions", "do one after the other")
    if arguments.flat and lists:
        raise usage("--flat without a change to write", "add --plan, --disable, --enable or --undo")
    if arguments.root and not Path(arguments.root).is_dir():
        raise DynacutError(f"{arguments.root} is no directory", "give the folder that the image's program files are in")


def _list(image: Image, arguments: argparse.Namespace) -> ExitStatus:
    """Lists what the processes had learned, or where their threads are."""
    from dynacut.cli.block_lists import LEARNED, STANDING, show_blocks
    from dynacut.offline.change import chosen
    from dynacut.shared.coverage.coverage import union_of_all
    from dynacut.shared.coverage.keep import learned_blocks
    from dynacut.shared.coverage.standing import standing_of
    from dynacut.shared.region import find_region

    processes = chosen(image, arguments.pid)
    if arguments.standing:
        parts = [standing_of(each, [(thread.rip, thread.rsp) for thread in each.threads]) for each in processes]
    else:
        regions = [(process, find_region(process)) for process in processes]
        parts = [learned_blocks(process, found.table if found else None) for process, found in regions]
    show_blocks(
        union_of_all(parts),
        STANDING if arguments.standing else LEARNED,
        {"image": str(arguments.image)},
        arguments.output,
        as_json=arguments.json,
        verbose=arguments.verbose > 0,
        quiet=arguments.quiet,
    )
    return ExitStatus.DONE


def _report(image: Image, outcome: Outcome, arguments: argparse.Namespace, *, changes: bool, wall_ms: float) -> None:
    from dynacut.offline.change import chosen

    for line in dict.fromkeys(warning for process in outcome.processes for warning in process.warnings):
        warn(line)
    for line in outcome.skipped:
        warn(f"left alone: {line}")
    if arguments.json:
        document = _document(outcome, arguments, wall_ms)
        if not changes:
            from dynacut.cli.offline.look import image_document

            document["processes"] = image_document(chosen(image, arguments.pid), document["processes"])
        print_json(document)
    elif not arguments.quiet:
        if changes:
            _print_change(outcome, arguments, wall_ms)
        else:
            from dynacut.cli.offline.look import print_image

            print_image(image, chosen(image, arguments.pid), thorough=arguments.verbose > 0)
            print_processes(outcome.processes, with_modules=arguments.verbose > 0)
        print_features(outcome.processes, with_sites=arguments.verbose > 0)


def _document(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float) -> dict[str, Any]:
    root = outcome.processes[0]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "target": {"image": str(arguments.image), "exe": root.exe},
        "features": merged_features(outcome.processes, with_sites=arguments.verbose > 0),
        "changed": outcome.changed and not arguments.dry_run,
        "wall_ms": round(wall_ms, 1),
    }
    if arguments.dry_run:
        document["edits"] = outcome.edits
    if outcome.written is not None:
        document["written"] = {
            "image": str(outcome.written.path),
            "layer": outcome.written.is_layer,
            "bytes": outcome.written.bytes_written,
            "files": outcome.written.files,
        }
    document["processes"] = processes_document(outcome.processes)
    return document | inspected_document(outcome.processes)


def _print_change(outcome: Outcome, arguments: argparse.Namespace, wall_ms: float) -> None:
    processes = counted(len(outcome.processes), "process", "processes")
    places = counted(outcome.edits, "place")
    written = outcome.written
    if written is None:
        print(f"{processes}: {places} would be changed; everything fits, nothing was written")
        return
    kind = "layer" if written.is_layer else "flat copy"
    print(
        f"{processes}, {places} changed: {kind} {printable(str(written.path))}, {written.bytes_written:,} bytes, "
        f"in {shown(wall_ms, 'ms')}"
    )
    if not written.is_layer and not arguments.flat:
        warn("hard links are not possible there, so everything was copied")
