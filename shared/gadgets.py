"""How many ROP gadgets code holds: the addresses from which an attacker's return address could go on.

A gadget is an address, aligned to the program's own instructions or not, from which at most MAX_INSTRUCTIONS are
executed one after the other, the last of them a return or an indirect jump or call, and none before it a branch, a trap
or a system call. Each address counts once. ROPgadget and ropper count different texts of instructions, and so have
other numbers; what is to be compared is two counts of one tool.
"""

from __future__ import annotations

from dynacut.shared.decode import MAX_INSTRUCTION, disassembler

MAX_INSTRUCTIONS = 6
"""The longest gadget, its end included."""
_AT_ONCE = 4  # instructions: few, as most streams soon run into one that is known
_CHUNK = _AT_ONCE * MAX_INSTRUCTION
_UNKNOWN, _BROKEN = 0, 255
_END = 254
_INDIRECT = frozenset({"jmp", "call"})
_RETURNS = frozenset({"ret", "retf"})
_STOPS = ("j", "loop", "int", "ud", "hlt", "iret", "call", "sys", "xbegin")


def count_gadgets(code: bytes) -> int:
    """The number of gadgets in a stretch of code; some seconds for each megabyte."""
    steps = _steps(code)
    lengths = bytearray(len(code) + MAX_INSTRUCTION)
    count = 0
    for offset in range(len(code) - 1, -1, -1):
        step = steps[offset]
        if step == _END:
            lengths[offset] = 1
        elif step != _BROKEN:
            following = lengths[offset + step]
            lengths[offset] = following + 1 if 0 < following < MAX_INSTRUCTIONS else 0
        count += lengths[offset] > 0
    return count


def _steps(code: bytes) -> bytearray:
    """For each offset the size of the instruction there, or _END, or _BROKEN."""
    disassemble = disassembler()
    steps = bytearray(len(code))
    for start in range(len(code)):
        if steps[start] != _UNKNOWN:
            continue
        position = start
        for offset, size, mnemonic, operands in disassemble(code[start : start + _CHUNK], start, _AT_ONCE):
            if steps[offset] != _UNKNOWN:
                break
            steps[offset] = _step(size, mnemonic.rpartition(" ")[2], operands)
            position = offset + size
            if steps[offset] in (_END, _BROKEN):
                break
        if position == start:
            steps[start] = _BROKEN
    return steps


def _step(size: int, mnemonic: str, operands: str) -> int:
    if mnemonic in _RETURNS or (mnemonic in _INDIRECT and not operands[:1].isdigit()):
        return _END
    return _BROKEN if mnemonic.startswith(_STOPS) else size
