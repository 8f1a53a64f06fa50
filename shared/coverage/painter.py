"""Draws the picture of the code (picture.py) from what ran in each phase, and the modules' files.

Blocks are those of the module's block map, so that logs of any tool give the same picture; a module whose file is not
here, or is not the one that ran, is drawn from the log alone, and then what never ran is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dynacut.shared.code import Code, code_of_file
from dynacut.shared.coverage.coverage import UNKNOWN_PATH, Coverage, CoveredModule, union_of_all
from dynacut.shared.coverage.picture import CODE, DrawnFunction, DrawnModule, Picture, Run, phase_bit
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.target import PAGE_SIZE

PHASE_LIMIT = 6
"""So many phases can be told apart by colour."""
PAGE_LIMIT = 1 << 17
"""The most pages of one module that are drawn: 512 MiB of text."""
_FITTING = 0.9  # of another build, about a quarter of the blocks begin where an instruction does


class Phase(NamedTuple):
    """What ran in a phase."""

    name: str
    coverage: Coverage


def picture_of(phases: Sequence[Phase], modules: Sequence[str] = ()) -> Picture:
    """Draw the modules that the phases have in them, or those of these names or paths.

    Phases of one name are one phase. Modules are found by the paths that the logs give them; see Picture.warnings
    for those that are not.

    Raises:
        DynacutError: more than PHASE_LIMIT phases, no coverage at all, no such module, or more than PAGE_LIMIT pages.
    """
    named: dict[str, Coverage] = {}
    for name, coverage in phases:
        named[name] = named[name].union(coverage) if name in named else coverage
    if len(named) > PHASE_LIMIT:
        raise DynacutError(
            f"{len(named)} phases cannot be told apart",
            f"give at most {PHASE_LIMIT}; files of one phase get one NAME=",
            status=ExitStatus.USAGE,
        )
    everything = union_of_all(named.values())
    paths = {everything.module(name).path for name in modules} if modules else None
    # In each phase a module may be known by another path, and drcov has no build-ids: Coverage finds the same ones.
    covered = [
        {module.path: module for module in everything.intersection(coverage).modules} for coverage in named.values()
    ]
    drawn, warnings = [], []
    for module in everything.modules:
        if module.path in ("", UNKNOWN_PATH):
            warnings.append(f"{module.size_bytes} bytes of code in unnamed memory are left out")
        elif paths is None or module.path in paths:
            painter = _Painter(module, [known.get(module.path) for known in covered])
            if found := painter.drawn():
                drawn.append(found)
            warnings += painter.warnings
    if not drawn:
        raise DynacutError("there is no code to draw", "give logs that have blocks in them")
    return Picture(tuple(named), tuple(drawn), tuple(warnings))


class _Painter:
    """Draws one module from its coverage in each phase; None where a phase does not have it."""

    def __init__(self, module: CoveredModule, phases: Sequence[CoveredModule | None]) -> None:
        self._module = module
        self._phases = [phase or CoveredModule.of(module.path, {}) for phase in phases]
        self.warnings: list[str] = []

    def drawn(self) -> DrawnModule | None:
        """The module; None if nothing of it is known."""
        code = self._code()
        if code is not None:
            return self._with(code)
        if not self._module.blocks:
            return None
        blocks = [phase.blocks for phase in self._phases]
        return self._painted(None, self._module.blocks, blocks, _pages_of(self._module.path, self._module.blocks))

    def _code(self) -> Code | None:
        """The code in the module's file, if it is there and is what ran."""
        path = self._module.path
        if not path.startswith("/"):  # [vdso]; and what lies in the current folder is not meant
            self._warn_if_drawn(f"{path} has no file")
            return None
        code = code_of_file(Path(path))
        try:
            block_map = code.blocks
        except DynacutError as error:
            self._warn_if_drawn(error.problem)
            return None
        if not len(block_map):
            self._warn_if_drawn(f"{path} has no .eh_frame that tells its functions")
            return None
        known = [offset for offset in self._module.blocks if block_map.block_at(offset)]
        fitting = sum(map(block_map.is_boundary, known))
        if self._module.blocks and (not known or fitting < _FITTING * len(known)):
            self._warn_if_drawn(
                f"{path} seems not to be the file that ran: {fitting} of {len(self._module.blocks)} blocks begin at an"
                " instruction of it"
            )
            return None
        return code

    def _warn_if_drawn(self, problem: str) -> None:
        if self._module.blocks:
            self.warnings.append(f"{problem}; it is drawn from the log alone")

    def _with(self, code: Code) -> DrawnModule:
        block_map = code.blocks
        known = dict(zip(block_map.block_starts, block_map.block_sizes, strict=True))
        outside = self._module.difference(CoveredModule.of(self._module.path, known)).size_bytes
        if outside:
            self.warnings.append(f"{self._module.path}: {outside} executed bytes lie in no known block, such as stubs")
        text = [(segment.offset, segment.file_end) for segment in code.elf.segments if segment.executable]
        pages = {page for start, end in text for page in _pages(self._module.path, start, end)}
        return self._painted(code, known, [phase.normalised(block_map).blocks for phase in self._phases], pages)

    def _painted(
        self, code: Code | None, known: Mapping[int, int], phases: Sequence[Mapping[int, int]], pages: set[int]
    ) -> DrawnModule:
        masks = dict.fromkeys(known, CODE)
        for index, blocks in enumerate(phases):
            for start in blocks:
                masks[start] = masks.get(start, CODE) | phase_bit(index)
        text = ((page, page + PAGE_SIZE) for page in pages)
        layers = [text, *(((start, start + size) for start, size in part.items()) for part in (known, *phases))]
        return DrawnModule(
            name=self._module.name,
            path=self._module.path,
            build_id=self._module.build_id if code is None else code.elf.build_id,
            from_log_alone=code is None,
            blocks=masks,
            runs=tuple(_runs(layers)),
            functions=() if code is None else tuple(_functions(code)),
        )


