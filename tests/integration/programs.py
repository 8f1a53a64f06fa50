"""The small C programs in programs/: compiled, started and asked over their line protocol."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from .servers import become_subreaper

SOURCES = Path(__file__).parent / "programs"
FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
DENIED = -1
"""What denied() of every program returns."""


_CANNOT_RUN = 77  # programs/feature.h


class CannotRunError(Exception):
    """A program says that this machine lacks what it is about. Any other end of it is a failure."""


def feature(n: int) -> int:
    """What feature(n) of every program returns (programs/feature.h)."""
    return -2 if n < 0 else 7 + sum((i * i) ^ n for i in range(n))


def compile_program(name: str, tmp_path: Path, *flags: str) -> Path:
    """Compiles programs/NAME.c, with further flags of gcc behind the usual ones; returns the executable."""
    output = tmp_path / name
    source = SOURCES / f"{name}.c"
    subprocess.run(["gcc", *FLAGS, "-o", output, source, *flags], check=True, stdin=subprocess.DEVNULL)
    return output


class Program:
    """A running program that answers each line with one line; it has said `ready` when this returns."""

    def __init__(self, executable: Path, *arguments: str | int, timeout: float = 10.0) -> None:
        become_subreaper()
        self._timeout = timeout
        self._pending = b""
        self._process = subprocess.Popen(
            [str(executable), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.pid = self._process.pid
        try:
            self.expect("ready")
        except EOFError as error:
            self.end()
            if self._process.wait() == _CANNOT_RUN:
                raise CannotRunError(str(error)) from None
            raise
        except BaseException:
            self.end()
            raise

    def read_line(self, timeout: float | None = None) -> str:
        """The next line; EOFError when the program is gone, TimeoutError when nothing comes."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while b"\n" not in self._pending:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError(f"{self._process.args!r} says nothing")
            data = os.read(descriptor, 65536)
            if not data:
                raise EOFError(f"{self._process.args!r} ended with status {self._process.wait(5)}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def expect(self, line: str) -> None:
        """AssertionError when the next line is another one."""
        got = self.read_line()
        assert got == line, f"{got!r} instead of {line!r}"

    def send(self, line: str) -> None:
        """Sends a line without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def ask(self, line: str, timeout: float | None = None) -> str:
        """Sends a line and returns the answer.

        Raises:
            EOFError: the program has ended; see status.
        """
        with suppress(BrokenPipeError):
            self.send(line)
        return self.read_line(timeout)

    def counters(self, line: str = "report") -> dict[str, int]:
        """The answer `name 1 other 2` to a line as {"name": 1, "other": 2}."""
        words = self.ask(line).split()
        return dict(zip(words[::2], map(int, words[1::2]), strict=True))

    def is_running(self) -> bool:
        """Whether the program still lives; a zombie does not."""
        return self._process.poll() is None

    def wait(self, timeout: float = 10.0) -> int:
        """Waits for the program's own end; the exit status, or minus the signal."""
        return self._process.wait(timeout)

    def end(self) -> int:
        """Ends the program: by the end of its input, then by SIGTERM, then by SIGKILL. Returns as wait()."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(1.0)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
        status = self._process.wait(5.0)
        self._process.stdout.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
