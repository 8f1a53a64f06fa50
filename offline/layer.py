"""A changed image written to a new directory: as a copy-on-write layer over the original, or as a flat copy.

A layer is complete in itself and costs as much as what changed. Unchanged files are hard links, also the pages file, so
it restores, and can be moved within its file system, without the original. CRIU's incremental images provide the rest:
a page marked as the parent's is looked for in the directory `parent`.

    OUT/                 pagemap of the original, written pages marked as the parent's; its pages file, linked
    OUT/parent/          pagemap and pages of what was written

Pages that the image itself holds lie amid its pages file, which the entries of a pagemap follow without a gap. Where
such a page is written or taken away, it is the other way round: the written pages in OUT, the original in OUT/parent.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dynacut.offline.images.files import MAX_PARENTS, ImageFolder, copy_range
from dynacut.offline.images.image import Image
from dynacut.offline.images.pages import PARENT, PRESENT, Extent, pages_name
from dynacut.offline.images.process import ImageProcess
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE

_PARENT = "parent"
_BELOW = f"{_PARENT}/"


@dataclass
class Written:
    """What was written. bytes_written: of new files, hard links apart; is_layer: False for a flat copy."""

    path: Path
    is_layer: bool
    bytes_written: int = 0
    files: list[str] = field(default_factory=list)
    """The image files that differ from the original's."""


def write_image(image: Image, output: Path, *, flat: bool, extra: dict[str, bytes]) -> Written:
    """Writes a changed image to a directory that does not exist yet, or is empty. It appears complete or not at all.

    extra: further files, by name. A layer needs hard links; where the file system has none, or another one is written
    to, the copy is flat.

    Raises:
        DynacutError: the directory is not free, or cannot be written; nothing is left of it.
    """
    partial = None
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DynacutError(f"{output} exists already", "give a new directory by -o OUT_DIR")
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(image.path)):
            raise DynacutError(f"{output} lies within the image", "it is never modified; give another directory by -o")
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        # A layer has a parent more.
        written = Written(output, not flat and image.depth < MAX_PARENTS and _can_link(image, partial))
        writer = _LayerWriter(image, partial, written) if written.is_layer else _FlatWriter(image, partial, written)
        writer.write()
        for name, data in extra.items():
            writer.put(name, data)
        partial.rename(output)
    except OSError as error:
        raise DynacutError(f"{output} cannot be written: {error.strerror}", "give another directory by -o") from None
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)
    return written


def _can_link(image: Image, directory: Path) -> bool:
    """Whether files of the image can be hard-linked into a directory."""
    name = "pstree.img"
    try:
        os.link(name, directory / name, src_dir_fd=image.folder.descriptor, follow_symlinks=False)
    except OSError:
        return False
    (directory / name).unlink()
    return True


