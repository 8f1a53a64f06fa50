"""What tests of checkpoints have in common: parents that reap, and the end of what a restore has started."""

from __future__ import annotations

import os
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

from .servers import become_subreaper, is_gone, wait_until

NOBODY = 65534


def the_criu() -> Criu:
    """The CRIU of this machine; without one the tests fail in CI and are skipped elsewhere."""
    try:
        return find_criu()
    except DynacutError as error:
        text = "; ".join([error.problem, *error.details])
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


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
def job(*command: str | Path, session: bool = True, **options: object) -> Iterator[int]:
    """A small process without pipes to us, ended with its descendants, also when it was restored meanwhile."""
    become_subreaper()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), start_new_session=session, **{**streams, **options})  # type: ignore[call-overload]
    pid = int(process.pid)
    try:
        yield pid
    finally:
        with suppress(OSError):
            if Path(f"/proc/{pid}").exists():
                assert processes.end(reversed(processes.tree_of(pid))) == []
        process.poll()


def python_job(code: str) -> list[str]:
    """The command of a small Python program."""
    return [sys.executable, "-I", "-S", "-c", code]


def wait_for_state(pid: int, states: str) -> None:
    """Returns when a process is in one of these states."""
    wait_until(lambda: processes.status_of(pid)["State"][0] in states, f"state {states} of {pid}")
