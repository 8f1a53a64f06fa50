"""Builds CRIU images in code: small, but complete as far as dynacut reads them, for tests and for the fuzzer.

The process maps a program and a library built from C, as a kernel would, with heap, stack, anonymous and shared memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from test_sites import BASE, LIBRARY_BASE, built

from dynacut.handlers.table import KernelAction
from dynacut.offline.images.files import packed
from dynacut.offline.images.image import Image
from dynacut.offline.images.memory import Memory
from dynacut.offline.images.pages import PAGEMAP_MAGIC, PARENT, PRESENT
from dynacut.offline.images.process import MM_MAGIC, ImageProcess
from dynacut.offline.images.schema import (
    CoreEntry,
    FileEntry,
    Message,
    MmEntry,
    PagemapEntry,
    PagemapHead,
    PstreeEntry,
    VmaEntry,
)
from dynacut.offline.images.tree import CORE_MAGIC
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.target import PAGE_SIZE

PSTREE_MAGIC, FILES_MAGIC, INVENTORY_MAGIC = 0x50273030, 0x56303138, 0x58313116
ROOT_PID, CHILD_PID, ZOMBIE_PID = 4711, 4720, 4730
HEAP, ANONYMOUS, SHARED, STACK = 0x5555_5557_0000, 0x7FFF_F000_0000, 0x7FFF_F100_0000, 0x7FFF_FFF0_0000
VDSO, VSYSCALL = 0x7FFF_F7FC_0000, 0xFFFF_FFFF_FF60_0000
HEAP_PAGES, ANONYMOUS_PAGES, SHARED_PAGES, STACK_PAGES = 4, 16, 4, 8
SHARED_ID = 77
BLOCKING_TID = ROOT_PID + 1
"""A thread that blocks every signal."""
SIGNALS = tuple(number for number in range(1, 65) if number not in (9, 19))
UNKNOWN = b"\xa2\x1f\x04kept"
"""A field that no schema has: number 500, four bytes."""
ARGUMENTS = b"server\0--port\x000\0"

_REGULAR, _FILE_PRIVATE, _ANON_SHARED, _ANON_PRIVATE = 0x1, 0x40, 0x100, 0x200
_STACK, _VSYSCALL, _VDSO, _HEAP = 0x2, 0x4, 0x8, 0x20
_PRIVATE, _MAP_SHARED, _MAP_ANONYMOUS = 0x2, 0x1, 0x20
_READ, _WRITE, _EXECUTE = 1, 2, 4
_ALIVE, _DEAD = 1, 2


def page_of(*seed: object) -> bytes:
    """A page of bytes that are not found elsewhere."""
    return random.Random(repr(seed)).randbytes(PAGE_SIZE)


def vma(start: int, pages: int, protection: int, flags: int, status: int, *, shmid: int = 0, pgoff: int = 0) -> Message:
    """The message of a VMA."""
    return VmaEntry(
        start=start,
        end=start + pages * PAGE_SIZE,
        pgoff=pgoff,
        shmid=shmid,
        prot=protection,
        flags=flags,
        status=_REGULAR | status,
        fd=-1,
    )


@dataclass
class BuiltProcess:
    """What is written of one process. pages: what its pages file holds; inherited: pages that are the parent's."""

    pid: int
    parent_pid: int
    tids: list[int]
    pages_id: int
    name: bytes = b"server"
    vmas: list[Message] = field(default_factory=list)
    pages: dict[int, bytes] = field(default_factory=dict)
    inherited: set[int] = field(default_factory=set)
    actions: dict[int, KernelAction] = field(default_factory=dict)
    blocked: dict[int, int] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """The image files of this process alone."""
        files = {f"core-{tid}.img": packed(CORE_MAGIC, [self._core(tid)]) for tid in self.tids}
        start = STACK + STACK_PAGES * PAGE_SIZE - len(ARGUMENTS)
        memory = MmEntry(mm_arg_start=start, mm_arg_end=start + len(ARGUMENTS), exe_file_id=1, vmas=self.vmas)
        files[f"mm-{self.pid}.img"] = packed(MM_MAGIC, [_with_unknown(memory)])
        files[f"ids-{self.pid}.img"] = b"ids"
        return files | paged(str(self.pid), self.pages_id, self.pages, self.inherited)

    def _core(self, tid: int) -> Message:
        blocked = self.blocked.get(tid, 0)
        core = CoreEntry(
            mtype=1,
            thread_info={"gpregs": {"ip": BASE, "sp": STACK + (STACK_PAGES - 1) * PAGE_SIZE}},
            thread_core={"blk_sigset": blocked, "comm": self.name},
        )
        if tid == self.pid:
            core.tc.task_state = _ALIVE
            core.tc.blk_sigset = blocked
            core.tc.comm = self.name
            for number in SIGNALS:
                action = self.actions.get(number, KernelAction())
                entry = core.tc.sigactions.add()
                entry.sigaction, entry.flags = action.handler, action.flags
                entry.restorer, entry.mask = action.restorer, action.mask
        return _with_unknown(core)


