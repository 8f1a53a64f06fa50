"""One process of an image as a Target, to be looked at and changed in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynacut.handlers.table import KernelAction
from dynacut.offline.images.files import ImageFolder, packed
from dynacut.offline.images.memory import ImageFile, Memory, open_mapped, read_vma
from dynacut.offline.images.pages import Pages
from dynacut.offline.images.schema import Message, MmEntry
from dynacut.offline.images.tree import CORE_MAGIC, read_core
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.modules import called_name, modules_of
from dynacut.shared.target import PAGE_SIZE, SIGTRAP_BIT, Mapping, Module

MM_MAGIC = 0x57492820
_X86_64 = 1
_MAX_ARGUMENTS = 1 << 16
_MAX_FILE_NAME = 255  # NAME_MAX, linux/limits.h
_MAX_PRIVATE_PAGES = 1 << 20
# The image has the actions of signals 1 to 64 but SIGKILL's and SIGSTOP's, which nobody can set.
_SIGNALS = tuple(number for number in range(1, 65) if number not in (9, 19))
_PLACE_OF = {number: place for place, number in enumerate(_SIGNALS)}


@dataclass(eq=False)
class Thread:
    """One thread: its core message, the first of a process's also has what all threads share."""

    tid: int
    core: Message
    changed: bool = False

    @property
    def file_name(self) -> str:
        """The image file it is in."""
        return f"core-{self.tid}.img"

    @property
    def started(self) -> int:
        """Not known: an image does not keep it, and the restored thread has another one."""
        return 0

    @property
    def rip(self) -> int:
        """The address of the next instruction."""
        return int(self.core.thread_info.gpregs.ip)

    @property
    def rsp(self) -> int:
        """The stack pointer."""
        return int(self.core.thread_info.gpregs.sp)

    @property
    def blocked(self) -> int:
        """The signals it blocks; bit N-1 for signal N."""
        return int(self.core.thread_core.blk_sigset)

    @blocked.setter
    def blocked(self, mask: int) -> None:
        self.core.thread_core.blk_sigset = mask
        if self.core.HasField("tc"):
            self.core.tc.blk_sigset = mask
        self.changed = True


