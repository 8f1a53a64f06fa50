"""gdb that is not there, is none, hangs, or is killed amid a change: the target lives, and dynacut tells the truth."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dynacut.shared.proc import task_status

from .conftest import Dynacut
from .gdbserver import GdbDynacut, GdbServer
from .programs import Program, feature
from .servers import wait_until
from .test_kill import bytes_at, check_truth, check_works, run_json, symbol
from .untouched import Snapshot

Start = Callable[..., Program]
_DISABLE = ("--disable", "work", "--on-hit", "redirect=denied")
_KILLS = 5
"""Of each kind; DYNACUT_KILLS in the environment asks for more."""


@contextmanager
def changing(program: Program, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A change by gdb, going on."""
    command = [sys.executable, "-m", "dynacut.cli.main", "live", "--engine", "gdb", "--pid", str(program.pid)]
    with subprocess.Popen(
        [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


def gdb_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The gdb that a dynacut has started, once it has."""
    with suppress(psutil.Error):
        return next(iter(psutil.Process(process.pid).children()), None)
    return None


def tracer_of(program: Program) -> int:
    return task_status(program.pid).tracer


@pytest.mark.parametrize("who", ["gdb", "dynacut", "both"])
def test_a_kill_at_any_instant_leaves_the_target_alive_and_known(program: Start, who: str) -> None:
    target = program("counter", 2)
    address = symbol(target, "work")
    old = bytes_at(target, address, 1)
    chance = random.Random(who)
    came_amid = 0
    for kill in range(int(os.environ.get("DYNACUT_KILLS", _KILLS))):
        before = check_truth(target, address, old)
        with changing(target, *(("--undo",) if before == "disabled" else _DISABLE)) as process:
            wait_until(lambda: process.poll() is not None or bool(tracer_of(target)), "gdb holds the process")
            time.sleep(chance.uniform(0, 0.15))  # the time until gdb lets go is about this
            came_amid += bool(tracer_of(target))
            victims = [each.pid for each in [gdb_of(process)] if each] if who != "dynacut" else []
            for pid in (*victims, *([process.pid] if who != "gdb" else [])):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            errors = process.communicate(timeout=60)[1]
            if who == "gdb":
                assert process.returncode in (0, 1, 3, 4) and "Traceback" not in errors, errors
        wait_until(lambda: tracer_of(target) == 0, "nobody traces the process")
        if who == "both":  # nobody is left who could let it go on
            time.sleep(0.05)
            if task_status(target.pid).state == "T":
                os.kill(target.pid, signal.SIGCONT)
        assert target.is_running(), f"kill {kill} ended the target: {target.wait()}"
        after = check_truth(target, address, old)
        if who == "gdb" and process.returncode == 1:
            assert after == before, errors
        check_works(target)
    assert came_amid > 0, "no kill came while gdb held the process"
    run_json("live", "--pid", target.pid, "--undo")
    assert bytes_at(target, address, 1) == old
    check_works(target)


def test_a_gdb_that_hangs_is_ended_and_the_target_goes_on(program: Start) -> None:
    target = program("counter", 2)
    check_works(target)  # by now its threads have the masks that they keep
    before = Snapshot.of(target.pid)
    with changing(target, *_DISABLE, "--timeout", "2") as process:
        wait_until(lambda: gdb_of(process) is not None, "gdb is started")
        gdb = gdb_of(process)
        assert gdb is not None
        wait_until(lambda: process.poll() is not None or bool(tracer_of(target)), "gdb holds the process")
        gdb.suspend()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode in (1, 4)
    assert "gdb does not answer in time" in errors and "Traceback" not in errors
    assert not gdb.is_running()
    check_works(target)
    run_json("live", "--pid", target.pid, "--undo")
    assert Snapshot.of(target.pid) == before


def test_a_connection_to_gdbserver_that_breaks_can_be_taken_up_again(program: Start) -> None:
    """gdbserver keeps the process, stopped, until the next one comes, or gdbserver ends."""
    target = program("counter", 2)
    with GdbServer("--multi") as server:
        command = ["live", "--remote", server.address, "--pid", str(target.pid), *_DISABLE]
        with subprocess.Popen(
            [sys.executable, "-m", "dynacut.cli.main", *command], stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until(lambda: process.poll() is not None or bool(tracer_of(target)), "gdbserver holds the process")
            gdb = gdb_of(process)
            assert gdb is not None
            gdb.kill()
            errors = process.communicate(timeout=60)[1]
            assert process.returncode in (1, 4) and "Traceback" not in errors, errors
        report = GdbDynacut(server).json("live", "--pid", target.pid)
        assert [each["state"] for each in report["features"]] in ([], ["enabled"], ["disabled"])
        check_works(target)
        GdbDynacut(server).json("live", "--pid", target.pid, "--undo")
        check_works(target)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "gdb is not installed"),
        ('#!/bin/sh\necho "Interpreter \\`mi3\' unrecognized" >&2\nexit 1\n', "Interpreter `mi3' unrecognized"),
        ("#!/bin/sh\nexit 3\n", "cannot be used: gdb has ended by itself, with status 3"),
        ("#!/nonexistent/shell\n", "cannot be used: No such file or directory"),
        ("#!/bin/sh\nwhile read line; do :; done\n", "gdb does not answer in time"),
    ],
)
def test_a_gdb_that_is_none(
    program: Start, dynacut: Dynacut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, says: str
) -> None:
    target = program("counter")
    before, maps = Snapshot.of(target.pid), Path(f"/proc/{target.pid}/maps").read_text()
    folder = tmp_path / "bin"
    folder.mkdir()
    if script is not None:
        (folder / "gdb").write_text(script)
        (folder / "gdb").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    way = ("--engine", "gdb") if script else ("--remote", "127.0.0.1:9")
    done = dynacut("live", *way, "--pid", target.pid, "--disable", "feature", "--timeout", "0.5")
    assert done.returncode == 1, done.stderr
    problem, advice = done.stderr.splitlines()
    assert says in problem
    assert "--engine ptrace" in advice
    assert Path(f"/proc/{target.pid}/maps").read_text() == maps
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))
