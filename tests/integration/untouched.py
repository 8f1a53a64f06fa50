"""Whether a process is as it was: its code, its mappings, its signal actions and masks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dynacut.handlers.table import CODE_SIZE
from dynacut.shared.proc import read_mappings
from dynacut.shared.target import Mapping


@dataclass(frozen=True)
class Snapshot:
    """Everything that an undo has to bring back. masks: SigBlk, SigIgn and SigCgt of each thread."""

    code: dict[int, bytes]
    mappings: tuple[tuple[int, int, str], ...]
    masks: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, pid: int) -> Snapshot:
        """Reads it, without the region that dynacut leaves mapped and the vDSO, in whose tail the first stub lies."""
        kept = [mapping for mapping in without_region(pid) if not mapping.path.startswith("[v")]
        with Path(f"/proc/{pid}/mem").open("rb") as memory:
            code = {}
            for mapping in kept:
                if mapping.executable and mapping.is_file:
                    memory.seek(mapping.start)
                    code[mapping.start] = memory.read(mapping.size)
        # The heap grows and shrinks by itself; what is mapped from files does not.
        mappings = tuple((mapping.start, mapping.end, mapping.path) for mapping in kept if mapping.is_file)
        return cls(code, mappings, {task.name: _masks(task) for task in Path(f"/proc/{pid}/task").iterdir()})


def without_region(pid: int) -> list[Mapping]:
    """The VMAs but those of dynacut's region."""
    mappings = read_mappings(pid)
    region = {
        mapping
        for code, table in pairwise(mappings)
        for mapping in (code, table)
        if code.size == CODE_SIZE and code.executable and not code.is_file and code.end == table.start
    }
    # What a trace shares with forks lies behind its table.
    ends = {mapping.end for mapping in region}
    return [
        mapping
        for mapping in mappings
        if mapping not in region and not (mapping.start in ends and mapping.path.startswith("/dev/zero"))
    ]


def _masks(task: Path) -> tuple[str, ...]:
    lines = (task / "status").read_text().splitlines()
    return tuple(line for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt")))
