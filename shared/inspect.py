"""Looking at a target: what its table says, what else has changed its code, and what endangers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynacut.handlers.table import TRACE_MAGIC
from dynacut.shared.code import CodeOf
from dynacut.shared.holes import Patched
from dynacut.shared.region import find_region, user_of
from dynacut.shared.report import FeatureReport, Inspection, features_of, foreign_changes
from dynacut.shared.target import Target

Warn = Callable[[Sequence[FeatureReport], bool], Sequence[str]]
"""From the features, and whether a site or a handler library is in force, to the warnings."""


def inspected(target: Target, pid: int, warn: Warn, *, thorough: bool) -> Inspection:
    """What is seen in a target; thorough: also what other tools have patched.

    Raises:
        DynacutError: it cannot be read, or its table is damaged.
    """
    found = find_region(target)
    table = found.table if found else None
    codes = CodeOf(Patched(target, table))
    features = features_of(target, table, codes)
    library = user_of(table)
    tables = [one.table for one in (found, find_region(target, TRACE_MAGIC)) if one is not None and one.table]
    foreign = foreign_changes(target, tables, codes) if thorough else []
    in_force = library.is_in_force or any(feature.patched for feature in features)
    return Inspection(
        pid, target.exe, tuple(target.modules), features, tuple(foreign), tuple(warn(features, in_force)), library
    )
