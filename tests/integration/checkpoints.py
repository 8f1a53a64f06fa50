"""What tests of checkpoints have in common: parents that reap, and the end of what a restore has started."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dynacut.offline import processes
from dynacut.offline.criu import Criu, find_criu
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import task_status

from .servers import become_subreaper, is_gone, wait_until

NOBODY = 65534


def the_criu() -> Criu:
    """The CRIU of this machine; without one the tests are skipped."""
    try:
        return find_criu()
    except DynacutError as error:
        pytest.skip("; ".join([error.problem, *error.details]))


@contextmanager
def reaping(pids: Sequence[int]) -> Iterator[None]:
    """Reaps processes as soon as they end, as a service's parent does, while another process dumps them."""
    stop = threading.Event()

    def reap() -> None:
        left = set(pids)
        while left and not stop.wait(0.002):
            left -= {pid for pid in left if is_gone(pid)}

    thread = threading.Thread(target=reap, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def job(*command: str | Path, **options: object) -> Iterator[int]:
    """A small process without pipes to us, ended with its descendants, also when it was restored meanwhile."""
    become_subreaper()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), start_new_session=True, **{**streams, **options})  # type: ignore[call-overload]
    pid = int(process.pid)
    try:
        yield pid
    finally:
        _end(pid)
        process.poll()


class ByFifos:
    """A program that answers each line with one line, through named pipes: restored, it has them open again."""

    def __init__(self, folder: Path) -> None:
        self._ends = []
        for name in ("requests", "answers"):
            os.mkfifo(folder / name)
            self._ends.append(os.open(folder / name, os.O_RDWR))
        self._answers = b""

    @contextmanager
    def started(self, executable: Path) -> Iterator[int]:
        """Its pid; it has said `ready`. What runs by that pid in the end is ended."""
        with job(executable, stdin=self._ends[0], stdout=self._ends[1]) as pid:
            try:
                assert self._line() == "ready"
                yield pid
            finally:
                for end in self._ends:
                    os.close(end)

    def ask(self, line: str) -> str:
        """Sends a line and returns the answer; TimeoutError when none comes."""
        os.write(self._ends[0], line.encode() + b"\n")
        return self._line()

    def _line(self) -> str:
        while b"\n" not in self._answers:
            if not select.select([self._ends[1]], [], [], 10)[0]:
                raise TimeoutError("the program says nothing")
            self._answers += os.read(self._ends[1], 4096)
        line, _, self._answers = self._answers.partition(b"\n")
        return line.decode()


@contextmanager
def shell_job(*command: str | Path) -> Iterator[int]:
    """As job(), started by a shell that leads the session and goes on as long as it runs."""
    become_subreaper()
    script = '"$@" >/dev/null 2>&1 & echo $!; wait'
    words = ["sh", "-c", script, "sh", *map(str, command)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            yield pid
        finally:
            _end(pid)


def _end(pid: int) -> None:
    with suppress(OSError):
        if Path(f"/proc/{pid}").exists():
            assert processes.end_tree(pid) == []


def python_job(code: str) -> list[str]:
    """The command of a small Python program."""
    return [sys.executable, "-I", "-S", "-c", code]


def wait_for_state(pid: int, states: str) -> None:
    """Returns when a process is in one of these states."""
    wait_until(lambda: task_status(pid).state in states, f"state {states} of {pid}")
