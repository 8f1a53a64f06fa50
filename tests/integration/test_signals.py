"""A signal that comes just when a thread is stopped in a system call: it must have the effect that it always has."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.cli.main import main
from dynacut.live.ptrace.tracee import Tracee
from dynacut.shared.proc import blocked_in, task_status

from .programs import DENIED, Program, compile_program, feature
from .servers import wait_until

_SCOPES = ["entry", "block"]
_EINTR = f"returned -1 errno {errno.EINTR} handled 1"


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("signalled", tmp_path_factory.mktemp("signalled"))


@pytest.fixture
def at_detachment(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Sends SIGUSR1 to a process at the last instant in which its thread is stopped, but once."""

    def arrange(pid: int) -> list[int]:
        sent: list[int] = []
        detach = Tracee.detach

        def send_and_detach(self: Tracee) -> None:
            if self.tid == pid and self.stopped and not sent:
                os.kill(pid, signal.SIGUSR1)
                sent.append(pid)
            detach(self)

        monkeypatch.setattr(Tracee, "detach", send_and_detach)
        return sent

    return arrange


@pytest.mark.parametrize("scope", _SCOPES)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ppoll", "no"),
        ("epoll_pwait", "no"),
        ("epoll_wait", "no"),
        ("epoll_wait", "restart"),
        ("nanosleep", "no"),
        ("read", "no"),
    ],
)
def test_a_signal_ends_the_wait(
    signalled: Path, at_detachment: Callable[[int], list[int]], name: str, flags: str, scope: str
) -> None:
    with Program(signalled, name, flags) as target:
        _wait_until_asleep(target.pid)
        sent = at_detachment(target.pid)
        _disable(target, scope)
        assert sent == [target.pid]
        assert target.read_line() == f"{name} {_EINTR}"
        assert target.ask("feature 3") == str(DENIED)
        assert main(["live", "--pid", str(target.pid), "--undo", "-q"]) == 0
        assert target.ask("feature 3") == str(feature(3))


@pytest.mark.parametrize("scope", _SCOPES)
def test_a_call_that_is_restarted_after_a_handler_goes_on(
    signalled: Path, at_detachment: Callable[[int], list[int]], scope: str
) -> None:
    with Program(signalled, "read", "restart") as target:
        _wait_until_asleep(target.pid)
        sent = at_detachment(target.pid)
        _disable(target, scope)
        assert sent == [target.pid]
        assert target.ask("x") == "read returned 1 errno 0 handled 1"


def _wait_until_asleep(pid: int) -> None:
    wait_until(lambda: task_status(pid).state == "S" and blocked_in(pid, pid) is not None, "the program waits")


def _disable(target: Program, scope: str) -> None:
    words = ["--disable", "feature", "--on-hit", "redirect=denied", "--scope", scope]
    assert main(["live", "--pid", str(target.pid), *words, "-q"]) == 0
