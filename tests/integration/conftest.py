"""Fixtures: servers, programs, load, and the dynacut command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from .load import Load
from .programs import Program, compile_program
from .servers import Lighttpd, Nginx, Redis, Server, ServerMissing
from .trims import Trims

Rounds = Callable[[int], range]
AnyServer = TypeVar("AnyServer", bound=Server)


def _started(server: AnyServer) -> Iterator[AnyServer]:
    with ExitStack() as stack:
        try:
            stack.enter_context(server)
        except ServerMissing as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture
def redis() -> Iterator[Redis]:
    """A running redis-server."""
    yield from _started(Redis())


@pytest.fixture
def nginx() -> Iterator[Nginx]:
    """A running nginx: a master and two workers."""
    yield from _started(Nginx())


@pytest.fixture
def lighttpd() -> Iterator[Lighttpd]:
    """A running lighttpd."""
    yield from _started(Lighttpd())


@pytest.fixture
def load() -> Iterator[Callable[..., Load]]:
    """load(call, threads=2, expect=…): a started Load, stopped at the test's end at the latest."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Load(*arguments, **options))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """program(name, *arguments, flags=()): compiles programs/NAME.c and starts it."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str | int, flags: tuple[str, ...] = ()) -> Program:
            executable = compile_program(name, tmp_path, *flags)
            return stack.enter_context(Program(executable, *arguments))

        yield start


class Dynacut:
    """The command as users run it: in a process of its own. options: what each `live` command gets in addition."""

    options: tuple[str, ...] = ()

    def __call__(self, *arguments: str | int | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs it; the caller looks at returncode, stdout and stderr."""
        return subprocess.run(
            [sys.executable, "-m", "dynacut.cli.main", *map(str, self.words(*arguments))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def words(self, *arguments: str | int | Path) -> list[str | int | Path]:
        """The command line for these arguments, with the options."""
        return [*arguments[:1], *(self.options if arguments[0] == "live" else ()), *arguments[1:]]

    def json(self, *arguments: str | int | Path, status: int = 0, timeout: float = 120) -> dict[str, Any]:
        """Runs it with --json, checks the exit status and the schema, returns what it printed."""
        done = self(*arguments, "--json", timeout=timeout)
        assert done.returncode == status, f"status {done.returncode}, not {status}:\n{done.stderr}{done.stdout}"
        report = json.loads(done.stdout)
        assert isinstance(report, dict)
        assert report["schema"] == 1
        return report


@pytest.fixture
def rounds() -> Rounds:
    """rounds(20): how often a test does the same; less often where it takes long, see test_gdb_engine.py."""
    return range


@pytest.fixture
def dynacut() -> Dynacut:
    """dynacut("live", "--pid", pid) → CompletedProcess; dynacut.json("live", …) → dict."""
    return Dynacut()


@pytest.fixture
def trim(dynacut: Dynacut, tmp_path: Path) -> Iterator[Trims]:
    """trim(option, …) → its report; what it leaves running is ended after the test."""
    trims = Trims(dynacut, tmp_path / "trim")
    try:
        yield trims
    finally:
        trims.end()