@dataclass
class BuiltImage:
    """What is written to one image directory. shared: the pages of each shared memory segment, by offset."""

    processes: list[BuiltProcess]
    mapped: dict[int, Path]
    shared: dict[int, dict[int, bytes]]
    zombies: list[int] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """All image files: name and contents."""
        tree = [
            PstreeEntry(pid=each.pid, ppid=each.parent_pid, pgid=each.pid, sid=ROOT_PID, threads=each.tids)
            for each in self.processes
        ]
        # CRIU writes what lay in its memory as the thread of a zombie.
        tree += [
            PstreeEntry(pid=pid, ppid=ROOT_PID, pgid=pid, sid=ROOT_PID, threads=[random.Random(pid).getrandbits(32)])
            for pid in self.zombies
        ]
        files = {
            "inventory.img": INVENTORY_MAGIC.to_bytes(4, "little") + b"\2\0\0\0\x08\2",
            "pstree.img": packed(PSTREE_MAGIC, [_with_unknown(entry) for entry in tree]),
            "files.img": packed(FILES_MAGIC, [_file(identity, path) for identity, path in self.mapped.items()]),
        }
        for process in self.processes:
            files |= process.files()
        for pid in self.zombies:
            ended = CoreEntry(mtype=0, tc={"task_state": _DEAD, "blk_sigset": 0, "comm": b"child"})
            files[f"core-{pid}.img"] = packed(CORE_MAGIC, [_with_unknown(ended)])
        for index, (identity, pages) in enumerate(self.shared.items()):
            files |= paged(f"shmem-{identity}", 1000 + index, pages, set())
        return files

    def write(self, directory: Path, parent: Path | str | None = None) -> Path:
        """Writes the image; parent: where its `parent` leads."""
        directory.mkdir(parents=True)
        for name, data in self.files().items():
            (directory / name).write_bytes(data)
        (directory / "dump.log").write_text("not an image\n")
        if parent is not None:
            (directory / "parent").symlink_to(parent)
        return directory


def paged(name: str, pages_id: int, pages: dict[int, bytes], inherited: Iterable[int]) -> dict[str, bytes]:
    """A pagemap with its pages file."""
    entries: list[Message] = [PagemapHead(pages_id=pages_id)]
    marks = dict.fromkeys(pages, PRESENT) | dict.fromkeys(inherited, PARENT)
    for page, flags in sorted(marks.items()):
        last = entries[-1]
        if len(entries) > 1 and last.flags == flags and last.vaddr + last.nr_pages * PAGE_SIZE == page:
            last.nr_pages += 1
            last.compat_nr_pages += 1
        else:
            entries.append(PagemapEntry(vaddr=page, compat_nr_pages=1, flags=flags, nr_pages=1))
    held = b"".join(pages[page] for page in sorted(pages) if marks[page] == PRESENT)
    return {f"pagemap-{name}.img": packed(PAGEMAP_MAGIC, entries), f"pages-{pages_id}.img": held}


def _with_unknown(message: Message) -> Message:
    message.MergeFromString(UNKNOWN)
    return message


def _file(identity: int, path: Path) -> Message:
    build_id = bytes.fromhex(ElfFile.open(path).build_id or "")
    words = [int.from_bytes(build_id[at : at + 4], "little") for at in range(0, len(build_id), 4)]
    reg = {"id": identity, "name": str(path).encode(), "size": path.stat().st_size, "build_id": words}
    return FileEntry(type=1, id=identity, reg=reg)


