"""The C programs in targets/: compiled once, started, and ended by pid."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.control import Control
from bench.machine import Cores, prioritize

SITES = 10_000
SITE_DISTANCE = 64
_SOURCES = Path(__file__).parent / "targets"
_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
_SETTLING = 0.03
"""Seconds after the start in which threads come to where they wait."""


class BenchmarkError(Exception):
    """The benchmark itself has failed: nothing can be said of what it should have measured."""


def compile_program(name: str, folder: Path) -> Path:
    """Compiles targets/NAME.c; returns the executable."""
    output = folder / name
    subprocess.run(["gcc", *_FLAGS, "-o", output, _SOURCES / f"{name}.c"], check=True, stdin=subprocess.DEVNULL)
    return output


def compile_library(name: str, folder: Path) -> Path:
    """Compiles targets/NAME.c; returns the shared object."""
    output = folder / f"{name}.so"
    flags = (*_FLAGS, "-shared", "-fPIC")
    subprocess.run(["gcc", *flags, "-o", output, _SOURCES / f"{name}.c"], check=True, stdin=subprocess.DEVNULL)
    return output


@contextmanager
def started(*command: str | int | Path, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, killed at the end."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=stdout, start_new_session=True, bufsize=0)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@dataclass(frozen=True)
class Observed:
    """A process with a thread that notices how long it was stopped: targets/observer.c."""

    pid: int
    executable: Path
    control: Control

    @property
    def sites(self) -> int:
        """The address of the first site."""
        return self.control["sites"]


@contextmanager
def observed(executable: Path, threads: int, observer: str, cores: Cores, folder: Path) -> Iterator[Observed]:
    """A fresh observer. observer: main or other, the thread that spins."""
    control = Control(folder / "control")
    try:
        with started(executable, control.path, threads, observer, cores.measured, cores.other) as process:
            control.wait_for("thread", 1)
            deadline = time.monotonic() + 5
            while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < threads:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"{executable.name} has not started {threads} threads")
                time.sleep(0.001)
            prioritize(control["thread"], cores)
            time.sleep(_SETTLING)
            yield Observed(process.pid, executable, control)
    finally:
        control.close()


def load_base(pid: int, path: Path | str) -> int:
    """Where a process has the first page of a file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            return int(line.partition("-")[0], 16)
    raise BenchmarkError(f"{path} is not mapped in process {pid}")


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Bytes of a process."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)
