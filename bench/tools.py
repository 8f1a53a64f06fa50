"""The tools that are measured: the dynacut command, and gdb writing the same bytes in two ways.

Both are started as users start them, each time anew; both keep to the same core.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.programs import BenchmarkError
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedFeature, PlannedModule, PlannedSite, Scope
from dynacut.shared.plan_file import dumps

DYNACUT = Path(sys.executable).parent / "dynacut"
GDB = ("gdb", "-nx", "-batch")
GDB_BEST = (*GDB, "-readnever", "-iex", "set auto-solib-add off")
"""As quick as gdb gets: it reads neither debug information nor any library's symbols."""
_TIMEOUT = 120
INT3 = 0xCC


@dataclass(frozen=True)
class Run:
    """One run of a command: its time from start to end, and for dynacut its JSON."""

    wall_ms: float
    report: dict[str, Any] = field(default_factory=dict)


def dynacut(pid: int, *options: str | Path) -> Run:
    """Runs `dynacut live`.

    Raises:
        BenchmarkError: it failed.
    """
    command = [str(DYNACUT), "live", "--pid", str(pid), *map(str, options), "--json"]
    started = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    wall_ms = (time.perf_counter() - started) * 1000
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr.strip()}")
    return Run(wall_ms, json.loads(done.stdout))


def gdb(pid: int, script: Path, command: Sequence[str] = GDB) -> Run:
    """Runs gdb on a process with a script of commands. Its exit status tells nothing: look at what it did."""
    started = time.perf_counter()
    subprocess.run(
        [*command, "-p", str(pid), "-x", str(script)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_TIMEOUT,
        check=False,
    )
    return Run((time.perf_counter() - started) * 1000)


def write_plan(path: Path, executable: Path, sites: Sequence[int], on_hit: str) -> None:
    """Writes a plan that disables the sites at these offsets of an executable."""
    module = PlannedModule(str(executable), ElfFile.open(executable).build_id)
    feature = PlannedFeature(
        "sites",
        OnHit.parse(on_hit),
        Scope.ENTRY,
        tuple(PlannedSite(f"{executable.name}+{offset:#x}") for offset in sites),
    )
    path.write_text(dumps(Plan("benchmark", (feature,), (), {executable.name: module})))


def write_gdb_sets(path: Path, addresses: Sequence[int], new: Sequence[int]) -> None:
    """A script that writes one byte at each address."""
    pairs = zip(addresses, new, strict=True)
    path.write_text("".join(f"set *(unsigned char *){address:#x} = {byte:#x}\n" for address, byte in pairs))


def write_gdb_buffer(path: Path, address: int, data: bytes) -> None:
    """A script that writes all bytes from an address on at once."""
    buffer = path.with_suffix(".bin")
    buffer.write_bytes(data)
    path.write_text(f"restore {buffer} binary {address:#x}\n")
