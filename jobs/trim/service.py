"""The service that `dynacut trim` works on: started, known to be ready, put to work, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.offline.processes import end_tree
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.proc import is_alive

if TYPE_CHECKING:
    from dynacut.live.tracing.readiness import Readiness

PID_VARIABLE = "DYNACUT_PID"
"""Tells the commands of the workload which process they work on: for a reload by signal."""
_POLL = 0.02
_SHOWN_LINES = 8
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW


@dataclass(frozen=True)
class Service:
    """How the service is started, and what it has to do.

    command: empty for one that runs already. ready_port, ready_log: when it is ready (one of them, with a command), as
    for Readiness. workload, serve: shell commands of the requests, and of other later phases such as a reload.
    shutdown: those that end it, each in another way; None is SIGTERM. timeout: seconds for each command, and until it
    is ready or has ended. directory: where output.log and workload.log are.
    """

    command: tuple[str, ...]
    directory: Path
    workload: tuple[str, ...]
    serve: tuple[str, ...] = ()
    shutdown: tuple[str | None, ...] = (None,)
    ready_port: int | None = None
    ready_log: str | None = None
    timeout: float = 300.0

    @property
    def output(self) -> Path:
        """Where the service's own output goes."""
        return self.directory / "output.log"

    def start(self) -> int:
        """Starts it as a daemon: in a session of its own, its output in the log; returns its pid when it is ready.

        Raises:
            DynacutError: its port is in use; it cannot be executed, has ended, or is not ready in time; nothing of it
                is left.
        """
        readiness = self.before_start()
        log = (os.POSIX_SPAWN_OPEN, 1, str(self.output), _APPEND, 0o600)
        no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        both = (os.POSIX_SPAWN_DUP2, 1, 2)
        try:
            pid = os.posix_spawnp(
                self.command[0], self.command, os.environ, file_actions=[no_input, log, both], setsid=True
            )
        except OSError as error:
            raise DynacutError(
                f"{self.command[0]} cannot be executed: {error.strerror}", "give the path of a program"
            ) from None
        try:
            self.await_ready(readiness, lambda: is_alive(pid))
        except BaseException:
            end_tree(pid)
            raise
        return pid

    def before_start(self) -> Readiness:
        """What tells that it is ready: its port, or what it says from now on.

        Raises:
            DynacutError: somebody listens on its port: it would seem to be ready at once, and another would be traced;
                or ready_log is no regular expression.
        """
        from dynacut.live.tracing.listening import check_unused
        from dynacut.live.tracing.readiness import Readiness

        if self.ready_port is not None:
            check_unused(self.ready_port)
        return Readiness(self.ready_port, self.ready_log, [self.output])

    def await_ready(self, readiness: Readiness, lives: Callable[[], bool]) -> None:
        """Returns when it is ready. readiness: what before_start() gave.

        Raises:
            DynacutError: it ended before, or was not ready in time.
        """
        deadline = time.monotonic() + self.timeout
        while not readiness.look():
            if not lives():
                raise DynacutError(
                    "the program ended, or put itself in the background, before it was ready",
                    f"let it run in the foreground (no daemon); {self.output} holds its output",
                    details=self._last_lines(self.output),
                )
            if time.monotonic() > deadline:
                raise DynacutError(
                    f"the program was not ready within {self.timeout:.0f} s",
                    f"check --ready-port or --ready-log; {self.output} holds its output",
                    details=self._last_lines(self.output),
                )
            time.sleep(_POLL)

    def work(self, pid: int) -> None:
        """Runs the workload, then the other serving phases, once.

        Raises:
            DynacutError: a command fails, or the service has ended; its status is CHECK_FAILED.
        """
        for command in (*self.workload, *self.serve):
            self._run(command, pid)
            if not is_alive(pid):
                raise self._failed(f"the program ended during: {command}", self.output)

    def _run(self, command: str, pid: int) -> None:
        log = self.directory / "workload.log"
        try:
            descriptor = os.open(log, _APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DynacutError(
                f"{log} cannot be written: {error.strerror}", "remove it, or give a new -o DIR"
            ) from None
        with os.fdopen(descriptor, "ab") as output:
            output.write(f"$ {command}\n".encode(errors="surrogateescape"))
            output.flush()
            try:
                done = subprocess.run(
                    command,
                    shell=True,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=self.timeout,
                    env={**os.environ, PID_VARIABLE: str(pid)},
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise self._failed(f"no end within {self.timeout:.0f} s: {command}", log) from None
        if done.returncode != 0:
            raise self._failed(f"status {done.returncode} of: {command}", log)

    def _failed(self, problem: str, log: Path) -> DynacutError:
        return DynacutError(
            problem,
            f"see {log}; the commands must succeed on the untouched program as well",
            details=self._last_lines(log),
            status=ExitStatus.CHECK_FAILED,
        )

    def _last_lines(self, log: Path) -> Sequence[str]:
        try:
            return log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        except OSError:
            return ()

    def shut_down(self, pid: int, command: str | None) -> None:
        """Ends it gracefully by one of the commands of shutdown, and returns when it has ended.

        Raises:
            DynacutError: it does not end in time.
        """
        if command is None:
            os.kill(pid, signal.SIGTERM)
        else:
            self._run(command, pid)
        deadline = time.monotonic() + self.timeout
        while is_alive(pid):
            if time.monotonic() > deadline:
                raise DynacutError(
                    f"process {pid} did not end within {self.timeout:.0f} s",
                    "name the command that ends it by --shutdown CMD",
                )
            time.sleep(_POLL)
