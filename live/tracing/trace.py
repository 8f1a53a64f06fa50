"""Coverage of a running process: every block learns.

Each block's first byte becomes an int3 whose action is `learn`: the first hit puts the block back, in the process
itself, and numbers it in counters that the process shares with what it forks. So no tracer need be attached, a block
costs nothing after its first hit, and a tracer that is killed leaves blocks that heal themselves.
"""

from __future__ import annotations

import mmap
import os
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dynacut.handlers.records import INT3
from dynacut.handlers.table import TRACE_MAGIC, Action, Table, TableSite
from dynacut.live.lock import locked
from dynacut.live.process import Process
from dynacut.live.ptrace.patcher import Patcher
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.urgency import without_collections
from dynacut.live.sharers import sharers
from dynacut.live.tracing.traceable import check_traceable
from dynacut.live.tree import descendants
from dynacut.shared import resolve
from dynacut.shared.code import Code, CodeOf
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.proc import is_alive, task_status
from dynacut.shared.region import FoundRegion, find_layout, find_region
from dynacut.shared.restoring import SiteMemory
from dynacut.shared.target import Module

_FEATURE = "trace"
_MAX_ROUNDS = 20


@dataclass(frozen=True)
class _Block:
    code: Code
    offset: int
    size: int
    original: bytes


