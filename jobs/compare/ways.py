"""The ways that `dynacut compare` compares, each as the command that it is, and the running of these commands.

What is measured is what a user waits for: a command from its start, with its imports and its output. So the live ways
are run as `dynacut live`, and the checkpoint as a command of its own that ends with the restore.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.interrupts import uninterrupted

if TYPE_CHECKING:
    import subprocess

_COMMAND = "dynacut.cli.main"
_REAP_SECONDS = 0.001


class Way(StrEnum):
    """A way of applying a plan to a running process."""

    LIVE = "live"
    GDB = "gdb"
    CHECKPOINT = "checkpoint"

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        return {
            Way.LIVE: "dynacut live (ptrace)",
            Way.GDB: "dynacut live --engine gdb",
            Way.CHECKPOINT: "checkpoint, rewrite, restore (CRIU)",
        }[self]


class Step(StrEnum):
    """What a way is asked to do."""

    DISABLE = "disable"
    UNDO = "undo"


@dataclass(frozen=True)
class Settings:
    """What every step is told. criu: None for the one that is found."""

    plan: Path
    features: tuple[str, ...]
    criu: Path | None

    def what(self, step: Step) -> list[str]:
        """The options that say what to do."""
        if step is Step.UNDO:
            return ["--undo"]
        return ["--plan", str(self.plan), *(word for name in self.features for word in ("--feature", name))]


@dataclass(frozen=True)
class Run:
    """How a command ended: its JSON, empty if it printed none; wall_ms: from its start to its end."""

    status: int
    report: dict[str, Any]
    errors: tuple[str, ...]
    wall_ms: float

    def error(self, problem: str, status: ExitStatus | None = None) -> DynacutError:
        """The error that says it failed, and why. status: by default that of the command."""
        known = {int(each) for each in ExitStatus}
        if status is None:
            status = ExitStatus(self.status) if self.status in known - {0} else ExitStatus.UNKNOWN
        return DynacutError(problem, "see above", status=status, details=self.errors or ("it says nothing",))


def why_not(way: Way, criu: Path | None) -> str:
    """Why a way cannot be gone on this machine; empty if it can."""
    match way:
        case Way.LIVE:
            return ""
        case Way.GDB:
            if find_spec("dynacut.live.gdb") is None:
                return "this dynacut has no gdb engine"
            missing = [
                name for name, there in (("gdb", shutil.which("gdb")), ("pygdbmi", find_spec("pygdbmi"))) if not there
            ]
            return f"{' and '.join(missing)} not installed" if missing else ""
        case Way.CHECKPOINT:
            from dynacut.offline.criu import find_criu

            try:
                find_criu(criu)
            except DynacutError as error:
                return "; ".join([error.problem, *error.details])
            return ""


def run_step(way: Way, step: Step, pids: Sequence[int], settings: Settings, images: Path) -> Run:
    """Lets a way do a step to a process tree, given root first, and waits until the command has ended.

    images: a new folder for what the checkpoint writes. The command is not interrupted by Ctrl-C, which would leave
    the processes half done.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed meanwhile; the command has ended by itself all the same.
    """
    pid = str(pids[0])
    command = [sys.executable, "-m"]
    if way is Way.CHECKPOINT:
        command += ["dynacut.jobs.compare.checkpoint_step", "--pid", pid, "--images", str(images)]
        command += ["--criu", str(settings.criu)] if settings.criu is not None else []
    else:
        command += [_COMMAND, "live", "--pid", pid, "--tree", "--json"]
        command += ["--engine", "gdb"] if way is Way.GDB else []
    return _run([*command, *settings.what(step)], pids if way is Way.CHECKPOINT else ())


def fill_caches(pid: int, settings: Settings) -> None:
    """Fills the caches that only the first run lacks, by a run that touches nothing; how it ends does not matter."""
    command = [sys.executable, "-m", _COMMAND, "live", "--pid", str(pid), "--tree", "--dry-run", "--json"]
    _run([*command, *settings.what(Step.DISABLE)], ())


def _run(command: Sequence[str], reaped: Sequence[int]) -> Run:
    """reaped: processes that end meanwhile; those that are our children are reaped, so that their pids are free."""
    import subprocess  # these take 6 ms, which the other commands need not spend
    import tempfile

    with uninterrupted(), tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        _wait(process, reaped)
        wall_ms = (time.perf_counter() - started) * 1000
        output.seek(0)
        errors.seek(0)
        return Run(process.returncode, _document(output.read()), _lines(errors.read()), wall_ms)


def _wait(process: subprocess.Popen[bytes], reaped: Sequence[int]) -> None:
    descriptor = os.pidfd_open(process.pid)
    try:
        while not select.select([descriptor], [], [], _REAP_SECONDS if reaped else None)[0]:
            for pid in reaped:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        process.wait()
    finally:
        os.close(descriptor)


def _document(output: bytes) -> dict[str, Any]:
    try:
        document = json.loads(output)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _lines(errors: bytes) -> tuple[str, ...]:
    lines = errors.decode(errors="replace").splitlines()
    return tuple(line.removeprefix("dynacut: ").strip().removeprefix("- ") for line in lines if line.strip())
