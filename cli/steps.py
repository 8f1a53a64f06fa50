"""What a command is doing at the moment, on one line of the terminal that is gone when it has ended."""

from __future__ import annotations

import os
import shutil
import sys
from types import TracebackType
from typing import Self

from dynacut.shared.errors import printable

_CLEAR_LINE = "\r\x1b[K"
_DUMB = ("", "dumb", "unknown")
"""Values of TERM whose terminals cannot clear a line (terminfo(5): no `el`)."""
_is_shown = False


def clear_line() -> None:
    """Takes back the line that is shown for now, if there is one: before anything else is printed."""
    global _is_shown
    if _is_shown:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
        _is_shown = False


class Steps:
    """Use as a context manager, and tell() as a progress function.

    Where stderr is no terminal, or one that cannot take back what it shows, there is nothing for now.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty() and os.environ.get("TERM", "") not in _DUMB

    def tell(self, step: str) -> None:
        """Shows the step instead of the one before."""
        self.show(f"{step} …")

    def show(self, line: str) -> None:
        """Shows a line instead of the one before, as much of it as fits."""
        global _is_shown
        if self._shown:
            _is_shown = True
            fitting = printable(line)[: shutil.get_terminal_size().columns - 1]
            print(f"{_CLEAR_LINE}{fitting}", end="", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays, wherever stderr goes."""
        clear_line()
        print(printable(line), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clear_line()
