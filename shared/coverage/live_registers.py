"""Whether a switch's jump overwrites registers that its default reads.

The default is entered from the comparison, before the jump's index and table are loaded: compilers may use registers
for those that still hold a variable of the default's. A redirect from a case to the default then shows it a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from dynacut.shared.binary.branches import BranchKind
from dynacut.shared.coverage.flow import Flow

_MAX_BLOCKS = 16
_ARGUMENTS = frozenset({"rdi", "rsi", "rdx", "rcx", "r8", "r9"})
_SCRATCH = _ARGUMENTS | {"rax", "r10", "r11"}
_CALLS = (BranchKind.CALL, BranchKind.INDIRECT_CALL)
_WIDE = {f"{low}l": f"r{low}x" for low in "abcd"} | {f"{low}h": f"r{low}x" for low in "abcd"}
_WIDE |= {f"{prefix}{low}x": f"r{low}x" for low in "abcd" for prefix in ("", "e", "r")}
_WIDE |= {f"{prefix}{name}": f"r{name}" for name in ("si", "di", "bp") for prefix in ("", "e", "r")}
_WIDE |= {f"{name}l": f"r{name}" for name in ("si", "di", "bp")}
_WIDE |= {f"r{number}{suffix}": f"r{number}" for number in range(8, 16) for suffix in ("", "d", "w", "b")}
"""The whole of each general register by its parts' names, without rsp."""


class Clobbered(IntEnum):
    """How certain it is that a register is overwritten that is needed."""

    NO = 0
    PERHAPS = 1
    """A call comes first that may take it as an argument, or not."""
    YES = 2


def clobbers(flow: Flow, block: int, default: int) -> Clobbered:
    """Return whether a block with a switch's jump writes general registers that the code at default reads.

    block: the start of a block, as a module offset. Looked at are the first _MAX_BLOCKS blocks from default on.
    """
    written = {name for _, names in _accesses(flow, block) for name in names}
    seen: set[int] = set()
    waiting = [(default, frozenset(written))]
    result = Clobbered.NO
    while waiting and len(seen) < _MAX_BLOCKS:
        start, wrong = waiting.pop()
        if start in seen or not wrong:
            continue
        seen.add(start)
        for reads, writes in _accesses(flow, start):
            if reads & wrong:
                return Clobbered.YES
            wrong -= writes
        branch = flow.branch_of(start)
        if branch is not None and branch.kind in _CALLS:
            if wrong & _ARGUMENTS:
                result = Clobbered.PERHAPS
            wrong -= _SCRATCH
        elif branch is not None and branch.kind is BranchKind.END and "rax" in wrong:
            result = Clobbered.PERHAPS  # the value returned, if the function returns any
        waiting += [(successor, wrong) for successor in flow.successors(start)]
    return result


def _accesses(flow: Flow, start: int) -> Iterator[tuple[frozenset[str], frozenset[str]]]:
    """Yield the general registers that each instruction of a block reads and writes, by their whole names."""
    import capstone

    block = flow.blocks.block_at(start)
    if block is None or block.start != start:
        return
    untyped: Any = capstone
    decoder = untyped.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    for instruction in decoder.disasm(flow.elf.read(block.start, block.size), block.start):
        sides = instruction.regs_access()
        reads, writes = (
            frozenset(_WIDE[name] for register in side if (name := instruction.reg_name(register)) in _WIDE)
            for side in sides
        )
        if instruction.mnemonic == "xor" and len(set(instruction.op_str.split(", "))) == 1:
            reads = frozenset()  # sets it to zero, whatever it was
        yield reads, writes
