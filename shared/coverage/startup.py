"""Start-up code: the blocks that ran while the program started and in no later phase, as a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynacut.shared.code import Code, code_of_file
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import MAX_SITE_SIZE, Plan, PlannedFeature, PlannedModule, PlannedSite, Scope

FEATURE = "startup"
"""The feature that holds all start-up code, of all modules: it is switched as a whole."""
_DYNAMIC_LINKER = re.compile(r"ld(-linux.*|-musl.*|-[0-9.]+|64)?\.so(\.[0-9]+)*")
_OLD_SIZE = 8  # with a build-id, enough to see that a site is not what it was; resolving compares the whole block
_OFFSET = re.compile(r"(?P<module>[^!]+)\+(?P<offset>0x[0-9a-fA-F]{1,16})")
_SYMBOL = re.compile(r"(?:(?P<module>[^!]+)!)?(?P<name>[^!+]+)")


@dataclass(frozen=True)
class StartupCode:
    """What ran of one module: whole basic blocks, module offset → size in bytes.

    init: while it started. later: in any other phase. only: in init and in no other, in the order of their first hits.
    """

    code: Code
    init: Mapping[int, int]
    later: Mapping[int, int]

    @cached_property
    def only(self) -> Mapping[int, int]:
        """The blocks of init that are not in later: the start-up code."""
        return {offset: size for offset, size in self.init.items() if offset not in self.later}

    @property
    def share(self) -> float:
        """The start-up code as a part of all blocks that ran, 0 to 1."""
        executed = len(self.init.keys() | self.later.keys())
        return len(self.only) / executed if executed else 0.0

    @cached_property
    def functions(self) -> list[tuple[str, int]]:
        """The functions of which nothing ran later: their names, and the bytes that go, the biggest first."""
        later = {self.code.function_at(offset) for offset in self.later}
        sizes: dict[int, int] = {}
        for offset, size in self.only.items():
            function = self.code.function_at(offset)
            if function is not None and function not in later:
                sizes[function.start] = sizes.get(function.start, 0) + size
        ranked = sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
        return [(self.code.describe(start), size) for start, size in ranked]


def startup_code(
    init: Coverage, later: Sequence[Coverage], modules: Sequence[str] = (), *, all_modules: bool = False
) -> list[StartupCode]:
    """The start-up code of each module, by comparing whole blocks of its block map.

    A block counts as run later if any of its bytes did, however the logs cut their blocks. modules: names or paths;
    by default the first module of init that has a file, which is the executable. all_modules: every module that has
    one, but the dynamic linker, which runs again whenever a symbol is bound.

    Raises:
        DynacutError: a module is not in init or in no later phase, or its file is another build; or there is no
            start-up code.
    """
    found = []
    for module in _chosen(init, modules, all_modules=all_modules):
        code = code_of_file(Path(module.path))
        blocks_later: dict[int, int] = {}
        for part in _same_module(later, module):
            blocks_later |= part.normalised(code.blocks).blocks
        found.append(StartupCode(code, module.normalised(code.blocks).blocks, blocks_later))
    if not any(part.only for part in found):
        raise DynacutError(
            "everything that ran at start-up ran later as well",
            "record start-up from the program's first instruction: dynacut trace -o F --ready-port N -- CMD",
        )
    return found


def _chosen(init: Coverage, names: Sequence[str], *, all_modules: bool) -> list[CoveredModule]:
    if names:
        return [init.module(name) for name in dict.fromkeys(names)]
    with_file = [module for module in init.modules if module.blocks and Path(module.path).is_file()]
    if not with_file:
        raise DynacutError("the coverage of start-up has no module whose file is here", "make the plan where it ran")
    if not all_modules:
        return with_file[:1]
    return [module for module in with_file if not _DYNAMIC_LINKER.fullmatch(module.name)]


def _same_module(later: Sequence[Coverage], module: CoveredModule) -> list[CoveredModule]:
    """The same module in other logs, which may have been made elsewhere: by its path, or else by its name.

    Where several have the name, it may be any: what ran of one of them is not taken for start-up code.

    Raises:
        DynacutError: no log has it. Then everything would seem to be start-up code, while it only was not recorded.
    """
    found = []
    for coverage in later:
        by_path = [other for other in coverage.modules if other.path == module.path]
        found += by_path or [other for other in coverage.modules if other.name == module.name]
    if not found:
        raise DynacutError(
            f"the later phases have no module {module.path!r}: what it ran in them is not known",
            "record them with the same modules, or leave it out by --module",
        )
    return found


def split_at(coverage: Coverage, site: str) -> tuple[Coverage, Coverage]:
    """An ordered log cut at an init point: what was first executed before the block of SITE, and from it on.

    site: ``module+0xOFFSET``, ``symbol`` or ``module!symbol``. A log keeps the order of first hits in each module, not
    among them, so only the module of the site is in the result.

    Raises:
        DynacutError: the site is not found, or its block did not run.
    """
    module, offset = _point(coverage, site)
    order = list(module.blocks.items())
    cut = next((index for index, (start, size) in enumerate(order) if start <= offset < start + size), None)
    if cut is None:
        raise DynacutError(
            f"the init point {site} did not run: it is in no block of {module.name}",
            "name a place that start-up passes",
        )

    def part(blocks: Sequence[tuple[int, int]]) -> Coverage:
        return Coverage((CoveredModule(module.name, module.path, module.build_id, dict(blocks)),))

    return part(order[:cut]), part(order[cut:])


def _point(coverage: Coverage, site: str) -> tuple[CoveredModule, int]:
    if place := _OFFSET.fullmatch(site):
        return coverage.module(place["module"]), int(place["offset"], 16)
    place = _SYMBOL.fullmatch(site)
    if place is None:
        raise DynacutError(f"{site!r} is no init point", "give module+0xOFFSET, symbol or module!symbol")
    modules = [coverage.module(place["module"])] if place["module"] else list(coverage.modules)
    found = []
    for module in modules:
        if module.blocks and Path(module.path).is_file():
            symbols = code_of_file(Path(module.path)).symbols.lookup(place["name"])
            found += [(module, symbol.offset) for symbol in symbols]
    if len(found) != 1:
        problem = "ambiguous" if found else "in no module of the coverage"
        raise DynacutError(f"the init point {site} is {problem}", "give it as module+0xOFFSET")
    return found[0]


def startup_plan(parts: Sequence[StartupCode], on_hit: OnHit, scope: Scope) -> Plan:
    """The plan that removes the start-up code of all modules, as one feature."""
    modules: dict[str, PlannedModule] = {}
    sites: list[PlannedSite] = []
    for part in parts:
        if not part.only:
            continue
        module, elf = part.code.module, part.code.elf
        name = module.name if module.name not in modules else module.path
        modules[name] = PlannedModule(module.path, elf.build_id)
        for offset, size in sorted(part.only.items()):
            known = min(size, _OLD_SIZE) if elf.build_id else size
            if size <= MAX_SITE_SIZE:
                sites.append(PlannedSite(f"{name}+{offset:#x}", size, elf.read(offset, known)))
    feature = PlannedFeature(FEATURE, on_hit, scope, tuple(sites))
    return Plan("start-up code", (feature,), (), modules)