class _Writer(ABC):
    """What both ways have in common."""

    def __init__(self, image: Image, directory: Path, written: Written) -> None:
        self._image = image
        self._directory = str(directory)
        self._folders = {""}
        self._written = written
        self._changed = [process for process in image.processes if process.changed]
        self._new: dict[str, bytes] = {}
        for process in self._changed:
            self._new |= process.changed_files()

    @abstractmethod
    def write(self) -> None:
        """Writes everything."""

    def put(self, name: str, data: bytes) -> None:
        """Writes one new file."""
        file = self._create(name)
        try:
            _write_all(file, data)
        finally:
            os.close(file)
        self._written.bytes_written += len(data)
        self._written.files.append(name)

    def _create(self, name: str) -> int:
        return os.open(self._place(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _place(self, name: str) -> str:
        """Where a file is to be written, in a folder that is there. Plain strings: it is asked for each file."""
        folder = name.rpartition("/")[0]
        if folder not in self._folders:
            os.makedirs(f"{self._directory}/{folder}", mode=0o700, exist_ok=True)  # noqa: PTH103
            self._folders.add(folder)
        return f"{self._directory}/{name}"

    def _repaged(self) -> list[ImageProcess]:
        """The processes whose pages have changed."""
        return [process for process in self._changed if process.memory.written or process.memory.vmas_changed]


class _LayerWriter(_Writer):
    """Links what is unchanged."""

    def write(self) -> None:
        """Writes the layer."""
        replaced = set(self._new)
        repaged = self._repaged()
        held = {process for process in repaged if _touches_held_pages(process)}
        for process in repaged:
            pages = process.memory.pages
            replaced.add(pages.name)
            if process in held:
                replaced.add(pages.pages_name)
        self._link_all(self._image.folder, "", replaced)
        for name, data in self._new.items():
            self.put(name, data)
        taken = self._link_parent(repaged)
        for process in repaged:
            below = process.memory.pages.pages_id
            while pages_name(below) in taken:
                below = (below + 1) % (1 << 32)
            taken.add(pages_name(below))
            if process in held:
                self._write_over(process, below)
            else:
                self._write_under(process, below)

    def _link_parent(self, repaged: list[ImageProcess]) -> set[str]:
        """Moves the original's parent one level deeper; the names that are then taken in between.

        Processes that do not change find there what they have from the parent, and what that has from parents of its
        own is found the same way. Each dump numbers its pages files anew, so other processes' may have the number of
        one that changes.
        """
        parent = self._image.folder.parent()
        if parent is None:
            return set()
        with parent:
            ours = {process.memory.pages.name for process in repaged}
            ours |= {below.pages_name for process in repaged if (below := process.memory.pages.parent) is not None}
            self._link_all(parent, _BELOW, ours)
            self._link_chain(parent, _BELOW + _BELOW)
            return set(parent.image_names()) - ours

    def _write_under(self, process: ImageProcess, pages_id: int) -> None:
        """The image's own pages stay on top; the written ones come from below. pages_id: of the pages file there."""
        pages, written = process.memory.pages, process.memory.written
        own = list(_without(process.memory.extents(), written))
        below = [Extent(start, end, -1, PARENT) for start, end in _runs(written)]
        self.put(pages.name, pages.with_extents(sorted([*own, *below]), pages.pages_id))
        if not written and not any(extent.in_parent for extent in own):
            return
        # A page of the original's parent is found one level deeper.
        deeper = [extent for extent in own if extent.in_parent]
        self._put_pages(process, deeper, _BELOW, pages_id)

    def _write_over(self, process: ImageProcess, pages_id: int) -> None:
        """The written pages come on top; all others from the original, below. pages_id: of its pages file there."""
        folder, pages = self._image.folder, process.memory.pages
        kept = _without(process.memory.extents(), process.memory.written)
        below = [Extent(extent.start, extent.end, -1, PARENT) for extent in kept]
        self._put_pages(process, below, "", pages.pages_id)
        if pages_id == pages.pages_id:
            self._link(folder, pages.name, _BELOW + pages.name)
        else:
            self.put(_BELOW + pages.name, pages.with_extents(pages.extents, pages_id))
        self._link(folder, pages.pages_name, _BELOW + pages_name(pages_id))

    def _put_pages(self, process: ImageProcess, others: list[Extent], where: str, pages_id: int) -> None:
        """A pagemap with the written pages and others that are a parent's, and the pages file. where: see _link_all."""
        pages, written = process.memory.pages, process.memory.written
        extents = list(others)
        offset = 0
        for start, end in _runs(written):
            extents.append(Extent(start, end, offset, PRESENT))
            offset += end - start
        self.put(where + pages.name, pages.with_extents(sorted(extents), pages_id))
        self.put(where + pages_name(pages_id), b"".join(written[page] for page in sorted(written)))

    def _link_all(self, folder: ImageFolder, where: str, replaced: set[str]) -> None:
        """Links the images of a directory, but for those that are replaced. where: empty, or a folder and a slash."""
        for name in folder.image_names():
            if name not in replaced:
                self._link(folder, name, where + name)

    def _link_chain(self, folder: ImageFolder, where: str) -> None:
        """Links a directory and its parents, each as a directory below the other."""
        self._link_all(folder, where, set())
        parent = folder.parent()
        if parent is not None:
            with parent:
                self._link_chain(parent, where + _BELOW)

    def _link(self, folder: ImageFolder, name: str, where: str) -> None:
        os.link(name, self._place(where), src_dir_fd=folder.descriptor, follow_symlinks=False)


class _FlatWriter(_Writer):
    """Copies everything into one directory without a parent."""

    def write(self) -> None:
        """Writes the copy."""
        folder = self._image.folder
        paged = {process.memory.pages.name: process for process in self._image.processes}
        done: set[str] = {_PARENT}
        for process in paged.values():
            if process in self._changed or any(extent.in_parent for extent in process.memory.pages.extents):
                self._write_pages(process)
                done |= {process.memory.pages.name, process.memory.pages.pages_name}
        for name, data in self._new.items():
            self.put(name, data)
            done.add(name)
        for name in folder.image_names():
            if name not in done:
                source = folder.open(name)
                try:
                    self._copy(source, name)
                finally:
                    os.close(source)

    def _copy(self, source: int, name: str) -> None:
        output = self._create(name)
        try:
            self._written.bytes_written += copy_range(source, output, 0, os.fstat(source).st_size)
        finally:
            os.close(output)

    def _write_pages(self, process: ImageProcess) -> None:
        pages, written = process.memory.pages, process.memory.written
        kept = list(_without(process.memory.extents(), written))
        new = [Extent(start, end, -1, PRESENT) for start, end in _runs(written)]
        extents = []
        output = self._create(pages.pages_name)
        try:
            offset = 0
            for extent in sorted([*kept, *new]):
                if extent.start in written:
                    for page in range(extent.start, extent.end, PAGE_SIZE):
                        _write_all(output, written[page])
                else:
                    pages.copy_to(output, extent)
                flags = extent.flags & ~PARENT | PRESENT
                extents.append(Extent(extent.start, extent.end, offset, flags))
                offset += extent.end - extent.start
        finally:
            os.close(output)
        self._written.bytes_written += offset
        self._written.files.append(pages.pages_name)
        self.put(pages.name, pages.with_extents(extents, pages.pages_id))


def _write_all(output: int, data: bytes) -> None:
    """Writes it all: a disk that fills up takes a part first."""
    while data:
        data = data[os.write(output, data) :]


def _touches_held_pages(process: ImageProcess) -> bool:
    """Whether a page that the image's own pages file holds was written or taken away."""
    memory = process.memory
    for start, end in _runs(memory.written):
        if any(not extent.in_parent for extent in memory.pages.within(start, end)):
            return True
    if not memory.unmapped:
        return False
    kept = sum(extent.end - extent.start for extent in memory.extents() if not extent.in_parent)
    return kept != memory.pages.size


def _runs(pages: dict[int, bytes]) -> Iterator[tuple[int, int]]:
    """The consecutive runs of pages, by first address and end."""
    start = end = -1
    for page in sorted(pages):
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + PAGE_SIZE
    if end >= 0:
        yield start, end


def _without(extents: Iterator[Extent], pages: dict[int, bytes]) -> Iterator[Extent]:
    """The extents but for some pages."""
    runs = list(_runs(pages))
    position = 0
    for extent in extents:
        start = extent.start
        while position < len(runs) and runs[position][1] <= start:
            position += 1
        if position == len(runs) or extent.end <= runs[position][0]:
            yield extent
            continue
        index = position
        while index < len(runs) and runs[index][0] < extent.end:
            if start < runs[index][0]:
                yield extent.part(start, runs[index][0])
            start = max(start, runs[index][1])
            index += 1
        if start < extent.end:
            yield extent.part(start, extent.end)