@cache
def _segments(path: Path, base: int, identity: int) -> tuple[list[Message], dict[int, bytes]]:
    """The VMAs of a program, and the pages that a dump of it has: the first of code, and those of its data."""
    elf = ElfFile.open(path)
    vmas, pages = [], {}
    for segment in elf.segments:
        start = segment.offset & -PAGE_SIZE
        count = -(-(segment.offset + segment.memory_size - start) // PAGE_SIZE)
        offset = segment.file_offset & -PAGE_SIZE
        protection = _READ | _WRITE * segment.writable | _EXECUTE * segment.executable
        vmas.append(vma(base + start, count, protection, _PRIVATE, _FILE_PRIVATE, shmid=identity, pgoff=offset))
        if segment.writable or segment.executable:
            pages[base + start] = bytes(elf.data[offset : offset + PAGE_SIZE]).ljust(PAGE_SIZE, b"\0")
    return vmas, pages


def build_process(pid: int = ROOT_PID, parent_pid: int = 0, threads: int = 3, *, pages_id: int = 1) -> BuiltProcess:
    """A process with all kinds of memory. Of the anonymous area, every second pair of pages is in the image."""
    server, library = built()
    tids = list(range(pid, pid + threads))
    process = BuiltProcess(pid, parent_pid, tids, pages_id)
    for path, base, identity in ((server, BASE, 1), (library, LIBRARY_BASE, 2)):
        vmas, pages = _segments(path, base, identity)
        process.vmas += vmas
        process.pages |= pages
    anonymous, writable = _PRIVATE | _MAP_ANONYMOUS, _READ | _WRITE
    shared = _MAP_SHARED | _MAP_ANONYMOUS
    process.vmas += [
        vma(HEAP, HEAP_PAGES, writable, anonymous, _ANON_PRIVATE | _HEAP),
        vma(ANONYMOUS, ANONYMOUS_PAGES, writable, anonymous, _ANON_PRIVATE),
        vma(SHARED, SHARED_PAGES - 1, writable, shared, _ANON_SHARED, shmid=SHARED_ID, pgoff=PAGE_SIZE),
        vma(VDSO, 2, _READ | _EXECUTE, anonymous, _ANON_PRIVATE | _VDSO),
        vma(STACK, STACK_PAGES, writable, anonymous | 0x100, _ANON_PRIVATE | _STACK),
        vma(VSYSCALL, 1, _EXECUTE, anonymous, _ANON_PRIVATE | _VSYSCALL),
    ]
    process.vmas.sort(key=lambda message: int(message.start))
    areas: list[tuple[int, Iterable[int]]]
    areas = [(HEAP, range(2)), (VDSO, range(2)), (STACK, range(STACK_PAGES - 2, STACK_PAGES))]
    areas.append((ANONYMOUS, (index for index in range(ANONYMOUS_PAGES) if index % 4 < 2)))
    for start, indices in areas:
        process.pages |= {start + index * PAGE_SIZE: page_of(pid, start, index) for index in indices}
    top = STACK + (STACK_PAGES - 1) * PAGE_SIZE
    process.pages[top] = process.pages[top][: -len(ARGUMENTS)] + ARGUMENTS
    process.blocked[pid + 1] = (1 << 64) - 1
    process.actions[15] = KernelAction(BASE + 0x1100, 0x4000000, BASE + 0x1200, 0xFFFF)
    return process


def build_image() -> BuiltImage:
    """A root with threads, a child with memory of its own, a zombie, and shared memory."""
    server, library = built()
    processes = [build_process(), build_process(CHILD_PID, ROOT_PID, 2, pages_id=2)]
    shared = {SHARED_ID: {index * PAGE_SIZE: page_of("shared", index) for index in range(0, SHARED_PAGES, 2)}}
    return BuiltImage(processes, {1: server, 2: library}, shared, [ZOMBIE_PID])


def write_incremental(directory: Path, image: BuiltImage, *, levels: int = 2) -> Path:
    """Writes an image as the last of several dumps: every third page is in it, the others are in older ones.

    The older dumps lie beside it. They also hold other, outdated contents of the pages that a newer one has.
    """
    for level in reversed(range(levels + 1)):
        part = deepcopy(image)
        for process in part.processes:
            own = [page for index, page in enumerate(sorted(process.pages)) if index % 3 <= level or level == levels]
            newer = {page for index, page in enumerate(sorted(process.pages)) if index % 3 < level}
            process.inherited = set(process.pages) - set(own)
            process.pages = {page: page_of(level, page) if page in newer else process.pages[page] for page in own}
        name = directory.name if level == 0 else f"{directory.name}-{level}"
        parent = f"../{directory.name}-{level + 1}" if level < levels else None
        part.write(directory.parent / name, parent)
    return directory


def memory_of(process: ImageProcess) -> dict[tuple[int, int], bytes]:
    """The contents of every VMA."""
    return {(part.start, part.end): process.read(part.start, part.size) for part in process.mappings}


def messages_of(memory: Memory) -> list[bytes]:
    """Every VMA's message."""
    return [each.message.SerializeToString(deterministic=True) for each in memory.vmas]


State = tuple[dict[tuple[int, int], bytes], list[bytes], list[KernelAction], list[tuple[int, int]]]
"""Memory, VMAs, actions and masks of a process."""


def everything(image: Image) -> list[State]:
    """The state of every process."""
    return [
        (
            memory_of(process),
            messages_of(process.memory),
            [process.action(number) for number in SIGNALS],
            [(thread.tid, thread.blocked) for thread in process.threads],
        )
        for process in image.processes
    ]


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: inode, time of the last change of its contents, contents if they are not sparse."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            status = path.stat()
            data = path.read_bytes() if status.st_size <= 1 << 30 else b""
            found[str(path.relative_to(directory))] = (status.st_ino, status.st_mtime_ns, data)
    return found
