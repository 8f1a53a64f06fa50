"""What `dynacut live` and `dynacut offline` show of processes in the same way, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynacut.cli.console import print_table
from dynacut.cli.quantities import counted
from dynacut.shared.errors import printable
from dynacut.shared.report import FeatureReport, Inspection, merged_features


def processes_document(processes: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Every process of a tree with its features, for --json."""
    return [
        {
            "pid": process.pid,
            "exe": process.exe,
            "features": [feature.as_json(with_sites=False) for feature in process.features],
            "handler": process.handler_json,
        }
        for process in processes
    ]


def inspected_document(processes: Sequence[Inspection]) -> dict[str, Any]:
    """The modules and the handler library of the first process, what others have patched, and warnings, for --json."""
    return {
        "handler": processes[0].handler_json,
        "modules": [
            {"name": module.name, "path": module.path, "base": f"{module.base:#x}"} for module in processes[0].modules
        ],
        "foreign": [
            {
                "pid": process.pid,
                "at": foreign.at,
                "size": foreign.size,
                "found": foreign.found.hex(" "),
                "original": foreign.original.hex(" "),
            }
            for process in processes
            for foreign in process.foreign
        ],
        "warnings": [warning for process in processes for warning in process.warnings],
    }


def print_processes(processes: Sequence[Inspection], *, with_modules: bool) -> None:
    """Which processes they are, and what others have patched in any; with_modules: the modules of the first as well."""
    root, *others = processes
    which = f"process {root.pid}" + (f" and {len(others):,} more" if others else "")
    modules = "" if with_modules else f", {counted(len(root.modules), 'module')} (-v lists them)"
    print(f"{which}: {printable(root.exe)}{modules}")
    if with_modules:
        rows = [[each.name, f"{each.base:#x}", each.path] for each in root.modules]
        print_table("modules", ["module", "base", "path"], rows)
    foreign = [
        [str(process.pid), each.at, str(each.size), each.original[:8].hex(" "), each.found[:8].hex(" ")]
        for process in processes
        for each in process.foreign
    ]
    if foreign:
        columns = ["pid", "at", "bytes", "in the file", "in memory"]
        print_table("patched by somebody else", columns, foreign, right=frozenset({0, 2}))


def print_features(processes: Sequence[Inspection], *, with_sites: bool) -> None:
    """The features of all processes, added up; with_sites: of each process, with every site."""
    several = len(processes) > 1
    for process in processes:
        if library := process.handler_json:
            whose = f" of {process.pid}" if several else ""
            print(f"handler{whose}: {library['library']} at {library['at']}, called at {library['function']}")
    if not any(process.features for process in processes):
        print("no features")
    elif several and not with_sites:
        _print_sums(processes)
    else:
        _print_each(processes, several=several, with_sites=with_sites)


def _print_sums(processes: Sequence[Inspection]) -> None:
    """A line for each feature: in how many processes it is disabled, and the sites and hits of all."""
    by_name: dict[str, list[FeatureReport]] = {}
    for process in processes:
        for feature in process.features:
            by_name.setdefault(feature.name, []).append(feature)
    rows = []
    for (name, features), merged in zip(by_name.items(), merged_features(processes, with_sites=False), strict=True):
        disabled = sum(feature.state == "disabled" for feature in features)
        sites = sum(len(feature.sites) for feature in features)
        patched = sum(feature.patched for feature in features)
        cells = [name, str(merged["state"]), f"{disabled}/{len(processes)}", f"{patched}/{sites}"]
        rows.append([*cells, str(merged["hits"])])
    print_table("features", ["feature", "state", "processes", "sites", "hits"], rows, right=frozenset({2, 3, 4}))


def _print_each(processes: Sequence[Inspection], *, several: bool, with_sites: bool) -> None:
    rows = []
    sites = []
    for process in processes:
        pid = [str(process.pid)] if several else []
        for feature in process.features:
            patched = f"{feature.patched}/{len(feature.sites)}"
            rows.append([*pid, feature.name, feature.state, patched, str(feature.hits)])
            for site in feature.sites:
                state = "patched" if site.patched else "original" if site.loaded else "unloaded"
                cells = [feature.name, site.at, str(site.length), site.on_hit, state, str(site.hits)]
                sites.append([*pid, *cells])
    first = ["pid"] if several else []
    print_table("features", [*first, "feature", "state", "sites", "hits"], rows, right=frozenset({len(first) + 3}))
    if with_sites:
        columns = [*first, "feature", "site", "bytes", "on hit", "text", "hits"]
        print_table("sites", columns, sites, right=frozenset({len(first) + 2, len(first) + 5}))
        for process in processes:
            _print_mappings(process, whose=f" of {process.pid}" if several else "")


def _print_mappings(process: Inspection, whose: str) -> None:
    for feature in process.features:
        if feature.unmapped_pages:
            print(f"{feature.name}{whose}: {feature.unmapped_pages} pages of code are unmapped")
        if feature.added_bytes:
            print(f"{feature.name}{whose}: {feature.added_bytes:,} bytes of memory are added")
