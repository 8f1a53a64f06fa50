"""The machine that the figures come from, and which of its cores do what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cores:
    """measured: whoever is interrupted. other: the tools, this program, and everything else."""

    measured: int
    other: int

    @property
    def apart(self) -> bool:
        """Whether the two are two: else the tools preempt whom they are to stop."""
        return self.measured != self.other


def take_cores() -> Cores:
    """Leaves the last core to what is measured; this process and its children keep to the first."""
    available = sorted(os.sched_getaffinity(0))
    cores = Cores(available[-1], available[0])
    os.sched_setaffinity(0, {cores.other})
    return cores


def isolate(pid: int, cores: Cores) -> None:
    """Gives a process the measured core, with real-time priority: other work on the machine does not preempt it.

    Without a core of its own it gets no priority: it would stop the tools.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {cores.measured})
            prioritize(int(task.name), cores)


def prioritize(tid: int, cores: Cores) -> None:
    """Gives a thread real-time priority, where that is permitted."""
    if cores.apart:
        with suppress(PermissionError):
            os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(1))


def describe(cores: Cores) -> dict[str, Any]:
    """For the JSON and the head of the tables."""
    return {
        "kernel": platform.release(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "virtual": "hypervisor" in _field("/proc/cpuinfo", "flags").split(),
        "memory_mib": int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "measured_core": cores.measured,
        "other_core": cores.other,
        "python": platform.python_version(),
        "gdb": _version("gdb"),
        "redis": _version("redis-server"),
        "gcc": _version("gcc"),
    }


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text(errors="replace").splitlines()
    return _first(line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)


def _version(program: str) -> str:
    if shutil.which(program) is None:
        return ""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return _first(done.stdout.splitlines())


def _first(lines: Iterable[str]) -> str:
    return next(iter(lines), "")
