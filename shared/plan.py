"""A plan: what is to change, in terms that survive restarts, ASLR and machines."""

from __future__ import annotations

from collections.abc import Mapping as Dictionary
from dataclasses import dataclass, field, replace
from enum import StrEnum

from dynacut.handlers.table import NAME_SIZE
from dynacut.shared.errors import DynacutError, shortened
from dynacut.shared.on_hit import OnHit

MAX_SITE_SIZE = 1 << 16
MAX_ADDED_SIZE = 1 << 30
MAX_ADDED_CODE = MAX_REMOVED_SIZE = 1 << 20
PROTECTIONS = ("r--", "rw-", "r-x")
"""Of memory that a plan adds: never writable and executable at once."""
EDITS = "edits"
"""The feature that plain edits without a feature of their own belong to."""


class Scope(StrEnum):
    """How much of each block a removal covers."""

    ENTRY = "entry"
    BLOCK = "block"
    PAGE = "page"


@dataclass(frozen=True)
class PlannedModule:
    """The module that offsets in the plan are relative to."""

    path: str
    build_id: str | None


@dataclass(frozen=True)
class PlannedSite:
    """A basic block by its first byte: a SITE, its size in bytes if known, and its first bytes if known."""

    at: str
    size: int | None = None
    old: bytes = b""


@dataclass(frozen=True)
class PlannedFeature:
    """Sites that are switched together."""

    name: str
    on_hit: OnHit
    scope: Scope
    sites: tuple[PlannedSite, ...]


@dataclass(frozen=True)
class PlannedEdit:
    """A plain replacement of bytes; old and new are equally long."""

    at: str
    old: bytes
    new: bytes
    feature: str = EDITS


@dataclass(frozen=True)
class PlannedMemory:
    """Private memory to add: whole pages. protection: as in proc_pid_maps(5), without the last letter."""

    at: str
    """Where: an absolute address, or SITE + offset, such as a place behind a module."""
    size: int
    protection: str
    contents: bytes
    """What it begins with; zeros follow."""
    feature: str = EDITS


@dataclass(frozen=True)
class PlannedRemoval:
    """Whole pages of a module's code to unmap; size in bytes."""

    at: str
    size: int
    feature: str = EDITS


@dataclass(frozen=True)
class Plan:
    """Everything in one plan file."""

    name: str
    features: tuple[PlannedFeature, ...] = ()
    edits: tuple[PlannedEdit, ...] = ()
    modules: Dictionary[str, PlannedModule] = field(default_factory=dict)
    added: tuple[PlannedMemory, ...] = ()
    removed: tuple[PlannedRemoval, ...] = ()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Every feature that the plan switches, those of plain edits included."""
        return tuple(dict.fromkeys([part.name for part in self.features] + self.features_of_edits))

    @property
    def features_of_edits(self) -> list[str]:
        """The feature of each plain edit, of each memory added, and of each removed, in this order."""
        parts = (self.edits, self.added, self.removed)
        return [part.feature for each in parts for part in each]

    def with_action(self, on_hit: OnHit | None, scope: Scope | None) -> Plan:
        """The plan with another action and another scope for all its features, where they are given."""
        features = tuple(
            replace(feature, on_hit=on_hit or feature.on_hit, scope=scope or feature.scope) for feature in self.features
        )
        return replace(self, features=features)

    def only(self, names: list[str]) -> Plan:
        """The plan with just these features.

        Raises:
            DynacutError: it lacks one of them.
        """
        for name in names:
            if name not in self.feature_names:
                raise DynacutError(
                    f"the plan has no feature {name!r}", f"it has {', '.join(self.feature_names) or 'none'}"
                )
        return Plan(
            self.name,
            tuple(part for part in self.features if part.name in names),
            tuple(edit for edit in self.edits if edit.feature in names),
            self.modules,
            tuple(part for part in self.added if part.feature in names),
            tuple(part for part in self.removed if part.feature in names),
        )


def quoted(value: object) -> str:
    """A value from a plan for a message: short, whatever it is."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} beyond all measure"


def name_problem(name: str) -> str | None:
    """What is wrong with a feature's name; None if nothing is."""
    if not name.isprintable() or not 0 < len(name.encode(errors="replace")) < NAME_SIZE:
        return f"a feature's name is 1 to {NAME_SIZE - 1} bytes of printable text, not {quoted(name)}"
    return None
