"""`dynacut trace` in the background, for tests and benchmarks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


class Tracer:
    """`dynacut trace` in the background; killed at the end of `with`, unless it has ended."""

    def __init__(self, *arguments: str | int | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dynacut.cli.main", "trace", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def await_line(self, word: str) -> str:
        """Waits for a line of its progress that contains a word."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            if word in line:
                return line
            said.append(line)
        raise AssertionError(f"the tracer ended with {self.process.wait()}, without saying {word!r}: {''.join(said)}")

    def end(self) -> str:
        """Ctrl-C; returns what it printed."""
        self.process.send_signal(signal.SIGINT)
        output, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        return output