def _pages(path: str, start: int, end: int) -> range:
    """The pages of [start, end), each by its first offset."""
    pages = range(start // PAGE_SIZE * PAGE_SIZE, end, PAGE_SIZE)
    if len(pages) > PAGE_LIMIT:
        raise DynacutError(f"{path!r} has more than {PAGE_LIMIT} pages of text", "choose other modules by --module")
    return pages


def _pages_of(path: str, blocks: Mapping[int, int]) -> set[int]:
    pages: set[int] = set()
    for start, size in blocks.items():
        pages.update(_pages(path, start, start + size))
        if len(pages) > PAGE_LIMIT:
            raise DynacutError(f"{path!r} has blocks on more than {PAGE_LIMIT} pages", "choose others by --module")
    return pages


def _runs(layers: Sequence[Iterable[tuple[int, int]]]) -> list[Run]:
    """Cut the text, which is the first layer, where any layer begins or ends; layer N + 1 gives bit N of the mask."""
    edges = sorted(
        edge
        for layer, ranges in enumerate(layers)
        for start, end in ranges
        for edge in ((start, layer, 1), (end, layer, -1))
    )
    depths = [0] * len(layers)  # blocks of a log may overlap
    runs: list[Run] = []
    state = position = 0
    for offset, layer, step in edges:
        if offset > position and state & 1:
            mask = state >> 1
            if runs and runs[-1].end == position and runs[-1].mask == mask:
                runs[-1] = Run(runs[-1].start, offset, mask)
            else:
                runs.append(Run(position, offset, mask))
        position = offset
        depths[layer] += step
        state = state | 1 << layer if depths[layer] else state & ~(1 << layer)
    return runs


def _functions(code: Code) -> Iterable[DrawnFunction]:
    for start, end in code.functions:
        try:
            name = code.describe(start)
        except DynacutError:  # a broken table of symbols
            name = f"{code.module.name}+{start:#x}"
        yield DrawnFunction(start, end, name)
