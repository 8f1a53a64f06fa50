"""Processes behind a gdbserver on loopback: attached to, started by it, and what is refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynacut.live.ptrace.tracee import Tracee
from dynacut.shared.proc import task_status

from .conftest import Dynacut
from .gdbserver import GdbDynacut, GdbServer
from .programs import DENIED, Program, compile_program, feature
from .servers import wait_until
from .untouched import Snapshot

Start = Callable[..., Program]
_DENY = ("--disable", "feature", "--on-hit", "redirect=denied")


def refused(dynacut: Dynacut, *arguments: str | int, says: str, advises: str = "", status: int = 1) -> None:
    """The command is refused with these words, in two lines."""
    done = dynacut("live", *arguments, "--timeout", "5")
    assert done.returncode == status, done.stderr
    problem, advice = done.stderr.splitlines()
    assert says in problem and advises in advice


def test_a_process_that_a_gdbserver_has_attached_to(program: Start) -> None:
    target = program("counter", 2)
    with GdbServer("--attach", target.pid) as server:
        remote = GdbDynacut(server)
        refused(remote, "--pid", os.getpid(), says=f"has process {target.pid}, not {os.getpid()}", advises="--pid")
        report = remote.json("live", *_DENY)  # it needs not be told the pid
        assert report["target"]["pid"] == target.pid
        assert target.ask("feature 3") == str(DENIED)
        refused(remote, "--undo", says="has no process", advises="--pid P")  # it was let go
        assert remote.json("live", "--pid", target.pid)["features"][0]["hits"] == 1
    assert target.ask("feature 3") == str(DENIED)
    assert Dynacut().json("live", "--pid", target.pid)["features"][0]["hits"] == 2
    Dynacut().json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))


def test_a_program_that_a_gdbserver_starts(tmp_path: Path) -> None:
    """It stands at its very first instruction: nothing is mapped but itself and the dynamic linker."""
    executable = compile_program("counter", tmp_path)
    with GdbServer(program=[executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        report = GdbDynacut(server).json("live", *_DENY)
        assert report["features"][0]["state"] == "disabled"
        given, said = server.process.stdin, server.process.stdout
        assert given is not None and said is not None
        while (line := said.readline()) != b"ready\n":
            assert line, "the program ended"
        given.write(b"feature 3\n")
        assert said.readline() == f"{DENIED}\n".encode()
        os.kill(report["target"]["pid"], signal.SIGKILL)


def test_which_process(program: Start) -> None:
    target = program("counter")
    with GdbServer("--multi") as server, subprocess.Popen(["true"]) as ended:
        remote = GdbDynacut(server)
        refused(remote, *_DENY, says="has no process", advises="--pid P")
        refused(remote, "--pid", 1 << 22, *_DENY, says="no process 4194304", advises="ps -e")
        refused(remote, "--pid", -4, says="no process -4", advises="ps -e")
        refused(remote, "--pid", 1, says="process 1 keeps the whole system")
        wait_until(lambda: task_status(ended.pid).state == "Z", "it has ended")
        refused(remote, "--pid", ended.pid, says="is a zombie")
        before = Snapshot.of(target.pid)
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: task_status(target.pid).state == "T", "it is stopped")
        refused(remote, "--pid", target.pid, *_DENY, says="is stopped by a signal", advises="kill -CONT")
        os.kill(target.pid, signal.SIGCONT)
        assert target.ask("feature 3") == str(feature(3))
        refused(remote, "--pid", target.pid, "--disable", "feature+1", says="not the first byte")
        assert target.ask("feature 3") == str(feature(3))
        assert Snapshot.of(target.pid) == before


def test_a_process_under_seccomp(program: Start) -> None:
    target = program("seccomp", "kill")
    with GdbServer("--multi") as server:
        refused(GdbDynacut(server), "--pid", target.pid, *_DENY, says="runs under seccomp", advises="dynacut offline")
    assert target.ask("feature 3") == str(feature(3))


def test_a_process_that_is_traced_already(program: Start) -> None:
    target = program("counter")
    with GdbServer("--multi") as server, traced(target.pid):
        refused(GdbDynacut(server), "--pid", target.pid, *_DENY, says="is traced already", advises="end that debugger")
    assert target.ask("feature 3") == str(feature(3))


@contextmanager
def traced(pid: int) -> Iterator[None]:
    ready = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        Tracee(pid)
        os.write(ready[1], b"x")
        while True:
            signal.pause()
    try:
        assert os.read(ready[0], 1) == b"x"
        yield
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        os.close(ready[0])
        os.close(ready[1])


def test_what_is_no_gdbserver(dynacut: Dynacut) -> None:
    """Nobody listens; and one who says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        refused(dynacut, "--remote", address, says=f"the gdbserver at {address} cannot be reached", advises="--multi")
        listener.listen()
        refused(dynacut, "--remote", address, says=f"the gdbserver at {address} cannot be reached", advises="--multi")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--remote", "nowhere"), "is no address of a gdbserver"),
        (("--remote", "| touch x:1"), "is no address of a gdbserver"),
        (("--remote", "localhost:70000"), "is no address of a gdbserver"),
        (("--remote", "a:1", "--engine", "ptrace"), "--engine ptrace does not go with --remote"),
        (("--remote", "a:1", "--name", "x"), "--name does not go with --remote"),
        (("--remote", "a:1", "--tree"), "--tree does not go with --remote"),
        (("--remote", "a:1", "--learned"), "--learned does not go with --remote"),
        (("--remote", "a:1", "--standing"), "--standing does not go with --remote"),
        (("--remote", "a:1", "--undo", "--fallback", "checkpoint"), "--fallback does not go with --remote"),
        (("--pid", "1", "--sysroot", "/"), "--sysroot belongs to --remote"),
    ],
)
def test_usage(dynacut: Dynacut, arguments: tuple[str, ...], says: str) -> None:
    refused(dynacut, *arguments, says=says, status=2)
