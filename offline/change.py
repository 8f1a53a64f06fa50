"""Looking at an image, and writing a changed one: the same requests as for a running process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynacut.offline import patcher
from dynacut.offline.criu_options import RECORD_NAME, Record
from dynacut.offline.image_tasks import read_options
from dynacut.offline.images.image import Image
from dynacut.offline.images.process import ImageProcess
from dynacut.offline.layer import Written, write_image
from dynacut.shared.errors import DynacutError
from dynacut.shared.inspect import inspected
from dynacut.shared.patch_set import Resolve
from dynacut.shared.region import find_region, is_our_handler
from dynacut.shared.report import Inspection
from dynacut.shared.target import SIGTRAP, SIGTRAP_BIT


@dataclass
class Outcome:
    """What was seen or done. processes: as they are in the image that was written, the root of the tree first."""

    processes: list[Inspection] = field(default_factory=list)
    edits: int = 0
    changed: bool = False
    written: Written | None = None
    skipped: list[str] = field(default_factory=list)
    """Processes that run another program, a line each."""


def look(image: Image, pids: Sequence[int] = ()) -> Outcome:
    """Looks at every process of an image, or only at these.

    Raises:
        DynacutError: the image has no such process.
    """
    return Outcome([inspect(process) for process in chosen(image, pids)])


def change(
    image: Image, resolve: Resolve, output: Path | None, *, pids: Sequence[int] = (), dry_run: bool, flat: bool
) -> Outcome:
    """Resolves a change for all processes of an image and writes the changed image.

    pids: only these processes. Without them, those that run another executable than the root, and that the change does
    not fit, are left alone. output: a new directory; None only with dry_run.

    Raises:
        DynacutError: refused, with nothing written.
    """
    outcome = Outcome()
    processes = chosen(image, pids)
    for process in processes:
        found = find_region(process)
        try:
            patches = resolve(process, found.table if found else None)
        except DynacutError as error:
            if pids or process.exe == processes[0].exe:
                raise
            outcome.skipped.append(f"{process.label} runs {process.exe}: {error.problem}")
            continue
        patcher.apply(process, patches)
        outcome.edits += len(patches.edits)
        outcome.changed = outcome.changed or patches.changes
    if not dry_run:
        assert output is not None
        outcome.written = write_image(image, output, flat=flat, extra={RECORD_NAME: _record(image.path)})
    outcome.processes = [inspect(process, thorough=False) for process in image.processes]
    return outcome


def _record(original: Path) -> bytes:
    """What `dynacut restore` is told of the new image."""
    return Record(read_options(original), original=str(original.absolute())).packed()


def chosen(image: Image, pids: Sequence[int]) -> list[ImageProcess]:
    """The processes of an image with these pids, in the image's order; without pids all.

    Raises:
        DynacutError: the image has no such process.
    """
    by_pid = {process.pid: process for process in image.processes}
    for pid in pids:
        if pid not in by_pid:
            known = ", ".join(map(str, by_pid))
            raise DynacutError(f"the image has no process {pid}", f"it has {known}")
    return [process for process in image.processes if not pids or process.pid in pids]


def inspect(process: ImageProcess, *, thorough: bool = True) -> Inspection:
    """Looks at one process; thorough: also at what other tools have patched."""
    return inspected(process, process.pid, lambda _, in_force: _warnings(process, in_force), thorough=thorough)


def _warnings(process: ImageProcess, in_force: bool) -> list[str]:
    if not in_force:
        return []
    warnings = []
    if not is_our_handler(process, process.action(SIGTRAP).handler):
        warnings.append(
            f"{process.label}: the program has taken SIGTRAP's action away: the next hit ends it; use --undo"
        )
    blocking = [thread.tid for thread in process.threads if thread.blocked & SIGTRAP_BIT]
    if blocking:
        warnings.append(f"{process.label}: thread {blocking[0]} blocks SIGTRAP: a hit there ends the program")
    return warnings
