"""Which pages of memory an image holds, and where: pagemap-ID.img with pages-N.img, and those of the parents."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from dynacut.offline.images.files import ImageFolder, copy_range, framed, packed
from dynacut.offline.images.schema import Message, PagemapEntry, PagemapHead
from dynacut.shared.target import PAGE_SIZE

PAGEMAP_MAGIC = 0x56084025
PARENT, PRESENT = 1, 4
"""Flags of a pagemap entry, CRIU's criu/include/image.h."""
_ADDRESS_LIMIT = 1 << 56
_MAX_EXTENTS = 1 << 22


class Extent(NamedTuple):
    """Consecutive pages; offset is where they are in the pages file, in bytes, -1 if they are the parent's.

    They sort by address. A tuple, because there are thousands, which are gone through many times.
    """

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

    name: the part of the file's name behind ``pagemap-``. parent: the same in the parent directory, None if no page is
    there.
    """

    def __init__(self, folder: ImageFolder, name: str) -> None:
        """Reads and checks the pagemap.

        Raises:
            DynacutError: it is malformed, its entries overlap, do not fit the pages file, or the parent's pages.
        """
        self.folder = folder
        self.name = f"pagemap-{name}.img"
        self._key = name
        self._data, self._places = folder.framed_messages(self.name, PAGEMAP_MAGIC, _MAX_EXTENTS)
        messages = (self._data[start + 4 : end] for start, end in pairwise(self._places))
        self.head = _head(folder, self.name, messages)
        self.extents: list[Extent] = []
        self.size = 0
        self._inherited: list[Extent] = []
        self._read_extents(messages)
        self._starts = [extent.start for extent in self.extents]
        self._file: int | None = None
        self.parent: Pages | None = None
        try:
            self._open()
            self._open_parent()
        except BaseException:
            self.close()
            raise

    def _read_extents(self, messages: Iterator[bytes]) -> None:
        offset = last = 0
        decode, add = self.folder.decode, self.extents.append
        for data in messages:
            entry = decode(self.name, PagemapEntry, data)
            flags, count, in_parent = entry.flags, entry.nr_pages, entry.in_parent
            if not flags and not entry.HasField("flags"):  # before CRIU 2.7
                flags = 0 if in_parent else PRESENT
            if not count and not entry.HasField("nr_pages"):  # before CRIU 4.2
                count = entry.compat_nr_pages
            flags |= PARENT if in_parent else 0
            start = entry.vaddr
            end = start + count * PAGE_SIZE
            if start % PAGE_SIZE or start < last or not start < end <= _ADDRESS_LIMIT:
                raise self.folder.broken(self.name, f"its entry for {start:#x}, {count} pages, overlaps or is no range")
            last = end
            place = flags & (PARENT | PRESENT)
            if place == PRESENT:
                add(Extent(start, end, offset, flags))
                offset += end - start
            elif place == PARENT:
                add(Extent(start, end, -1, flags))
                self._inherited.append(self.extents[-1])
            else:  # a dump by --lazy-pages may leave pages in the process that was dumped
                raise self.folder.broken(self.name, f"the pages at {start:#x} are not in one place")
        self.size = offset

    @property
    def pages_id(self) -> int:
        """The number of the file with the pages themselves."""
        return int(self.head.pages_id)

    @property
    def pages_name(self) -> str:
        """The name of that file."""
        return pages_name(self.pages_id)

    def _open(self) -> None:
        folder = self.folder
        if self.size or folder.has(self.pages_name):
            self._file = folder.open(self.pages_name)
            found = os.fstat(self._file).st_size
            if found != self.size:
                raise folder.broken(
                    self.pages_name, f"{found} bytes, but {self.name} describes {self.size}: they do not fit"
                )

    def _open_parent(self) -> None:
        if not self._inherited:
            return
        folder = self.folder.parent()
        if folder is None:
            raise self.folder.broken(self.name, "it refers to pages of a parent, and there is no parent directory")
        try:
            self.parent = Pages(folder, self._key)
        except BaseException:
            folder.close()
            raise
        for extent in self._inherited:  # CRIU would look for a missing one for ever
            self.parent.all_within(extent.start, extent.end)

    def close(self) -> None:
        """Closes the pages file, those of the parents, and the parents' directories."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self.parent is not None:
            self.parent.close()
            self.parent.folder.close()
            self.parent = None

    def within(self, start: int, end: int) -> Iterator[Extent]:
        """The extents of this directory, cut to a range."""
        index = max(0, bisect_right(self._starts, start) - 1)
        for position in range(index, len(self.extents)):
            extent = self.extents[position]
            if extent.start >= end:
                return
            if start <= extent.start and extent.end <= end:
                yield extent
            elif extent.end > start:
                yield extent.part(max(start, extent.start), min(end, extent.end))

    def fill(self, data: bytearray | memoryview, address: int) -> None:
        """Copies what the image holds of a range of memory over its bytes. data, address: whole pages.

        Raises:
            DynacutError: a file cannot be read.
        """
        place = memoryview(data)
        for extent in self.within(address, address + len(data)):
            self._fill_extent(place[extent.start - address : extent.end - address], extent)

    def _fill_extent(self, place: memoryview, extent: Extent) -> None:
        if not extent.in_parent:
            self._read(place, extent.offset)
        elif self.parent is not None:
            self.parent.fill(place, extent.start)

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
            DynacutError: the pages file has become shorter. OSError: the output cannot be written.
        """
        if extent.in_parent:
            assert self.parent is not None
            for part in self.parent.within(extent.start, extent.end):
                self.parent.copy_to(output, part)
            return
        assert self._file is not None
        size = extent.end - extent.start
        if copy_range(self._file, output, extent.offset, size) < size:
            raise self.folder.broken(self.pages_name, "it is cut off")

    def with_extents(self, extents: list[Extent], pages_id: int) -> bytes:
        """The pagemap file of that pages file with other extents; entries that stay as they are keep their bytes.

        What mappings or written pages have cut an entry into is joined again where it still belongs together.
        """
        head = PagemapHead()
        head.CopyFrom(self.head)
        head.pages_id = pages_id
        parts = [packed(PAGEMAP_MAGIC, [head])]
        first = stop = 0  # a run of entries that stay as they are, by their positions: as a rule nearly all of them
        last: Extent | None = None
        for extent in extents:
            position = self._positions.get(extent.start, -1)
            if position >= 0 and self.extents[position] is extent:
                if last is not None:
                    parts.append(self._entry(last))
                    last = None
                if position != stop:
                    parts.append(self._entries(first, stop))
                    first = position
                stop = position + 1
                continue
            parts.append(self._entries(first, stop))
            first = stop = 0
            if last is not None and position < 0 and _belong_together(last, extent):
                last = last._replace(end=extent.end)
                continue
            if last is not None:
                parts.append(self._entry(last))
            last = extent
        parts.append(self._entry(last) if last is not None else self._entries(first, stop))
        return b"".join(parts)

    def _entry(self, extent: Extent) -> bytes:
        """The entry for an extent with its length, as it is in the file if it is there."""
        position = self._positions.get(extent.start, -1)
        if position >= 0 and self.extents[position][:2] == extent[:2] and self.extents[position].flags == extent.flags:
            return self._entries(position, position + 1)
        return framed(extent.message())

    def _entries(self, first: int, stop: int) -> bytes:
        """Some entries with their lengths as they are in the file; the head is not counted."""
        return self._data[self._places[first + 1] : self._places[stop + 1]]

    @cached_property
    def _positions(self) -> dict[int, int]:
        """Which entry begins at an address, by that address."""
        return {start: position for position, start in enumerate(self._starts)}


def _belong_together(one: Extent, after: Extent) -> bool:
    """Whether one entry can describe both."""
    if one.end != after.start or one.flags != after.flags:
        return False
    return (one.in_parent and after.in_parent) or one.offset + one.end - one.start == after.offset


def pages_name(pages_id: int) -> str:
    """The name of a pages file."""
    return f"pages-{pages_id}.img"


def pages_ids(folder: ImageFolder, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The numbers of the pages files that pagemaps of a directory belong to, by the pagemap's name.

    Raises:
        DynacutError: one of them is malformed.
    """
    for name in names:
        yield name, int(_head(folder, name, folder.messages(name, PAGEMAP_MAGIC, _MAX_EXTENTS)).pages_id)


def _head(folder: ImageFolder, name: str, messages: Iterator[bytes]) -> Message:
    head = next(messages, None)
    if head is None:
        raise folder.broken(name, "it is empty")
    return folder.decode(name, PagemapHead, head)