class Trace:
    """Block coverage of one process and its descendants, from arm() to disarm()."""

    def __init__(self, process: Process, modules: Sequence[Module], *, timeout: float = 60.0) -> None:
        """modules: those to trace; the block map of each is taken from the cache, or made.

        Raises:
            DynacutError: an int3 in one of them could end the process; or its file cannot be read.
        """
        check_traceable(process, modules)
        self.clock = StopClock()
        self._process = process
        self._timeout = timeout
        codes = CodeOf(process)
        self._codes = [codes.of(module) for module in modules]
        for code in self._codes:
            _ = code.blocks  # what takes longest, before anything is changed
        self._blocks: dict[int, _Block] = {}
        self._addresses: list[int] = []
        self._by_counter: dict[int, _Block] = {}
        self._counters: memoryview | mmap.mmap = memoryview(bytes(8))
        self._shared_inode = 0
        self._before = array("Q", [0])
        self._noted: list[_Block] = []

    @property
    def is_running(self) -> bool:
        """Whether the process, or a descendant that inherited the trace, still runs."""
        try:
            if task_status(self._process.pid).state not in "ZX":
                return True
        except OSError:
            pass
        return bool(self._family())

    def running(self) -> list[int]:
        """The process and the descendants that inherited the trace, as far as they run."""
        own = [self._process.pid] if is_alive(self._process.pid) else []
        return sorted({*own, *self._family()})

    @property
    def armed(self) -> int:
        """How many blocks are traced."""
        return len(self._blocks)

    def arm(self) -> None:
        """Arms every block that can be. Blocks with other bytes than in the file are left alone: others' patches.

        Raises:
            DynacutError: the process cannot be patched; it is as it was.
        """
        with without_collections():
            self._stop_left_behind()
            self._process.refresh()
            self._arm()

    def _arm(self) -> None:
        self._blocks = {block.code.module.base + block.offset: block for block in self._armable()}
        self._addresses = sorted(self._blocks)
        if not self._blocks:
            raise DynacutError("there is no block to trace", "choose other modules by --module")
        sites = tuple(
            TableSite(address, _FEATURE, Action.LEARN, 0, block.size, block.original, INT3)
            for address in self._addresses
            for block in (self._blocks[address],)
        )
        edits = tuple(ByteEdit(site.address, site.old, site.new) for site in sites)
        try:
            self._patcher(self._process).apply(PatchSet(edits, HandlerChange.INSTALL, (_FEATURE,), sites))
            self._share_counters()
        except BaseException:
            with suppress(DynacutError):  # it would hide why; and blocks that stay armed heal themselves
                stop_trace(self._process, self._timeout, self.clock)
            raise

    def _share_counters(self) -> None:
        self._process.refresh()
        found = find_layout(self._process, TRACE_MAGIC)
        assert found is not None
        region, layout = found
        counters = Table.counters_of(self._process.read(region.table, layout.size))
        self._by_counter = {counter: self._blocks[address] for address, counter in counters.items()}
        self._counters, self._shared_inode = _shared_memory(self._process, region.table + layout.counters)
        # The table came with counters of zero: what was hit while the blocks were being armed counts as well.
        self._before = array("Q", bytes(8 * (max(self._by_counter) + 1)))
        self._before[0] = self._numbers()[0]

    def note(self, address: int) -> None:
        """Counts the block at an address as hit in this phase: the entry point of a held program cannot be armed."""
        for code in self._codes:
            block = code.blocks.block_at(address - code.module.base)
            if block is not None and code.module.base <= address < code.module.end:
                self._noted.append(_Block(code, block.start, block.size, b""))

    def poll(self) -> int:
        """How many blocks were hit in this phase so far."""
        return int.from_bytes(self._counters[:8], "little") - self._before[0]

    def poll_modules(self) -> dict[str, int]:
        """The same by module, by its path. Looks at every counter, which takes a millisecond for ten thousand."""
        numbers = self._numbers()
        hits = Counter(
            block.code.module.path
            for counter, block in self._by_counter.items()
            if numbers[counter] != self._before[counter]
        )
        return {code.module.path: hits[code.module.path] for code in self._codes}

    def coverage(self) -> Coverage:
        """The blocks hit in this phase, in the order of their first hits."""
        return self._coverage(self._numbers())

    def _coverage(self, numbers: array[int]) -> Coverage:
        # By what has changed, not by the number of the last hit: a thread may be between taking a number and noting it.
        hits = sorted(
            (numbers[counter], counter) for counter in self._by_counter if numbers[counter] != self._before[counter]
        )
        blocks: dict[str, dict[int, int]] = {code.module.path: {} for code in self._codes}
        for block in self._noted:
            blocks[block.code.module.path][block.offset] = block.size
        for _, counter in hits:
            block = self._by_counter[counter]
            blocks[block.code.module.path][block.offset] = block.size
        return Coverage(
            tuple(
                CoveredModule(code.module.name, code.module.path, code.elf.build_id, blocks[code.module.path])
                for code in self._codes
            )
        )

    def next_phase(self) -> Coverage:
        """Closes the phase: its coverage; and arms all blocks again, in the descendants too, for the next one."""
        numbers = self._numbers()
        coverage = self._coverage(numbers)
        self._noted.clear()
        self._before = numbers
        self._in_family(self._arm_again)
        return coverage

    def disarm(self) -> None:
        """Puts everything back, in the descendants too. The coverage stays readable until the process ends.

        Raises:
            DynacutError: a process could not be put back; blocks that are left armed heal themselves.
        """
        self._in_family(lambda process: stop_trace(process, self._timeout, self.clock))

    def extents(self) -> dict[str, tuple[int, int]]:
        """Load base and end of each traced module, by its path."""
        return {code.module.path: (code.module.base, code.module.end) for code in self._codes}

    def _numbers(self) -> array[int]:
        return array("Q", self._counters[: 8 * len(self._before)])

    def _armable(self) -> Iterator[_Block]:
        for code in self._codes:
            blocks, base = code.blocks, code.module.base
            for mapping in code.module.executable_mappings:
                memory = self._process.read(mapping.start, mapping.size)
                start = mapping.start - base
                for offset, size in zip(blocks.block_starts, blocks.block_sizes, strict=True):
                    index = offset - start
                    if 0 <= index < len(memory) and memory[index] != INT3[0]:
                        original = bytes(memory[index : index + 1])
                        if original == code.elf.read(offset, 1) and not code.is_restartable(offset, offset + 1):
                            yield _Block(code, offset, size, original)

    def _healed(self, process: Process) -> Iterator[int]:
        """The addresses of traced blocks that are not armed at the moment."""
        for code in self._codes:
            for mapping in code.module.executable_mappings:
                memory = process.read(mapping.start, mapping.size)
                first = bisect_left(self._addresses, mapping.start)
                for address in self._addresses[first : bisect_left(self._addresses, mapping.end)]:
                    if memory[address - mapping.start] == self._blocks[address].original[0]:
                        yield address

    def _arm_again(self, process: Process) -> None:
        for address in self._healed(process):
            process.write(address, INT3)

    def _family(self) -> list[int]:
        """The process and what it has forked since it was armed, and those in turn: all that count in its counters."""
        return sharers(self._process.exe, self._shared_inode) if self._shared_inode else []

    def _in_family(self, act: Callable[[Process], object]) -> None:
        """Acts on each process of the family, opened anew, and on those that are forked meanwhile.

        A failure is one only if the process has the trace still: it may end, or become another program, at any time.

        Raises:
            DynacutError: the first failure, when all had their turn.
        """
        failures = []
        seen: set[int] = set()
        for _ in range(_MAX_ROUNDS):
            new = [pid for pid in self._family() if pid not in seen]
            if not new:
                break
            seen.update(new)
            for pid in new:
                try:
                    with Process(pid) as process:
                        act(process)
                except DynacutError as error:
                    if _is_traced(pid):
                        failures.append(error)
        if failures:
            raise failures[0]

    def _stop_left_behind(self) -> None:
        """Takes out what a killed tracer has left: its blocks are in no file, and would be taken for others' patches.

        Raises:
            DynacutError: it cannot be taken out of the process.
        """
        stop_trace(self._process, self._timeout, self.clock)
        for pid in descendants(self._process.pid)[1:]:
            with (
                suppress(DynacutError),
                locked(pid),
                Process(pid) as process,
            ):  # locked: another tracer is at work there
                stop_trace(process, self._timeout, self.clock)

    def _patcher(self, process: Process) -> Patcher:
        return Patcher(process, self._timeout, self.clock, TRACE_MAGIC)


