"""Which pages of memory an image holds, and where: pagemap-ID.img with pages-N.img, and those of the parents."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from dynacut.offline.images.files import ImageFolder, packed
from dynacut.offline.images.schema import Message, PagemapEntry, PagemapHead
from dynacut.shared.target import PAGE_SIZE

PAGEMAP_MAGIC = 0x56084025
PARENT, LAZY, PRESENT = 1, 2, 4
"""Flags of a pagemap entry, CRIU's criu/include/image.h."""
_ADDRESS_LIMIT = 1 << 56


@dataclass(frozen=True)
class Extent:
    """Consecutive pages; offset is where they are in the pages file, in bytes, -1 if they are the parent's."""

    start: int
    end: int
    offset: int
    flags: int

    @property
    def in_parent(self) -> bool:
        """Whether the pages are found in the parent directory."""
        return self.offset < 0

    def part(self, start: int, end: int) -> Extent:
        """The extent cut to a range within it."""
        offset = self.offset if self.in_parent else self.offset + start - self.start
        return Extent(start, end, offset, self.flags)

    def message(self) -> Message:
        """The pagemap entry."""
        pages = (self.end - self.start) // PAGE_SIZE
        # Readers before CRIU 4.2 know the short count only; it is a required field.
        compatible = pages if pages < 1 << 32 else 0
        return PagemapEntry(vaddr=self.start, compat_nr_pages=compatible, flags=self.flags, nr_pages=pages)


class Pages:
    """The pages of one address space (or shared memory segment) as one directory holds them; parents on demand.

    name: the part of the file's name behind ``pagemap-``.
    """

    def __init__(self, folder: ImageFolder, name: str) -> None:
        """Reads and checks the pagemap.

        Raises:
            DynacutError: it is malformed, its entries overlap, or do not fit the pages file.
        """
        self.folder = folder
        self.name = f"pagemap-{name}.img"
        self._key = name
        messages = folder.messages(self.name, PAGEMAP_MAGIC)
        head = next(messages, None)
        if head is None:
            raise folder.broken(self.name, "it is empty")
        self.head = folder.decode(self.name, PagemapHead, head)
        self.extents = list(self._read_extents(messages))
        self._starts = [extent.start for extent in self.extents]
        self.size = sum(extent.end - extent.start for extent in self.extents if not extent.in_parent)
        self._file: int | None = None
        self._parent: Pages | None = None
        self._check()

    def _read_extents(self, messages: Iterator[bytes]) -> Iterator[Extent]:
        offset = last = 0
        for data in messages:
            entry = self.folder.decode(self.name, PagemapEntry, data)
            flags = entry.flags if entry.HasField("flags") else PARENT if entry.in_parent else PRESENT
            count = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
            start, end = entry.vaddr, entry.vaddr + count * PAGE_SIZE
            if start % PAGE_SIZE or start < last or not start < end <= _ADDRESS_LIMIT:
                raise self.folder.broken(self.name, f"its entry for {start:#x}, {count} pages, overlaps or is no range")
            last = end
            if flags & PARENT:
                yield Extent(start, end, -1, flags)
            elif flags & PRESENT:
                yield Extent(start, end, offset, flags)
                offset += end - start

    @property
    def pages_name(self) -> str:
        """The name of the file with the pages themselves."""
        return f"pages-{self.head.pages_id}.img"

    def _check(self) -> None:
        folder = self.folder
        if self.size or folder.has(self.pages_name):
            self._file = folder.open(self.pages_name)
            found = os.fstat(self._file).st_size
            if found != self.size:
                self.close()
                raise folder.broken(
                    self.pages_name, f"{found} bytes, but {self.name} describes {self.size}: they do not fit"
                )
        if any(extent.in_parent for extent in self.extents):
            parent = folder.parent()
            if parent is None:
                raise folder.broken(self.name, "it refers to pages of a parent, and there is no parent directory")
            self._parent = Pages(parent, self._key)

    def close(self) -> None:
        """Closes the pages file, those of the parents, and the parents' directories."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._parent is not None:
            self._parent.close()
            self._parent.folder.close()
            self._parent = None

    def within(self, start: int, end: int) -> Iterator[Extent]:
        """The extents of this directory, cut to a range."""
        index = max(0, bisect_right(self._starts, start) - 1)
        for extent in self.extents[index:]:
            if extent.start >= end:
                return
            if extent.end > start:
                yield extent.part(max(start, extent.start), min(end, extent.end))

    def fill(self, data: bytearray, address: int) -> None:
        """Copies what the image holds of a range of memory over its bytes. data, address: whole pages.

        Raises:
            DynacutError: a page that should be the parent's is not there, or a file cannot be read.
        """
        place = memoryview(data)
        for extent in self.within(address, address + len(data)):
            self._fill_extent(place[extent.start - address : extent.end - address], extent)

    def fill_all(self, place: memoryview, address: int) -> None:
        """As fill(), for pages that must be there."""
        for extent in self.all_within(address, address + len(place)):
            self._fill_extent(place[extent.start - address : extent.end - address], extent)

    def _fill_extent(self, place: memoryview, extent: Extent) -> None:
        if not extent.in_parent:
            self._read(place, extent.offset)
        elif self._parent is not None:
            self._parent.fill_all(place, extent.start)

    def all_within(self, start: int, end: int) -> list[Extent]:
        """As within(), for a range that must be here without a gap.

        Raises:
            DynacutError: it is not.
        """
        extents = list(self.within(start, end))
        if sum(extent.end - extent.start for extent in extents) != end - start:
            raise self.folder.broken(self.name, f"pages from {start:#x} on should be here, and are not")
        return extents

    def _read(self, place: memoryview, offset: int) -> None:
        assert self._file is not None
        done = 0
        while done < len(place):
            count = os.preadv(self._file, [place[done:]], offset + done)
            if count == 0:
                raise self.folder.broken(self.pages_name, "it is cut off")
            done += count

    def copy_to(self, output: int, extent: Extent) -> None:
        """Copies an extent's pages to the end of a file, wherever they are.

        Raises:
            DynacutError: they are not there. OSError: the output cannot be written.
        """
        if extent.in_parent:
            assert self._parent is not None
            for part in self._parent.all_within(extent.start, extent.end):
                self._parent.copy_to(output, part)
            return
        assert self._file is not None
        offset, left = extent.offset, extent.end - extent.start
        while left:
            count = os.copy_file_range(self._file, output, left, offset)
            if count == 0:
                raise self.folder.broken(self.pages_name, "it is cut off")
            offset, left = offset + count, left - count

    def with_extents(self, extents: list[Extent]) -> bytes:
        """The pagemap file with other extents, neighbours that belong together joined."""
        joined: list[Extent] = []
        for extent in extents:
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.end == extent.start
                and last.flags == extent.flags
                and ((last.in_parent and extent.in_parent) or last.offset + last.end - last.start == extent.offset)
            ):
                joined[-1] = Extent(last.start, extent.end, last.offset, last.flags)
            else:
                joined.append(extent)
        return packed(PAGEMAP_MAGIC, [self.head, *(extent.message() for extent in joined)])
