"""A gdb, spoken to in its machine interface (GDB/MI) through pygdbmi: one command, one checked answer.

A gdb that attaches loads no symbols, and so sets no breakpoints of its own: it only stops, reads and writes.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dynacut.live.gdb.program import ADVICE, INTERPRETER, unusable
from dynacut.shared.errors import DynacutError, printable, shortened

try:
    from pygdbmi.IoManager import IoManager
except ModuleNotFoundError:
    raise DynacutError("pygdbmi is not installed", "pip install pygdbmi, or use --engine ptrace") from None

_END_TIMEOUT = 2.0
_LEAST_TIMEOUT = 5.0
_BULK = 2048
"""Bytes from which on memory goes through a file: an answer of MI is text, and slow to take apart."""
_SETTINGS = (
    "confirm off",
    "pagination off",
    "width 0",
    "auto-load off",
    "auto-solib-add off",
    "exec-file-mismatch off",
    "breakpoint auto-hw off",
    "stack-cache off",
    "code-cache off",
    "mi-async off",
)


class GdbError(Exception):
    """gdb could not do what a command asked for; the text is gdb's."""


@dataclass(frozen=True)
class Stop:
    """Why gdb's inferior has stopped: MI's reason, empty after an attachment, and the name of a signal or empty."""

    reason: str
    signal: str


@dataclass
class _Records:
    """What has come from gdb and has not been looked at: results by their token, stops, text for the console."""

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    stops: list[Stop] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


