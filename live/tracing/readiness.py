"""When a program has started up: a port of it answers, or a line of its log says so."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from dynacut.live.tracing.listening import is_listening
from dynacut.shared.errors import DynacutError, ExitStatus

_LINE_LIMIT = 1 << 20


class Readiness:
    """One condition, looked at again and again until it is true."""

    def __init__(self, port: int | None, pattern: str | None, logs: Sequence[Path] = ()) -> None:
        """port: TCP, on this machine. pattern: a regular expression for a line that is written to a log from now on.

        Raises:
            DynacutError: pattern is no regular expression, or port no port.
        """
        if port is not None and not 0 < port < 65536:
            raise DynacutError(f"{port} is no TCP port", "give one from 1 to 65535", status=ExitStatus.USAGE)
        try:
            self._pattern = re.compile(pattern) if pattern is not None else None
        except re.error as error:
            raise DynacutError(
                f"{pattern!r} is no regular expression: {error}",
                "see https://docs.python.org/3/library/re.html",
                status=ExitStatus.USAGE,
            ) from None
        self._port = port
        self._logs = [_Log(path) for path in logs]
        self._is_true = port is None and pattern is None

    def look(self) -> bool:
        """Whether it is true by now; once it is, it stays so."""
        self._is_true = self._is_true or self._port_answers() or self._log_says_so()
        return self._is_true

    def _port_answers(self) -> bool:
        return self._port is not None and is_listening(self._port)

    def _log_says_so(self) -> bool:
        pattern = self._pattern
        return pattern is not None and any(pattern.search(line) for log in self._logs for line in log.new_lines())


class _Log:
    """A file that grows. A last line without an end is told of, too, and again when it has grown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.is_file() else 0

    def new_lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:
                    self._position = 0  # begun anew
                file.seek(self._position)
                data = file.read(_LINE_LIMIT)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self._position += end if end or len(data) < _LINE_LIMIT else len(data)
        return data.decode(errors="replace").splitlines()


def output_files(pid: int) -> list[Path]:
    """The regular files that the standard output and error of a process go to; none where they are pipes or terminals.

    By their paths, as the process may be the first one of a daemon, which ends at once; where a path leads elsewhere
    here, by the link below /proc (proc_pid_fd(5)).
    """
    found: dict[tuple[int, int], Path] = {}
    for number in (1, 2):
        link = Path(f"/proc/{pid}/fd/{number}")
        try:
            status, path = link.stat(), link.readlink()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            is_there = path.exists() and path.samefile(link)
            found.setdefault((status.st_dev, status.st_ino), path if is_there else link)
    return list(found.values())
