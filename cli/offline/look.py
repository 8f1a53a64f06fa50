"""What only an image shows: threads, VMAs with what was dumped of them, signal actions, and instructions."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import SCHEMA, print_json, print_table
from dynacut.shared.errors import printable
from dynacut.shared.target import PAGE_SIZE

if TYPE_CHECKING:
    from dynacut.offline.images.image import Image
    from dynacut.offline.images.process import ImageProcess

_SHOWN_BYTES = 256


def print_image(image: Image, processes: Sequence[ImageProcess], *, thorough: bool) -> None:
    """These processes of an image; thorough: their threads, VMAs and signal actions as well."""
    print(f"image {printable(str(image.path))}")
    rows = []
    for process in processes:
        dumped = sum(_dumped(process, vma["start"], vma["end"]) for vma in _ranges(process))
        cells = [str(process.pid), process.name, str(len(process.threads)), str(len(process.mappings)), f"{dumped:,}"]
        rows.append([*cells, process.exe])
    columns = ["pid", "name", "threads", "vmas", "pages dumped", "executable"]
    print_table("processes", columns, rows, right=frozenset({0, 2, 3, 4}))
    if not thorough:
        return
    for process in processes:
        print(f"process {process.pid} ({printable(process.name)})")
        document = _process_document(process)
        threads = [
            [str(thread["tid"]), thread["rip"], thread["rsp"], thread["blocked"]] for thread in document["threads"]
        ]
        print_table("threads", ["thread", "rip", "rsp", "blocked"], threads, right=frozenset({0}))
        vmas = [
            [vma["start"], vma["end"], vma["protection"], str(vma["pages"]), str(vma["dumped"]), vma["path"]]
            for vma in document["vmas"]
        ]
        columns = ["start", "end", "protection", "pages", "dumped", "what"]
        print_table("memory", columns, vmas, right=frozenset({3, 4}))
        actions = [
            [action["signal"], action["handler"], action["flags"], action["mask"]] for action in document["actions"]
        ]
        print_table("signal handlers", ["signal", "handler", "flags", "mask"], actions)


def image_document(processes: Sequence[ImageProcess], documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The processes' documents with what only an image has."""
    return [document | _process_document(process) for document, process in zip(documents, processes, strict=True)]


def _process_document(process: ImageProcess) -> dict[str, Any]:
    return {
        "name": process.name,
        "arguments": [argument for argument in process.arguments if argument],
        "threads": [
            {
                "tid": thread.tid,
                "rip": f"{thread.rip:#x}",
                "rsp": f"{thread.rsp:#x}",
                "blocked": f"{thread.blocked:#x}",
            }
            for thread in process.threads
        ],
        "vmas": [
            vma
            | {
                "start": f"{vma['start']:#x}",
                "end": f"{vma['end']:#x}",
                "dumped": _dumped(process, vma["start"], vma["end"]),
            }
            for vma in _ranges(process)
        ],
        "actions": [
            {
                "signal": _signal_name(number),
                "handler": f"{process.action(number).handler:#x}",
                "flags": f"{process.action(number).flags:#x}",
                "mask": f"{process.action(number).mask:#x}",
            }
            for number in process.caught_signals()
        ],
    }


def _ranges(process: ImageProcess) -> list[dict[str, Any]]:
    return [
        {
            "start": mapping.start,
            "end": mapping.end,
            "protection": "".join(
                letter if allowed else other
                for letter, other, allowed in (
                    ("r", "-", mapping.readable),
                    ("w", "-", mapping.writable),
                    ("x", "-", mapping.executable),
                    ("p", "s", mapping.private),
                )
            ),
            "pages": mapping.size // PAGE_SIZE,
            "path": printable(mapping.path),
        }
        for mapping in process.mappings
    ]


def _dumped(process: ImageProcess, start: int, end: int) -> int:
    """How many pages of a range are in the image."""
    return sum((extent.end - extent.start) // PAGE_SIZE for extent in process.memory.pages.within(start, end))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - 34}" if number >= 34 else str(number)


def show_disassembly(image: Image, site: str, pids: Sequence[int], *, as_json: bool) -> None:
    """Prints the instructions from a SITE on, to the end of its function but not too many.

    Raises:
        DynacutError: the site is not found in the chosen process (the root by default).
    """
    from dynacut.offline.change import chosen
    from dynacut.shared.code import CodeOf
    from dynacut.shared.disassembly import instructions
    from dynacut.shared.sites import Locator

    process = chosen(image, pids)[0]
    place = Locator(CodeOf(process)).locate(site)
    function = place.code.function_at(place.offset)
    size = min(_SHOWN_BYTES, function.end - place.offset) if function else _SHOWN_BYTES
    lines = list(instructions(process.read(place.address, size), place.address))
    if as_json:
        print_json(
            {
                "schema": SCHEMA,
                "target": {"image": str(image.path), "pid": process.pid},
                "at": str(place),
                "instructions": [
                    {"address": f"{line.address:#x}", "bytes": line.data.hex(" "), "text": line.text} for line in lines
                ],
            }
        )
        return
    print(printable(f"{place} of {process.label}"))
    for line in lines:
        print(f"  {line.address:#x}  {line.data.hex(' '):<32}  {line.text}")
