"""System calls made by a process itself: its threads are sent through stubs that make them (shots.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE

from dynacut.handlers.layout import ACTION
from dynacut.handlers.table import CODE_SIZE, INPUT_OFFSET, MAGIC, OBSERVED_OFFSET, OUTPUT_OFFSET, KernelAction, Layout
from dynacut.live.process import Process
from dynacut.live.ptrace.shots import Shots
from dynacut.live.ptrace.slack import find_slack
from dynacut.live.ptrace.stub import Stub
from dynacut.live.refusal import NeedsCheckpointError
from dynacut.live.syscalls import MAP_FIXED_NOREPLACE, MAP_NORESERVE, PR_SET_PDEATHSIG, SIGSET_SIZE, Syscall
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.region import Region, choose_address
from dynacut.shared.target import SIGTRAP

_MAX_PATH = 64 * 32  # of the table's scratch, the input of 64 signal actions
_ACTION_SIZE = ACTION.size
_ACTIONS_PER_SHOT = 16
_RANGES_PER_SHOT = 8


class Remote:
    """Makes threads of one process call the kernel, by shots at them."""

    def __init__(self, process: Process, shots: Shots) -> None:
        self._process = process
        self._shots = shots

    def map_region(self, layout: Layout, magic: bytes = MAGIC, taken: range = range(0)) -> Region:
        """Maps a new region, its table marked by the magic but without contents. taken: addresses it must leave free.

        Raises:
            DynacutError: the process does not get the memory, and has no part of it; or no thread can be stopped.
        """
        process = self._process
        region = choose_address(process, layout, taken)
        stub = Stub()
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
        code_protection = PROT_READ | PROT_EXEC
        stub.syscall(Syscall.MMAP, region.code, CODE_SIZE, code_protection, flags, -1, 0)
        stub.require(region.code)
        stub.syscall(Syscall.MMAP, region.table, layout.size, PROT_READ | PROT_WRITE, flags, -1, 0)
        stub.otherwise(region.table, Syscall.MUNMAP, region.code, CODE_SIZE)
        stub.require(region.table)
        if layout.shared:
            shared, size = region.table + layout.size, layout.total_size - layout.size
            flags = flags & ~MAP_PRIVATE | MAP_SHARED
            stub.syscall(Syscall.MMAP, shared, size, PROT_READ | PROT_WRITE, flags, -1, 0)
            stub.otherwise(shared, Syscall.MUNMAP, region.code, CODE_SIZE + layout.size)
            stub.require(shared)
        stub.store(region.table, int.from_bytes(magic, "little"))
        self._shots.shoot(stub, find_slack(process, stub.size))

        def mapped() -> bool:
            try:
                return process.read(region.table, len(MAGIC)) == magic
            except DynacutError:
                return False

        if not self._shots.wait(mapped):
            raise NeedsCheckpointError(
                f"{process.label} could not map {CODE_SIZE + layout.total_size} bytes for the handler",
                "look at its limits of memory (prlimit --as, cgroup)",
            )
        process.refresh()
        return region

    def map_memory(self, region: Region, parts: Sequence[NewMemory]) -> None:
        """Maps memory, such as a library's segments, and fills it.

        Raises:
            DynacutError: the process does not get the memory, or no thread can be stopped.
        """
        process = self._process
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        for first in range(0, len(parts), _RANGES_PER_SHOT):
            stub = Stub()
            for part in parts[first : first + _RANGES_PER_SHOT]:
                stub.syscall(Syscall.MMAP, part.address, part.size, part.protection, flags, -1, 0)
                stub.require(part.address)
            if not self._shots.run(stub, region):
                raise NeedsCheckpointError(
                    f"{process.label} could not map memory at {parts[0].address:#x}",
                    "look at its limits of memory (prlimit --as, cgroup)",
                )
        if parts:
            process.refresh()
        for part in parts:
            process.write(part.address, part.contents)

    def unmap(self, region: Region, ranges: Sequence[PageRange]) -> None:
        """Unmaps pages, in which no thread is nor will be any more.

        Raises:
            DynacutError: not all are gone; what stays mapped stays as it is.
        """
        for first in range(0, len(ranges), _RANGES_PER_SHOT):
            stub = Stub()
            for pages in ranges[first : first + _RANGES_PER_SHOT]:
                stub.syscall(Syscall.MUNMAP, pages.start, pages.size)
                stub.require(0)
            if not self._shots.run(stub, region):
                raise DynacutError(
                    f"{self._process.label} could not unmap all of {len(ranges)} runs of pages",
                    "all blocks are disabled nevertheless; the limit of mappings (vm.max_map_count) may be reached",
                    status=ExitStatus.CHECK_FAILED,
                )
        if ranges:
            self._process.refresh()

    def map_files(self, region: Region, ranges: Sequence[PageRange]) -> None:
        """Maps unmapped pages of files back, and verifies that they are those of the same file.

        Where another file has taken its name since, as after an upgrade, the pages are copies of what is still mapped.

        Raises:
            DynacutError: they cannot be had; what could be mapped is mapped, nothing of another file.
        """
        for pages in ranges:
            if not self._map_by_name(region, pages) and not self._map_copy(region, pages):
                raise DynacutError(
                    f"{self._process.label} could not map {pages.mapping.path} at {pages.start:#x} again",
                    "the file was replaced, or the process may not read it: only a restart brings the pages back",
                    status=ExitStatus.CHECK_FAILED,
                )

    def _map_by_name(self, region: Region, pages: PageRange) -> bool:
        """Maps unmapped pages from what has their file's name; whether it is that file. Else nothing is mapped."""
        process = self._process
        path = os.fsencode(pages.mapping.path) + b"\0"
        if path.endswith(b" (deleted)\0") or len(path) > _MAX_PATH:
            return False
        name = region.table + INPUT_OFFSET
        process.write(name, path)
        stub = Stub()
        size, flags = pages.size, MAP_PRIVATE | MAP_FIXED_NOREPLACE
        stub.map_opened(name, pages.start, size, PROT_READ | PROT_EXEC, flags, pages.file_offset)
        done = self._shots.run(stub, region)
        process.write(name, bytes(len(path)))
        process.refresh()
        new = next((part for part in process.mappings if part.start <= pages.start < part.end), None)
        if done and new is not None and new.inode == pages.mapping.inode:
            return True
        if done and new is not None:
            self.unmap(region, [pages])
        return False

    def _map_copy(self, region: Region, pages: PageRange) -> bool:
        """Maps a copy of unmapped pages, from their file as its other pages still hold it; whether it can be read."""
        modules = self._process.modules
        for module in modules:
            part = next((part for part in module.mappings if part.inode == pages.mapping.inode), None)
            if part is None or not module.base <= pages.start < module.end:
                continue
            try:
                data = ElfFile.open(module.file).data
            except DynacutError:
                return False
            contents = bytes(data[pages.file_offset : pages.file_offset + pages.size])
            protection = PROT_READ | PROT_EXEC
            self.map_memory(region, [NewMemory(pages.start, pages.size, protection, contents)])
            return True
        return False

    def keep_alive(self, region: Region | None) -> None:
        """Lets the process, of one thread, outlive its parent, whose end would have ended it. region: None if none is
        mapped yet.

        Raises:
            DynacutError: the thread cannot be stopped.
        """
        stub = Stub()
        stub.syscall(Syscall.PRCTL, PR_SET_PDEATHSIG, 0)
        if region is None:
            self._shots.shoot(stub, find_slack(self._process, stub.size))
        elif not self._shots.run(stub, region):
            raise DynacutError(f"{self._process.label} did not come to the end of a stub in time")

    def sigactions(self, region: Region, actions: Mapping[int, KernelAction | None]) -> dict[int, KernelAction]:
        """Sets the process's actions for signals, as rt_sigaction(2) does; None only reads.

        Returns the actions that were in force before.
        """
        process = self._process
        before: dict[int, KernelAction] = {}
        signals = list(actions)
        for first in range(0, len(signals), _ACTIONS_PER_SHOT):
            batch = signals[first : first + _ACTIONS_PER_SHOT]
            stub = Stub()
            for number in batch:
                action = actions[number]
                given = 0
                if action is not None:
                    given = region.table + INPUT_OFFSET + (number - 1) * _ACTION_SIZE
                    process.write(given, action.pack())
                stub.syscall(Syscall.RT_SIGACTION, number, given, _output(region, number, action), SIGSET_SIZE)
            if not self._shots.run(stub, region):
                raise DynacutError(
                    f"a thread of {process.label} was sent through a stub and did not come to its end in time",
                    "run `dynacut live` on it again to see what is in force",
                    status=ExitStatus.UNKNOWN,
                )
            for number in batch:
                place = _output(region, number, actions[number])
                before[number] = KernelAction.unpack(process.read(place, _ACTION_SIZE))
                # Scratch is cleared: what stays is the table that the offline backend writes as well.
                process.write(region.table + INPUT_OFFSET + (number - 1) * _ACTION_SIZE, bytes(_ACTION_SIZE))
                process.write(region.table + OUTPUT_OFFSET + (number - 1) * _ACTION_SIZE, bytes(_ACTION_SIZE))
        return before


def _output(region: Region, number: int, action: KernelAction | None) -> int:
    """Where the kernel writes the action that was in force. Installing our own for SIGTRAP, that is the place where the
    handler looks for whom to pass strange traps on to: no instant in which it would not know."""
    if number == SIGTRAP and action is not None and action.handler == region.handler:
        return region.table + OBSERVED_OFFSET
    return region.table + OUTPUT_OFFSET + (number - 1) * _ACTION_SIZE
