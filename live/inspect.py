"""Looking at a process without touching it: no stop, no system call of its own, nothing loaded."""

from __future__ import annotations

from dynacut.handlers.table import TRACE_MAGIC, UserLibrary
from dynacut.live.masks import SIGTRAP_BIT, lasting_blockers
from dynacut.live.proc import task_status
from dynacut.live.process import Process
from dynacut.live.trace import armed_blocks
from dynacut.shared.code import CodeOf
from dynacut.shared.holes import Patched
from dynacut.shared.region import find_region, user_of
from dynacut.shared.report import FeatureReport, Inspection, features_of, foreign_changes


def inspect(process: Process, *, thorough: bool = True) -> Inspection:
    """Looks at a process; thorough: also at what other tools have patched."""
    found = find_region(process)
    table = found.table if found else None
    codes = CodeOf(Patched(process, table))
    features = features_of(process, table, codes)
    library = user_of(table)
    tables = [one.table for one in (found, find_region(process, TRACE_MAGIC)) if one is not None and one.table]
    foreign = foreign_changes(process, tables, codes) if thorough else []
    return Inspection(
        process.pid,
        process.exe,
        tuple(process.modules),
        features,
        tuple(foreign),
        tuple(_warnings(process, features, library)),
        library,
    )


def _warnings(process: Process, features: tuple[FeatureReport, ...], library: UserLibrary) -> list[str]:
    warnings = [
        f"feature {feature.name!r} is only partly in force ({feature.patched} of {len(feature.sites)} sites): "
        "a patcher was interrupted; disable or enable it again"
        for feature in features
        if 0 < feature.patched < len(feature.sites) and not any(site.on_hit == "learn" for site in feature.sites)
    ]
    if armed := armed_blocks(process):
        warnings.append(
            f"{armed:,} blocks are armed by `dynacut trace`; if that was killed, each is put back by its first hit, "
            "and all by --undo"
        )
    in_force = library.is_in_force or any(feature.patched for feature in features)
    if in_force and not task_status(process.pid).caught & SIGTRAP_BIT:
        warnings.append("the program has taken SIGTRAP's action away: the next hit ends it; use --undo")
    if in_force and (blocking := lasting_blockers(process.pid)):
        count = f"{len(blocking)} thread{'s' if len(blocking) > 1 else ''}"
        warnings.append(f"{count} block SIGTRAP (such as {blocking[0]}): a hit there ends the program; disable again")
    return warnings
