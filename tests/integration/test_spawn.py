"""A program that is held at its entry point: it must neither stay there for ever nor die once it has been let go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from .servers import become_subreaper, wait_until

_HOLDER = """
import sys, time
from dynacut.live.process import Process
from dynacut.live.tracing.spawn import HeldProgram
from dynacut.live.tracing.trace import Trace

held = HeldProgram(["sleep", "1000"])
with Process(held.pid) as process:
    held.await_entry(process, timeout=60)
    if sys.argv[1] != "held":
        if sys.argv[1] == "traced":
            Trace(process, process.modules[:1]).arm()
        held.release(process)
    print(held.pid, flush=True)
    time.sleep(1000)
"""


@contextmanager
def _killed_holder(how: str) -> Iterator[psutil.Process]:
    """A program that was started by a tracer, which has been killed since. how: held, released or traced."""
    become_subreaper()
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, how], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert holder.stdout is not None
        program = psutil.Process(int(holder.stdout.readline()))
        holder.stdout.close()  # the program has it as well: there will be no end of it
    finally:
        holder.kill()
        holder.wait()
    try:
        yield program
    finally:
        program.kill()
        os.waitpid(program.pid, 0)


def test_a_held_program_ends_with_its_tracer() -> None:
    with _killed_holder("held") as program:
        wait_until(lambda: program.status() == psutil.STATUS_ZOMBIE, "the program has ended")


@pytest.mark.parametrize("how", ["released", "traced"])
def test_a_released_program_outlives_its_tracer(how: str) -> None:
    with _killed_holder(how) as program:
        wait_until(lambda: program.status() == psutil.STATUS_SLEEPING, "the program does its work")
