"""What a machine has of what dynacut needs: findings, each with what a lack costs and how to mend it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.symbols import DEBUG_ROOT
from dynacut.shared.errors import AS_ROOT
from dynacut.shared.proc import task_status

_VERSION_TIMEOUT = 10.0


class State(StrEnum):
    """How well a piece works."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


class Area(StrEnum):
    """What a piece is needed for."""

    BASIS = "basis"
    """All of dynacut."""
    LIVE = "live"
    GDB = "gdb"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Finding:
    """One piece. found: what is there, in a few words; costs: what cannot be done without; mend: how to get it.

    essential: the area does not work at all while it is missing.
    """

    name: str
    area: Area
    state: State
    found: str
    costs: str = ""
    mend: str = ""
    essential: bool = False


CAPABILITIES = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24, "CAP_CHECKPOINT_RESTORE": 40}
"""Those that matter, by their numbers in the kernel's include/uapi/linux/capability.h."""


def capability(name: str, area: Area, costs: str, mend: str) -> Finding:
    """Whether this process has a capability in force (capabilities(7)). mend: for root; others must become it."""
    if task_status(os.getpid()).capabilities >> CAPABILITIES[name] & 1:
        return Finding(name, area, State.OK, "in force")
    return Finding(name, area, State.LIMITED, "not in force", costs, mend if os.geteuid() == 0 else AS_ROOT)


def program(name: str, area: Area, *, costs: str, package: str) -> Finding:
    """Whether a program is in PATH, with the version that it says. package: Debian's, that has it."""
    path = shutil.which(name)
    mend = f"apt-get install {package}"
    if path is None:
        return Finding(name, area, State.MISSING, "not in PATH", costs, mend)
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, area, State.MISSING, f"{path} cannot be run: {error}", costs, mend)
    version = re.search(r"\d+(\.\d+)+", done.stdout.decode(errors="replace").partition("\n")[0])
    if done.returncode != 0 or version is None:
        return Finding(name, area, State.MISSING, f"{path} does not say its version", costs, mend)
    return Finding(name, area, State.OK, f"{version[0]}, {path}")


def basis() -> list[Finding]:
    """What all of dynacut needs: the built handler, a compiler to build it, debug files, a place for its caches."""
    return [_handler(), _compiler(), _debug_files(), _cache()]


def _handler() -> Finding:
    from dynacut.handlers.blob import handler_code

    try:
        size = len(handler_code())
    except OSError:
        costs = "nothing can be disabled, neither live nor in images"
        mend = "install dynacut anew by `pip install .`; in its source folder run `python3 handlers/build.py`"
        return Finding("handler", Area.BASIS, State.MISSING, "not built", costs, mend, essential=True)
    return Finding("handler", Area.BASIS, State.OK, f"{size:,} bytes")


def _compiler() -> Finding:
    """The tools that handlers/build.py calls."""
    wanted = ((os.environ.get("CC") or "gcc", "gcc"), (os.environ.get("OBJCOPY") or "objcopy", "binutils"))
    missing = [(command, package) for command, package in wanted if shutil.which(command.split()[0]) is None]
    if not missing:
        return Finding("compiler", Area.BASIS, State.OK, " and ".join(command for command, _ in wanted))
    return Finding(
        "compiler",
        Area.BASIS,
        State.LIMITED,
        f"no {' and no '.join(command for command, _ in missing)} in PATH",
        "dynacut cannot be installed from source; what is installed works",
        f"apt-get install {' '.join(package for _, package in missing)}",
    )


def _debug_files() -> Finding:
    folder = Path("/") / DEBUG_ROOT
    if (folder / ".build-id").is_dir():
        return Finding("debug files", Area.BASIS, State.OK, f"{folder}/.build-id")
    return Finding(
        "debug files",
        Area.BASIS,
        State.LIMITED,
        f"none below {folder}",
        "in stripped programs a site is module+0xOFFSET or an exported symbol, and file.c:LINE is known nowhere",
        "apt-get install PACKAGE-dbgsym, with Debian's debug archive among the sources",
    )


def _cache() -> Finding:
    folder = cache_folder()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("cache", Area.BASIS, State.OK, str(folder))
    costs = "the blocks of a program are found anew for each trace, and CRIU is tried out by each command"
    mend = "make it writable, or name another folder by XDG_CACHE_HOME"
    return Finding("cache", Area.BASIS, State.LIMITED, f"{folder} cannot be written", costs, mend)


def python_package(name: str, area: Area, costs: str) -> Finding:
    """Whether a package of Python can be imported; it is not."""
    if find_spec(name) is not None:
        return Finding(name, area, State.OK, "installed")
    return Finding(name, area, State.MISSING, "not installed", costs, f"pip install {name}", essential=True)


def works(findings: list[Finding], area: Area) -> bool:
    """Whether nothing essential is missing for an area, nor for all of dynacut."""
    return not any(
        each.essential and each.state is State.MISSING and each.area in (area, Area.BASIS) for each in findings
    )