def _shared_memory(process: Process, address: int) -> tuple[mmap.mmap, int]:
    """The target's shared mapping at an address, mapped here too, and its inode.

    It stays readable when the target has ended.
    """
    mapping = next(part for part in process.mappings if part.start <= address < part.end)
    link = f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        file = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DynacutError(
            f"the counters of {process.label} cannot be shared: {error.strerror}", "run as root"
        ) from None
    try:
        return mmap.mmap(file, mapping.size, mmap.MAP_SHARED, mmap.PROT_READ), mapping.inode
    finally:
        os.close(file)


def _is_traced(pid: int) -> bool:
    """Whether a process, opened anew, has blocks of a trace in force."""
    try:
        with Process(pid) as process:
            return has_trace(process)
    except DynacutError:
        return False


def armed_blocks(process: Process) -> int:
    """How many blocks of a trace are armed in a process: of one that goes on, or of one that was killed."""
    found = _trace_of(process)
    if found is None or found.table is None:
        return 0
    memory = SiteMemory(process)
    return sum(memory.found(site) == INT3 for site in found.table.sites)


def stop_trace(process: Process, timeout: float, clock: StopClock) -> int:
    """Takes a trace out of a process, its own or one that a killed tracer left behind.

    Returns how many blocks were still armed.

    Raises:
        DynacutError: it could not be taken out.
    """
    with without_collections():
        found = _trace_of(process)
        if found is None:
            return 0
        patches = resolve.undo(process, found.table)
        Patcher(process, timeout, clock, TRACE_MAGIC).apply(patches)
        return len(patches.edits)


def has_trace(process: Process) -> bool:
    """Whether blocks of a trace are in force: armed in the process itself, or inherited from its parent."""
    return _trace_of(process) is not None


def _trace_of(process: Process) -> FoundRegion | None:
    found = find_region(process, TRACE_MAGIC)
    return found if found is not None and found.table is not None and found.table.sites else None
