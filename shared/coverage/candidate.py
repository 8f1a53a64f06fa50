"""One way to switch a feature off: the block where it begins, where a hit goes on instead, and how plans say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from dynacut.handlers.table import Action
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import EDITS, PlannedEdit, PlannedFeature, PlannedSite, Scope

_OLD_BYTES = 8
"""So many bytes of a site go into the plan, to recognise it by."""


class CandidateKind(StrEnum):
    """How the feature is reached."""

    JUMP = "jump"
    CASE = "case"
    FUNCTION = "function"


@dataclass(frozen=True)
class Candidate:
    """One way to switch a feature off: a hit of entry goes on at destination. Offsets are module offsets.

    size: the bytes of the block that starts at entry. reason: one sentence for people. parts: what the score is
    made of. jump: for a conditional jump, the offset and bytes of the instruction and of what forces it.
    """

    kind: CandidateKind
    entry: int
    destination: int
    size: int
    reason: str
    parts: Mapping[str, float]
    jump: tuple[int, bytes, bytes] | None = None

    @property
    def score(self) -> float:
        """How likely it is the right one; comparable between modules of one program if found with the same total."""
        return sum(self.parts.values())

    def as_feature(self, name: str, module_name: str, elf: ElfFile) -> PlannedFeature:
        """Return the feature for a plan: an int3 at entry, redirected to destination."""
        old = elf.read(self.entry, min(self.size, _OLD_BYTES))
        site = PlannedSite(f"{module_name}+{self.entry:#x}", self.size, old)
        on_hit = OnHit(Action.REDIRECT, destination=f"{module_name}+{self.destination:#x}")
        return PlannedFeature(name, on_hit, Scope.ENTRY, (site,))

    def as_edit(self, module_name: str, feature: str = EDITS) -> PlannedEdit | None:
        """Return the edit that forces the jump: no cost at run time, but no hits are counted. None for other kinds."""
        if self.jump is None:
            return None
        offset, old, new = self.jump
        return PlannedEdit(f"{module_name}+{offset:#x}", old, new, feature)


def forced(jump: bytes, *, taken: bool) -> bytes | None:
    """Return the bytes that make a conditional jump always (taken) or never jump; None for loop, jrcxz and prefixes.

    Encodings: Intel SDM volume 2, Jcc and JMP. ``0f 8x rel32`` becomes ``nop; jmp rel32``: both end at the same place,
    so the distance stays. Not taken: the recommended NOPs of 2 and 6 bytes, one instruction each.
    """
    if len(jump) == 2 and jump[0] & 0xF0 == 0x70:
        return b"\xeb" + jump[1:] if taken else b"\x66\x90"
    if len(jump) == 6 and jump[0] == 0x0F and jump[1] & 0xF0 == 0x80:
        return b"\x90\xe9" + jump[2:] if taken else b"\x66\x0f\x1f\x44\x00\x00"
    return None
