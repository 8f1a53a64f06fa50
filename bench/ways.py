"""A plan applied to a redis-server and undone by each way that dynacut has: `dynacut compare`, with its own clients.

live (ptrace), gdb (gdb/MI, driven by pygdbmi), checkpoint (CRIU's dump, the rewritten layer, CRIU's restore).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores
from bench.programs import BenchmarkError
from bench.tools import DYNACUT as COMMAND
from tests.integration.servers import free_port

_MEASURES = ("client_us", "new_client_us", "stopped_us", "wall_us", "written_bytes")
_STEPS = ("disable", "undo")
_NAMES = {"live": DYNACUT, "gdb": "gdb/MI", "checkpoint": "CRIU"}
_NOBODY = "nobody"
_PLAN = """\
format = 1
name = "redis without SET"

[[feature]]
name = "set"
on_hit = "redirect=readonlyCommand"
sites = [{ at = "setCommand" }]
"""
_TIMEOUT = 600


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """One comparison of that many turns, on instances started for it."""
    del quick
    plan = folder / "plan.toml"
    plan.write_text(_PLAN)
    progress(f"ways: {repeat} turns of each")
    with _all_cores(cores):
        report = _compare(plan, repeat, folder)
    figures = Figures("ways")
    for way in report["ways"]:
        for step in _STEPS:
            for measure in _MEASURES:
                for value in way[step].get(measure, {"values": ()})["values"]:
                    figures.add(case(step=step), _NAMES[way["way"]], measure, value)
    for measure in ("client_us", "new_client_us"):
        for value in report["nobody"][measure]["values"]:
            for step in _STEPS:
                figures.add(case(step=step), _NOBODY, measure, value)
    missing = [f"{_NAMES[each['way']]}: {each['reason']}" for each in (*report["left_out"], *report["failed"])]
    return Result(figures, [_table(figures)], _claims(figures, report), missing)


@contextmanager
def _all_cores(cores: Cores) -> Iterator[None]:
    """The redis, its clients and the tools share the machine, as they do outside of benchmarks."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores.measured, cores.other})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _compare(plan: Path, repeat: int, folder: Path) -> dict[str, Any]:
    port = str(free_port())
    server = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    what = ("--plan", plan, "--repeat", repeat, "--images", folder, "--json", "-q")
    command = [str(word) for word in (COMMAND, "compare", *what, "--", *server)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise BenchmarkError(f"dynacut compare ended with {done.returncode}: {done.stderr.strip()}") from None
    assert isinstance(report, dict)
    return report


def _table(figures: Figures) -> Table:
    rows = []
    for name in (_NOBODY, *_NAMES.values()):
        for step in _STEPS:
            if figures.values(case(step=step), name, "client_us"):
                cells = [
                    spread([value / 1000 for value in figures.values(case(step=step), name, measure)])
                    for measure in _MEASURES
                ]
                rows.append([name, step, *cells])
    return Table(
        "SET of a redis-server of 5 MB switched off and on again",
        ["by", "step", "a client waited, ms", "a new client, ms", "threads stopped, ms", "wall, ms", "written, kB"],
        rows,
        ("median (90th percentile). See `dynacut compare` in docs/reference.md for what each figure is",),
    )


def _claims(figures: Figures, report: dict[str, Any]) -> list[Claim]:
    ways = report["ways"]
    names = ", ".join(_NAMES[way["way"]] for way in ways)
    lost = sum(way[step]["lost"]["worst"] for way in ways for step in _STEPS)
    claims = [
        Claim(
            f"all ways lead to the same code and the same table, and undo completely ({names})",
            "the same" if report["equal"] else "NOT the same",
            bool(report["equal"]),
        ),
        Claim(f"open connections survive ({names})", f"{lost:.0f} broken", lost == 0),
    ]
    for step in _STEPS:
        own = figures.median(case(step=step), DYNACUT, "client_us")
        for name in ("gdb/MI", "CRIU"):
            peer = figures.median(case(step=step), name, "client_us")
            if own is not None and peer is not None:
                text = f"clients wait less for a live change than by {name} ({step})"
                figure = f"{number(own / 1000)} ms, {name} {number(peer / 1000)} ms: {number(peer / own)} times"
                claims.append(Claim(text, figure, own < peer))
    return claims