class ImageProcess:
    """A process in an image. Changes stay in memory; see layer.py for writing them."""

    def __init__(
        self, folder: ImageFolder, pid: int, tids: Sequence[int], files: Callable[[int], ImageFile | None], root: str
    ) -> None:
        """Reads everything but the pages themselves.

        tids: the threads, the one with the process's id first. files: the mapped file of an id. root: see
        Memory.

        Raises:
            DynacutError: an image file is missing, malformed, or of another architecture.
        """
        self.pid = pid
        self._folder = folder
        self._checked_files: set[str] = set()
        self._root = root
        self.threads = [Thread(tid, self._core(tid)) for tid in tids]
        shared = self.threads[0].core
        if not shared.HasField("tc"):
            raise folder.broken(f"core-{pid}.img", "it lacks the task's part")
        if len(shared.tc.sigactions) != len(_SIGNALS):
            raise folder.broken(f"core-{pid}.img", f"{len(shared.tc.sigactions)} signal actions, not {len(_SIGNALS)}")
        self.name = os.fsdecode(shared.tc.comm)
        self._mm = folder.parse_one(self.mm_name, MM_MAGIC, MmEntry)
        self.memory = self._read_memory(files)
        try:
            executable = files(int(self._mm.exe_file_id))
            self._exe = executable.path if executable else ""
            self._modules = self._find_modules()
            self._check_pages()
        except BaseException:
            self.close()
            raise

    def _core(self, tid: int) -> Message:
        name = f"core-{tid}.img"
        core = read_core(self._folder, tid)
        if core.mtype != _X86_64 or not core.HasField("thread_info"):
            raise self._folder.broken(name, "not of an x86-64 thread")
        return core

    def _read_memory(self, files: Callable[[int], ImageFile | None]) -> Memory:
        vmas = []
        last = 0
        for message in self._mm.vmas:
            try:
                vma = read_vma(message, files)
            except ValueError as error:
                raise self._folder.broken(self.mm_name, str(error)) from None
            if vma.mapping.start < last:
                raise self._folder.broken(self.mm_name, f"VMAs overlap or do not ascend at {vma.mapping.start:#x}")
            last = vma.mapping.end
            vmas.append(vma)
        return Memory(self.label, vmas, Pages(self._folder, str(self.pid)), self._folder, self._root)

    def _check_pages(self) -> None:
        """Every page lies in a VMA; CRIU would fail half-way through otherwise."""
        ranges = [(vma.mapping.start, vma.mapping.end) for vma in self.memory.vmas]
        position, (first, last) = 0, ranges[0] if ranges else (0, 0)
        for extent in self.memory.pages.extents:
            start, end = extent.start, extent.end
            while not (first <= start and end <= last):
                if first <= start < last:
                    start = last  # it goes on in the next one
                position += 1
                if position >= len(ranges) or start < first:
                    raise self._folder.broken(self.memory.pages.name, f"the page at {start:#x} lies in no VMA")
                first, last = ranges[position]

    @property
    def mm_name(self) -> str:
        """The image file with the VMAs."""
        return f"mm-{self.pid}.img"

    def close(self) -> None:
        """Closes all files."""
        self.memory.close()

    def _find_modules(self) -> tuple[Module, ...]:
        names = (called_name(self.arguments), self.name)
        aliases = [name for name in names if 0 < len(os.fsencode(name)) <= _MAX_FILE_NAME]
        root = self._root or "/"
        return modules_of(self.mappings, self._exe, aliases, Path(root), lambda _, path: Path(self._root + path))

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command line; empty where the image does not have it."""
        start, end = int(self._mm.mm_arg_start), int(self._mm.mm_arg_end)
        try:
            data = self.memory.read(start, min(end - start, _MAX_ARGUMENTS))
        except DynacutError:
            return ()
        return tuple(os.fsdecode(argument) for argument in data.split(b"\0")[:-1])

    @property
    def started(self) -> int:
        """Not known, as of its threads."""
        return 0

    @property
    def label(self) -> str:
        """How to call the process in messages."""
        return f"process {self.pid} ({self.name}) of the image"

    @property
    def exe(self) -> str:
        """The path of the executable, as the process sees it."""
        return self._exe

    @property
    def modules(self) -> Sequence[Module]:
        """Every file mapped with code, the executable first."""
        return self._modules

    @property
    def mappings(self) -> Sequence[Mapping]:
        """Every VMA, ascending by address."""
        return [vma.mapping for vma in self.memory.vmas]

    @property
    def has_shadow_stack(self) -> bool:
        """Whether a thread uses a shadow stack."""
        return self.memory.has_shadow_stack

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """The addresses of the pages of a mapping that the image holds, or that were written to here.

        Raises:
            DynacutError: they are more than code can have.
        """
        extents = list(self.memory.pages.within(mapping.start, mapping.end))
        if sum(extent.end - extent.start for extent in extents) > _MAX_PRIVATE_PAGES * PAGE_SIZE:
            raise self._folder.broken(self.memory.pages.name, f"too many pages of the file at {mapping.start:#x}")
        pages = {page for extent in extents for page in range(extent.start, extent.end, PAGE_SIZE)}
        pages |= {page for page in self.memory.written if mapping.start <= page < mapping.end}
        return sorted(pages)

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes; DynacutError if they are not all mapped."""
        return self.memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Changes bytes; DynacutError if they are not all in private memory."""
        self.memory.write(address, data)

    def map_anonymous(self, parts: Sequence[NewMemory]) -> None:
        """Maps memory, zeros in it for now; DynacutError if a place is not free."""
        for part in parts:
            self.memory.map_anonymous(part.address, part.size, part.protection)

    def map_file(self, pages: PageRange) -> None:
        """Maps unmapped pages of a file back."""
        self.memory.map_file(pages.start, pages.end, pages.mapping)

    def unmap(self, pages: PageRange) -> None:
        """Unmaps pages."""
        self.memory.unmap(pages.start, pages.end)

    def action(self, signal: int) -> KernelAction:
        """What is done upon a signal, SIGKILL and SIGSTOP apart."""
        entry = self._action_message(signal)
        return KernelAction(int(entry.sigaction), int(entry.flags), int(entry.restorer), int(entry.mask))

    def set_actions(self, actions: dict[int, KernelAction]) -> None:
        """Changes what is done upon signals."""
        for signal, action in actions.items():
            entry = self._action_message(signal)
            entry.sigaction, entry.flags, entry.restorer, entry.mask = (
                action.handler,
                action.flags,
                action.restorer,
                action.mask,
            )
        self.threads[0].changed = True

    def blocked_signals(self) -> dict[int, int]:
        """The mask of each thread, by its id."""
        return {thread.tid: thread.blocked for thread in self.threads}

    def block_sigtrap(self, tids: Collection[int], *, block: bool) -> None:
        """Makes threads block SIGTRAP, or accept it."""
        for thread in self.threads:
            if thread.tid in tids:
                thread.blocked = thread.blocked | SIGTRAP_BIT if block else thread.blocked & ~SIGTRAP_BIT

    def _action_message(self, signal: int) -> Message:
        place = _PLACE_OF.get(signal)
        if place is None:
            raise DynacutError(f"{self.label} has no action for signal {signal}")
        return self.threads[0].core.tc.sigactions[place]

    def caught_signals(self) -> list[int]:
        """The signals that the process handles itself."""
        actions = self.threads[0].core.tc.sigactions
        return [number for number, action in zip(_SIGNALS, actions, strict=True) if action.sigaction > 1]

    def check_file(self, address: int) -> None:
        """Verifies that the file mapped at an address is the one that was mapped when the image was made.

        Raises:
            DynacutError: its build-id is another one.
        """
        vma = self.memory.vma_at(address)
        if vma is None or vma.file is None:
            return
        path = self._root + vma.file.path
        if path in self._checked_files:
            return
        os.close(open_mapped(path, vma.file))
        # The sites were verified against the module's file as it was read then: that must be of this build-id.
        module = next((module for module in self._modules if module.file == Path(path)), None)
        build_id = (module.elf if module else ElfFile.open(Path(path))).build_id or ""
        recorded = vma.file.build_id.hex()
        # CRIU pads it to words of four bytes.
        if recorded and recorded.removesuffix("00" * 3)[: len(build_id)] != build_id[: len(recorded)]:
            raise DynacutError(
                f"{path} has build-id {build_id or 'none'}, the image was made with {recorded}",
                "restore the program's version, or give the folder that has it by --root",
            )
        self._checked_files.add(path)

    @property
    def changed(self) -> bool:
        """Whether anything differs from the image."""
        return bool(self.memory.written) or self.memory.vmas_changed or any(thread.changed for thread in self.threads)

    def changed_files(self) -> dict[str, bytes]:
        """The image files that differ, pages and pagemap apart: name and contents."""
        files = {thread.file_name: packed(CORE_MAGIC, [thread.core]) for thread in self.threads if thread.changed}
        if self.memory.vmas_changed:
            del self._mm.vmas[:]
            self._mm.vmas.extend(vma.message for vma in self.memory.vmas)
            files[self.mm_name] = packed(MM_MAGIC, [self._mm])
        return files
