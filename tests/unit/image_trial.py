"""Tries what dynacut makes of a mutated image: an error for the user, or a result that is right, at once."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from image_mutations import Mutant, Seed

from dynacut.cli.offline.look import image_document
from dynacut.handlers.table import Table
from dynacut.offline.change import change, look
from dynacut.offline.images.image import Image
from dynacut.offline.images.process import ImageProcess
from dynacut.offline.layer import write_image
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan
from dynacut.shared.target import Target

MEMORY_LIMIT = 2 << 30
"""Bytes of address space that any image may cost."""
TIME_LIMIT = 1.0
"""Seconds of processor time that any image may cost, writing it included."""
_SHOWN = 1 << 16


def try_image(directory: Path, output: Path, plan: Plan, flat: Sequence[bool] = (False, True)) -> str:
    """Looks at an image, changes it, and puts it back: says how far it came.

    output: a directory that is not there yet, in which everything is written. flat: the ways in which the image is
    written with a byte changed; each costs as much as a change of its own.

    Raises:
        AssertionError: an image that was accepted gives one that is not, or that reads differently; or something is
        left of what was refused.
        Exception: anything but a DynacutError is a bug.
    """
    output.mkdir()
    try:
        with Image(directory) as image:
            look(image)
            _show(image)
    except DynacutError as error:
        assert not any(output.iterdir())
        assert error.problem.isprintable() and error.advice.isprintable()
        return "refused"
    _check_written(directory, output, flat)

    def disable(target: Target, table: Table | None) -> PatchSet:
        return resolve.disable(plan, target, table)

    before = sorted(output.iterdir())
    try:
        with Image(directory) as image:
            change(image, disable, output / "changed", dry_run=False, flat=False)
            memory = [_ends(process) for process in image.processes]
    except DynacutError:
        assert sorted(output.iterdir()) == before
        return "change refused"
    with Image(output / "changed") as image:
        assert [_ends(process) for process in image.processes] == memory
        try:
            change(image, resolve.undo, output / "undone", dry_run=False, flat=True)
        except DynacutError:  # nothing was left to change before, so the program's file was not looked at
            assert not (output / "undone").exists()
            return "changed, undo refused"
    with Image(output / "undone") as image:
        look(image)
    return "changed and undone"


def _check_written(directory: Path, output: Path, ways: Sequence[bool]) -> None:
    """Writes a byte where it is possible, and the image as a layer or flat: each must read as it does."""
    for flat in ways:
        with Image(directory) as image:
            for process in image.processes:
                _write_somewhere(process)
            memory = [_ends(process) for process in image.processes]
            written = write_image(image, output / f"written-{flat}", flat=flat, extra={})
        with Image(written.path) as image:
            assert [_ends(process) for process in image.processes] == memory


def _write_somewhere(process: ImageProcess) -> None:
    for mapping in process.mappings:
        try:
            process.write(mapping.start + 5, b"x")
        except DynacutError:
            continue
        return


def _ends(process: ImageProcess) -> list[object]:
    """The first and last bytes of every VMA, with its message; whether they can be read is compared as well."""
    found: list[object] = []
    for vma in process.memory.vmas:
        size = min(_SHOWN, vma.mapping.size)
        found.append(vma.message.SerializeToString(deterministic=True))
        for start in (vma.mapping.start, vma.mapping.end - size):
            try:
                found.append(process.read(start, size))
            except DynacutError:
                found.append(None)
    return found


def _show(image: Image) -> None:
    """What `dynacut offline -v --json` asks for."""
    document = image_document(image.processes, [{} for _ in image.processes])
    assert len(document) == len(image.processes)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Any image must do with this address space; beyond it is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@dataclass(frozen=True)
class Tried:
    """What came of a mutant. seconds: of processor time."""

    mutations: tuple[str, ...]
    result: str
    seconds: float


def try_mutant(seed: Seed, folder: Path, key: str) -> Tried:
    """Makes the mutant of a key, the same for each key, and tries it within an empty folder, which is empty then.

    Raises:
        AssertionError: as for try_image(); also if it takes too long, or anything outside of the output is changed.
    """
    mutant = Mutant.of(seed, folder / "image", key)
    listing = _listing(folder)
    started = time.process_time()
    try:
        result = try_image(mutant.directory, folder / "output", seed.plan, [zlib.crc32(key.encode()) % 2 == 0])
        seconds = time.process_time() - started
        assert seconds < TIME_LIMIT, f"{seconds:.1f} s"
        shutil.rmtree(folder / "output")
        assert _listing(folder) == listing, "the image was changed"
    except Exception as error:
        error.add_note(f"mutant {key}: {', '.join(mutant.done)}")
        raise
    finally:
        shutil.rmtree(folder / "output", ignore_errors=True)
        shutil.rmtree(mutant.directory)
    return Tried(tuple(mutant.done), result, seconds)


def _listing(folder: Path) -> list[tuple[str, int, int, int]]:
    """Every entry with inode, size and time of its last change."""
    found = []
    for where, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = f"{where}/{name}"
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return sorted(found)
