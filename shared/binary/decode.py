"""Linear decoding of whole functions: where instructions begin, and where control goes.

capstone's disasm_lite, without operand details: 0.25 s for redis against 1.23 s with them. Nothing outside
the ranges of .eh_frame is ever decoded: libcrypto has data between its functions.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, Protocol

from dynacut.shared.binary.branches import BranchKind, branch_kind, without_prefixes
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange
from dynacut.shared.errors import DynacutError

SPAN_LIMIT = 1 << 26
"""The most bytes from a module's first function to its last one, in addition to four times the file's size."""
MAX_INSTRUCTION = 15

_PLAIN, _JUMP, _OTHER_BRANCH, _LEA, _MOVSXD = range(5)


class Instruction(NamedTuple):
    """One instruction: its module offset, size in bytes, capstone's mnemonic and operands (Intel syntax)."""

    offset: int
    size: int
    mnemonic: str
    op_str: str


class _Kinds(dict[str, int]):
    """What each mnemonic means to a sweep; numbers, as it asks a hundred thousand times."""

    def __missing__(self, mnemonic: str) -> int:
        word = without_prefixes(mnemonic)
        if word == "lea":
            kind = _LEA
        elif word in ("movsxd", "movslq"):
            kind = _MOVSXD
        else:
            kind = {None: _PLAIN, BranchKind.JUMP: _JUMP}.get(branch_kind(mnemonic), _OTHER_BRANCH)
        self[mnemonic] = kind
        return kind


@dataclass
class Sweep:
    """What decoding found, over the functions' span [start, end) of module offsets.

    boundaries: for each byte of the span, 1 if an instruction begins there whose decoding nothing
    contradicts. followers: where the instruction after a branch, call or terminator begins (or would).
    targets: of direct branches and calls, and of rip-relative leas into functions. table_candidates: data
    that functions with an indirect jump lea. data_references: all data that functions lea. immediates: 32-bit
    absolute operands (ET_EXEC only). certain_ends: for functions (by their start) in which decoding stopped,
    where it did. gaps: bytes that belong to no block, because another path enters amid an instruction.
    """

    start: int
    end: int
    boundaries: bytearray
    ranges: Sequence[FunctionRange]
    followers: set[int] = field(default_factory=set)
    targets: set[int] = field(default_factory=set)
    table_candidates: set[int] = field(default_factory=set)
    data_references: set[int] = field(default_factory=set)
    immediates: set[int] = field(default_factory=set)
    certain_ends: dict[int, int] = field(default_factory=dict)
    gaps: list[tuple[int, int]] = field(default_factory=list)

    def is_boundary(self, offset: int) -> bool:
        """Whether an instruction certainly begins at a module offset."""
        return self.start <= offset < self.end and self.boundaries[offset - self.start] == 1

    def boundary_offsets(self) -> array[int]:
        """Return all instruction starts, ascending."""
        return array("Q", compress(range(self.start, self.end), self.boundaries))


class Disassemble(Protocol):
    """capstone.Cs.disasm_lite: yields offset, size, mnemonic, operands; ends at what it cannot decode."""

    def __call__(self, code: bytes, offset: int, count: int = 0) -> Iterator[tuple[int, int, str, str]]:
        """Decode up to count instructions (0: all); all of them before it yields the first."""


def disassembler() -> Disassemble:
    """Return a decoder for x86-64 (importing capstone takes 63 ms)."""
    import capstone

    untyped: Any = capstone
    disassemble: Disassemble = untyped.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm_lite
    return disassemble


def instructions(elf: ElfFile, function: FunctionRange) -> tuple[Instruction, ...]:
    """Decode one function, straight from its start, as far as it goes; DynacutError if its bytes are not in the file.

    This is what decoding says, without regard to branches into the middle of instructions: see
    is_instruction_boundary.
    """
    code = elf.read(function.start, function.end - function.start)
    return tuple(Instruction(*fields) for fields in disassembler()(code, function.start))


