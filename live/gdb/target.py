"""A process that gdb holds, as a target that a patch set is applied to (shared/apply.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ

from dynacut.handlers.layout import ACTION
from dynacut.handlers.table import INPUT_OFFSET, OUTPUT_OFFSET, SLOT_COUNT, KernelAction
from dynacut.live.gdb.held import Held
from dynacut.live.gdb.session import GdbSession
from dynacut.live.gdb.shots import Shot, shoot
from dynacut.live.gdb.through_gdb import Described, ReadFile
from dynacut.live.ptrace.masks import WITH_TEMPORARY_MASK
from dynacut.live.ptrace.resumption import in_syscall, resumption
from dynacut.live.ptrace.slack import find_slack
from dynacut.live.ptrace.slots import Slot, take_slot
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stub import Stub
from dynacut.live.syscalls import MAP_FIXED_NOREPLACE, MAP_NORESERVE, SIG_BLOCK, SIG_UNBLOCK, SIGSET_SIZE, Syscall
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.memory import NewMemory, PageRange
from dynacut.shared.region import Region, find_region
from dynacut.shared.target import SIGTRAP, SIGTRAP_BIT, Mapping

_ACTION_SIZE = ACTION.size
_SCRATCH_SIZE = 64 * _ACTION_SIZE
_ACTIONS_PER_SHOT = 16
_RANGES_PER_SHOT = 8
_THREADS_AT_ONCE = min(SLOT_COUNT // 2, _SCRATCH_SIZE // SIGSET_SIZE)


@dataclass(frozen=True)
class GdbThread:
    """A thread of the process as it was when it was looked at."""

    tid: int
    rip: int
    rsp: int
    start_time: Callable[[int], int]

    @property
    def started(self) -> int:
        """When it started, in clock ticks since boot."""
        return self.start_time(self.tid)


class GdbTarget(Held):
    """The process in gdb's hands. What needs a system call is done by its own threads, which run meanwhile: shots.py.

    passing: whether a thread's mask was changed that did not wait: it may have been amid pthread_create, which puts
    back the mask it found.
    """

    def __init__(
        self, session: GdbSession, process: Described, read_file: ReadFile | None, clock: StopClock, deadline: float
    ) -> None:
        super().__init__(session, process, read_file, clock, deadline)
        self.passing = False
        self._actions: dict[int, KernelAction] = {}

    @property
    def threads(self) -> Sequence[GdbThread]:
        """Every thread."""
        return [
            GdbThread(thread.tid, thread.registers["rip"], thread.registers["rsp"], self.start_time)
            for thread in self.held_threads
        ]

    @property
    def started(self) -> int:
        """When the process started, in clock ticks since boot."""
        return self.start_time(self.process.pid)

    def map_anonymous(self, parts: Sequence[NewMemory]) -> None:
        """Maps memory at just these places, zeros in it for now; DynacutError if the process does not get it."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
        for first in range(0, len(parts), _RANGES_PER_SHOT):
            batch = parts[first : first + _RANGES_PER_SHOT]
            stub = Stub()
            for part in batch:
                stub.syscall(Syscall.MMAP, part.address, part.size, part.protection, flags, -1, 0)
            self._map(stub, [(part.address, part.address + part.size) for part in batch])

    def map_file(self, pages: PageRange) -> None:
        """Maps unmapped pages of a file back; DynacutError if they are not those of the same file."""
        path = os.fsencode(pages.mapping.path) + b"\0"
        if len(path) > _SCRATCH_SIZE:
            raise DynacutError(f"{pages.mapping.path}: the name is too long", status=ExitStatus.CHECK_FAILED)
        name = self._region().table + INPUT_OFFSET
        self.write(name, path)
        stub = Stub()
        flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE
        stub.map_opened(name, pages.start, pages.size, PROT_READ | PROT_EXEC, flags, pages.file_offset)
        self._run(stub)
        self.write(name, bytes(len(path)))
        new = self._mapping_at(pages.start)
        if new is None or new.inode != pages.mapping.inode:
            raise DynacutError(
                f"{self.label} could not map {pages.mapping.path} at {pages.start:#x} again",
                "the file was replaced, or the process may not read it: only a restart brings the pages back",
                status=ExitStatus.CHECK_FAILED,
            )

    def unmap(self, pages: PageRange) -> None:
        """Unmaps pages; DynacutError if they do not go."""
        stub = Stub()
        stub.syscall(Syscall.MUNMAP, pages.start, pages.size)
        self._run(stub)
        if self._mapping_at(pages.start) is not None:
            raise DynacutError(
                f"{self.label} could not unmap the pages at {pages.start:#x}",
                "all blocks are disabled nevertheless; the limit of mappings (vm.max_map_count) may be reached",
                status=ExitStatus.CHECK_FAILED,
            )

    def caught_signals(self) -> list[int]:
        """The signals that the process handles itself."""
        caught = self.status().caught
        return [number for number in range(1, 65) if caught >> (number - 1) & 1]

    def action(self, signal: int) -> KernelAction:
        """What is done upon a signal."""
        if signal not in self._actions:
            self._exchange_actions(dict.fromkeys({signal, SIGTRAP, *self.caught_signals()}))
        return self._actions[signal]

    def set_actions(self, actions: dict[int, KernelAction]) -> None:
        """Changes what is done upon signals."""
        self._exchange_actions(dict(actions))
        self._actions |= actions

    def blocked_signals(self) -> dict[int, int]:
        """The mask of each thread, also where a system call such as ppoll has replaced it for its duration."""
        masks = {thread.tid: self.status(thread.tid).blocked for thread in self.held_threads}
        hidden = [
            thread.tid
            for thread in self.held_threads
            if in_syscall(thread.registers) and thread.registers["orig_rax"] in WITH_TEMPORARY_MASK
        ]
        # The kernel puts a thread's own mask back when it leaves such a call, so before the stub begins.
        return masks | self._change_masks(hidden, SIG_BLOCK, 0)

    def waiting_blockers(self) -> list[int]:
        """The threads that block SIGTRAP while they wait in a system call; others may do so for a moment only."""
        return [
            thread.tid
            for thread in self.held_threads
            if resumption(thread.registers).restarts and self.status(thread.tid).blocked & SIGTRAP_BIT
        ]

    def block_sigtrap(self, tids: Collection[int], *, block: bool) -> None:
        """Makes threads block SIGTRAP or accept it, and nothing else; those that have ended are left out."""
        for tid in tids:
            thread = self.thread(tid)
            self.passing = self.passing or (thread is not None and not resumption(thread.registers).restarts)
        # Not by the whole mask: before its turn comes, a thread may run on, and into or out of a signal handler.
        self._change_masks(tids, SIG_BLOCK if block else SIG_UNBLOCK, SIGTRAP_BIT)

    def _exchange_actions(self, actions: dict[int, KernelAction | None]) -> None:
        """Sets signal actions, or with None only reads them."""
        table = self._region().table
        numbers = sorted(actions)
        for first in range(0, len(numbers), _ACTIONS_PER_SHOT):
            batch = {number: (number - 1) * _ACTION_SIZE for number in numbers[first : first + _ACTIONS_PER_SHOT]}
            stub = Stub()
            for number, place in batch.items():
                action = actions[number]
                if action is not None:
                    self.write(table + INPUT_OFFSET + place, action.pack())
                given = 0 if action is None else table + INPUT_OFFSET + place
                stub.syscall(Syscall.RT_SIGACTION, number, given, table + OUTPUT_OFFSET + place, SIGSET_SIZE)
            self._run(stub)
            for number, place in batch.items():
                self._actions[number] = KernelAction.unpack(self.read(table + OUTPUT_OFFSET + place, _ACTION_SIZE))
                # What stays is the table that the other backends write as well.
                self.write(table + INPUT_OFFSET + place, bytes(_ACTION_SIZE))
                self.write(table + OUTPUT_OFFSET + place, bytes(_ACTION_SIZE))

    def _change_masks(self, tids: Collection[int], how: int, signals: int) -> dict[int, int]:
        """Has threads change their masks as rt_sigprocmask(2) does; returns what was in force, for those that live."""
        region = self._region()
        given, old = region.table + INPUT_OFFSET, region.table + OUTPUT_OFFSET
        before: dict[int, int] = {}
        for first in range(0, len(tids), _THREADS_AT_ONCE):
            batch = list(tids)[first : first + _THREADS_AT_ONCE]
            self.write(given, signals.to_bytes(SIGSET_SIZE, "little"))
            shots = []
            for index, tid in enumerate(batch):
                stub = Stub()
                stub.syscall(Syscall.RT_SIGPROCMASK, how, given, old + index * SIGSET_SIZE, SIGSET_SIZE)
                shots.append(self._shot(stub, region, tid))
            shoot(self, shots)
            found = self.read(old, len(batch) * SIGSET_SIZE)
            for index, tid in enumerate(batch):
                if self.thread(tid) is not None:
                    before[tid] = int.from_bytes(found[index * SIGSET_SIZE : (index + 1) * SIGSET_SIZE], "little")
            self.write(given, bytes(SIGSET_SIZE))
            self.write(old, bytes(len(found)))
        return before

    def _map(self, stub: Stub, ranges: Sequence[tuple[int, int]]) -> None:
        """Runs a stub that maps memory; the first one, before there is a region, in unused bytes elsewhere."""

        def is_done() -> bool:
            self.process.refresh()
            return all(self._is_mapped(start, end) for start, end in ranges)

        found = find_region(self)
        slot = self._slot(found.region).address if found else find_slack(self, stub.size)
        shoot(self, [Shot(stub, slot, is_done)])

    def _run(self, stub: Stub) -> None:
        """Runs a stub by any thread."""
        shoot(self, [self._shot(stub, self._region(), None)])
        self.process.refresh()

    def _shot(self, stub: Stub, region: Region, tid: int | None) -> Shot:
        """A shot from a slot of the region, where its last act is to say that it is done."""
        slot = self._slot(region)
        done = slot.done
        assert done is not None
        stub.set_byte(done)
        return Shot(stub, slot.address, lambda: self.read(done, 1) == b"\1", tid)

    def _slot(self, region: Region) -> Slot:
        """A slot for one stub; those who are being sent to one are in none that was used long ago."""

        def none_inside() -> bool:
            return not any(
                region.contains_code(thread.registers["rip"]) for thread in self.held_threads if not thread.moved
            )

        return take_slot(self, region, none_inside)

    def _region(self) -> Region:
        found = find_region(self)
        assert found is not None, "only what has a region is asked to make such calls"
        return found.region

    def _is_mapped(self, start: int, end: int) -> bool:
        while start < end:
            mapping = self._mapping_at(start)
            if mapping is None:
                return False
            start = mapping.end
        return True

    def _mapping_at(self, address: int) -> Mapping | None:
        return next((mapping for mapping in self.mappings if mapping.start <= address < mapping.end), None)
