"""Loading a library of one's own into a running process: dynacut maps and relocates it, injectors call dlopen in it.

The stop is what a spinning thread of the target sees, as in `stop`; every measurement has a fresh process.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.control import stay_busy
from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores
from bench.peers import has_package, package_environment
from bench.programs import Observed, compile_library, compile_program, observed
from bench.tools import GDB, Run, dynacut, gdb
from dynacut.cli.quantities import counted

INJECTOR = "pyinjector"
_GDB = "gdb, dlopen"
_NOBODY = "nobody"
_MEASURES = ("load_stop_us", "load_held_us", "load_wall_ms")
_TIMEOUT = 60


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """All tools in turns."""
    executable = compile_program("observer", folder)
    library = compile_library("library", folder)
    figures = Figures("library")
    missing: dict[str, str] = {}
    tools = [DYNACUT]
    if has_package("pyinjector"):
        tools.append(INJECTOR)
    else:
        missing[INJECTOR] = "not installed (make bench, or pip install --target build/peers pyinjector)"
    if shutil.which("gdb"):
        tools.append(_GDB)
    else:
        missing[_GDB] = "gdb is not installed (apt-get install gdb)"
    with observed(executable, 1, "main", cores, folder) as target:
        _load(DYNACUT, target, library, folder)  # fills the caches
    turns = [(threads, tool) for threads in ((1,) if quick else (1, 8)) for tool in tools]
    for repetition in range(repeat):
        random.shuffle(turns)
        for threads, tool in turns:
            progress(f"library: repetition {repetition + 1} of {repeat}, {tool}")
            if tool not in missing and not _measure(figures, tool, threads, executable, library, cores, folder):
                missing[tool] = "it does not load the library on this machine (as gdb, where it cannot call functions)"
    return Result(figures, [_table(figures)], _claims(figures), [f"{tool}: {why}" for tool, why in missing.items()])


def _measure(
    figures: Figures, tool: str, threads: int, executable: Path, library: Path, cores: Cores, folder: Path
) -> bool:
    """False: the tool ran, and the library is not there."""
    measured = case(threads=threads)
    with observed(executable, threads, "main", cores, folder) as target:
        with target.control.measuring():
            ran = _load(tool, target, library, folder)
        stop_us, held_us = target.control.largest_us, target.control.stopped_us
        # dynacut maps the library's bytes, not its file, and has checked what it reports.
        if tool != DYNACUT and str(library) not in Path(f"/proc/{target.pid}/maps").read_text():
            return False
        figures.add(measured, tool, "load_stop_us", stop_us)
        figures.add(measured, tool, "load_held_us", held_us)
        figures.add(measured, tool, "load_wall_ms", ran.wall_ms)
        with target.control.measuring():
            stay_busy(ran.wall_ms / 1000)
        figures.add(measured, _NOBODY, "load_stop_us", target.control.largest_us)
    return True


def _load(tool: str, target: Observed, library: Path, folder: Path) -> Run:
    if tool == DYNACUT:
        return dynacut(target.pid, "--handler", library)
    if tool == INJECTOR:
        return _inject(target.pid, library)
    script = folder / "library.gdb"
    script.write_text(f'print ((void *(*)(const char *, int))dlopen)("{library}", 2)\n')
    return gdb(target.pid, script, GDB)


def _inject(pid: int, library: Path) -> Run:
    """Its exit status tells whether it worked; the maps of the target do as well."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pyinjector", str(pid), str(library)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=package_environment(),
        timeout=_TIMEOUT,
        check=False,
    )
    return Run((time.perf_counter() - started) * 1000)


def _table(figures: Figures) -> Table:
    rows = [
        [str(dict(measured)["threads"]), tool, *(spread(figures.values(measured, tool, name)) for name in _MEASURES)]
        for measured in figures.medians(DYNACUT, "load_stop_us")
        for tool in (_NOBODY, DYNACUT, INJECTOR, _GDB)
        if figures.values(measured, tool, "load_stop_us")
    ]
    return Table(
        "loading a library into a running process",
        ["threads", "by", "stop, µs", "held, µs", "wall, ms"],
        rows,
        (
            "median (90th percentile). stop: the largest gap that the spinning main thread saw; held: of the gaps in "
            "which it was stopped, and not interrupted by the machine",
            "dynacut also maps its own handler and table, and makes the library’s function SIGTRAP’s action",
        ),
    )


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for measured, stop in figures.medians(DYNACUT, "load_stop_us").items():
        peer = figures.median(measured, INJECTOR, "load_stop_us")
        if peer is not None:
            threads = counted(int(dict(measured)["threads"]), "thread")
            claims.append(
                Claim(
                    f"a library is loaded with a shorter stop than by an injector in C ({threads})",
                    f"{number(stop)} µs, {INJECTOR} {number(peer)} µs",
                    stop < peer,
                )
            )
    return claims