class GdbSession:
    """A running gdb. Use as a context manager: leaving it lets gdb detach and end."""

    def __init__(self, timeout: float, debuginfod: str = "") -> None:
        """Starts gdb. timeout: seconds in which each answer must come, but never less than gdb needs on a busy machine.

        debuginfod: the servers that gdb may fetch debug information from; none by default.

        Raises:
            DynacutError: there is no gdb, or it does not start.
        """
        self._timeout = max(timeout, _LEAST_TIMEOUT)
        self._failure: DynacutError | None = None
        program = shutil.which("gdb")
        if program is None:
            raise DynacutError("gdb is not installed", f"{ADVICE}, or use --engine ptrace")
        self._folder = tempfile.TemporaryDirectory(prefix="dynacut-gdb-")
        complaints = Path(self._folder.name, "complaints")
        # A session of its own: Ctrl-C at the terminal is dynacut's, which lets gdb detach.
        try:
            with complaints.open("wb") as errors:
                self._process = subprocess.Popen(
                    [program, "-nx", "-nh", "-q", f"--interpreter={INTERPRETER}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                    start_new_session=True,
                    env={**os.environ, "LC_ALL": "C", "DEBUGINFOD_URLS": debuginfod, "TERM": "dumb"},
                )
        except OSError as error:
            self._folder.cleanup()
            raise unusable(program, error.strerror or str(error)) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._io = IoManager(self._process.stdin, self._process.stdout, None, 0)
        self._token = 0
        self._records = _Records()
        try:
            self._set_up(debuginfod)
        except BaseException as error:
            reason = complaints.read_text(errors="replace").strip().partition("\n")[0]
            had_ended = not self.is_alive
            self.close()
            if had_ended and isinstance(error, DynacutError):
                raise unusable(program, reason or error.problem) from None
            raise

    def _set_up(self, debuginfod: str) -> None:
        for setting in (*_SETTINGS, f"debuginfod enabled {'on' if debuginfod else 'off'}"):
            with suppress(GdbError):  # a setting that this gdb does not know yet, or no longer
                self.command(f"-gdb-set {setting}")
        # With no file found below it, gdb has neither the program nor the dynamic linker to set breakpoints in.
        self.command(f"-gdb-set sysroot {Path(self._folder.name, 'none')}")
        # A thread that has run into an int3 does so again (held.py). A SIGTRAP that debugging itself has caused, as
        # exec does where gdbserver starts a program, must never reach the program.
        self.console("handle SIGTRAP nopass")

    def __enter__(self) -> GdbSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether gdb still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends gdb, which detaches what it still holds; if it does not answer it is killed."""
        with suppress(OSError, ValueError):
            self._io.write("-gdb-exit", timeout_sec=0.1, read_response=False)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(_END_TIMEOUT)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
        self._process.wait()
        for pipe in (self._process.stdin, self._output):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def command(self, text: str) -> dict[str, Any]:
        """Sends a command of MI, waits for its result and returns the result's variables.

        Raises:
            GdbError: gdb's answer is an error.
            DynacutError: no answer in time, or gdb has ended; from then on, always.
        """
        if self._failure is not None:
            raise self._failure
        if not text.isprintable():  # a line break would begin another command
            raise GdbError(f"{printable(shortened(text))} is no command")
        self._token += 1
        token = self._token
        deadline = time.monotonic() + self._timeout
        try:
            self._io.write(f"{token}{text}", timeout_sec=self._timeout, read_response=False)
        except OSError:
            raise self._ended() from None
        while token not in self._records.results:
            self._receive(text, deadline)
        record = self._records.results.pop(token)
        payload = record.get("payload") or {}
        if record["message"] == "error":
            raise GdbError(str(payload.get("msg", "an error")))
        assert isinstance(payload, dict)
        return payload

    def console(self, text: str) -> str:
        """Sends a command of gdb's own language; returns what it prints.

        Raises:
            GdbError, DynacutError: as command().
        """
        self._records.console.clear()
        self.command(f"-interpreter-exec console {quoted(text)}")
        return "".join(self._records.console)

    def forget_stops(self) -> None:
        """Forgets stops that were not waited for: the next one is that of the next command."""
        self._records.stops.clear()

    def await_stop(self) -> Stop:
        """Waits until the inferior has stopped, or has ended; its reason tells which.

        Raises:
            DynacutError: it does not in time, or gdb has ended.
        """
        deadline = time.monotonic() + self._timeout
        while not self._records.stops:
            self._receive("a stop", deadline)
        return self._records.stops.pop(0)

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes of the inferior's memory.

        Raises:
            GdbError: they are not all readable.
        """
        if size == 0:
            return b""
        if size > _BULK:
            file = Path(self._folder.name, "memory")
            self.console(f"dump binary memory {file} {address:#x} {address + size:#x}")
            return file.read_bytes()
        blocks = self.command(f"-data-read-memory-bytes {address:#x} {size}")["memory"]
        data = bytes.fromhex(blocks[0]["contents"])
        if len(data) != size:
            raise GdbError(f"Cannot access memory at address {address + len(data):#x}")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Writes to the inferior's memory, whatever the protection there.

        Raises:
            GdbError: it is not all mapped.
        """
        if len(data) <= _BULK:
            self.command(f"-data-write-memory-bytes {address:#x} {data.hex()}")
            return
        file = Path(self._folder.name, "memory")
        file.write_bytes(data)
        self.console(f"restore {file} binary {address:#x}")

    def fetch(self, path: str) -> bytes:
        """The contents of a file of the machine that gdbserver runs on.

        Raises:
            GdbError: it cannot be read.
        """
        file = Path(self._folder.name, "fetched")
        file.unlink(missing_ok=True)
        self.command(f"-target-file-get {quoted(path)} {quoted(str(file))}")
        return file.read_bytes()

    def registers(self, thread: str, numbers: Sequence[int]) -> list[int]:
        """The values of a thread's registers, as unsigned numbers.

        Raises:
            GdbError: one of them cannot be read.
        """
        answer = self.command(f"-data-list-register-values --thread {thread} x {' '.join(map(str, numbers))}")
        by_number = {int(entry["number"]): str(entry["value"]) for entry in answer["register-values"]}
        try:
            return [int(by_number[number], 16) for number in numbers]
        except (KeyError, ValueError):
            raise GdbError(f"the registers of thread {thread} cannot be read") from None

    def _receive(self, awaited: str, deadline: float) -> None:
        """Takes what gdb has said, and waits for it if need be, until a time.monotonic()."""
        ready, _, _ = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            self._failure = DynacutError(
                f"gdb does not answer in time ({shortened(awaited)})",
                "try again with a longer --timeout, or use --engine ptrace",
            )
            raise self._failure
        records = self._io.get_gdb_response(0, raise_error_on_timeout=False)
        if not records and not self.is_alive:
            raise self._ended()
        for record in records:
            payload = record["payload"]
            if record["type"] == "result" and record["token"] is not None:
                self._records.results[record["token"]] = record
            elif record["type"] == "console":
                self._records.console.append(str(payload))
            elif record["type"] == "notify" and record["message"] == "stopped":
                details = payload or {}
                self._records.stops.append(Stop(str(details.get("reason", "")), str(details.get("signal-name", ""))))

    def _ended(self) -> DynacutError:
        return DynacutError(
            f"gdb has ended by itself, with status {self._process.wait(_END_TIMEOUT)}",
            "run `dynacut live` on the process to see what is in force",
        )


def quoted(text: str) -> str:
    """A text as MI's c-string."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
