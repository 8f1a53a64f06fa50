"""The results of `dynacut compare` as JSON, from which the table and the page are made as well."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dynacut.cli.console import SCHEMA
from dynacut.cli.quantities import counted, shown
from dynacut.jobs.compare.results import Measured, Observed, Results
from dynacut.jobs.compare.ways import Settings, Step, Way
from dynacut.shared.errors import DynacutError, printable

NOBODY = "nobody"
"""The row for the same client with nobody touching the server."""


class Measure(NamedTuple):
    """A figure: its name in JSON, its title for people, what it is, and its unit: µs, ms, B for bytes, or none."""

    name: str
    title: str
    about: str
    unit: str


MEASURES = (
    Measure("client_us", "client waited", "the longest time a client on an open connection waited for a reply", "µs"),
    Measure(
        "new_client_us", "new client waited", "the longest time until a client with a new connection was served", "µs"
    ),
    Measure("failed", "failed", "requests that were refused or reset, or not answered", ""),
    Measure("lost", "lost", "connections that broke", ""),
    Measure("stopped_us", "threads stopped", "the longest time threads of the process stood still", "µs"),
    Measure("wall_us", "command", "the whole command, from its start to its end", "µs"),
    Measure("dump_ms", "dump", "of a checkpoint: CRIU’s dump, with what is looked at before", "ms"),
    Measure("rewrite_ms", "rewrite", "of a checkpoint: reading the image and writing the rewritten layer", "ms"),
    Measure("restore_ms", "restore", "of a checkpoint: CRIU’s restore, with the checks before it", "ms"),
    Measure(
        "copied_bytes",
        "pages copied",
        "pages of code, handler and table that became the process’s own; the first change maps the handler",
        "B",
    ),
    Measure(
        "anonymous_bytes", "memory", "resident memory of no file that was added, the server’s own work included", "B"
    ),
    Measure("virtual_bytes", "mapped", "address space that was added, by the first change to a process", "B"),
    Measure("written_bytes", "written", "bytes written to files: the image and the rewritten layer", "B"),
)


def document_of(results: Results, settings: Settings, repeat: int) -> dict[str, Any]:
    """Everything, for --json."""
    facts = results.facts
    assert facts is not None
    return {
        "schema": SCHEMA,
        "target": {
            "pid": facts.pid,
            "name": facts.name,
            "exe": facts.exe,
            "processes": facts.processes,
            "threads": facts.threads,
        }
        | {"resident_bytes": facts.resident_bytes},
        "plan": str(settings.plan),
        "features": list(settings.features),
        "probe": results.probe,
        "repeat": repeat,
        "taken": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine(settings.criu),
        "ways": [_way(way, results) for way in results.steps if way in results.undone],
        NOBODY: _figures([_seen(observed) for observed in results.quiet]),
        "left_out": [{"way": str(way), "reason": printable(reason)} for way, reason in results.left_out.items()],
        "failed": [
            {"way": str(way), "step": str(failure.step), "reason": failure.reason, "restored": failure.restored}
            for way, failure in results.failures.items()
        ],
        "broken_off": _broken_off(results.broken_off),
        "equal": results.equal,
        "warnings": [printable(line) for line in results.warnings],
    }


def rows_of(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Way, step and figures of each, with nobody first."""
    steps = [(str(way["way"]), str(step), way[str(step)]) for way in document["ways"] for step in Step]
    return [(NOBODY, "", document[NOBODY]), *steps]


def extent_of(target: dict[str, Any]) -> str:
    """The target in a few words."""
    processes, threads = counted(target["processes"], "process", "processes"), counted(target["threads"], "thread")
    return f"{printable(target['exe'])}, {processes}, {threads}, {shown(target['resident_bytes'], 'B')} resident"


def verdicts_of(way: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is to be said of a way besides figures, and whether it is as it should be."""
    lost, failed = (max(way[str(step)][name]["worst"] for step in Step) for name in ("lost", "failed"))
    at_new = "" if lost else ", for new connections"
    return [
        ("the same code", True) if way["same_text"] else ("OTHER CODE than by the first way", False),
        ("the same table", True) if way["same_tables"] else ("ANOTHER TABLE than by the first way", False),
        ("undone completely", True) if way["undone"] else ("NOT UNDONE completely", False),
        ("open connections survived", True) if not lost else (f"up to {lost:.0f} open connections BROKEN", False),
        ("no request failed", True) if not failed else (f"up to {failed:,.0f} requests failed{at_new}", False),
    ]


def cell(figure: dict[str, Any] | None, unit: str) -> str:
    """A figure for a table: the median, and the worst where it is another."""
    if figure is None:
        return ""
    middle, worst = shown(figure["median"], unit), shown(figure["worst"], unit)
    return middle if middle == worst else f"{middle} ({worst})"


def _broken_off(error: DynacutError | KeyboardInterrupt | None) -> str | None:
    if error is None:
        return None
    return error.problem if isinstance(error, DynacutError) else "interrupted"


def _way(way: Way, results: Results) -> dict[str, Any]:
    return {
        "way": str(way),
        "title": way.description,
        "same_text": results.same_text[way],
        "same_tables": results.same_tables[way],
        "undone": results.undone[way],
        **{str(step): _step(results.steps[way][step]) for step in Step},
    }


def _step(measured: Sequence[Measured]) -> dict[str, Any]:
    rows = [
        {
            **_seen(each.observed),
            "stopped_us": each.stopped_us,
            "wall_us": each.run.wall_ms * 1000,
            "written_bytes": each.written_bytes,
            **{f"{name}_bytes": added for name, added in each.memory.items()},
            **{
                name: each.run.report[name]
                for name in ("dump_ms", "rewrite_ms", "restore_ms")
                if name in each.run.report
            },
        }
        for each in measured
    ]
    return _figures(rows)


def _seen(observed: Observed) -> dict[str, float]:
    both = [seen for seen in (observed.kept, observed.fresh) if seen is not None]
    return {
        "client_us": observed.client.longest_us,
        "new_client_us": observed.fresh.longest_us,
        "failed": sum(seen.failed for seen in both),
        "lost": sum(seen.lost for seen in both),
        "replies_per_second": sum(seen.replies for seen in both) / max(seen.seconds for seen in both),
    }


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, worst and all values of each figure; a figure that a way does not have is left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    figures = {}
    for name in names:
        values = [round(row[name], 1) for row in rows if row.get(name) is not None]
        if values:
            figures[name] = {"median": round(median(values), 1), "worst": max(values), "values": values}
    return figures


def _machine(criu: Path | None) -> dict[str, Any]:
    memory = _field("/proc/meminfo", "MemTotal").split()
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[0]) // 1024 if memory else 0,
        "virtual": "hypervisor" in _field("/proc/cpuinfo", "flags").split(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gdb": _or_nothing(_gdb_version),
        "criu": _or_nothing(lambda: _criu_version(criu)),
    }


def _or_nothing(version: Callable[[], str]) -> str:
    try:
        return version()
    except (DynacutError, OSError, subprocess.SubprocessError):
        return ""


def _gdb_version() -> str:
    if shutil.which("gdb") is None:
        return ""
    done = subprocess.run(["gdb", "-nx", "--version"], capture_output=True, text=True, timeout=10.0, check=False)
    return next(iter(done.stdout.splitlines()), "").rpartition(") ")[2]


def _criu_version(criu: Path | None) -> str:
    from dynacut.offline.criu import find_criu

    return find_criu(criu).version


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
