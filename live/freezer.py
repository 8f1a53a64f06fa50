"""Processes that a cgroup's freezer holds, as `docker pause` and `systemctl freeze` do.

They stop for ptrace all the same, but do not go on before they are thawed: what they are sent to do is not done.
Source: Documentation/admin-guide/cgroup-v2.rst, Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst; cgroups(7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def freezing_cgroup(pid: int) -> Path | None:
    """The cgroup, of a process, that is frozen, itself or by one above it; None if none is, or it is out of sight.

    Raises:
        OSError: no such process.
    """
    of_process = dict(_cgroups(pid))
    for kind, mounted in _mounts():
        if kind in of_process:
            folder = Path(mounted) / of_process[kind].lstrip("/")
            with suppress(OSError):
                if kind == "freezer":
                    frozen = (folder / "freezer.state").read_text().strip() != "THAWED"
                else:
                    frozen = "frozen 1" in (folder / "cgroup.events").read_text().splitlines()
                if frozen:
                    return folder
    return None


def _cgroups(pid: int) -> Iterator[tuple[str, str]]:
    """A process's place in the hierarchies that have a freezer: "freezer" for version 1, "" for version 2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, place = line.split(":", 2)
        if "freezer" in controllers.split(","):
            yield "freezer", place
        elif number == "0":
            yield "", place


def _mounts() -> Iterator[tuple[str, str]]:
    """Where these hierarchies are mounted whole (proc_pid_mountinfo(5))."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, root, mounted, *_ = before.split()
        kind, _, options = after.split(maxsplit=2)
        if root != "/":
            continue
        if kind == "cgroup2":
            yield "", mounted
        elif kind == "cgroup" and "freezer" in options.split(","):
            yield "freezer", mounted
