"""Blocks that have to stay: those that `learn` has put back, taken out of a plan.

A list of them is coverage like any other, and so a drcov log: a block that was learned is one that ran. It can be given
to `dynacut plan --serving`, merged and drawn as every other log.
"""

from __future__ import annotations

import re
from dataclasses import replace

from dynacut.handlers.table import Action, Table
from dynacut.shared.code import CodeOf
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.errors import DynacutError
from dynacut.shared.plan import Plan, PlannedSite
from dynacut.shared.target import Target

_SITE = re.compile(r"(?P<module>.+)\+(?P<offset>0x[0-9a-fA-F]{1,16})")


def learned_blocks(target: Target, table: Table | None) -> Coverage:
    """The blocks of a target that learn and were hit, in the order of their hits.

    Empty where nothing was. What forked children learned is in their own tables.
    """
    codes = CodeOf(target)
    hit = [site for site in (table.sites if table else ()) if site.action is Action.LEARN and site.order]
    modules: dict[str, CoveredModule] = {}
    blocks: dict[str, dict[int, int]] = {}
    for site in sorted(hit, key=lambda site: site.order):
        code = codes.containing(site.address)
        if code is None:
            continue  # its module was unloaded
        module = code.module
        found = blocks.setdefault(module.path, {})
        found[site.address - module.base] = site.size
        modules[module.path] = CoveredModule(module.name, module.path, code.elf.build_id, found)
    return Coverage(tuple(modules.values()))


def planned_code(plan: Plan) -> Coverage:
    """What a plan names by ``module+0xOFFSET``, as coverage."""
    return Coverage(tuple(_planned(plan).values()))


def without(plan: Plan, kept: Coverage) -> tuple[Plan, int]:
    """The plan without the sites that any kept byte lies in, and how many these are.

    Only sites of the form ``module+0xOFFSET`` can be told; a feature of which nothing is left goes too.

    Raises:
        DynacutError: nothing at all would be left.
    """
    planned = _planned(plan)
    left = dict(zip(planned, planned_code(plan).difference(kept).modules, strict=True))

    def stays(site: PlannedSite) -> bool:
        name, offset = _place(site)
        return name not in left or left[name].blocks.get(offset) == planned[name].blocks[offset]

    features = [
        replace(feature, sites=tuple(site for site in feature.sites if stays(site))) for feature in plan.features
    ]
    count = sum(len(feature.sites) for feature in plan.features) - sum(len(feature.sites) for feature in features)
    features = [feature for feature in features if feature.sites]
    if not features and not (plan.edits or plan.added or plan.removed):
        raise DynacutError("all blocks of the plan are to be kept: nothing is left of it", "there is nothing to remove")
    return replace(plan, features=tuple(features)), count


def _planned(plan: Plan) -> dict[str, CoveredModule]:
    """The sites of a plan's modules, by the modules' names in it."""
    planned: dict[str, dict[int, int]] = {}
    for feature in plan.features:
        for site in feature.sites:
            name, offset = _place(site)
            if name in plan.modules:
                planned.setdefault(name, {})[offset] = site.size or 1
    return {
        name: CoveredModule.of(plan.modules[name].path, blocks, plan.modules[name].build_id)
        for name, blocks in planned.items()
    }


def _place(site: PlannedSite) -> tuple[str, int]:
    place = _SITE.fullmatch(site.at)
    return (place["module"], int(place["offset"], 16)) if place else ("", 0)
