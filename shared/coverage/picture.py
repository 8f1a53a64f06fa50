"""A picture of the code: which bytes of each module's text ran in which phases, page by page.

A phase is the coverage of start-up, of wanted requests, of unwanted ones, and so on. Every byte of the text has a mask:
CODE if it lies in a known basic block, and a bit for each phase that executed this block.
painter.py draws it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dynacut.shared.target import PAGE_SIZE

CODE = 1
"""The bit of a mask that says: in a known block. Phase N has bit N + 1; mask 0 is padding, stubs, data."""


class Run(NamedTuple):
    """Bytes of one mask, as module offsets; end is exclusive."""

    start: int
    end: int
    mask: int


class DrawnFunction(NamedTuple):
    """A function as module offsets, and what people call it; end is exclusive."""

    start: int
    end: int
    name: str


class Page(NamedTuple):
    """PAGE_SIZE bytes of text: the module offset of the first, and how many have which mask."""

    start: int
    bytes_by_mask: Mapping[int, int]


class Share(NamedTuple):
    """A part of a module's text: whole blocks, bytes, and the pages that hold any of these bytes."""

    blocks: int
    size_bytes: int
    pages: int


@dataclass(frozen=True)
class DrawnModule:
    """The text of one module. Offsets are relative to its load base."""

    name: str
    path: str
    build_id: str | None
    from_log_alone: bool
    """No file was there to tell blocks and functions: the text is the pages that the log names."""
    blocks: Mapping[int, int]
    """The mask of each block by its start."""
    runs: tuple[Run, ...]
    """The whole text, ascending; neighbours that touch differ in their masks."""
    functions: tuple[DrawnFunction, ...]

    @cached_property
    def pages(self) -> tuple[Page, ...]:
        """All pages of the text, ascending."""
        counts: dict[int, Counter[int]] = {}
        for start, end, mask in self.runs:
            while start < end:
                page = start // PAGE_SIZE * PAGE_SIZE
                part = min(end, page + PAGE_SIZE)
                counts.setdefault(page, Counter())[mask] += part - start
                start = part
        return tuple(Page(start, counts[start]) for start in sorted(counts))

    def share(self, holds: Callable[[int], bool]) -> Share:
        """Return how much of the text has a mask that holds."""
        return Share(
            sum(number for mask, number in self._blocks_by_mask.items() if holds(mask)),
            sum(size for mask, size in self._bytes_by_mask.items() if holds(mask)),
            sum(any(map(holds, page.bytes_by_mask)) for page in self.pages),
        )

    def executed_in(self, phase: int) -> Share:
        """Return what ran in the phase of that index, whether or not in others too."""
        return self.share(lambda mask: bool(mask & phase_bit(phase)))

    def cells(self, number: int) -> list[Counter[int]]:
        """Return the text in number parts of about as many pages each: bytes by mask. Fewer parts if fewer pages."""
        number = min(number, len(self.pages))
        cells: list[Counter[int]] = [Counter() for _ in range(number)]
        for index, page in enumerate(self.pages):
            cells[index * number // len(self.pages)].update(page.bytes_by_mask)
        return cells

    @cached_property
    def _blocks_by_mask(self) -> Counter[int]:
        return Counter(self.blocks.values())

    @cached_property
    def _bytes_by_mask(self) -> Counter[int]:
        total: Counter[int] = Counter()
        for start, end, mask in self.runs:
            total[mask] += end - start
        return total


@dataclass(frozen=True)
class Picture:
    """All modules, and what their masks mean.

    Each byte is of one kind, which is what gives it its colour: executed in one phase only (the kind with the index
    of the phase), in several, never, or no code. kinds names them in this order.
    """

    phases: tuple[str, ...]
    modules: tuple[DrawnModule, ...]
    warnings: tuple[str, ...]

    @property
    def several(self) -> int:
        """The kind of what ran in more than one phase."""
        return len(self.phases)

    @property
    def never(self) -> int:
        """The kind of known code that ran in no phase."""
        return len(self.phases) + 1

    @property
    def no_code(self) -> int:
        """The kind of what lies in no known block."""
        return len(self.phases) + 2

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of all kinds."""
        single = len(self.phases) == 1
        alone = (name if single else f"only {name}" for name in self.phases)
        return (*alone, "several phases", "never executed", "no known code")

    def kind_of(self, mask: int) -> int:
        """Return the kind of a mask."""
        phases = mask // phase_bit(0)
        if phases & (phases - 1):
            return self.several
        if phases:
            return phases.bit_length() - 1
        return self.never if mask & CODE else self.no_code

    def share(self, module: DrawnModule, kind: int) -> Share:
        """Return what of a module is of a kind."""
        return module.share(lambda mask: self.kind_of(mask) == kind)

    def functions_only_in(self, module: DrawnModule, phase: int) -> list[tuple[DrawnFunction, int]]:
        """Return the functions that have code which ran in that phase only, and how many bytes, the most first."""
        sizes: Counter[int] = Counter()
        starts = [function.start for function in module.functions]
        for start, end, mask in module.runs:
            while start < end and self.kind_of(mask) == phase:
                index = bisect_right(starts, start) - 1
                if index < 0 or start >= module.functions[index].end:
                    break
                part = min(end, module.functions[index].end)
                sizes[index] += part - start
                start = part
        return [(module.functions[index], size) for index, size in sorted(sizes.items(), key=lambda item: -item[1])]

    def idle_pages(self, module: DrawnModule) -> int:
        """Return how many pages of a module's text hold no executed block."""
        return len(module.pages) - module.share(lambda mask: mask >= phase_bit(0)).pages

    def phases_of(self, mask: int) -> tuple[int, ...]:
        """Return the indexes of the phases of a mask."""
        return tuple(index for index in range(len(self.phases)) if mask & phase_bit(index))


def phase_bit(phase: int) -> int:
    """Return the bit of a mask that stands for the phase of that index."""
    return 2 << phase
