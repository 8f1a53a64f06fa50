"""Code as people read it: a few instructions with their addresses, bytes and the names of what they branch to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dynacut.shared.binary.decode import MAX_INSTRUCTION
from dynacut.shared.code import Code


def disassembly(code: Code, offset: int, count: int = 6) -> list[str]:
    """Return up to count instructions from a module offset on, one a line, within its function.

    A line is the offset, the bytes in hex, and the instruction (Intel syntax); a direct branch has the name of
    its target behind it. Empty where no instruction certainly begins.
    """
    function = code.function_at(offset)
    lines: list[str] = []
    while function is not None and len(lines) < count and offset < function.end:
        found = code.blocks.instruction_at(offset)
        if found is None:
            break
        data = code.elf.read(offset, min(found.size, MAX_INSTRUCTION)).hex(" ")
        text = f"{found.mnemonic} {found.op_str}".rstrip()
        is_branch = found.op_str.startswith("0x") and found.mnemonic.split()[-1].startswith(("j", "call", "loop"))
        note = f"  ; {code.describe(int(found.op_str, 16))}" if is_branch else ""
        lines.append(f"{offset:#x}: {data:<23} {text}{note}")
        offset += found.size
    return lines


@dataclass(frozen=True)
class Instruction:
    """One instruction as it is in memory; text is ``(bad)`` where the bytes are none."""

    address: int
    data: bytes
    text: str


def instructions(data: bytes, address: int) -> Iterator[Instruction]:
    """The instructions in bytes of a target's memory, patched or not; address: of the first, absolute."""
    import capstone

    decoder: Any = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)  # type: ignore[no-untyped-call]
    position = 0
    while position < len(data):
        found = next(decoder.disasm_lite(data[position:], address + position, 1), None)
        size, text = (found[1], f"{found[2]} {found[3]}".rstrip()) if found else (1, "(bad)")
        yield Instruction(address + position, data[position : position + size], text)
        position += size
