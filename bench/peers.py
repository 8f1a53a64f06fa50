"""The tools that dynacut is measured beside: which are there, in which version, and how to get the others.

`make bench` gets what can be got (tools/peers.sh); what dynacut itself does not need lies in build/peers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.crit import has_crit
from dynacut.offline.criu import find_criu
from dynacut.shared.errors import DynacutError

ROOT = Path(__file__).resolve().parent.parent
PEER_FOLDER = ROOT / "build/peers"
"""Where packages lie that only the benchmarks use."""
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Peer:
    """A tool. version: empty if it is missing; then reason says why it is NOT MEASURED, and what to do."""

    name: str
    what: str
    version: str
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.what, "version": self.version, "not_measured": self.reason}


def peers() -> list[Peer]:
    """All of them, there or not."""
    return [
        _program("gdb", "gdb -batch: writes the same bytes", ["gdb", "-nx", "--version"], "apt-get install gdb"),
        _package("gdb/MI", "pygdbmi", "dynacut live --engine gdb: the same plan, driven through gdb", "", ""),
        _criu(),
        _crit(),
        _package(
            "pyinjector",
            "pyinjector",
            "an injector in C: ptrace, then dlopen in the target",
            str(PEER_FOLDER),
            "make bench, or pip install --target build/peers pyinjector",
        ),
        _program(
            "callgrind", "valgrind --tool=callgrind: coverage", ["valgrind", "--version"], "apt-get install valgrind"
        ),
        _package(
            "Frida",
            "frida",
            "Stalker: coverage of a running process",
            str(PEER_FOLDER),
            "make bench, or pip install --target build/peers frida",
        ),
    ]


def package_environment() -> dict[str, str]:
    """The environment of a Python that is to find the peers' packages."""
    return {**os.environ, "PYTHONPATH": str(PEER_FOLDER)}


def has_package(name: str) -> bool:
    """Whether a package of a peer is there."""
    return (PEER_FOLDER / name).is_dir()


def _program(name: str, what: str, command: Sequence[str], advice: str) -> Peer:
    if shutil.which(command[0]) is None:
        return Peer(name, what, "", f"{command[0]} is not installed ({advice})")
    line = _first_line(command)
    return Peer(name, what, line or "?")


def _package(name: str, package: str, what: str, folder: str, advice: str) -> Peer:
    code = f"from importlib.metadata import version; import {package}; print(version({package!r}))"
    environment = package_environment() if folder else dict(os.environ)
    version = _first_line([sys.executable, "-c", code], environment)
    return Peer(name, what, version, "" if version else f"the package {package} cannot be imported ({advice})")


def _criu() -> Peer:
    what = "checkpoint and restore"
    try:
        criu = find_criu(None)
    except DynacutError as error:
        return Peer("CRIU", what, "", f"{'; '.join([error.problem, *error.details])} (make criu)")
    return Peer("CRIU", what, criu.version)


def _crit() -> Peer:
    what = "CRIU’s own tool: images to JSON and back"
    if not has_crit():
        return Peer("crit", what, "", "build/criu/crit is not there (make setup)")
    return Peer("crit", what, "of CRIU’s source, as the suite of Debian has it")


def _first_line(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Of what a command prints; empty if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""
