"""The jump table behind one indirect jump: its cases by index, and the default that the comparison before it leads to.

What gcc and clang emit for a switch: a comparison with the last index, ``ja default``, and a jump through a table
of int32 offsets relative to the table (PIE, shared objects) or of absolute addresses (programs for a fixed address).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynacut.shared.binary.decode import Instruction, instructions
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange

MAX_CASES = 4096
"""More entries than this are not read, whatever the comparison says."""

_LOAD = re.compile(r"(\w+), dword ptr \[(\w+) \+ (\w+)\*4\]")
_LEA = re.compile(r"(\w+), \[rip ([+-]) 0x([0-9a-f]+)\]")
_ABSOLUTE = re.compile(r"qword ptr \[(\w+)\*8 \+ 0x([0-9a-f]+)\]")
_ABOVE = {"ja": True, "jae": False, "jbe": True, "jb": False}
"""Whether the compared number is itself an index; the jump goes to the default (ja) or to the table (jbe)."""
_LOOK_BACK = 24
"""Between the comparison and the jump, compilers put a few other instructions at most."""


@dataclass(frozen=True)
class JumpTable:
    """A jump table: module offsets of the jump, the table, each index's target, and of the default (None: unknown)."""

    jump: int
    table: int
    targets: tuple[int, ...]
    default: int | None


def find_jump_table(
    elf: ElfFile, function: FunctionRange, jump: int, is_code: Callable[[int], bool]
) -> JumpTable | None:
    """Return the table that the indirect jump at an offset in a function goes through; None if it is no such jump.

    is_code: whether an instruction begins at an offset. Without a comparison the table ends at the first
    entry that leads out of the function or to no instruction. DynacutError if the module is malformed.
    """
    decoded = [one for one in instructions(elf, function) if one.offset <= jump]
    if not decoded or decoded[-1].offset != jump:
        return None
    found = _absolute(decoded, elf.link_base) or _relative(decoded)
    if found is None:
        return None
    table, loaded, width = found
    count, default = _guard(decoded, loaded)
    targets: list[int] = []
    segment = elf.segment_at(table)
    if segment is None:
        return None
    limit = min(MAX_CASES if count is None else count, (segment.file_end - table) // width)
    for (entry,) in struct.iter_unpack("<i" if width == 4 else "<Q", elf.view(table, max(0, limit) * width)):
        target = table + entry if width == 4 else entry - elf.link_base
        # A part of the function that gcc moved away (.cold) is a range of its own: believed if entries are counted.
        if not is_code(target) or (count is None and not function.start <= target < function.end):
            break
        targets.append(target)
    if not targets or (count is not None and len(targets) < min(count, MAX_CASES)):
        return None
    return JumpTable(jump, table, tuple(targets), default)


def _absolute(decoded: Sequence[Instruction], link_base: int) -> tuple[int, int, int] | None:
    """Return table, index of the loading instruction, width, for jmp [index*8 + table]."""
    match = _ABSOLUTE.fullmatch(decoded[-1].op_str)
    return (int(match[2], 16) - link_base, len(decoded) - 1, 8) if match else None


def _relative(decoded: Sequence[Instruction]) -> tuple[int, int, int] | None:
    """Return the same for movsxd offset, [table + index*4]; add offset, table; jmp offset."""
    for at in range(len(decoded) - 2, max(-1, len(decoded) - _LOOK_BACK), -1):
        match = _LOAD.fullmatch(decoded[at].op_str)
        if match is None or decoded[at].mnemonic not in ("movsxd", "movslq"):
            continue
        for before in range(at - 1, -1, -1):  # the lea may be far away: compilers hoist it out of loops
            lea = _LEA.fullmatch(decoded[before].op_str) if decoded[before].mnemonic == "lea" else None
            if lea is not None and lea[1] == match[2]:
                distance = int(lea[3], 16) * (1 if lea[2] == "+" else -1)
                return decoded[before].offset + decoded[before].size + distance, at, 4
        return None
    return None


def _guard(decoded: Sequence[Instruction], loaded: int) -> tuple[int | None, int | None]:
    """Return how many entries the comparison before the table admits, and where it sends the others."""
    for at in range(loaded - 1, max(0, loaded - _LOOK_BACK), -1):
        name, operands = decoded[at].mnemonic.split()[-1], decoded[at].op_str
        if name.startswith(("call", "jmp", "ret")):
            break
        if name not in _ABOVE or not operands.startswith("0x"):
            continue
        default: int | None = int(operands, 16)
        if name in ("jbe", "jb"):  # the jump enters the table's block, what follows it is the default
            default = decoded[at].offset + decoded[at].size
        for before in range(at - 1, max(-1, at - 8), -1):
            if decoded[before].mnemonic == "cmp":
                try:
                    number = int(decoded[before].op_str.rpartition(", ")[2], 0)
                except ValueError:
                    break
                return number + _ABOVE[name], default
        return None, default
    return None, None
