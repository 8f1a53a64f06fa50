"""What is in force in a target: the features with their state and hits, and what else looks patched. Same for both
backends, as text and as JSON."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dynacut.handlers.table import NO_LIBRARY, Action, Table, TableSite, UserLibrary
from dynacut.shared.added import is_mapped
from dynacut.shared.code import CodeOf
from dynacut.shared.errors import DynacutError, printable
from dynacut.shared.holes import Patched
from dynacut.shared.on_hit import OnHit
from dynacut.shared.restoring import SiteMemory
from dynacut.shared.target import PAGE_SIZE, Module, Target

_MAX_FOREIGN = 1000


@dataclass(frozen=True)
class SiteReport:
    """One site: where it is, what a hit does, how often it was hit, and whether it is patched at this moment."""

    at: str
    address: int
    length: int
    on_hit: str
    hits: int
    patched: bool
    loaded: bool = True
    """Whether the module it is in is loaded still."""


@dataclass(frozen=True)
class FeatureReport:
    """One feature with its sites."""

    name: str
    sites: tuple[SiteReport, ...]
    unmapped_pages: int = 0
    """Pages of its code that are not mapped at this moment."""
    added_bytes: int = 0
    """Memory that it adds, as far as it is mapped at this moment."""

    @property
    def patched(self) -> int:
        """How many of its sites are patched. Fewer than all: some were learned, or a patcher was killed midway."""
        return sum(site.patched for site in self.sites)

    @property
    def loaded(self) -> int:
        """How many of its sites are in modules that are loaded still."""
        return sum(site.loaded for site in self.sites)

    @property
    def state(self) -> str:
        """``disabled`` as soon as a site is patched, or memory added, else ``enabled``; ``unloaded`` where all that it
        has are sites in modules that are not loaded any more."""
        if self.patched or self.added_bytes:
            return "disabled"
        return "unloaded" if self.sites and not self.loaded else "enabled"

    @property
    def hits(self) -> int:
        """The hits of all its sites."""
        return sum(site.hits for site in self.sites)

    def as_json(self, *, with_sites: bool) -> dict[str, Any]:
        """The feature for --json; sites is their number, patched how many of them are in force."""
        document: dict[str, Any] = {
            "name": self.name,
            "state": self.state,
            "sites": len(self.sites),
            "patched": self.patched,
            "hits": self.hits,
        }
        if self.unmapped_pages:
            document["unmapped_pages"] = self.unmapped_pages
        if self.added_bytes:
            document["added_bytes"] = self.added_bytes
        if with_sites:
            document["site_list"] = [
                {
                    "at": site.at,
                    "address": f"{site.address:#x}",
                    "length": site.length,
                    "on_hit": site.on_hit,
                    "hits": site.hits,
                    "patched": site.patched,
                }
                for site in self.sites
            ]
        return document


@dataclass(frozen=True)
class Foreign:
    """Bytes of a module's code that differ from its file and are not dynacut's."""

    at: str
    size: int
    found: bytes
    original: bytes


@dataclass(frozen=True)
class Inspection:
    """What was seen in one process. warnings: whatever endangers it or makes the picture incomplete, a line each."""

    pid: int
    exe: str
    modules: tuple[Module, ...]
    features: tuple[FeatureReport, ...]
    foreign: tuple[Foreign, ...]
    warnings: tuple[str, ...]
    library: UserLibrary = NO_LIBRARY
    """The user's handler library, if one is in force."""

    @property
    def handler_json(self) -> dict[str, str] | None:
        """That library for --json: its path, where it is mapped, and the address of its handler; None without one."""
        if not self.library.is_in_force:
            return None
        addresses = {"at": f"{self.library.start:#x}", "function": f"{self.library.action.handler:#x}"}
        return {"library": printable(self.library.path), **addresses}


