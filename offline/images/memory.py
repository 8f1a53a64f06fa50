"""The memory of one process in an image: its VMAs, its pages, and what has been written over them here."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE
from pathlib import Path

from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.pages import Extent, Pages
from dynacut.offline.images.schema import Message, VmaEntry
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE, Mapping

# Status bits of a VMA, CRIU's criu/include/image.h.
_REGULAR, _STACK, _VSYSCALL, _VDSO, _HEAP = 0x1, 0x2, 0x4, 0x8, 0x20
_FILE_PRIVATE, _FILE_SHARED, _ANON_SHARED, _ANON_PRIVATE = 0x40, 0x80, 0x100, 0x200
_SHADOW_STACK, _VVAR = 0x8000, 0x1000
_NAMES = {_STACK: "[stack]", _VSYSCALL: "[vsyscall]", _VDSO: "[vdso]", _HEAP: "[heap]", _VVAR: "[vvar]"}
_ADDRESS_LIMIT = 1 << 47
_MAX_READ = 1 << 29  # many times the text of a browser, or the largest table
_MAX_FILE_OFFSET = 1 << 62
_VSYSCALL_PAGE = 0xFFFFFFFFFF600000


@dataclass(frozen=True)
class ImageFile:
    """A regular file that is mapped: the path as the process sees it, size in bytes, build-id padded to words."""

    path: str
    size: int
    build_id: bytes
    shared_memory: int | None = None
    """Of a memfd, which anonymous shared memory is dumped as: the id of its pages."""


@dataclass(frozen=True)
class Vma:
    """One VMA with its message in the image."""

    mapping: Mapping
    message: Message
    file: ImageFile | None

    @property
    def is_file_private(self) -> bool:
        """Whether pages that are not in the image are those of the file."""
        return bool(self.message.status & _FILE_PRIVATE)

    @property
    def is_writable_here(self) -> bool:
        """Whether its pages belong to this process alone, and so can be changed in its image."""
        return bool(self.message.status & (_FILE_PRIVATE | _ANON_PRIVATE))

    @property
    def shared_memory(self) -> int | None:
        """The id of the anonymous shared memory that is mapped; None if it is not such a VMA."""
        if self.file is not None and self.file.shared_memory is not None:
            return self.file.shared_memory
        return int(self.message.shmid) if self.message.status & _ANON_SHARED else None

    def part(self, start: int, end: int) -> Vma:
        """The VMA cut to a range of pages within it."""
        message = type(self.message)()
        message.CopyFrom(self.message)
        message.start, message.end = start, end
        if self.file is not None or self.shared_memory is not None:
            message.pgoff = self.message.pgoff + start - self.mapping.start
        mapping = replace(self.mapping, start=start, end=end, file_offset=int(message.pgoff) if self.file else 0)
        return Vma(mapping, message, self.file)


def read_vma(message: Message, files: Callable[[int], ImageFile | None]) -> Vma:
    """A VMA from its message; files: the mapped file of an id.

    Raises:
        ValueError: its addresses or its file are not possible.
    """
    start, end, status = message.start, message.end, message.status
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise ValueError(f"the VMA {start:#x}-{end:#x} is no range of pages")
    if end > _ADDRESS_LIMIT and start != _VSYSCALL_PAGE:
        raise ValueError(f"the VMA {start:#x}-{end:#x} lies outside of user space")
    if message.pgoff % PAGE_SIZE or message.pgoff > _MAX_FILE_OFFSET:
        raise ValueError(f"the VMA {start:#x}-{end:#x} begins amid a page of its file, or behind any file's end")
    file = None
    if status & (_FILE_PRIVATE | _FILE_SHARED):
        file = files(message.shmid)
        if file is None:
            raise ValueError(
                f"the VMA {start:#x}-{end:#x} maps file {message.shmid}, which the image does not describe"
            )
    name = next((name for bit, name in _NAMES.items() if status & bit), "")
    mapping = Mapping(
        start=start,
        end=end,
        readable=bool(message.prot & PROT_READ),
        writable=bool(message.prot & PROT_WRITE),
        executable=bool(message.prot & PROT_EXEC),
        private=bool(message.flags & MAP_PRIVATE),
        file_offset=int(message.pgoff) if file else 0,
        path=file.path if file else name,
        inode=int(message.shmid) or 1 if file else 0,
    )
    return Vma(mapping, message, file)


class Memory:
    """VMAs, ascending, with their contents; reading and writing as the process would see it.

    What has been changed: written maps the address of a page to its new bytes; vmas_changed; unmapped, whether pages
    were taken away.
    """

    def __init__(self, label: str, vmas: Sequence[Vma], pages: Pages, folder: ImageFolder, root: str) -> None:
        """folder: where shared memory is looked for. root: the folder that the paths of mapped files begin in."""
        self.vmas = list(vmas)
        self.pages = pages
        self.written: dict[int, bytes] = {}
        self.vmas_changed = False
        self.unmapped = False
        self._label = label
        self._folder = folder
        self._root = root
        self._shared: dict[int, Pages] = {}
        self._files: dict[str, int] = {}
        self._index()

    def _index(self) -> None:
        self._starts = [vma.mapping.start for vma in self.vmas]

    def close(self) -> None:
        """Closes all files."""
        self.pages.close()
        for pages in self._shared.values():
            pages.close()
        for file in self._files.values():
            os.close(file)
        self._shared.clear()
        self._files.clear()

    @property
    def has_shadow_stack(self) -> bool:
        """Whether a VMA is a shadow stack."""
        return any(vma.message.status & _SHADOW_STACK for vma in self.vmas)

    def vma_at(self, address: int) -> Vma | None:
        """The VMA that contains an address."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        vma = self.vmas[index]
        return vma if address < vma.mapping.end else None

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes.

        Raises:
            DynacutError: they are not all mapped, or the mapped file is not there any more.
        """
        if size <= 0:
            return b""
        if size > _MAX_READ:
            raise DynacutError(f"{size} bytes at {address:#x} of {self._label} are more than is read at once")
        first, end = address & -PAGE_SIZE, -(-(address + size) // PAGE_SIZE) * PAGE_SIZE
        data = bytearray()
        while first < end:
            vma = self.vma_at(first)
            if vma is None:
                raise DynacutError(
                    f"{size} bytes at {address:#x} of {self._label} cannot be read",
                    "check the address against the modules that `dynacut offline IMAGE` shows",
                )
            stop = min(end, vma.mapping.end)
            data += self._contents(vma, first, stop)
            first = stop
        offset = address % PAGE_SIZE
        return bytes(memoryview(data)[offset : offset + size])

    def _contents(self, vma: Vma, start: int, end: int) -> bytearray:
        size = end - start
        shared = vma.shared_memory
        is_of_file = vma.file is not None and shared is None
        data = self._file_bytes(vma, start, size) if is_of_file else bytearray(size)
        if shared is not None:
            self._shared_pages(shared).fill(data, start - vma.mapping.start + int(vma.message.pgoff))
            return data
        self.pages.fill(data, start)
        if self.written:
            for page in range(start, end, PAGE_SIZE):
                if (written := self.written.get(page)) is not None:
                    data[page - start : page - start + PAGE_SIZE] = written
        return data

    def _file_bytes(self, vma: Vma, start: int, size: int) -> bytearray:
        assert vma.file is not None
        path = self._root + vma.file.path
        if path not in self._files:
            self._files[path] = open_mapped(path, vma.file)
        data = bytearray(size)
        os.preadv(self._files[path], [data], vma.mapping.file_offset + start - vma.mapping.start)
        return data

    def _shared_pages(self, identity: int) -> Pages:
        if identity not in self._shared:
            self._shared[identity] = Pages(self._folder, f"shmem-{identity}")
        return self._shared[identity]

    def write(self, address: int, data: bytes) -> None:
        """Changes bytes, whatever the protection there.

        Raises:
            DynacutError: they are not all in private memory.
        """
        position = 0
        while position < len(data):
            page = (address + position) & -PAGE_SIZE
            vma = self.vma_at(page)
            if vma is None or not vma.is_writable_here:
                raise DynacutError(
                    f"{len(data)} bytes at {address:#x} of {self._label} cannot be written: "
                    + ("nothing is mapped there" if vma is None else "that memory is shared")
                )
            begin = address + position - page
            part = data[position : position + PAGE_SIZE - begin]
            before = self.written.get(page)
            contents = bytearray(before) if before is not None else self._contents(vma, page, page + PAGE_SIZE)
            contents[begin : begin + len(part)] = part
            self.written[page] = bytes(contents)
            position += len(part)

    def map_anonymous(self, start: int, size: int, protection: int) -> None:
        """Adds a private anonymous VMA of zeros. start, size: whole pages.

        Raises:
            DynacutError: something is mapped there already.
        """
        end = start + size
        if any(vma.mapping.start < end and start < vma.mapping.end for vma in self.vmas):
            raise DynacutError(
                f"{start:#x}-{end:#x} of {self._label} is not free",
                "choose another address; `dynacut offline` shows all",
            )
        message = VmaEntry(
            start=start,
            end=end,
            pgoff=0,
            shmid=0,
            prot=protection,
            flags=MAP_PRIVATE | MAP_ANONYMOUS,
            status=_REGULAR | _ANON_PRIVATE,
            fd=-1,
        )
        self.vmas.insert(bisect_right(self._starts, start), read_vma(message, lambda _: None))
        self.vmas_changed = True
        self._index()

    def map_file(self, start: int, end: int, as_in: Mapping) -> None:
        """Adds a private VMA of a mapped file. as_in: a mapping of that file whose distance to it is the same.

        Raises:
            DynacutError: the file is not mapped anywhere else, or something is mapped there already.
        """
        other = next((vma for vma in self.vmas if vma.is_file_private and vma.mapping.path == as_in.path), None)
        if other is None or any(vma.mapping.start < end and start < vma.mapping.end for vma in self.vmas):
            raise DynacutError(f"{as_in.path} cannot be mapped at {start:#x} of {self._label}")
        message = VmaEntry()
        message.CopyFrom(other.message)
        message.start, message.end = start, end
        message.pgoff = as_in.file_offset + start - as_in.start
        message.prot = PROT_READ | PROT_EXEC
        message.status = _REGULAR | _FILE_PRIVATE
        self.vmas.insert(bisect_right(self._starts, start), read_vma(message, lambda _: other.file))
        self.vmas_changed = True
        self._index()

    def unmap(self, start: int, end: int) -> None:
        """Takes whole pages away, splitting VMAs; nothing need be mapped there."""
        kept: list[Vma] = []
        for vma in self.vmas:
            first, last = vma.mapping.start, vma.mapping.end
            if last <= start or end <= first:
                kept.append(vma)
                continue
            if first < start:
                kept.append(vma.part(first, start))
            if end < last:
                kept.append(vma.part(end, last))
        self.vmas = kept
        self.vmas_changed = self.unmapped = True
        self._index()
        for page in [page for page in self.written if start <= page < end]:
            del self.written[page]

    def extents(self) -> Iterator[Extent]:
        """The pages of the image that are still mapped, as its own directory holds them, ascending."""
        if not self.unmapped:  # each of them lies in a VMA, or the image would have been refused
            yield from self.pages.extents
            return
        for vma in self.vmas:
            yield from self.pages.within(vma.mapping.start, vma.mapping.end)


def open_mapped(path: str, file: ImageFile) -> int:
    """Opens the file that a VMA maps, the one that was there when the image was made; the caller closes it.

    Raises:
        DynacutError: it is not there, no regular file, or of another size.
    """
    advice = "restore it, or give the folder that has the files of the image's machine by --root"
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a device may already do something
            raise DynacutError(f"{path}, which the image maps, is not a regular file", advice)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DynacutError(f"{path}, which the image maps, cannot be read: {reason}", advice) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
        os.close(descriptor)
        raise DynacutError(
            f"{path} is not the file that the image maps: {status.st_size} bytes instead of {file.size}", advice
        )
    return descriptor
