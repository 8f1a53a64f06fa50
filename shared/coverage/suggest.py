"""From coverage to plans: what only unwanted requests execute, and the ways to switch that off, best first."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.code import Code, code_of_file
from dynacut.shared.coverage.candidate import Candidate
from dynacut.shared.coverage.candidates import find_candidates
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.disassembly import disassembly
from dynacut.shared.errors import DynacutError
from dynacut.shared.plan import Plan, PlannedModule


@dataclass(frozen=True)
class FunctionShare:
    """What only unwanted requests execute of one function. Offsets are module offsets.

    name: as people know it, ``redis-server+0x8df70`` where there is no symbol. entry: where it begins. first: its block
    that is reached first. blocks: so many, of those it has.
    """

    name: str
    entry: int
    first: int
    blocks: int
    of: int
    size_bytes: int

    @property
    def is_entered(self) -> bool:
        """Whether wanted requests never enter it at all."""
        return self.first == self.entry


@dataclass(frozen=True)
class Difference:
    """What one module executed for unwanted requests only."""

    code: Code
    blocks: tuple[int, ...]
    """Module offsets in the order of first hits."""

    @property
    def size_bytes(self) -> int:
        """How many bytes these blocks have."""
        return sum(self.code.block_size(offset) for offset in self.blocks)

    @property
    def functions(self) -> list[FunctionShare]:
        """The functions that these blocks lie in, the first reached first."""
        starts = self.code.blocks.block_starts
        blocks: dict[tuple[int, int], list[int]] = {}
        for offset in self.blocks:
            function = self.code.function_at(offset)
            blocks.setdefault((function.start, function.end) if function else (offset, offset + 1), []).append(offset)
        return [
            FunctionShare(
                self.code.describe(start),
                start,
                first=inside[0],
                blocks=len(inside),
                of=bisect_left(starts, end) - bisect_left(starts, start),
                size_bytes=sum(map(self.code.block_size, inside)),
            )
            for (start, end), inside in blocks.items()
        ]


@dataclass(frozen=True)
class Suggestion:
    """One way to switch the feature off."""

    code: Code
    candidate: Candidate

    def plan(self, name: str) -> Plan:
        """The plan for it, with one feature of that name."""
        module = self.code.module
        planned = PlannedModule(module.path, self.code.elf.build_id)
        feature = self.candidate.as_feature(name, module.name, self.code.elf)
        return Plan(name, (feature,), (), {module.name: planned})

    @property
    def entry(self) -> str:
        """Where the feature begins, as people know it."""
        return self.code.describe(self.candidate.entry)

    @property
    def destination(self) -> str:
        """Where a hit goes on, as people know it."""
        return self.code.describe(self.candidate.destination)

    def disassembly(self) -> list[str]:
        """The first instructions at the entry."""
        return disassembly(self.code, self.candidate.entry)

    def disassembly_instead(self) -> list[str]:
        """The first instructions where a hit goes on."""
        return disassembly(self.code, self.candidate.destination)

    def disassembly_of_jump(self) -> list[str]:
        """The conditional jump that leads to the entry; empty for other kinds."""
        jump = self.candidate.jump
        return disassembly(self.code, jump, 1) if jump is not None else []


def suggest(
    wanted: Coverage, unwanted: Coverage, error: Coverage | None = None
) -> tuple[list[Difference], list[Suggestion]]:
    """What only unwanted requests executed, by module, and the ways to switch it off, best first.

    error: the unwanted request where the server refuses it already, if it can be made to.

    Raises:
        DynacutError: there is no difference, or a module's file cannot be read.
    """
    sets: list[tuple[Code, dict[int, int], dict[int, int], dict[int, int] | None]] = []
    for module in unwanted.modules:
        if not Path(module.path).is_file():
            continue  # the vDSO, and what was deleted meanwhile
        code = code_of_file(Path(module.path))
        u = dict(module.normalised(code.blocks).blocks)
        w = _blocks(wanted, module, code)
        sets.append((code, u, w, _blocks(error, module, code) if error else None))
    differences = [Difference(code, tuple(offset for offset in u if offset not in w)) for code, u, w, _ in sets]
    differences = [difference for difference in differences if difference.blocks]
    total = sum(len(difference.blocks) for difference in differences)
    if not total:
        raise DynacutError(
            "the unwanted requests executed nothing that the wanted ones did not",
            "record the unwanted requests alone, and more of them",
        )
    suggestions = [
        Suggestion(code, candidate)
        for code, u, w, e in sets
        if any(difference.code is code for difference in differences)
        for candidate in find_candidates(code, w, u, e, total=total)
    ]
    suggestions.sort(key=lambda one: -one.candidate.score)
    return differences, suggestions


def _blocks(coverage: Coverage, module: CoveredModule, code: Code) -> dict[int, int]:
    try:
        other = coverage.module(module.path)
    except DynacutError:
        return {}  # the wanted requests never loaded it
    return dict(other.normalised(code.blocks).blocks)
