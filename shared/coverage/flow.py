"""Where control goes in one module: successors of blocks, callers of functions, what is only reached indirectly.

One pass over the module's instructions, without operand details (redis: about half a second), which keeps the
branches and the rip-relative leas only. Every branch ends a block (see blocks), so a block's branch is found
by the block's end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.branches import BranchKind, branch_kind
from dynacut.shared.binary.code_pointers import code_pointers
from dynacut.shared.binary.decode import disassembler
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.entries import Entries
from dynacut.shared.binary.functions import FunctionRange, function_at
from dynacut.shared.binary.jump_tables import JumpTable, find_jump_table
from dynacut.shared.binary.pointer_tables import PointerTables
from dynacut.shared.code import Code


class Branch(NamedTuple):
    """The branch that ends a block: its module offset, size in bytes, and where it leads if that is direct."""

    offset: int
    size: int
    kind: BranchKind
    target: int | None

    @property
    def end(self) -> int:
        """Where the instruction after it begins: the fall-through."""
        return self.offset + self.size


_GOES_ON = (BranchKind.CONDITIONAL, BranchKind.CALL, BranchKind.INDIRECT_CALL)


class Flow:
    """The flow of control in one module; everything is computed on demand, once. Offsets are module offsets."""

    def __init__(self, elf: ElfFile, blocks: BlockMap, functions: tuple[FunctionRange, ...]) -> None:
        """See of. functions: function_ranges(elf)."""
        self.elf = elf
        self.blocks = blocks
        self.functions = functions
        self._entries = frozenset(function.start for function in functions)
        self._tables: dict[int, JumpTable | None] = {}
        self._predecessors: dict[int, dict[int, tuple[int, ...]]] = {}
        self._callees: dict[int, tuple[int, ...]] = {}

    @classmethod
    def of(cls, code: Code) -> Flow:
        """Return the flow of a module that is known already."""
        return cls(code.elf, code.blocks, code.functions)

    def function_at(self, offset: int) -> FunctionRange | None:
        """Return the function that contains an offset, or None."""
        return function_at(self.functions, offset)

    def is_entry(self, offset: int) -> bool:
        """Whether a function, or a part of one that lies apart, begins at an offset."""
        return offset in self._entries

    @cached_property
    def entries(self) -> Entries:
        """Where functions begin, without their parts that lie apart."""
        return Entries(self.elf)

    @cached_property
    def _scanned(self) -> tuple[dict[int, Branch], dict[int, int]]:
        """Branches by their end, and what rip-relative leas (in programs that are not PIE: movs) point at."""
        branches: dict[int, Branch] = {}
        references: dict[int, int] = {}
        kinds: dict[str, BranchKind | None] = {}
        disassemble, base = disassembler(), self.elf.link_base
        for function in self.functions:
            code = self.elf.read(function.start, function.end - function.start)
            for offset, size, mnemonic, operands in disassemble(code, function.start):
                if mnemonic not in kinds:
                    kinds[mnemonic] = branch_kind(mnemonic)
                kind = kinds[mnemonic]
                if kind is None:
                    if mnemonic == "lea" and "[rip" in operands:
                        at = offset + size - function.start
                        displacement = int.from_bytes(code[at - 4 : at], "little", signed=True)
                        references[offset] = offset + size + displacement
                    elif self.elf.is_fixed and size >= 5 and mnemonic in ("mov", "push"):
                        at = offset + size - function.start
                        references[offset] = int.from_bytes(code[at - 4 : at], "little") - base
                    continue
                target = int(operands, 16) if operands.startswith("0x") else None
                if target is None and kind in (BranchKind.JUMP, BranchKind.CALL):
                    kind = BranchKind.INDIRECT_JUMP if kind is BranchKind.JUMP else BranchKind.INDIRECT_CALL
                branches[offset + size] = Branch(offset, size, kind, target)
        return branches, references

    def branch_of(self, block: int) -> Branch | None:
        """Return the branch that ends the block starting at an offset; None if it just runs into the next one."""
        found = self.blocks.block_at(block)
        return self._scanned[0].get(found.end) if found is not None else None

    def data_references(self, start: int, end: int) -> list[int]:
        """Return what the leas in [start, end) point at, in the order of the instructions."""
        references, places = self._scanned[1], self._reference_places
        return [references[places[at]] for at in range(bisect_left(places, start), bisect_left(places, end))]

    @cached_property
    def _reference_places(self) -> list[int]:
        return sorted(self._scanned[1])

    def jump_table(self, block: int) -> JumpTable | None:
        """Return the jump table that a block's indirect jump goes through; None: there is none, or none is known."""
        branch = self.branch_of(block)
        if branch is None or branch.kind is not BranchKind.INDIRECT_JUMP:
            return None
        if branch.offset not in self._tables:
            function = self.function_at(branch.offset)
            self._tables[branch.offset] = (
                find_jump_table(self.elf, function, branch.offset, self.blocks.is_boundary) if function else None
            )
        return self._tables[branch.offset]

    def successors(self, block: int) -> tuple[int, ...]:
        """Return where the block starting at an offset goes on: a conditional jump's target, then its fall-through.

        A call goes on after it (even if the callee never returns); a jump to another function is a successor
        too. For a jump table its cases, each once, in ascending order, without the default: that is the
        successor of the block with the comparison. Nothing for a return and unknown indirect jumps.
        """
        found = self.blocks.block_at(block)
        if found is None:
            return ()
        branch = self._scanned[0].get(found.end)
        following = (found.end,) if self._follows(found.start, found.end) else ()
        if branch is None:
            return following
        if branch.kind is BranchKind.INDIRECT_JUMP:
            table = self.jump_table(block)
            return tuple(sorted(set(table.targets))) if table is not None else ()
        onward: tuple[int, ...] = following if branch.kind in _GOES_ON else ()
        if branch.kind in (BranchKind.CONDITIONAL, BranchKind.JUMP) and branch.target is not None:
            onward = (branch.target, *(offset for offset in onward if offset != branch.target))
        return onward

    def _follows(self, start: int, end: int) -> bool:
        """Whether another block of the same function begins where one ends."""
        function = self.function_at(start)
        return function is not None and end < function.end and self.blocks.is_boundary(end)

    def predecessors(self, block: int) -> tuple[int, ...]:
        """Return the blocks of the same function whose successor is the block starting at an offset, ascending."""
        function = self.function_at(block)
        if function is None:
            return ()
        if function.start not in self._predecessors:
            found: dict[int, list[int]] = {}
            for one in self.blocks.blocks_in(*function):
                for successor in self.successors(one.start):
                    found.setdefault(successor, []).append(one.start)
            self._predecessors[function.start] = {offset: tuple(sources) for offset, sources in found.items()}
        return self._predecessors[function.start].get(block, ())

    def transfers_from(self, start: int, end: int) -> Iterable[Branch]:
        """Yield the branches in [start, end), ascending."""
        ends = self._branch_ends
        for at in range(bisect_right(ends, start), bisect_right(ends, end)):
            yield self._scanned[0][ends[at]]

    @cached_property
    def _branch_ends(self) -> list[int]:
        return sorted(self._scanned[0])

    def callees(self, function: FunctionRange) -> tuple[int, ...]:
        """Return the entries of functions that a function calls or jumps to directly, each once, in that order."""
        if function.start not in self._callees:
            targets = (branch.target for branch in self.transfers_from(*function))
            found = dict.fromkeys(target for target in targets if target is not None and target in self._entries)
            found.pop(function.start, None)
            self._callees[function.start] = tuple(found)
        return self._callees[function.start]

    @cached_property
    def _callers(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for branch in self._scanned[0].values():
            if branch.target is not None and branch.target in self._entries:
                function = self.function_at(branch.offset)
                if branch.kind is BranchKind.CALL or function is None or function.start != branch.target:
                    found.setdefault(branch.target, []).append(branch.offset)
        return found

    def callers(self, entry: int) -> tuple[int, ...]:
        """Return the direct calls of the function at an offset, and jumps to it from other functions."""
        return tuple(self._callers.get(entry, ()))

    @cached_property
    def pointers(self) -> PointerTables:
        """The pointers to functions in the module's data."""
        return PointerTables(self.elf, self._entries)

    @cached_property
    def indirect_only(self) -> frozenset[int]:
        """The functions whose address is taken (in data or by a lea), and that nothing calls or jumps to directly."""
        span = (self.functions[0].start, self.functions[-1].end) if self.functions else (0, 0)
        taken = code_pointers(self.elf, *span) | set(self._scanned[1].values())
        return frozenset(entry for entry in self._entries if entry in taken and entry not in self._callers)