def sweep(elf: ElfFile, ranges: Sequence[FunctionRange]) -> Sweep:
    """Decode functions (ascending, not overlapping) in one go; DynacutError if they are too far apart."""
    if not ranges:
        return Sweep(0, 0, bytearray(), ranges)
    start, end = ranges[0].start, ranges[-1].end
    if end - start > SPAN_LIMIT + 4 * len(elf.data):  # a hostile file could take any amount of memory
        raise DynacutError(f"the functions of {elf.path} are {end - start} bytes apart: too large a module")
    found = Sweep(start, end, bytearray(end - start), ranges)
    disasm, kinds = disassembler(), _Kinds()
    boundaries, followers, targets = found.boundaries, found.followers, found.targets
    is_fixed = elf.is_fixed
    for function in ranges:
        first, last = function.start, function.end
        code = elf.read(first, last - first)
        address, size = first, 0
        data: set[int] = set()
        jumps = False
        for address, size, mnemonic, operands in disasm(code, first):
            boundaries[address - start] = 1
            kind = kinds[mnemonic]
            if not kind:
                if is_fixed and size >= 5 and mnemonic in ("mov", "push"):
                    found.immediates.add(int.from_bytes(code[address + size - first - 4 :][:4], "little"))
            elif kind == _LEA:
                if "[rip" in operands:
                    after = address + size
                    data.add(after + int.from_bytes(code[after - first - 4 : after - first], "little", signed=True))
            elif kind == _MOVSXD:
                jumps = jumps or "*4" in operands
            else:
                followers.add(address + size)
                if operands.startswith("0x"):
                    targets.add(int(operands, 16))
                elif kind == _JUMP:
                    jumps = True
        if address + size < last:
            found.certain_ends[first] = address + size
        found.data_references |= data
        if jumps:
            found.table_candidates |= data
    executable = [(s.offset, s.file_end) for s in elf.segments if s.executable]
    in_functions = {offset for offset in found.data_references if any(low <= offset < high for low, high in executable)}
    # Code and data may share a segment (ld -z noseparate-code): only an instruction's start counts as code.
    targets.update(offset for offset in in_functions if found.is_boundary(offset))
    return found


def cut_contradictions(elf: ElfFile, found: Sweep, leaders: Iterable[int]) -> set[int]:
    """Withdraw boundaries that a leader amid an instruction contradicts; return where certainty begins again.

    glibc jumps over lock prefixes: both the prefixed instruction and its second byte are entered. An int3 at
    the second byte would make the prefixed path an illegal instruction, one at the prefix would miss the
    other path. So the whole instruction becomes a gap, up to where both readings meet again: no block covers
    it, nothing in it is a boundary.
    """
    boundaries, base = found.boundaries, found.start
    starts = [function.start for function in found.ranges]
    resumed: set[int] = set()
    disasm = None
    meeting = 0
    for leader in sorted(leaders):
        if not base <= leader < found.end or boundaries[leader - base]:
            continue
        index = bisect_right(starts, leader) - 1
        function = found.ranges[index]
        end = found.certain_ends.get(function.start, function.end)
        if leader >= end or leader < meeting:
            continue
        head = boundaries.rfind(1, function.start - base, leader - base) + base
        disasm = disasm or disassembler()
        meeting = leader
        while meeting < end and not boundaries[meeting - base]:
            # One at a time: capstone decodes all it is given before it returns the first.
            code = elf.read(meeting, min(MAX_INSTRUCTION, function.end - meeting))
            size = next((size for _, size, _, _ in disasm(code, meeting, 1)), 0)
            meeting = min(meeting + size, end) if size else end
        boundaries[head - base : meeting - base] = bytes(meeting - head)
        found.gaps.append((head, meeting))
        if meeting < end:
            resumed.add(meeting)
    return resumed


def function_boundaries(elf: ElfFile, function: FunctionRange) -> array[int]:
    """Return where instructions of one function certainly begin, ascending: decodes it only (1 ms per KB).

    Without what decoding does not reach, and without instructions that a branch of the same function enters
    amid (what other functions do is not looked at: BlockMap does). Importing capstone comes on top.
    """
    found = sweep(elf, (function,))
    cut_contradictions(elf, found, found.targets)
    return found.boundary_offsets()
