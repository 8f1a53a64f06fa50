"""One way to switch a feature off: the block where it begins, where a hit goes on instead, and how plans say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from dynacut.handlers.table import Action
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import PlannedFeature, PlannedSite, Scope

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
    made of. jump: the offset of the conditional jump that leads to entry; None for other kinds.
    """

    kind: CandidateKind
    entry: int
    destination: int
    size: int
    reason: str
    parts: Mapping[str, float]
    jump: int | None = None

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
