"""Looking at a process without touching it: no stop, no system call of its own, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynacut.live.process import Process
from dynacut.live.ptrace.masks import lasting_blockers
from dynacut.live.tracing.trace import armed_blocks
from dynacut.shared.inspect import inspected
from dynacut.shared.proc import task_status
from dynacut.shared.report import FeatureReport, Inspection
from dynacut.shared.target import SIGTRAP_BIT


def inspect(process: Process, *, thorough: bool = True) -> Inspection:
    """Looks at a process; thorough: also at what other tools have patched."""

    def warnings(features: Sequence[FeatureReport], in_force: bool) -> list[str]:
        caught = bool(task_status(process.pid).caught & SIGTRAP_BIT)
        found = warnings_of(features, in_force, caught, lambda: lasting_blockers(process.pid))
        if armed := armed_blocks(process):
            found.append(
                f"{armed:,} blocks are armed by `dynacut trace`; if that was killed, each is put back by its first "
                "hit, and all by --undo"
            )
        return found

    return inspected(process, process.pid, warnings, thorough=thorough)


def warnings_of(
    features: Sequence[FeatureReport], in_force: bool, catches_sigtrap: bool, blockers: Callable[[], Sequence[int]]
) -> list[str]:
    """What endangers a running process. blockers: finds the threads that block SIGTRAP, and not only for the moment."""
    warnings = [
        f"feature {feature.name!r} is only partly in force ({feature.patched} of {feature.loaded} sites): "
        "a patcher was interrupted; disable or enable it again"
        for feature in features
        if 0 < feature.patched < feature.loaded and not any(site.on_hit == "learn" for site in feature.sites)
    ]
    if in_force and not catches_sigtrap:
        warnings.append("the program has taken SIGTRAP's action away: the next hit ends it; use --undo")
    if in_force and (blocking := blockers()):
        count = f"{len(blocking)} thread{'s' if len(blocking) > 1 else ''}"
        warnings.append(f"{count} block SIGTRAP (such as {blocking[0]}): a hit there ends the program; disable again")
    return warnings
