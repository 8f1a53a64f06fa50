"""What instructions do to control, told by their mnemonics."""

from __future__ import annotations

from enum import Enum


class BranchKind(Enum):
    """What an instruction does that does not just go on."""

    CONDITIONAL = "conditional jump"
    JUMP = "jump"
    INDIRECT_JUMP = "indirect jump"
    CALL = "call"
    INDIRECT_CALL = "indirect call"
    END = "end"
    """A return, or an instruction that never gets further."""


_ENDS = ("ret", "iret", "sysret", "sysexit", "ud", "hlt", "int3", "int1", "ljmp", "rsm")


def branch_kind(mnemonic: str) -> BranchKind | None:
    """Return what a mnemonic of capstone does to control; None for what just goes on. Direct if there are two.

    It may have prefixes before it (notrack, bnd, rep).
    """
    word = without_prefixes(mnemonic)
    if word == "jmp":
        return BranchKind.JUMP
    if word in ("call", "lcall"):
        return BranchKind.CALL
    if word.startswith(_ENDS):
        return BranchKind.END
    if word.startswith(("j", "loop")) or word == "xbegin":
        return BranchKind.CONDITIONAL
    return None


def without_prefixes(mnemonic: str) -> str:
    """Return the last word of a mnemonic; empty if there is none."""
    words = mnemonic.split()
    return words[-1] if words else ""