def merged_features(processes: Sequence[Inspection], *, with_sites: bool) -> list[dict[str, Any]]:
    """The features of all processes for --json: hits added up; disabled if they are in any process."""
    merged: dict[str, dict[str, Any]] = {}
    for process in processes:
        for feature in process.features:
            entry = merged.get(feature.name)
            if entry is None:
                merged[feature.name] = feature.as_json(with_sites=with_sites)
                continue
            entry["hits"] += feature.hits
            if entry["state"] == "unloaded":
                entry["state"] = feature.state
            if feature.state == "disabled":
                entry["state"] = feature.state
                entry["patched"] = max(entry["patched"], feature.patched)
    return list(merged.values())


def features_of(target: Target, table: Table | None, codes: CodeOf) -> tuple[FeatureReport, ...]:
    """The features that a table describes, in its order."""
    if table is None:
        return ()
    by_feature: dict[str, list[SiteReport]] = {name: [] for name in table.features}
    unmapped, added = dict.fromkeys(table.features, 0), dict.fromkeys(table.features, 0)
    view = Patched(target, table)
    holes = {hole.start for hole in view.holes}
    memory = SiteMemory(view)
    for site in table.sites:
        if site.action is Action.UNMAP:
            unmapped[site.feature] += site.range_size // PAGE_SIZE if site.address in holes else 0
            continue
        if site.action is Action.MAP:
            added[site.feature] += site.range_size if is_mapped(target, site) else 0
            continue
        found = memory.found(site)
        by_feature[site.feature].append(
            SiteReport(
                at=codes.describe(site.address),
                address=site.address,
                length=len(site.old),
                on_hit=_on_hit(site, codes),
                hits=site.hits,
                patched=found == site.new,
                loaded=found is not None,
            )
        )
    return tuple(FeatureReport(name, tuple(sites), unmapped[name], added[name]) for name, sites in by_feature.items())


def _on_hit(site: TableSite, codes: CodeOf) -> str:
    if site.action is Action.EDIT:
        return "edit"
    destination = codes.describe(site.argument) if site.action is Action.REDIRECT else ""
    return str(OnHit(site.action, site.argument, destination))


def foreign_changes(target: Target, tables: Sequence[Table], codes: CodeOf) -> list[Foreign]:
    """Code that differs from its file: other tools' breakpoints and patches. tables: what is known to be dynacut's.

    Only pages that were written to are compared, so that nothing is loaded into the target by looking.
    """
    ours = sorted((site for table in tables for site in table.sites), key=lambda site: site.address)
    starts = [site.address for site in ours]
    found: list[Foreign] = []
    for module in target.modules:
        for mapping in module.executable_mappings:
            pages = target.private_pages(mapping)
            if not pages:
                continue
            code = codes.of(module)
            try:
                segments = [segment for segment in code.elf.segments if segment.executable]
            except DynacutError:
                continue  # a file that cannot be read cannot be compared with
            for page, segment in product(pages, segments):
                # A page may begin, or end, amid a segment.
                start = max(page, module.base + segment.offset)
                end = min(page + PAGE_SIZE, module.base + segment.file_end)
                if start >= end:
                    continue
                original = code.elf.read(start - module.base, end - start)
                memory = target.read(start, end - start)
                if memory != original:
                    first = max(0, bisect_right(starts, start) - 1)
                    near = ours[first : bisect_right(starts, end)]
                    found += _differences(codes, start, memory, original, near)
                if len(found) > _MAX_FOREIGN:
                    return found
    return found


def _differences(codes: CodeOf, start: int, memory: bytes, original: bytes, ours: Sequence[TableSite]) -> list[Foreign]:
    known = bytearray(len(memory))
    for site in ours:
        for position in range(max(0, site.address - start), min(len(memory), site.end - start)):
            known[position] = 1
    differing = [
        position
        for position, (one, other) in enumerate(zip(memory, original, strict=True))
        if one != other and not known[position]
    ]
    found = []
    first = 0
    for index, position in enumerate(differing):
        if index + 1 < len(differing) and differing[index + 1] == position + 1:
            continue
        begin, end = differing[first], position + 1
        found.append(Foreign(codes.describe(start + begin), end - begin, memory[begin:end], original[begin:end]))
        first = index + 1
    return found
