"""What `dynacut live` and `dynacut offline` show of processes in the same way, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynacut.cli.console import print_table
from dynacut.shared.errors import printable
from dynacut.shared.report import Inspection


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


def print_modules(processes: Sequence[Inspection]) -> None:
    """The modules of the first process, and what others have patched in any."""
    root = processes[0]
    print(f"process {root.pid}: {printable(root.exe)}")
    rows = [[module.name, f"{module.base:#x}", f"{module.end - module.base:,}", module.path] for module in root.modules]
    print_table("modules", ["module", "base", "bytes", "path"], rows, right=frozenset({2}))
    foreign = [
        [str(process.pid), each.at, str(each.size), each.original[:8].hex(" "), each.found[:8].hex(" ")]
        for process in processes
        for each in process.foreign
    ]
    if foreign:
        columns = ["pid", "at", "bytes", "in the file", "in memory"]
        print_table("patched by somebody else", columns, foreign, right=frozenset({0, 2}))


def print_features(processes: Sequence[Inspection], *, with_sites: bool) -> None:
    """The features of all processes; with_sites: every site as well."""
    several = len(processes) > 1
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
    for process in processes:
        if library := process.handler_json:
            whose = f" of {process.pid}" if several else ""
            print(f"handler{whose}: {library['library']} at {library['at']}, called at {library['function']}")
    if not rows:
        print("no features")
        return
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
