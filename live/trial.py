"""Trying plans on a sacrificial instance: applied, probed, undone, until one does what it shall and nothing else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dynacut.live.admission import admit, is_there
from dynacut.live.change import change
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import Resolve
from dynacut.shared.plan import Plan

_START_TIMEOUT = 20.0
_NO_ANSWER = "no answer in time"
_GRACE = 5.0
"""Seconds between the first probe that succeeds and the last one."""


@dataclass(frozen=True)
class Probes:
    """Shell commands. wanted must succeed always; unwanted before, and after an undo, but not with the plan."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    timeout: float = 5.0

    def failing(self, commands: Sequence[str]) -> list[str]:
        """Those that fail, with why."""
        return [f"{command}: {reason}" for command in commands if (reason := self._run(command))]

    def _run(self, command: str) -> str:
        """Why a command fails; empty if it succeeds."""
        try:
            done = subprocess.run(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _NO_ANSWER
        return f"exit status {done.returncode}" if done.returncode else ""


@dataclass(frozen=True)
class Trial:
    """What came of one plan. verdict is ``works``, or why not."""

    plan: Plan
    verdict: str

    @property
    def works(self) -> bool:
        """Whether the plan is accepted."""
        return self.verdict == "works"


class Instance:
    """A server to try on: one that runs, or one that is started, and started again when a trial has killed it."""

    def __init__(self, pid: int | None, command: Sequence[str], probes: Probes, *, tree: bool) -> None:
        """Takes the running one, or starts one.

        Raises:
            DynacutError: it does not answer the probes as it should before anything is changed.
        """
        self._command = command
        self._probes = probes
        self._tree = tree
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.pid = pid if pid is not None else self._start()
            admit(self.pid, changing=True)
            self._check_untouched()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def attempt(self, plan: Plan) -> Trial:
        """Applies a plan, probes, undoes, probes again."""
        try:
            self._change(lambda target, table: resolve.disable(plan, target, table))
        except DynacutError as error:
            return Trial(plan, "; ".join([error.problem, *error.details]))
        try:
            verdict = self._verdict()
        except BaseException:  # interrupted
            with suppress(DynacutError):
                self._change(resolve.undo)
            raise
        if not self._is_alive():
            self._revive()
            return Trial(plan, verdict if verdict != "works" else "it ends the server")
        self._change(resolve.undo)
        failing = self._probes.failing([*self._probes.wanted, *self._probes.unwanted])
        if failing:
            self._revive()
            return Trial(plan, f"the server is not as before when it is undone: {failing[0]}")
        return Trial(plan, verdict)

    def _verdict(self) -> str:
        refused = self._probes.failing(self._probes.unwanted)
        if not self._is_alive():
            return "it ends the server"
        if len(refused) < len(self._probes.unwanted):
            return "the unwanted request is still answered"
        if any(_NO_ANSWER in line for line in refused):
            return "the unwanted request gets no answer"
        broken = self._probes.failing(self._probes.wanted)
        if not self._is_alive():
            return "it ends the server"
        return f"a wanted request fails: {broken[0]}" if broken else "works"

    def _change(self, decide: Resolve) -> None:
        change(self.pid, decide, tree=self._tree, dry_run=False, timeout=10.0)

    def _is_alive(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            return False
        return is_there(self.pid)

    def _check_untouched(self) -> None:
        failing = self._probes.failing([*self._probes.wanted, *self._probes.unwanted])
        if failing:
            raise DynacutError(
                f"before anything is changed a probe fails: {failing[0]}",
                "every probe must succeed (exit status 0) while the feature is there",
            )

    def _start(self) -> int:
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise DynacutError(
                f"{self._command[0]} cannot be executed: {error.strerror}", "give the path of a program"
            ) from None
        deadline = time.monotonic() + _START_TIMEOUT
        is_up = False
        while failing := self._probes.failing([*self._probes.wanted, *self._probes.unwanted]):
            if not is_up and len(failing) < len(self._probes.wanted) + len(self._probes.unwanted):
                is_up, deadline = True, time.monotonic() + _GRACE  # some work: the others should by now
            if self._process.poll() is not None:
                raise DynacutError(
                    f"{shlex.join(self._command)} ended, or went to the background, before it answered the probes",
                    "start it by hand to see why; it has to stay in the foreground",
                )
            if time.monotonic() > deadline:
                raise DynacutError(
                    f"{shlex.join(self._command)} does not answer as it should: {failing[0]}",
                    "every probe must succeed (exit status 0) while the feature is there",
                )
            time.sleep(0.05)
        return self._process.pid

    def _revive(self) -> None:
        if self._process is None:
            if not self._is_alive():
                raise DynacutError(
                    "a trial ended the server, or left it broken",
                    "start it again, or let dynacut start it: dynacut plan --try … -- CMD",
                )
            return
        self._end()
        self.pid = self._start()

    def _end(self) -> None:
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(5.0)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process.wait()
